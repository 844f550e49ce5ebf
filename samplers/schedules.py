"""Noise levels to step through: a schedule is a 1-D float64 tensor of sigmas that falls and ends in 0."""

import math

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


def _unit(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)


def _ending_in_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _check(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise ValueError(f"n: {n} steps; at least 1 is needed")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min, sigma_max: {sigma_min}, {sigma_max}; needed is 0 < sigma_min < sigma_max < inf")
