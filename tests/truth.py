"""What several tests share: closed forms, an error measure, and a denoiser that counts its calls."""

from typing import Any

import torch
from torch import Tensor

from samplers import Denoiser


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|; NaN (which fails every bound) if either holds one."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def gaussian_transport(x: Tensor, mean: Tensor, variance: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
    """The probability-flow ODE of N(mean, diag(variance)), solved: each direction is scaled by its own factor."""
    return mean + ((variance + sigma_to**2) / (variance + sigma_from**2)).sqrt() * (x - mean)


def order(steps: list[int], errors: list[float]) -> float:
    """The measured order of convergence: minus the slope of log error against log steps, by least squares."""
    n, error = (torch.tensor(v, dtype=torch.float64).log() for v in (steps, errors))
    n, error = n - n.mean(), error - error.mean()
    return float(-(n * error).sum() / (n * n).sum())


class Counted:
    """A denoiser that records the batch of every call."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        self.batches.append(len(x))
        return self.denoiser(x, sigma, cond)
