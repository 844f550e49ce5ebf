"""Solvers of the probability-flow ODE dx/dsigma = (x - D) / sigma and of its reverse SDE: generators of State.

A step is written as an interpolation between the state and the prediction, never through the derivative: at
sigma = 80 in low precision the derivative form errs by 1.0 where the interpolation errs by 0.04.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from samplers.denoiser import Denoiser
from samplers.gaussian import Gaussian
from samplers.noise import SampleNoise, normal_like

Generator = torch.Generator | SampleNoise | None


@dataclass(frozen=True)
class State:
    """Where a solver stands after a step.

    x [B, ...] at noise level sigma []; denoised [B, ...], the prediction that the step began with; step, from 0.
    """

    x: Tensor
    sigma: Tensor
    denoised: Tensor
    step: int


class Solver(Protocol):
    """Steps x [B, ...], given at sigmas[0], down the schedule; yields the State after every step."""

    def __call__(
        self, denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Any = None, generator: Generator = None
    ) -> Iterator[State]: ...


def euler(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Any = None, generator: Generator = None
) -> Iterator[State]:
    """Euler's method, which is DDIM: x' = D + (sigma' / sigma) (x - D). One evaluation a step, order 1."""
    for step, (sigma, sigma_next, _) in enumerate(levels(x, sigmas)):
        denoised = denoiser(x, sigma, cond)
        x = torch.lerp(denoised, x, sigma_next / sigma)
        yield State(x, sigma_next, denoised, step)


def heun(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Any = None, generator: Generator = None
) -> Iterator[State]:
    """Heun's method (Karras et al. 2022, Algorithm 1). Two evaluations a step, one where it ends in 0; order 2.

    The trapezoid rule is the Euler step plus (sigma / sigma' - 1) / 2 times the change of the prediction.
    """
    for step, (sigma, sigma_next, to_zero) in enumerate(levels(x, sigmas)):
        denoised = denoiser(x, sigma, cond)
        x = torch.lerp(denoised, x, sigma_next / sigma)
        if not to_zero:
            x = x + 0.5 * (sigma / sigma_next - 1) * (denoiser(x, sigma_next, cond) - denoised)
        yield State(x, sigma_next, denoised, step)


def ancestral(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    generator: Generator = None,
    eta: float = 1.0,
) -> Iterator[State]:
    """Ancestral sampling: the exact posterior step of DDPM given x0 = D, or DDIM with noise eta in [0, 1].

    x' = D + (sigma_down / sigma) (x - D) + sigma_up eps, sigma_up = eta sigma' sqrt(1 - sigma'^2 / sigma^2),
    sigma_down^2 + sigma_up^2 = sigma'^2 (Song et al. 2021, eqs. 12 and 16). One evaluation a step.
    Raises ValueError for an eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta} is not in [0, 1]")
    for step, (sigma, sigma_next, to_zero) in enumerate(levels(x, sigmas)):
        denoised = denoiser(x, sigma, cond)
        ratio = sigma_next / sigma
        up = eta * sigma_next * (1 - ratio**2).sqrt()
        # sqrt(sigma'^2 - up^2) without the difference, which leaves nothing in float32 at sigma' = sigma / 4000
        down = sigma_next * (1 - eta**2 + (eta * ratio) ** 2).sqrt()
        x = torch.lerp(denoised, x, down / sigma)
        if not to_zero:
            x = x + up * normal_like(x, generator)
        yield State(x, sigma_next, denoised, step)


def dpmpp_2m(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Any = None, generator: Generator = None
) -> Iterator[State]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): one evaluation a step, order 2 by multistep extrapolation.

    The first step, and a last step to 0, are Euler steps.
    """
    denoised_before, h_before = x, None
    for step, (sigma, sigma_next, to_zero) in enumerate(levels(x, sigmas)):
        denoised = denoiser(x, sigma, cond)
        h = torch.log(sigma / sigma_next)
        extrapolated = denoised
        if h_before is not None and not to_zero:
            extrapolated = torch.lerp(denoised_before, denoised, 1 + 0.5 * h / h_before)
        x = torch.lerp(extrapolated, x, sigma_next / sigma)
        denoised_before, h_before = denoised, h
        yield State(x, sigma_next, denoised, step)


def gaussian_exponential(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    generator: Generator = None,
    *,
    gaussian: Gaussian,
    order: int = 2,
) -> Iterator[State]:
    """Exact for a Gaussian, first or second order in what the denoiser adds to it: one evaluation a step.

    With D = D_N + delta every eigendirection obeys d(c / phi) = delta d(eta) (see `Gaussian.exponential`); delta is
    held constant (order 1), or extrapolated in eta from the step before, by no more than that step's length (order 2).
    Teleportation is the step with delta = 0, DDIM the one of a Gaussian without variance. The first step is of order 1,
    a last step to 0 takes the prediction. `functools.partial(gaussian_exponential, gaussian=g)` is a Solver.
    Raises ValueError for another order.
    """
    if order not in (1, 2):
        raise ValueError(f"order: {order}; accepted are 1 and 2")
    before: tuple[Tensor, tuple[Tensor, ...]] | None = None
    for step, (sigma, sigma_next, to_zero) in enumerate(levels(x, sigmas)):
        denoised = denoiser(x, sigma, cond)
        if to_zero:
            x = denoised
        else:
            residual = (denoised - gaussian(x, sigma, cond)).reshape(len(x), -1)
            phi, eta_next = gaussian.exponential(sigma_next, x)
            _, eta = gaussian.exponential(sigma, x)
            h = [b - a for a, b in zip(eta, eta_next, strict=True)]
            if order == 1 or before is None:
                moved = gaussian.apply((phi[0] * h[0], phi[1] * h[1], residual))
            else:
                half = [0.5 * (now / last).clamp(max=1.0) for now, last in zip(h, before[1], strict=True)]
                own, rest = ([p * d * k for k in (1 + r, -r)] for p, d, r in zip(phi, h, half, strict=True))
                moved = gaussian.apply((own[0], rest[0], residual), (own[1], rest[1], before[0]))
            x = gaussian.transport(x, sigma, sigma_next, cond) + moved.reshape(x.shape)
            before = residual, tuple(h)
        yield State(x, sigma_next, denoised, step)


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "ancestral": ancestral, "dpmpp_2m": dpmpp_2m}


