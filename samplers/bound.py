"""What a jump to a Gaussian costs at most, from data alone: the model-free companion of the KL integral.

KL(p || N) <= ln(1 + chi^2(p || N)), and noise makes 1 + chi^2 an average over pairs of samples of Mehler's kernel
(1866), a product over eigendirections of (1 - rho^2)^-1/2 exp{[2 rho w w' - rho^2 (w^2 + w'^2)] / (2 (1 - rho^2))},
with w a coordinate in standard deviations, l its variance and rho = l / (l + sigma^2).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from samplers.gaussian import Gaussian


KEPT_NUMBERS = 2**23  # of a stream's samples, at most
DEAREST = 0.25  # nats of a finite sample's cost, up to which its leading order is most of it


@dataclass(frozen=True)
class Bound:
    """How many nats a jump costs at most: kl [L] at the noise levels sigma [L], which fall. Infinite where unknown."""

    sigma: tuple[float, ...]
    kl: tuple[float, ...]

    def at(self, sigma: float) -> float:
        """The bound at the highest level that does not lie above sigma; infinite below the lowest one."""
        return next(
            (kl for level, kl in zip(self.sigma, self.kl, strict=True) if level <= sigma * (1 + 1e-9)), math.inf
        )

    def sigma_skip(self, tolerance: float) -> float:
        """The lowest level down to which every bound is within the tolerance, in nats.

        Raises ValueError, with the smallest bound there is, if the highest level already costs more.
        """
        if not tolerance > 0:
            raise ValueError(f"tolerance: {tolerance} nats is not positive")
        lowest = None
        for sigma, kl in zip(self.sigma, self.kl, strict=True):
            if not kl <= tolerance:
                break
            lowest = sigma
        if lowest is None:
            raise ValueError(
                f"tolerance: {tolerance:g} nats is met at no noise level; the smallest bound is "
                f"{min(self.kl):.3g} nats, at sigma {self.sigma[self.kl.index(min(self.kl))]:.4g}"
            )
        return lowest


def kept_count(dim: int, n_classes: int | None) -> int:
    """How many samples of a stream are kept for a bound: pairs are within a class, so more where there are classes."""
    return max(8, min(1024 if n_classes is None else 4096, KEPT_NUMBERS // max(1, dim)))


class Reservoir:
    """`kept_count` samples of a stream, all equally likely, in buffers that are overwritten."""

    def __init__(self, n_classes: int | None = None) -> None:
        self._generator, self._n_classes = torch.Generator().manual_seed(0), n_classes
        self._keys, self._samples, self._labels = torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64)

    def update(self, x: Tensor, labels: Tensor | None = None) -> None:
        """See samples [B, ...], with labels [B] or without."""
        if not len(x):
            return
        if not len(self._keys):
            capacity = kept_count(x[0].numel(), self._n_classes)
            self._keys = torch.full((capacity,), math.inf)
            self._samples = torch.empty((capacity, *x.shape[1:]), dtype=x.dtype)
            self._labels = torch.zeros(capacity, dtype=torch.int64)
        place = int(self._keys.argmax())
        largest = float(self._keys[place])
        for row, key in enumerate(torch.rand(len(x), generator=self._generator).tolist()):
            if key >= largest:  # the smallest keys stay
                continue
            self._keys[place] = key
            self._samples[place] = x[row].detach()
            self._labels[place] = 0 if labels is None else int(labels[row])
            place = int(self._keys.argmax())
            largest = float(self._keys[place])

    @property
    def samples(self) -> Tensor:
        """[N, ...]."""
        kept = self._keys < math.inf
        return self._samples if bool(kept.all()) else self._samples[kept]

    @property
    def labels(self) -> Tensor | None:
        """[N]; None without classes."""
        return None if self._n_classes is None else self._labels[self._keys < math.inf]


@torch.no_grad()
def bound_of(
    samples: Tensor, gaussian: "Gaussian", labels: Tensor | None = None, sigmas: Tensor | None = None
) -> Bound:
    """What a jump costs at most, estimated from data alone: ln(1 + chi^2) of noised samples against the Gaussian.

    1 + chi^2 = E K(x, x') over independent pairs, with Mehler's kernel K in the Gaussian's own coordinates, by a
    U-statistic over samples [N, *shape] (all pairs, so N^2 d operations a level); KL <= ln(1 + chi^2). With classes the
    pairs are within a class, and the cost is the average of the classes' (those with two samples or more). Two standard
    errors and the cost of the Gaussian's own finite sample, twice (the samples may be those that it was fitted to), are
    on top: an upper limit as far as these samples tell, which does not see modes that none of them is from. Infinite
    from where chi^2 is above 1, for there the average is no longer one, or that cost above a quarter of a nat, for
    there its leading order is not all of it. 1 / (1 + chi^2) is the share of effective samples of importance weights.
    labels: class labels [N] iff the Gaussian has classes. sigmas: falling; by default four to an octave. Raises
    ValueError for fewer than 8 samples, or ones that are not finite or of another shape, and levels that are not
    positive or do not fall.
    """
    _check(samples, gaussian, sigmas)
    flat, labels = samples.flatten(1), None if gaussian.n_classes is None else labels
    partners = torch.ones(len(flat), len(flat), dtype=torch.bool)
    if labels is not None:
        partners = labels.cpu()[:, None] == labels.cpu()
    partners.fill_diagonal_(False)
    means = gaussian.mean_of(samples, labels)
    c = torch.zeros(len(flat), gaussian.rank, dtype=torch.float64)
    across = torch.zeros(len(flat), len(flat), dtype=torch.float64)  # inner products of what no component holds
    strips = (t.split(1024, 1) for t in (flat, means, gaussian.components))
    for part, mean, components in zip(*strips, strict=True):
        z = (part.cpu() - mean.cpu()).double()
        c += z @ components.cpu().double().mT
        across += z @ z.mT
    scale = float((across.diagonal().mean() / gaussian.dim).sqrt())
    across -= c @ c.mT
    if sigmas is None:
        sigmas = 64.0 * scale * 2 ** (-torch.arange(40, dtype=torch.float64) / 4)
    costs: list[float] = []
    for sigma in sigmas.tolist():
        costs.append(math.inf if costs and math.isinf(costs[-1]) else _cost(c, across, partners, gaussian, sigma))
    return Bound(tuple(sigmas.tolist()), tuple(costs))


def _check(samples: Tensor, gaussian: "Gaussian", sigmas: Tensor | None) -> None:
    if tuple(samples.shape[1:]) != gaussian.shape:
        raise ValueError(f"samples: are {list(samples.shape[1:])}; the Gaussian is of {list(gaussian.shape)} a sample")
    if len(samples) < 8:
        raise ValueError(f"samples: {len(samples)} are too few for pairs; at least 8 are needed")
    if not samples.is_floating_point() or not all(bool(v.isfinite()) for v in torch.aminmax(samples)):
        raise ValueError("samples: are not finite floating-point numbers")
    if sigmas is not None:
        levels = sigmas.flatten().tolist()
        falling = sigmas.ndim == 1 and all(a > b for a, b in pairwise([*levels, 0.0]))
        if not levels or not falling or not math.isfinite(levels[0]):
            raise ValueError(f"sigmas: {levels}; needed are positive levels [L] that fall")


def _cost(c: Tensor, across: Tensor, partners: Tensor, gaussian: "Gaussian", sigma: float) -> float:
    """ln(1 + chi^2 + two standard errors) + twice the sampling cost, in nats; infinity where it is unknown."""
    cost = gaussian.sampling_kl(sigma)
    if cost > DEAREST:
        return math.inf
    variances, left = gaussian.variances.cpu(), gaussian.dim - gaussian.rank
    rho = variances / (variances + sigma**2)
    weight = 1 / (variances + sigma**2) / (1 - rho**2)
    single = (c.square() * weight * rho).sum(1)
    constant = -0.5 * float((-(rho**2)).log1p().sum())
    w = 0.0
    if left and gaussian.rest:
        r = gaussian.rest / (gaussian.rest + sigma**2)
        w = 1 / (gaussian.rest + sigma**2) / (1 - r**2)
        single = single + w * r * across.diagonal().clamp_min(0)
        constant -= 0.5 * left * math.log1p(-(r**2))

    rows, weighted = [], (c * weight).mT
    for part in torch.arange(len(c)).split(256):
        # The sum of rho w w' / (1 - rho^2) over directions, with w = c / sqrt(variance), less what is of one sample.
        exponent = (c[part] @ weighted).add_(across[part], alpha=w).add_(single[part, None] + single, alpha=-0.5)
        pairs = partners[part].sum(1)
        kernel = exponent.add_(constant).exp_().masked_fill_(~partners[part], 0.0).sum(1)
        rows.append((kernel / pairs)[pairs > 0])
    averages = torch.cat(rows)
    if len(averages) < 8:
        return math.inf
    chi2, error = float(averages.mean()) - 1, 2 * float(averages.std()) / math.sqrt(len(averages))
    upper = chi2 + 2 * error
    return math.log1p(max(0.0, upper)) + 2 * cost if upper < 1 else math.inf
