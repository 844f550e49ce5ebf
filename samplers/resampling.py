"""Resampling for sequential Monte Carlo: groups of weighted particles, [groups, particles], that never mix.

A scheme turns log-weights into ancestors [groups, particles]: slot j of a group is to hold a copy of its particle
ancestors[j]. All are unbiased: particle i of weight w_i is copied K w_i times in expectation (Douc et al. 2005,
"Comparison of resampling schemes for particle filtering"; Gerber, Chopin & Whiteley 2019 for SSP). Ancestors rise.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from samplers.noise import SampleNoise


class Resampler(Protocol):
    """Log-weights [groups, particles] -> ancestors of that shape, int64, rising within a group."""

    def __call__(self, log_weights: Tensor, generator: torch.Generator | SampleNoise | None = None) -> Tensor: ...


def systematic(log_weights: Tensor, generator: torch.Generator | SampleNoise | None = None) -> Tensor:
    """One uniform number a group: particle i is copied floor(K w_i) or ceil(K w_i) times, as far as floats tell."""
    cumulative = _cumulative(log_weights)
    u = _uniforms(log_weights, generator)[:, :1].expand_as(cumulative)
    return _ancestors(_crossed(cumulative, u).diff(prepend=cumulative.new_zeros(len(cumulative), 1)))


def stratified(log_weights: Tensor, generator: torch.Generator | SampleNoise | None = None) -> Tensor:
    """One uniform number in each of K strata: particle i is copied fewer than two times more or less than K w_i."""
    cumulative = _cumulative(log_weights)
    crossed = _crossed(cumulative, _uniforms(log_weights, generator))
    return _ancestors(crossed.diff(prepend=cumulative.new_zeros(len(cumulative), 1)))


def residual(log_weights: Tensor, generator: torch.Generator | SampleNoise | None = None) -> Tensor:
    """floor(K w_i) copies of particle i, and the rest multinomially by what is left of the weights."""
    counts, left = _split(log_weights)
    missing = log_weights.shape[1] - counts.sum(1, keepdim=True)
    total = left.cumsum(1)
    drawn = _multinomial(total / total[:, -1:].clamp_min(torch.finfo(total.dtype).tiny), log_weights, generator)
    needed = torch.arange(log_weights.shape[1], device=left.device) < missing
    return _ancestors(counts.scatter_add(1, drawn, needed.to(counts.dtype)))


def ssp(log_weights: Tensor, generator: torch.Generator | SampleNoise | None = None) -> Tensor:
    """Srinivasan's sampling process: floor(K w_i) or ceil(K w_i) copies of particle i, negatively associated.

    Two particles at a time settle who keeps the fractions of both. The loop is over particles, for all groups at once.
    """
    counts, left = _split(log_weights)
    u = _uniforms(log_weights, generator)
    carrier, carried = torch.zeros_like(counts[:, :1]), left[:, :1]  # the particle whose fraction is not settled yet
    for i in range(1, log_weights.shape[1]):
        own, total = left[:, i : i + 1], carried + left[:, i : i + 1]
        above = total >= 1
        # Of (a, b) one becomes 0 or 1 and the other has what is left, with the chance that keeps both means.
        chance = torch.where(above, (1 - own) / (2 - total).clamp_min(1e-300), carried / total.clamp_min(1e-300))
        stays = u[:, i : i + 1] < chance  # above: the carrier becomes 1; below: it keeps the fraction of both
        other = torch.full_like(carrier, i)
        counts.scatter_add_(1, torch.where(stays, carrier, other), above.to(counts.dtype))
        carrier = torch.where(above == stays, other, carrier)
        carried = torch.where(above, total - 1, total)
    counts.scatter_add_(1, carrier, counts.shape[1] - counts.sum(1, keepdim=True))
    return _ancestors(counts)


def multinomial(log_weights: Tensor, generator: torch.Generator | SampleNoise | None = None) -> Tensor:
    """Independent draws by the weights: the most random of all. For comparison, and for independent final draws."""
    cumulative = _cumulative(log_weights) / log_weights.shape[1]
    return _multinomial(cumulative, log_weights, generator).sort(1).values


RESAMPLERS: dict[str, Resampler] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "ssp": ssp,
    "multinomial": multinomial,
}


def ess(log_weights: Tensor) -> Tensor:
    """The effective sample size (sum w)^2 / sum w^2 of each group, [groups], from 1 to K (Kong 1992)."""
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


@dataclass(frozen=True, eq=False)
class LogWeights:
    """Unnormalised log-weights [groups, particles], float64; never changed, only replaced.

    Raises ValueError for values that are not a floating-point matrix with a row.
    """

    values: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.numel() or not self.values.is_floating_point():
            raise ValueError(
                f"log_weights: have shape {list(self.values.shape)}; needed is [groups, particles], floats"
            )

    @classmethod
    def equal(cls, groups: int, particles: int, device: torch.device | str = "cpu") -> Self:
        """Log-weights of 0."""
        return cls(torch.zeros((groups, particles), dtype=torch.float64, device=device))

    def __add__(self, increments: Tensor) -> "LogWeights":
        return replace(self, values=self.values + increments.to(self.values))

    @cached_property
    def probabilities(self) -> Tensor:
        """The weights, each group's of sum 1, [groups, particles]."""
        return self.values.softmax(-1)

    @cached_property
    def ess(self) -> Tensor:
        """The effective sample size of each group, [groups]."""
        return ess(self.values)

    @property
    def log_mean(self) -> Tensor:
        """The logarithm of each group's mean weight, [groups]."""
        return self.values.logsumexp(-1) - math.log(self.values.shape[1])

    @property
    def entropy(self) -> Tensor:
        """-sum w log w of the normalised weights, [groups], in nats: log K for equal weights, 0 for one particle."""
        return torch.special.entr(self.probabilities).sum(-1)