def sample(
    solver: Solver,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    generator: Generator = None,
) -> Tensor:
    """The last state of a solver, [B, ...]: a sample x0 where the schedule ends in 0.

    x is given at sigmas[0]: sigmas[0] * noise for a fresh start. No gradients are recorded. Raises ValueError for
    levels outside the range [sigma_min, sigma_max] that the denoiser publishes.
    """
    check_range(denoiser, sigmas)
    with torch.no_grad():
        for state in solver(denoiser, x, sigmas, cond, generator):
            x = state.x
    return x


def check_range(denoiser: Denoiser, sigmas: Tensor) -> None:
    """Raises ValueError for a positive level outside the range [sigma_min, sigma_max] that the denoiser publishes."""
    low, high = getattr(denoiser, "sigma_min", 0.0), getattr(denoiser, "sigma_max", float("inf"))
    for sigma in sigmas.flatten().tolist():
        if sigma and not low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6):
            raise ValueError(f"sigmas: {sigma:.6g} is outside the denoiser's range [{low:.6g}, {high:.6g}]")


def nfe(solver: Solver, sigmas: Tensor, shape: Sequence[int] = ()) -> int:
    """How many times a solver evaluates the denoiser on this schedule, counted on a dry run.

    shape: of a sample, which a solver that knows its data's Gaussian needs (any will do for the others).
    """
    calls = 0

    def count(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    x, own = torch.zeros(1, *shape, dtype=torch.float64), torch.Generator()  # leaves torch's global generator alone
    for _ in solver(count, x, sigmas, generator=own):
        pass
    return calls


def levels(x: Tensor, sigmas: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Neighbouring levels on x's device, and whether the lower one is 0; at most one copy from the device."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x: is {x.dtype}; the state must be float32 or float64 (autocast the network instead)")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: has shape {list(sigmas.shape)}; needed is a 1-D tensor of at least two levels")
    sigmas = sigmas.to(x.dtype)  # before the checks: levels may coincide, or be 0, in the state's precision only
    values = sigmas.tolist()
    if not all(a > b >= 0 for a, b in pairwise(values)) or values[0] == float("inf"):
        raise ValueError(f"sigmas: {values} do not fall strictly from a finite level to >= 0")
    for (sigma, sigma_next), level_next in zip(pairwise(sigmas.to(x.device).unbind()), values[1:], strict=True):
        yield sigma, sigma_next, level_next == 0
