"""How far down a Gaussian may carry a sample, certified: the noise level that teleportation jumps to.

Two laws p, q under the heat flow obey KL(p_sigma || q_sigma) = int_sigma^inf E_p |D_p - D_q|^2 v^-3 dv exactly (de
Bruijn's identity for relative entropies; Verdu 2010, "Mismatched estimation and relative entropy"), and nothing that
a sampler does from there on can increase it. So the noise level to jump to is the lowest at which it is small.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from samplers.denoiser import Denoiser
from samplers.gaussian import Gaussian
from samplers.integral import CONFIDENT, KLIntegral, estimate, upper
from samplers.schedules import karras_sigmas, restarted
from samplers.solvers import Solver, heun, nfe

RATIO = math.sqrt(2)  # between the noise levels of an integral


@dataclass(frozen=True)
class Skip:
    """A certificate: from sigma_max to sigma_skip a Gaussian stands in for the model, at a cost of kl nats.

    kl, kl_error: KL between the law at sigma_skip of what was integrated (`direction` says which way) and the jump's,
    and its standard error; kl + 1.645 kl_error is within the tolerance. network_error: the integral of
    (D - D_N) . (D - D_p), which is 0 for an exact network, and its standard error; None without samples. prior_kl: what
    starting from N(0, sigma_max^2) costs any sampler, jump or not (only `mode="marginal"` repairs it). count, shape: of
    points. sigmas, kls, errors: the whole curve. steps, skipped, nfe, nfe_after: of the solver and schedule that it was
    made for; `on` makes it for another.
    """

    sigma_skip: float
    sigma_max: float
    kl: float
    kl_error: float
    tolerance: float
    direction: str
    network_error: tuple[float, float] | None
    prior_kl: float
    count: int
    shape: tuple[int, ...]
    sigmas: tuple[float, ...]
    kls: tuple[float, ...]
    errors: tuple[float, ...]
    steps: int = 0
    skipped: int = 0
    nfe: int = 0
    nfe_after: int = 0

    def on(self, solver: Solver, sigmas: Tensor) -> "Skip":
        """The same certificate for another solver and schedule [steps + 1]."""
        below = self.grid(sigmas)
        steps, left = (len(grid) - 1 for grid in (sigmas, below))
        before, after = (nfe(solver, grid, self.shape) for grid in (sigmas, below))
        start = float(sigmas[0])
        return replace(self, sigma_max=start, steps=steps, skipped=steps - left, nfe=before, nfe_after=after)

    def grid(self, sigmas: Tensor) -> Tensor:
        """A schedule, rebuilt to start at sigma_skip with as many steps fewer as it has levels above."""
        return restarted(sigmas, self.sigma_skip) if self.sigma_skip < float(sigmas[0]) else sigmas

    def __str__(self) -> str:
        start = f", beside {self.prior_kl:.2g} of the start" if self.prior_kl > self.tolerance else ""
        return (
            f"skipped {self.skipped} of {self.steps} steps, sigma {self.sigma_max:.3g} -> {self.sigma_skip:.3g}, "
            f"KL {self.kl:.3f} +- {self.kl_error:.3f} nats{start}, {self.nfe} -> {self.nfe_after} NFE"
        )


@torch.no_grad()
def choose_sigma_skip(
    denoiser: Denoiser,
    gaussian: Gaussian,
    tolerance: float = 0.05,
    *,
    samples: Tensor | None = None,
    cond: Any = None,
    count: int = 256,
    batch: int = 64,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    solver: Solver = heun,
    sigmas: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Skip:
    """The lowest noise level whose KL integral, plus 1.645 standard errors, is within the tolerance (nats).

    samples [N, *shape]: clean data that the Gaussian was not fitted to (the model's own samples will do); the integral
    is then under noised data, KL(p || N) as far as the network is exact, and what it shows of its own error is refused.
    Without them it is KL(N || p), under the Gaussian's own law, from `count` points. cond: of the samples, tensors of N
    rows or one; class labels in turns where there are classes and no samples. sigma_min, sigma_max: by default the
    denoiser's. solver, sigmas: what the certificate counts steps for, by default Heun on 18 Karras levels; no level
    below the lowest of sigmas is chosen. About ten levels, a factor sqrt 2 apart, are evaluated in batches until the
    KL is four times the tolerance: `count` x levels evaluations, once. The Gaussian lies on the denoiser's device.

    The KL is that of the marginal law at sigma_skip, which `mode="marginal"` lands on; `mode="ode"` carries along what
    the start N(0, sigma_max^2) has lost already (`prior_kl`), as every sampler does.

    Raises ValueError if no level meets the tolerance (with the smallest KL there is), if the network's own error is
    more than half of the KL or hides more of the data's shape than the tolerance, if the Gaussian is of too few samples
    for the tolerance (with how many are needed), for a denoiser that is not finite (with the level), for samples that
    are not, or not of the Gaussian's shape, or without their class labels where the Gaussian has classes.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance: {tolerance} nats is not positive and finite")
    low = sigma_min if sigma_min is not None else getattr(denoiser, "sigma_min", 0.002)
    high = sigma_max if sigma_max is not None else getattr(denoiser, "sigma_max", 80.0)
    if sigmas is not None:
        low = max([low, *sigmas[sigmas > 0].flatten().tolist()[-1:]])
    if not 0 < low < high < math.inf:
        raise ValueError(f"sigma_min, sigma_max: {low}, {high}; needed is 0 < sigma_min < sigma_max < inf")
    if samples is not None:
        samples, count = _checked(samples, gaussian), len(samples)
    if batch < 1:
        raise ValueError(f"batch: {batch} points at a time; at least 1 is needed")
    if count < 8:
        raise ValueError(f"samples, count: {count} points leave no standard error; at least 8 are needed")
    if cond is None and gaussian.n_classes is not None:
        if samples is not None:
            raise ValueError(f"cond: None; needed are the class labels [{count}] of the samples")
        cond = torch.arange(count, device=gaussian.mean.device) % gaussian.n_classes
    integral = KLIntegral(denoiser, gaussian, samples, cond, count, batch, generator)

    sigma, limit = high, 4 * tolerance
    while sigma >= low * (1 - 1e-9) and integral.reached() <= limit:
        integral.extend(sigma)
        sigma /= RATIO
    return _certificate(integral, tolerance, high, solver, karras_sigmas(18, low, high) if sigmas is None else sigmas)


def _checked(samples: Tensor, gaussian: Gaussian) -> Tensor:
    """In float32 at least."""
    if tuple(samples.shape[1:]) != gaussian.shape:
        raise ValueError(
            f"samples: are of {list(samples.shape[1:])}; the Gaussian is of {list(gaussian.shape)} a sample"
        )
    if not samples.is_floating_point() or not bool(samples.isfinite().all()):
        raise ValueError("samples: are not finite floating-point numbers")
    return samples.to(torch.promote_types(samples.dtype, torch.float32))


def _certificate(integral: KLIntegral, tolerance: float, high: float, solver: Solver, sigmas: Tensor) -> Skip:
    gaussian, uppers = integral.gaussian, [upper(total) for total in integral.totals]
    estimates = [estimate(total) for total in integral.totals]
    known = "KL(N || p)" if integral.samples is None else "KL(p || N)"
    if uppers[0] > tolerance:
        if integral.errors:
            _refuse_own_error(estimate(integral.error_totals[0]), estimates[0][0], integral.sigmas[0], tolerance)
        raise ValueError(
            f"tolerance: {tolerance:g} nats is met at no noise level, so nothing can be skipped; the smallest {known} "
            f"is {estimates[0][0]:.3g} +- {estimates[0][1]:.2g} nats, at sigma {integral.sigmas[0]:.4g}"
            + _too_few(gaussian, integral.sigmas[0], tolerance)
        )
    k = next((k for k, value in enumerate(uppers) if value > tolerance), None)
    sigma, total, error = integral.sigmas[-1], integral.totals[-1], integral.error_totals[-1:]
    if k is not None:
        inside, above = integral.sigmas[k], integral.sigmas[k - 1]
        for _ in range(50):  # bisection in sigma
            middle = math.sqrt(inside * above)
            within = upper(integral.totals[k - 1] + integral.between(integral.squares, middle, k)) <= tolerance
            inside, above = (inside, middle) if within else (middle, above)
        sigma = above
        total = integral.totals[k - 1] + integral.between(integral.squares, sigma, k)
        error = [integral.error_totals[k - 1] + integral.between(integral.errors, sigma, k)] if error else []

    kl, kl_error = estimate(total)
    network = estimate(error[0]) if error else None
    if network is not None:
        _refuse_own_error(network, kl, sigma, tolerance)
    if gaussian.sampling_kl(sigma) > tolerance:
        raise ValueError(f"gaussian: cannot be certified to {tolerance:g} nats{_too_few(gaussian, sigma, tolerance)}")
    skip = Skip(
        sigma_skip=sigma,
        sigma_max=high,
        kl=kl,
        kl_error=kl_error,
        tolerance=tolerance,
        direction=known,
        network_error=network,
        prior_kl=_prior_kl(gaussian, float(sigmas[0])),
        count=len(total),
        shape=gaussian.shape,
        sigmas=tuple(integral.sigmas),
        kls=tuple(mean for mean, _ in estimates),
        errors=tuple(error for _, error in estimates),
    )
    return skip.on(solver, sigmas)


def _refuse_own_error(network: tuple[float, float], kl: float, sigma: float, tolerance: float) -> None:
    """Raise ValueError for a network whose distance to the Gaussian says too little of the data's.

    With e = E (D - D_N) . (D - D_p), integrated, the data's own KL is at least (kl - e)^2 / kl (Cauchy-Schwarz): e is
    positive for a network that errs away from the Gaussian, negative for one that falls short of the data's shape.
    """
    error, spread = network[0], CONFIDENT * network[1]
    hidden = max(0.0, kl - error - spread) ** 2 / kl if kl > 0 else 0.0
    if error - spread > kl / 2:
        told = f"of the {kl:.3g} nats down to sigma {sigma:.4g} are its own error, not the data's shape"
    elif error + spread < -kl / 2 or (error + spread < 0 and hidden > tolerance):
        told = (
            f"of own error beside {kl:.3g} nats down to sigma {sigma:.4g}: it falls short of the data's shape, "
            f"which is at least {hidden:.3g} nats from the Gaussian"
        )
    else:
        return
    raise ValueError(
        f"denoiser: {network[0]:.3g} +- {network[1]:.2g} {told}; a jump cannot be certified by it (`bound_of` needs no "
        "network)"
    )


def _too_few(gaussian: Gaussian, sigma: float, tolerance: float) -> str:
    if gaussian.sampling_kl(sigma) <= tolerance / 2:
        return ""
    needed = gaussian.samples_needed(sigma, tolerance / 2)
    return f"; it is of {gaussian.count} samples, and about {needed} are needed at sigma {sigma:.4g}"


def _prior_kl(gaussian: Gaussian, sigma: float) -> float:
    """KL(N(mean, S + sigma^2 I) || N(0, sigma^2 I)), averaged over classes."""
    left = gaussian.dim - gaussian.rank
    ratio = (
        torch.cat([gaussian.variances.cpu(), gaussian.variances.new_full((int(left > 0),), gaussian.rest).cpu()])
        / sigma**2
    )
    times = torch.ones_like(ratio)
    times[gaussian.rank :] = left
    means = gaussian.mean.reshape(-1, gaussian.dim).double().square().sum(1).mean()
    return float((0.5 * times * (ratio - ratio.log1p())).sum() + means / (2 * sigma**2))
