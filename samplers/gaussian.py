"""A Gaussian in closed form: denoiser, log-density, and the probability-flow ODE between any two noise levels.

N(mu, U diag(l) U^T + r (I - U U^T)) with U of low rank. Along x = alpha x0 + s eps all marginal covariances commute, so
the flow scales every eigendirection by sqrt[(alpha'^2 l + s'^2) / (alpha^2 l + s^2)] (Wang & Vastola 2024,
"The unreasonable effectiveness of Gaussian score approximation", arXiv 2412.09726, section 3).
"""

import copy
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from samplers.atomic import atomic_write
from samplers.bound import Bound, Reservoir, bound_of
from samplers.denoiser import expand

Mode = Literal["ode", "marginal"]
Level = Tensor | float

_FORMAT = "gaussian-1"

# A path's alpha and s as functions of sigma = s / alpha, which may be infinite for vp and flow (t = 1).
PATHS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "ve": lambda sigma: (torch.ones_like(sigma), sigma),
    "vp": lambda sigma: ((1 + sigma**2).rsqrt(), (1 + sigma**-2).rsqrt()),
    "flow": lambda sigma: (1 / (1 + sigma), 1 / (1 + 1 / sigma)),
}


class Gaussian:
    """N(mean, U diag(variances) U^T + rest (I - U U^T)), called as a denoiser.

    mean: [*shape], or [n_classes, *shape]: a mean for each class, and one covariance. components: U^T, [rank, d],
    orthonormal rows, d the size of shape. variances: [rank], falling. rest: the variance of every other direction.
    count: of how many samples. facts: what they were (JSON). bound: what a jump costs, as far as the samples tell.
    cond is a tensor of class labels [B], or a dict with `class_labels`, where there are classes, and not looked at
    where there are none.
    The arithmetic is in x's dtype, float32 at least, with gains in float64.
    Raises ValueError for shapes that do not fit, values that are not finite, and variances that are negative.
    """

    def __init__(
        self,
        mean: Tensor,
        components: Tensor,
        variances: Tensor,
        rest: float,
        *,
        n_classes: int | None = None,
        count: int | None = None,
        facts: dict[str, Any] | None = None,
        bound: Bound | None = None,
    ) -> None:
        if n_classes is not None and (mean.ndim < 2 or len(mean) != n_classes):
            raise ValueError(f"mean: has shape {list(mean.shape)}; needed is [{n_classes}, ...], a mean for each class")
        self.n_classes, self.count, self.facts, self.bound = n_classes, count, dict(facts or {}), bound
        self.shape = tuple(mean.shape if n_classes is None else mean.shape[1:])
        self.dim = math.prod(self.shape)
        rank = len(variances)
        if components.shape != (rank, self.dim) or variances.ndim != 1 or rank > self.dim:
            raise ValueError(
                f"components, variances: have shapes {list(components.shape)} and {list(variances.shape)}; needed are "
                f"[rank, {self.dim}] and [rank]"
            )
        for name, values in (("mean", mean), ("components", components), ("variances", variances)):
            if not values.is_floating_point() or not bool(values.isfinite().all()):
                raise ValueError(f"{name}: are not finite floating-point numbers")
        if bool((variances < 0).any()) or not 0 <= rest < math.inf:
            raise ValueError(f"variances, rest: {float(variances.min()) if rank else 0:.3g}, {rest:.3g} is negative")
        slack = 1e-3 if components.dtype != torch.float64 else 1e-8
        gram = components @ components.mT
        if bool(((gram - torch.eye(rank).to(gram)).abs() > slack).any()):
            raise ValueError("components: are not orthonormal")
        self.mean, self.variances, self.rest = mean, variances.double(), float(rest)
        self.components = components.contiguous()  # as a file has it: a loaded Gaussian has the same rounding
        self._flat_directions = bool((variances == 0).any()) or (rank < self.dim and not self.rest)
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    @property
    def rank(self) -> int:
        """How many directions have a variance of their own."""
        return len(self.variances)

    def with_bound(self, bound: Bound | None) -> "Gaussian":
        """The same Gaussian, with what a jump costs."""
        other = copy.copy(self)
        other.bound = bound
        return other

    def __call__(self, x: Tensor, sigma: Level, cond: Any = None) -> Tensor:
        """The posterior mean E[x0 | x = x0 + sigma eps], like x [B, *shape]; linear in x."""
        z, mean, noise = self._centred(x, cond), self.mean_of(x, cond), self._level(sigma, x) ** 2
        gains = [torch.where(noise == 0, 1.0, v / (v + noise)) for v in self._spectrum(x)]
        return self._shaped(mean + self.apply((gains[0], gains[1], z)), x)

    def transport(
        self,
        x: Tensor,
        sigma_from: Level,
        sigma_to: Level,
        cond: Any = None,
        *,
        mode: Mode = "ode",
        path: str = "ve",
    ) -> Tensor:
        """The state at sigma_to of the trajectory through x at sigma_from, in closed form, like x [B, *shape].

        sigma_from, sigma_to: [] or [B], s / alpha, infinity included where the path has it. path: what x is, `ve`
        x0 + sigma eps, `vp` (x0 + sigma eps) / sqrt(1 + sigma^2), `flow` (1 - t) x0 + t eps with sigma = t / (1 - t).
        mode: `ode` is the probability-flow ODE; `marginal` takes x / s for standard normal noise, as a sampler's start
        is, and gives it the law at sigma_to (so it repairs the start's mismatch too).
        Raises ValueError for an unknown mode or path, and where sigma_from = 0 leaves nothing to scale.
        """
        if mode not in ("ode", "marginal") or path not in PATHS:
            raise ValueError(f"mode, path: {mode!r}, {path!r}; accepted are ode, marginal and {', '.join(PATHS)}")
        if path == "ve" and any(_lies(sigma, lambda v: v.isinf()) for sigma in (sigma_from, sigma_to)):
            raise ValueError("sigma_from, sigma_to: are infinite; only the paths vp and flow reach there")
        if (mode == "marginal" or self._flat_directions) and _lies(sigma_from, lambda v: v == 0):
            raise ValueError("sigma_from: 0 leaves nothing to scale in a direction without variance")
        levels = (self._level(sigma, x) for sigma in (sigma_from, sigma_to))
        (alpha, s), (alpha_to, s_to) = (PATHS[path](level) for level in levels)
        spectrum = self._spectrum(x)
        before = [alpha**2 * v + s**2 if mode == "ode" else s**2 for v in spectrum]
        gains = [((alpha_to**2 * v + s_to**2) / b).sqrt() for v, b in zip(spectrum, before, strict=True)]
        mean = self.mean_of(x, cond)
        z = self._flat(x)
        z = z - alpha.to(z) * mean if mode == "ode" else z
        return self._shaped(alpha_to.to(z) * mean + self.apply((gains[0], gains[1], z)), x)

    def log_density(self, x: Tensor, sigma: Level = 0.0, cond: Any = None) -> Tensor:
        """log p(x; sigma) with noise of level sigma, [B], in nats. Raises ValueError where there is no density."""
        z, noise = self._centred(x, cond), self._level(sigma, x) ** 2
        own, rest = (v + noise for v in self._spectrum(x))
        left = self.dim - self.rank
        if bool((own <= 0).any()) or (left and bool((rest <= 0).any())):
            raise ValueError("sigma: 0 with a singular covariance; the Gaussian has no density there")
        c = (z @ self._at(x)[1].mT).double()
        squares = (c**2 / own + own.log()).sum(1)
        if left:
            across = (z.double().square().sum(1) - c.square().sum(1)).clamp_min(0)
            squares = squares + across / rest[:, 0] + left * rest[:, 0].log()
        return (-0.5 * (squares + self.dim * math.log(2 * math.pi))).to(z)

    def sample(self, n: int, sigma: Level = 0.0, cond: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """n independent samples at noise level sigma, [n, *shape]."""
        eps = torch.randn((n, *self.shape), generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        noise = self._level(sigma, eps) ** 2
        own, rest = ((v + noise).sqrt() for v in self._spectrum(eps))
        return self._shaped(self.mean_of(eps, cond) + self.apply((own, rest, self._flat(eps))), eps)

    def apply(self, *terms: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The sum of linear maps in this eigenbasis, [B, d]; each: gains [B or 1, rank], rest [B or 1, 1], z [B, d]."""
        total = within = None
        for gains, rest, z in terms:
            components = self._at(z)[1]
            own = (gains - rest).to(z) * (z @ components.mT)
            across = rest.to(z) * z
            within = own if within is None else within + own
            total = across if total is None else total + across
        assert total is not None
        assert within is not None
        return total + within @ self._at(total)[1]

    def exponential(self, sigma: Level, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """phi = sqrt(l + sigma^2) and eta = asinh(sqrt(l) / sigma) / sqrt(l), each of the variances and of the rest.

        With D = D_N + delta, a coordinate c of x - mu in this eigenbasis obeys d(c / phi) = delta d(eta) along the
        probability-flow ODE, so transport is the step with delta = 0. eta is 1 / sigma where l = 0, which is DDIM.
        """
        level = self._level(sigma, x)
        phi_own, phi_rest = ((v + level**2).sqrt() for v in self._spectrum(x))
        eta_own, eta_rest = (_eta(v.sqrt(), level) for v in self._spectrum(x))
        return (phi_own, phi_rest), (eta_own, eta_rest)

    def sampling_kl(self, sigma: float) -> float:
        """The nats that having `count` samples only costs at noise level sigma; 0 if the count is unknown.

        (d_eff^2 + sum rho^2) / 4n for the covariance and K d_eff / 2n for the K means, with rho = l / (l + sigma^2)
        and d_eff = sum rho: the leading order in 1 / n of E KL(true moments || estimated moments).
        """
        return 0.0 if self.count is None else self._nats_times_count(sigma) / self.count

    def samples_needed(self, sigma: float, tolerance: float) -> int:
        """How many samples make `sampling_kl` at noise level sigma no more than the tolerance, in nats."""
        if not tolerance > 0:
            raise ValueError(f"tolerance: {tolerance} nats is not positive")
        return math.ceil(self._nats_times_count(sigma) / tolerance)

    def _nats_times_count(self, sigma: float) -> float:
        return nats_times_count(self.variances, self.rest, self.dim, self.n_classes or 1, sigma)

    def to(self, device: torch.device | str) -> "Gaussian":
        """The same Gaussian on a device."""
        moved = copy.copy(self)
        moved.mean, moved.components, moved._placed = self.mean.to(device), self.components.to(device), {}
        return moved

    @classmethod
    def fit(
        cls,
        batches: Iterable[Tensor | tuple[Tensor, Tensor]],
        rank: int | None = None,
        *,
        n_classes: int | None = None,
        tolerance: float = 0.05,
        facts: dict[str, Any] | None = None,
    ) -> "Gaussian":
        """The Gaussian of a stream of batches [B, *shape], or of pairs of them with class labels [B].

        n_classes: with labels, class means and a pooled covariance. rank, tolerance, errors: see
        `samplers.moments.Moments`, which can also be merged across processes. The bound is of some of the
        samples (`samplers.bound.kept_count`), chosen at random, always the same ones.
        """
        from samplers.moments import Moments

        moments: Moments | None = None
        kept = Reservoir(n_classes)
        for batch in batches:
            x, labels = batch if isinstance(batch, tuple | list) else (batch, None)
            if moments is None:
                moments = Moments(x.shape[1:], n_classes, rank=rank)
            moments.update(x, labels)
            kept.update(x, labels)
        if moments is None:
            raise ValueError("batches: there are none")
        gaussian = moments.gaussian(rank, tolerance, facts)
        return gaussian.with_bound(bound_of(kept.samples, gaussian, kept.labels) if moments.count >= 8 else None)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; its metadata says what the Gaussian is of."""
        about = {"n_classes": self.n_classes, "count": self.count, "rest": self.rest, "facts": self.facts}
        if self.bound is not None:
            about["bound"] = {"sigma": self.bound.sigma, "kl": [None if math.isinf(v) else v for v in self.bound.kl]}
        tensors = {"mean": self.mean, "components": self.components, "variances": self.variances}
        metadata = {"format": _FORMAT, "gaussian": json.dumps(about, allow_nan=False)}
        with atomic_write(path) as file:
            file.write(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises ValueError, naming the file, for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
                about = json.loads(metadata["gaussian"])
                tensors = [file.get_tensor(name) for name in ("mean", "components", "variances")]
            bound = about.get("bound")
            if bound is not None:
                kl = tuple(math.inf if v is None else float(v) for v in bound["kl"])
                bound = Bound(tuple(float(v) for v in bound["sigma"]), kl)
            mean, components, variances = tensors
            return cls(
                mean,
                components,
                variances,
                float(about["rest"]),
                n_classes=about["n_classes"],
                count=about["count"],
                facts=about["facts"],
                bound=bound,
            )
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"gaussian: {path} cannot be read as a Gaussian ({error or type(error).__name__})"
            ) from error

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where and in what x is computed: means [K or 1, d], components [rank, d]; variances [1, rank] and rest [1, 1]
        in float64. They are copied there once."""
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        key = (x.device, dtype)
        if key not in self._placed:
            rest = self.rest if self.rank < self.dim else 1.0  # of no direction: any number whose gain is finite
            self._placed[key] = (
                self.mean.reshape(-1, self.dim).to(*key),
                self.components.to(*key),
                self.variances.to(x.device)[None],
                torch.full((1, 1), rest, dtype=torch.float64, device=x.device),
            )
        return self._placed[key]

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: has shape {list(x.shape)}; the Gaussian is of {list(self.shape)} a sample")
        return x.reshape(len(x), self.dim).to(torch.promote_types(x.dtype, torch.float32))

    def mean_of(self, x: Tensor, cond: Any) -> Tensor:
        """The mean of each sample, [B or 1, d]."""
        means = self._at(x)[0]
        if self.n_classes is None:
            return means
        cond = cond.get("class_labels") if isinstance(cond, dict) else cond
        if not isinstance(cond, Tensor) or cond.shape not in ((len(x),), (1,), ()) or cond.is_floating_point():
            given = f"shape {list(cond.shape)}" if isinstance(cond, Tensor) else repr(cond)
            raise ValueError(f"cond: {given}; needed are class labels [{len(x)}] in 0 .. {self.n_classes - 1}")
        labels, known = cond.reshape(-1), self.n_classes
        if _lies(labels, lambda v: (v < 0) | (v >= known)):
            raise ValueError(f"cond: holds the label {int(labels.max())}; known are 0 .. {self.n_classes - 1}")
        labels = labels.to(means.device)
        return means[labels]

    def _centred(self, x: Tensor, cond: Any) -> Tensor:
        return self._flat(x) - self.mean_of(x, cond)

    def _level(self, sigma: Level, x: Tensor) -> Tensor:
        """sigma as [B or 1, 1], float64, on x's device."""
        if _lies(sigma, lambda v: ~(v >= 0)):
            raise ValueError(
                f"sigma: {sigma if isinstance(sigma, float | int) else sigma.tolist()}; needed is 0 or more"
            )
        level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
        return expand(level, x.new_empty((len(x), 1), dtype=torch.float64)).reshape(-1, 1)

    def _spectrum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The variances [1, rank] and the rest [1, 1], float64, on x's device."""
        return self._at(x)[2:]

    def _shaped(self, flat: Tensor, x: Tensor) -> Tensor:
        return flat.reshape(-1, *self.shape).to(x.dtype)


def _lies(value: Level, where: Callable[[Tensor], Tensor]) -> bool:
    """Whether any number is where it should not be; of a tensor that is not on the CPU, where a look would wait for the
    device, False (its result is NaN, or torch's own error)."""
    value = torch.as_tensor(value)
    return value.device.type == "cpu" and bool(where(value).any())


def _eta(root: Tensor, level: Tensor) -> Tensor:
    """asinh(root / level) / root, and its limit 1 / level as root goes to 0."""
    flat = root < 1e-6 * level
    return torch.where(flat, 1 / level, (root / level).asinh() / torch.where(flat, 1.0, root))


def nats_times_count(variances: Tensor, rest: float, dim: int, n_classes: int, sigma: float) -> float:
    """n times the nats that estimating these moments from n samples costs at noise level sigma, to leading order."""
    rho = variances.double() / (variances.double() + sigma**2)
    own, others = float(rho.sum()), (dim - len(rho)) * rest / (rest + sigma**2) if rest else 0.0
    covariance = (own**2 + float(rho.square().sum()) + 2 * own * others) / 4
    return covariance + n_classes * (own + others) / 2
