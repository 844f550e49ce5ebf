"""Noise levels to step through: a schedule is a 1-D float64 tensor of sigmas that falls and ends in 0."""

import math
from itertools import pairwise

import torch
from torch import Tensor


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """n falling levels from sigma_max to sigma_min, then 0: [n + 1] (Karras et al. 2022, eq. 5)."""
    _check(n, sigma_min, sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho: {rho} is not positive and finite")
    return _ending_in_zero(karras_sigma(_unit(n), sigma_min, sigma_max, rho))


def karras_sigma(u: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """The noise level at position u in [0, 1] of the Karras grid: sigma_max at 0, sigma_min at 1."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + u * (low - high)) ** rho


def karras_index(sigma: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """The position u in the Karras grid of a noise level: the inverse of `karras_sigma`."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (sigma ** (1 / rho) - high) / (low - high)


def exponential_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """n levels evenly spaced in log sigma, then 0: [n + 1]."""
    _check(n, sigma_min, sigma_max)
    return _ending_in_zero((math.log(sigma_max) + _unit(n) * math.log(sigma_min / sigma_max)).exp())


def flow_sigmas(n: int, sigma_max: float = 999.0, shift: float = 1.0) -> Tensor:
    """n levels evenly spaced in flow time t = sigma / (1 + sigma), then 0: [n + 1].

    The first level is sigma_max (t = 1 is sigma = infinity). `shift` is the resolution shift of Esser et al. 2024,
    eq. 23: t -> shift t / (1 + (shift - 1) t), which in these coordinates just multiplies sigma.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift: {shift} is not positive and finite")
    _check(n, sigma_max / 2, sigma_max)
    start = sigma_max / shift
    t = start / (1 + start) * (1 - torch.arange(n + 1, dtype=torch.float64) / n)
    return shift * t / (1 - t)


def restarted(sigmas: Tensor, sigma: float, steps: int | None = None) -> Tensor:
    """A schedule of the same spacing that starts at a level inside this one, [steps + 1] where it ends in 0.

    steps: by default as many fewer as there are levels above sigma. Levels are spaced evenly in the old schedule's own
    (fractional) index, between its levels as on a Karras grid of rho = 7: exactly so for one, within 2 % of a step for
    an exponential schedule, within 40 % for a flow schedule, whose first and last steps are bent.
    Raises ValueError for a sigma outside the levels, no step, and levels that do not fall.
    """
    if sigmas.ndim != 1 or not len(sigmas) or not all(a > b >= 0 for a, b in pairwise(sigmas.tolist())):
        raise ValueError(f"sigmas: {sigmas.tolist()}; needed are levels [steps + 1] that fall to 0 or above")
    ends = bool(sigmas[-1] == 0)
    levels = (sigmas[:-1] if ends else sigmas).double()
    high, low = float(levels[0]), float(levels[-1])
    if not low * (1 - 1e-9) <= sigma <= high * (1 + 1e-9):
        raise ValueError(f"sigma: {sigma:.6g} is outside the schedule's levels [{low:.6g}, {high:.6g}]")
    if steps is None:
        steps = len(levels) - int((levels > sigma * (1 + 1e-9)).sum()) - (0 if ends else 1)
        steps = max(steps, int(sigma > low * (1 + 1e-9)))  # to the last level, if there is one below
    if steps < 1:
        raise ValueError(f"sigma: {sigma:.6g} leaves {steps} steps of the schedule; at least 1 is needed")

    bent = levels ** (1 / 7)  # in which Karras' grid is straight, and others nearly are
    above = int((levels >= sigma).sum().clamp(1, max(1, len(levels) - 1))) - 1
    first = above + (bent[above] - sigma ** (1 / 7)) / (bent[above] - bent[above + 1]) if len(levels) > 1 else 0.0
    count = steps + (0 if ends else 1)
    index = torch.linspace(float(first), len(levels) - 1, count, dtype=torch.float64) if count > 1 else bent[:1] * 0
    below = index.floor().long().clamp(0, max(0, len(levels) - 2))
    after = (below + 1).clamp(max=len(levels) - 1)
    rebuilt = torch.lerp(bent[below], bent[after], index - below) ** 7
    rebuilt[-1], rebuilt[0] = levels[-1], sigma  # without the rounding of the powers
    return _ending_in_zero(rebuilt) if ends else rebuilt


def _unit(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)


def _ending_in_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _check(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise ValueError(f"n: {n} steps; at least 1 is needed")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min, sigma_max: {sigma_min}, {sigma_max}; needed is 0 < sigma_min < sigma_max < inf")
