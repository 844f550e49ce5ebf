"""One-dimensional targets of Feynman-Kac correctors, sums on a grid for truth, and estimates by independent groups."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers import (
    Corrector,
    FeynmanKacState,
    Gaussian,
    GaussianMixture,
    Resampling,
    Target,
    feynman_kac,
    karras_sigmas,
    start_particles,
)

LOW, HIGH, GROUPS, K = 0.05, 10.0, 20, 200
GRID = torch.linspace(-12, 12, 6001, dtype=torch.float64)[:, None]
NEVER = Resampling(active=(1e8, 1e9))  # the uncorrected sampler
KEPT = Resampling(threshold=0.0)
BELOW_HALF = Resampling(threshold=0.5)
SCORE = Corrector(form="score", zeta=1.0, proposal="multistep", rule="trapezoid", resampling=BELOW_HALF)
TRACE = Corrector(form="trace", proposal="multistep", rule="trapezoid", probes=None, resampling=BELOW_HALF)
PLAIN = Corrector(form="score", zeta=1.0, proposal="ancestral", rule="left", resampling=KEPT)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(weights: list[float], means: list[float], deviations: list[float]) -> GaussianMixture:
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, deviations))
    return GaussianMixture(w, m[:, None], s**2)


FIRST = mixture([0.6, 0.4], [-1.5, 1.5], [0.6, 0.8])
SECOND = mixture([0.5, 0.5], [0.0, 2.5], [0.7, 0.5])


class Moments(NamedTuple):
    """log Z, the mean and the mean square; of groups, [groups] each."""

    log_z: Any
    mean: Any
    square: Any


def quadrature(target: Target, sigma: float, tilt: Callable[[Tensor], Tensor] | None = None) -> Moments:
    log_p = sum(
        b * d.log_density(GRID, sigma) for b, d in zip(target.exponents_at(sigma), target.denoisers, strict=True)
    )
    log_p = log_p if tilt is None else log_p + tilt(GRID)
    p, x = log_p.softmax(0), GRID[:, 0]
    return Moments(float(log_p.logsumexp(0)) + math.log(float(x[1] - x[0])), float(p @ x), float(p @ x**2))


def run(
    target: Target,
    corrector: Corrector,
    *,
    steps: int = 160,
    groups: int = GROUPS,
    k: int = K,
    low: float = LOW,
    high: float = HIGH,
    to_zero: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> FeynmanKacState:
    """The last state of a run from particles that are weighted exactly."""
    generator = seeded(seed)
    dim = getattr(target.denoisers[0], "dim", 1)
    models = list(target.denoisers) if all(isinstance(d, Gaussian) for d in target.denoisers) else None
    x, log_weights = start_particles(
        target, (dim,), high, k, groups=groups, gaussians=models, generator=generator, dtype=dtype
    )
    sigmas = karras_sigmas(steps, low, high)[: None if to_zero else -1]
    states = feynman_kac(
        target, x, sigmas, generator=generator, groups=groups, log_weights=log_weights, corrector=corrector
    )
    return list(states)[-1]


def estimates(state: FeynmanKacState) -> Moments:
    w = state.particles.weights.probabilities
    x = state.x[:, 0].reshape(w.shape).double()
    return Moments(state.log_evidence, (w * x).sum(1), (w * x**2).sum(1))


def deviations(state: FeynmanKacState, truth: Moments, *, evidence: bool = True) -> list[float]:
    """How many standard errors of the groups the estimates are from the truth; evidence: Z by itself is unbiased."""
    found = estimates(state)
    pairs = [(found.mean - truth.mean), (found.square - truth.square)]
    pairs += [(found.log_z - truth.log_z).exp() - 1] if evidence else []
    return [abs(float(e.mean())) / (float(e.std()) / math.sqrt(len(e))) for e in pairs]


def standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def gaussian(seed: int, *, spread: float = 1.0, mean: float = 1.0) -> Gaussian:
    generator = seeded(seed)
    basis = torch.linalg.qr(torch.randn((3, 3), generator=generator, dtype=torch.float64)).Q
    variances = spread * torch.tensor([2.0, 0.7, 0.2], dtype=torch.float64)
    return Gaussian(mean * torch.randn(3, generator=generator, dtype=torch.float64), basis, variances, 0.0)


def log_normaliser(beta: float, variances: Tensor) -> float:
    """log of the integral of N(mu, C)^beta, of the variances of C."""
    d, logdet = len(variances), float(variances.log().sum())
    return 0.5 * (1 - beta) * (d * math.log(2 * math.pi) + logdet) - 0.5 * d * math.log(beta)


def falling(sigma: float) -> float:
    return 1.5 / (1 + sigma**2)
