"""What several tests share: closed forms, an error measure, and a denoiser that counts its calls."""

from typing import Any

import torch
from torch import Tensor

from samplers import Denoiser
from samplers.denoiser import score


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


@torch.no_grad()
def chain_log_ratio(
    target: Denoiser, fake: Denoiser, x: Tensor, sigmas: Tensor, chains: int, generator: torch.Generator
) -> Tensor:
    """ln p_target / p_fake at x [B, d] from scores alone, [B]: no density, no samples, no discriminator.

    sigmas [K + 1] rise from the noise level of x to one where both laws are alike. Both must solve the heat flow in
    v = sigma^2. Along X_0 = x, X_k+1 = X_k + sqrt(v_k+1 - v_k) n the ratio's change is the backward Ito sum of
    (s_target - s_fake) dX + (|s_target|^2 - |s_fake|^2) dv / 2, of scores at the right end; the factor v_k+1 / v_k, of
    the kernels of the reversed chain, removes most of the error of finitely many steps. The mean over `chains`.
    """
    total, v = torch.zeros(chains * len(x)).to(x), sigmas.to(x) ** 2
    point = x.repeat(chains, 1)
    for k in range(len(v) - 1):
        step = (v[k + 1] - v[k]).sqrt() * torch.randn(point.shape, generator=generator, dtype=x.dtype)
        point = point + step
        ours, theirs = (score(denoiser, point, v[k + 1].sqrt()) for denoiser in (target, fake))
        drift = 0.5 * (v[k + 1] - v[k]) * (ours.square() - theirs.square()).sum(1)
        total -= v[k + 1] / v[k] * (((ours - theirs) * step).sum(1) + drift)
    return total.reshape(chains, -1).mean(0)


class Counted:
    """A denoiser that records the batch of every call."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        self.batches.append(len(x))
        return self.denoiser(x, sigma, cond)