def _uniforms(log_weights: Tensor, generator: torch.Generator | SampleNoise | None) -> Tensor:
    """Numbers in [0, 1), [groups, particles], float64: one for each particle, from its own stream if it has one."""
    shape, device = log_weights.shape, log_weights.device
    if isinstance(generator, SampleNoise):
        if len(generator) != log_weights.numel():
            raise ValueError(f"generator: has {len(generator)} sample streams for {log_weights.numel()} particles")
        return generator.uniform(device).reshape(shape)
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=source).to(device)


def _cumulative(log_weights: Tensor) -> Tensor:
    """K times the cumulative normalised weights, float64; K at the end, and whole where it is one to rounding.

    Rounding must not push a boundary over a whole number: equal weights are to copy every particle once.
    """
    if log_weights.ndim != 2 or not log_weights.numel():
        raise ValueError(f"log_weights: have shape {list(log_weights.shape)}; needed is [groups, particles]")
    if not bool(log_weights.isfinite().all()):
        raise ValueError(f"log_weights: {int((~log_weights.isfinite()).sum())} are not finite")
    n = log_weights.shape[1]
    c = log_weights.double().softmax(-1).cumsum(-1)
    c = n * (c / c[:, -1:])
    nearest = c.round()
    return torch.where((c - nearest).abs() <= 8 * n * torch.finfo(c.dtype).eps, nearest, c)


def _crossed(cumulative: Tensor, u: Tensor) -> Tensor:
    """How many of the points j + u[j], j = 0 .. K - 1, lie below each of the boundaries, [groups, K]."""
    whole = cumulative.floor()
    inside = u.gather(1, whole.long().clamp_max(u.shape[1] - 1)) < cumulative - whole
    return whole + inside


def _split(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """floor(K w_i), int64, and the fractions that are left, whose sum is whole to rounding."""
    copies = _cumulative(log_weights).diff(prepend=log_weights.new_zeros(len(log_weights), 1, dtype=torch.float64))
    nearest = copies.round()
    copies = torch.where(
        (copies - nearest).abs() <= 16 * copies.shape[1] * torch.finfo(copies.dtype).eps, nearest, copies
    )
    counts = copies.floor()
    return counts.long(), copies - counts


def _multinomial(cumulative: Tensor, log_weights: Tensor, generator: torch.Generator | SampleNoise | None) -> Tensor:
    """Independent indices by cumulative weights of which the last is 1, [groups, K]; one of weight 0 is never drawn."""
    drawn = torch.searchsorted(cumulative.contiguous(), _uniforms(log_weights, generator), right=True)
    return drawn.clamp_max(cumulative.shape[1] - 1)


def _ancestors(counts: Tensor) -> Tensor:
    """Counts [groups, K] that sum to K as indices, each as often as it counts, rising."""
    slots = torch.arange(counts.shape[1], device=counts.device, dtype=counts.dtype).expand_as(counts).contiguous()
    return torch.searchsorted(counts.cumsum(1), slots, right=True)
