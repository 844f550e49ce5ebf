"""A solver that begins with a Gaussian's jump: teleportation in your own loop (`samplers.pipelines` for diffusers')."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from samplers.denoiser import Denoiser
from samplers.gaussian import Gaussian, Mode
from samplers.schedules import restarted
from samplers.skip import Skip
from samplers.solvers import Generator, Solver, State


def teleported(
    solver: Solver, gaussian: Gaussian, skip: Skip | float, *, mode: Mode = "ode", landing: float | None = 0.5
) -> Solver:
    """A solver that jumps to sigma_skip in closed form, for no evaluation, and goes on with `solver` from there.

    The schedule that it is given is rebuilt to start at sigma_skip, with as many steps fewer as it has levels above;
    one that starts at or below sigma_skip is left as it is. skip: a certificate, or a noise level.
    landing: p > -1 corrects the landing by the first evaluation, for none more: a difference D - D_N that has grown as
    sigma^-p on the way has moved the state by phi eta / (p + 1) times itself (see `Gaussian.exponential`). On exact
    mixtures p of 0.5 to 1 is best at a certificate's level (2 far above it, where there is little to correct), on a
    trained network, whose own error does not fall with sigma, 0. None: as it is.
    Raises ValueError for a level that is not positive, p <= -1, or another mode.
    """
    sigma_skip = skip.sigma_skip if isinstance(skip, Skip) else float(skip)
    if not 0 < sigma_skip < math.inf or not (landing is None or -1 < landing < math.inf):
        raise ValueError(f"skip, landing: {sigma_skip}, {landing}; needed are a positive level and a power above -1")
    if mode not in get_args(Mode):
        raise ValueError(f"mode: {mode!r}; accepted are {', '.join(get_args(Mode))}")

    def solve(
        denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Any = None, generator: Generator = None
    ) -> Iterator[State]:
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"x: is {x.dtype}; the state must be float32 or float64 (autocast the network instead)")
        if not sigma_skip < float(sigmas[0]):
            yield from solver(denoiser, x, sigmas, cond, generator)
            return
        start, below = sigmas[0], restarted(sigmas, sigma_skip).to(sigmas)
        denoised = gaussian(x, start, cond)
        x = gaussian.transport(x, start, below[0], cond, mode=mode)
        yield State(x, below[0], denoised, 0)
        if landing is not None:
            denoiser, x = _corrected(denoiser, gaussian, x, start, below[0], landing, cond)
        for state in solver(denoiser, x, below, cond, generator):
            yield replace(state, step=state.step + 1)

    return solve


def _corrected(
    denoiser: Denoiser, gaussian: Gaussian, x: Tensor, start: Tensor, sigma: Tensor, power: float, cond: Any
) -> tuple[Denoiser, Tensor]:
    """The landing, corrected by one evaluation, and a denoiser whose first answer is that evaluation, moved along.

    int delta d(eta) from eta_a to eta_b for delta = delta_b (eta / eta_b)^p; what is moved is moved by D_N, delta kept.
    """
    residual = (denoiser(x, sigma.to(x), cond) - gaussian(x, sigma, cond)).reshape(len(x), -1)
    phi, eta = gaussian.exponential(sigma, x)
    _, eta_start = gaussian.exponential(start, x)
    gains = [p * (b - a * (a / b) ** power) / (power + 1) for p, a, b in zip(phi, eta_start, eta, strict=True)]
    landed = x + gaussian.apply((gains[0], gains[1], residual)).reshape(x.shape)
    answers = [residual.reshape(x.shape) + gaussian(landed, sigma, cond)]

    def after(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return answers.pop() if answers else denoiser(x, sigma, cond)

    return after, landed
