"""Weighted particles with their history: what a Feynman-Kac step reports, and when it resamples."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from samplers.noise import SampleNoise
from samplers.resampling import RESAMPLERS, LogWeights, Resampler


@dataclass(frozen=True)
class Resampling:
    """When and how particles are weighted and resampled.

    scheme: a function of `samplers.resampling`, or its name. threshold: groups whose effective sample size is below
    this share of their particles are resampled before a step (0: never, 1: always). active: levels (low, high) outside
    which particles are not resampled and weighted by rewards only, so that there the uncorrected sampler runs. clamp:
    increments of a step, but for those by rewards and by exponents that change, are kept within this many nats of their
    group's mean (None: as they are); what that did is reported as `clipped`.
    Raises ValueError for a threshold outside [0, 1], a clamp that is not positive, and levels that are no interval.
    """

    scheme: Resampler | str = "systematic"
    threshold: float = 0.5
    active: tuple[float, float] = (0.0, math.inf)
    clamp: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.scheme) and self.scheme not in RESAMPLERS:
            raise ValueError(f"scheme: {self.scheme!r}; accepted are {', '.join(RESAMPLERS)}, and functions like them")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: {self.threshold}; accepted are shares of the particles in [0, 1]")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp: {self.clamp}; accepted are positive numbers of nats, and None")
        if len(self.active) != 2 or not 0 <= self.active[0] < self.active[1]:
            raise ValueError(f"active: {self.active}; needed are levels 0 <= low < high")

    def acts_at(self, sigma: float) -> bool:
        """Whether particles are weighted and resampled at this level."""
        return self.active[0] <= sigma <= self.active[1]


@dataclass(frozen=True, eq=False)
class Particles:
    """Groups of weighted particles, and where they come from.

    weights: since each group's last resampling. ancestors: [groups, K], whose place in its group each particle held
    before the last step. roots: [groups, K], which of the first particles it descends from. resampled: [groups], in the
    last step. clipped: [groups], the share of the weight that the last step's clamping
    moved from particle to particle.
    """

    weights: LogWeights
    ancestors: Tensor
    roots: Tensor
    resampled: Tensor
    clipped: Tensor
    collected: Tensor  # [groups], the log-evidence up to the last resampling

    @classmethod
    def begin(cls, weights: LogWeights, sigma: float) -> Self:
        """Fresh particles. Raises ValueError for weights that are not finite."""
        groups, k = weights.values.shape
        device = weights.values.device
        places = torch.arange(k, device=device).expand(groups, k)
        none = torch.zeros(groups, dtype=torch.float64, device=device)
        _check_finite(weights.values, sigma)
        return cls(weights, places, places, torch.zeros(groups, dtype=torch.bool, device=device), none, none)

    @property
    def log_evidence(self) -> Tensor:
        """The logarithm of the mean of the whole path's weights, [groups]: unbiased before it is taken.

        Of the path as it was weighed: clamping, levels that were not active and a rule's error are in it.
        """
        return self.collected + self.weights.log_mean

    @cached_property
    def unique_ancestors(self) -> Tensor:
        """How many of the first particles have descendants, [groups]."""
        ordered = self.roots.sort(1).values
        return 1 + (ordered.diff(dim=1) != 0).sum(1)

    def resample(
        self,
        resampling: Resampling,
        generator: torch.Generator | SampleNoise | None,
        sigma: float,
        separates: bool = True,
    ) -> tuple["Particles", Tensor | None]:
        """The particles to step from, and which of all particles [groups K] they copy (None: each itself).

        Numbers are drawn whether or not a group is resampled, so that no group's depend on another's; never for single
        particles, which move as without weights. separates: whether noise is about to tell copies apart; without it
        nothing is copied.
        """
        groups, k = self.weights.values.shape
        places = torch.arange(k, device=self.roots.device).expand(groups, k)
        stepped = replace(self, ancestors=places, resampled=torch.zeros_like(self.resampled))
        if k == 1 or resampling.threshold == 0 or not resampling.acts_at(sigma):
            return stepped, None
        scheme = RESAMPLERS[resampling.scheme] if isinstance(resampling.scheme, str) else resampling.scheme
        ancestors = scheme(self.weights.values, generator)
        if not separates:
            return stepped, None
        triggered = self.weights.ess < resampling.threshold * k * (1 - 1e-12)  # equal weights are not resampled
        if not bool(triggered.any()):
            return stepped, None
        ancestors = torch.where(triggered[:, None], ancestors, places)
        first = torch.arange(groups, device=places.device)[:, None] * k
        after = Particles(
            weights=LogWeights(torch.where(triggered[:, None], 0.0, self.weights.values)),
            ancestors=ancestors,
            roots=self.roots.gather(1, ancestors),
            resampled=triggered,
            clipped=self.clipped,
            collected=torch.where(triggered, self.log_evidence, self.collected),
        )
        return after, (first + ancestors).flatten()

    def weigh(
        self, increments: Tensor, resampling: Resampling, sigma: float, rewards: Tensor | None = None
    ) -> "Particles":
        """The particles with increments [groups K] of their log-weights, in nats, clamped if asked.

        rewards: [groups K], never clamped, for they add up to the reward, or to the change of an exponent.
        Raises ValueError, with the level and their number, for increments that are not finite.
        """
        increments = increments.double().reshape(self.roots.shape)
        own = torch.zeros_like(increments) if rewards is None else rewards.double().reshape(self.roots.shape)
        _check_finite(increments + own, sigma)
        if resampling.clamp is None:
            return replace(self, weights=self.weights + (increments + own), clipped=torch.zeros_like(self.clipped))
        centre = increments.mean(1, keepdim=True)
        kept = (increments - centre).clamp(-resampling.clamp, resampling.clamp) + centre
        weights, unclamped = self.weights + (kept + own), self.weights + (increments + own)
        moved = 0.5 * (weights.probabilities - unclamped.probabilities).abs().sum(1)
        return replace(self, weights=weights, clipped=moved)


def _check_finite(values: Tensor, sigma: float) -> None:
    wrong = ~values.isfinite()
    if bool(wrong.any()):
        raise ValueError(
            f"log_weights: {int(wrong.sum())} of {values.numel()} are not finite at sigma {sigma:.4g}; "
            "the denoisers or the reward gave what is not a number, or levels are too far apart for weights"
        )
