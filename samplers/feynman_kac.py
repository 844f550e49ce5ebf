"""Feynman-Kac correctors: weighted particles that follow a target's laws from noise to data, resampled on the way.

Exact annealing, guidance, products of experts and rewards by sequential Monte Carlo (Skreta et al. 2025, arXiv
2503.02819), with the targets of `samplers.targets`, the weights of `samplers.weighted_path`, and the schemes of
`samplers.resampling`. A run is a generator of states; `samplers.diagnosis` says whether to trust it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.gaussian import Gaussian
from samplers.noise import SampleNoise
from samplers.particles import Particles
from samplers.resampling import LogWeights
from samplers.solvers import Generator, State, check_range, levels
from samplers.start import log_densities
from samplers.targets import Conditioned, Target
from samplers.weighted_path import Corrector, WeightedPath


@dataclass(frozen=True)
class FeynmanKacState(State):
    """Where the particles stand after a step: a weighted sample of the target at `sigma`.

    x [groups K, ...], a group's particles together; denoised: the target's prediction sum b_i D_i / B at x; weights,
    ancestors, unique ancestors, log-evidence: `particles` has them, [groups, K] and [groups].
    The log-evidence is that of integral of the unnormalised target over what the first log-weights were relative to.
    """

    particles: Particles

    @property
    def log_weights(self) -> Tensor:
        """[groups, K], float64, unnormalised."""
        return self.particles.weights.values

    @property
    def ess(self) -> Tensor:
        """The effective sample size of each group, [groups]."""
        return self.particles.weights.ess

    @property
    def ancestors(self) -> Tensor:
        """[groups, K]: whose place in its group each particle held before the step."""
        return self.particles.ancestors

    @property
    def log_evidence(self) -> Tensor:
        """[groups], in nats."""
        return self.particles.log_evidence

    @property
    def unique_ancestors(self) -> Tensor:
        """[groups]: how many of the first particles have descendants."""
        return self.particles.unique_ancestors


def feynman_kac(
    target: Target,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    generator: Generator = None,
    *,
    groups: int = 1,
    log_weights: Tensor | None = None,
    gaussians: Gaussian | Sequence[Gaussian] | None = None,
    corrector: Corrector | None = None,
) -> Iterator[FeynmanKacState]:
    """Steps particles x [groups K, ...], given at sigmas[0], down the schedule; yields the state after every step.

    The last state with its log_weights is a weighted sample of the target (`draw` takes particles from it). One
    evaluation of every denoiser a step. A last step to 0 takes the prediction and has no increment but the rewards'.
    log_weights: of the start, [groups, K]; `start_particles` gives them with x. cond: for denoisers without a condition
    of their own, the same within a group. gaussians: those of the start, which exponents that vary need for log q_i
    there if denoisers have no `log_density` and noise is not all that x is. generator: a SampleNoise makes every group
    the run that it is alone.
    Raises ValueError for groups that do not divide the batch, conditions that differ within one, weights that are not
    finite, exponents that vary without zeta = 1 or a trace, and what the target, the schedule and the denoisers refuse.
    Warns where the score form's weights have no finite variance (zeta^2 <= 1 - 1 / B).
    """
    if not isinstance(target, Target):
        raise ValueError(f"target: is a {type(target).__name__}; needed is a Target, as product([denoiser]) makes one")
    path = WeightedPath(target, Corrector() if corrector is None else corrector, cond, generator, groups)
    if type(groups) is not int or groups < 1 or len(x) % groups or not len(x):
        raise ValueError(f"groups: {groups} do not divide a batch of {len(x)} particles")
    for denoiser in target.denoisers:
        check_range(denoiser, sigmas)
        _check_groups(denoiser.cond if isinstance(denoiser, Conditioned) else cond, groups, len(x))
    grid = [float(level) for level, _, _ in levels(x, sigmas)] + [float(sigmas[-1])]
    path.check(grid)
    weights = LogWeights.equal(groups, len(x) // groups, x.device)
    if log_weights is not None:
        if log_weights.shape not in (weights.values.shape, (len(x),)):
            raise ValueError(
                f"log_weights: have shape {list(log_weights.shape)}; needed is {list(weights.values.shape)}"
            )
        weights = weights + log_weights.reshape(weights.values.shape)

    sigma, resampling = grid[0], path.corrector.resamples(target, grid[0])
    found = path.evaluate(x, sigma)
    if target.varies:
        found = found._replace(logs=log_densities(target, x, sigma, gaussians, cond))
    particles = Particles.begin(weights + found.tilt.reshape(weights.values.shape), sigma)
    for step, sigma_next in enumerate(grid[1:]):
        separates = sigma_next > 0 and path.corrector.noise(sum(target.exponents_at(sigma))) > 0
        particles, index = particles.resample(resampling, generator, sigma, separates)
        if index is not None:
            x, found = x[index], found.take(index)
        weighs = resampling.acts_at(sigma)
        last = step + 2 == len(grid)
        x, sigma, found, increments, rewards = path.step(x, found, sigma, sigma_next, weighs, last)
        particles = particles.weigh(increments, resampling, sigma, rewards)
        yield FeynmanKacState(x, torch.tensor(sigma, dtype=x.dtype, device=x.device), found.denoised, step, particles)


def draw(state: FeynmanKacState, n: int = 1, generator: Generator = None) -> Tensor:
    """n independent particles of each group by their weights, [groups n, ...], a group's together."""
    groups, k = state.log_weights.shape
    if n < 1:
        raise ValueError(f"n: {n}; accepted are whole numbers of at least 1")
    if isinstance(generator, SampleNoise):
        if len(generator) != groups * k or n > k:
            raise ValueError(
                f"generator: has {len(generator)} streams for {n} draws of each of {groups} groups of {k}; needed is "
                "one for each particle, and no more draws than particles"
            )
        u = generator.uniform(state.x.device).reshape(groups, k)[:, :n]
    else:
        device = state.x.device if generator is None else generator.device
        u = torch.rand((groups, n), generator=generator, dtype=torch.float64, device=device).to(state.x.device)
    cumulative = state.particles.weights.probabilities.cumsum(1)
    chosen = torch.searchsorted(cumulative / cumulative[:, -1:], u.contiguous(), right=True).clamp_max(k - 1)
    return state.x[(chosen + torch.arange(groups, device=chosen.device)[:, None] * k).flatten()]


def _check_groups(cond: Any, groups: int, batch: int) -> None:
    """Raise ValueError for a condition that differs within a group, of which resampling would make a mess."""
    if isinstance(cond, dict | list | tuple):
        for part in cond.values() if isinstance(cond, dict) else cond:
            _check_groups(part, groups, batch)
    elif isinstance(cond, Tensor) and cond.ndim and len(cond) == batch > groups:
        rows = cond.reshape(groups, batch // groups, -1)
        if not bool((rows == rows[:, :1]).all()):
            raise ValueError(f"cond: differs within a group of {batch // groups} particles; needed is one a group")
