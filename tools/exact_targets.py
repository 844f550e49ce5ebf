"""Targets of Feynman-Kac correctors that are known exactly, and distances of weighted particles to them.

A whole power of mixtures is a mixture again; any power of them in one or two dimensions is summed on a grid.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers import GaussianMixture, Target
from samplers.resampling import systematic


@dataclass(frozen=True)
class Grid:
    """A density on the points of a grid [M, d]: probabilities [M], log of the normaliser, half a cell's width."""

    points: Tensor
    probabilities: Tensor
    log_normaliser: float
    half: float

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n independent points [n, d], uniform within their cells."""
        chosen = torch.multinomial(self.probabilities, n, replacement=True, generator=generator)
        jitter = 2 * torch.rand((n, self.points.shape[1]), generator=generator, dtype=self.points.dtype) - 1
        return self.points[chosen] + self.half * jitter

    def expectation(self, values: Tensor) -> float:
        """Of values [M] at the points."""
        return float((self.probabilities * values).sum())


def on_grid(target: Target, width: float, cells: int, dim: int = 1, sigma: float = 0.0) -> Grid:
    """A target of mixtures at noise level sigma on [-width, width]^dim, `cells` to a side; float64.

    Tilts are taken at the points themselves, which is what they are at sigma = 0.
    """
    line = (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 * width / cells) - width
    points = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    log_p = torch.zeros(len(points), dtype=torch.float64)
    for b, denoiser in zip(target.exponents_at(sigma), target.denoisers, strict=True):
        log_p = log_p + b * denoiser.log_density(points, sigma)  # type: ignore[attr-defined]
    log_p = log_p + target.tilt(points, sigma)
    log_z = float(log_p.logsumexp(0)) + dim * math.log(2 * width / cells)
    return Grid(points, log_p.softmax(0), log_z, width / cells)


def mixture_power(mixture: GaussianMixture, variances: Tensor, power: int) -> tuple[GaussianMixture, float]:
    """p^power of a mixture of isotropic variances [K], normalised, and the log of its normaliser.

    K^power components; those of less than 1e-12 of the weight are left out.
    """
    index = torch.cartesian_prod(*[torch.arange(len(variances))] * power).reshape(-1, power)  # [K^power, power]
    own, means = 1 / variances[index], mixture.means[index]
    total = own.sum(1)
    mean = (own[..., None] * means).sum(1) / total[:, None]
    log_w = mixture.log_weights[index].sum(1) + 0.5 * mixture.dim * (own.log().sum(1) - total.log())
    log_w = log_w - 0.5 * mixture.dim * (power - 1) * math.log(2 * math.pi)
    log_w = log_w - 0.5 * (own * (means - mean[:, None]).square().sum(2)).sum(1)
    log_z = log_w.logsumexp(0)
    kept = log_w > log_z + math.log(1e-12)
    return GaussianMixture((log_w[kept] - log_z).exp(), mean[kept], 1 / total[kept]), float(log_z)


def wasserstein_to_grid(x: Tensor, weights: Tensor, grid: Grid, quantiles: int = 20000) -> float:
    """The 2-Wasserstein distance of weighted points [N, 1] to a density on a line."""
    p = (torch.arange(quantiles, dtype=torch.float64) + 0.5) / quantiles
    values, order = x[:, 0].double().sort()
    cumulative = weights[order].double().cumsum(0) / weights.sum()
    ours = values[torch.searchsorted(cumulative, p).clamp_max(len(values) - 1)]
    theirs = grid.points[torch.searchsorted(grid.probabilities.cumsum(0), p).clamp_max(len(grid.points) - 1), 0]
    return float((ours - theirs).square().mean().sqrt())


def sliced_wasserstein(x: Tensor, weights: Tensor, reference: Tensor, slices: int = 200) -> float:
    """The sliced 2-Wasserstein distance of weighted points [N, d] to as many equally weighted ones, on fixed slices."""
    generator = torch.Generator().manual_seed(0)
    chosen = systematic(weights.double().log().clamp_min(-700.0)[None], generator)[0]
    directions = torch.randn((x.shape[1], slices), generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    ours, theirs = ((points.double() @ directions).sort(0).values for points in (x[chosen], reference))
    return float((ours - theirs).square().mean().sqrt())


def mode_error(x: Tensor, weights: Tensor, mixture: GaussianMixture) -> float:
    """Half the sum of |share - weight| over a mixture's components, points belonging to the nearest mean."""
    nearest = torch.cdist(x.double(), mixture.means).argmin(1)
    shares = torch.zeros(len(mixture.means), dtype=torch.float64)
    shares.index_add_(0, nearest, weights.double() / weights.sum())
    return float(0.5 * (shares - mixture.log_weights.exp()).abs().sum())
