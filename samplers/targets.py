"""What a Feynman-Kac corrector samples: p(x; sigma) ~ exp(tilt(x, sigma)) prod_i q_i(x; sigma)^b_i, at every level.

q_i(.; sigma) is the law that denoiser i knows. Annealing, guidance and products of experts are powers (Skreta et al.
2025, arXiv 2503.02819, Propositions 3.1-3.3), a reward is a tilt (Proposition 3.4); all are one `Target`, and targets
make new ones. Exponents and scales may depend on sigma: the target is what they are at the last level.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.denoiser import Denoiser, join_conditions

Exponent = float | Callable[[float], float]
Reward = Callable[[Tensor], Tensor]


class Conditioned:
    """A denoiser with its condition: the network for one class, one prompt, or for none.

    cond: like a batch's, with as many rows, or of one row (or a class's number) for all. Those of one network are
    evaluated as one batch inside a target. Publishes sigma_min, sigma_max and log_density where the denoiser does.
    """

    def __init__(self, denoiser: Denoiser, cond: Any) -> None:
        self.denoiser, self.cond = denoiser, torch.tensor([cond]) if isinstance(cond, int) else cond
        for name in ("sigma_min", "sigma_max"):
            if hasattr(denoiser, name):
                setattr(self, name, getattr(denoiser, name))
        if hasattr(denoiser, "log_density"):
            self.log_density = self._log_density

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.denoiser(x, sigma, join_conditions([_on(self.cond, x.device)], len(x)))

    def _log_density(self, x: Tensor, sigma: Tensor | float = 0.0, cond: Any = None) -> Tensor:
        own = self.denoiser.log_density  # type: ignore[attr-defined]
        return own(x, sigma, join_conditions([_on(self.cond, x.device)], len(x)))


class Tilt(NamedTuple):
    """scale(sigma) * reward(prediction), in nats. gradient: steer by it too, through the denoisers."""

    reward: Reward
    scale: Exponent
    gradient: bool = False

    def __call__(self, denoised: Tensor, sigma: float) -> Tensor:
        """[B], float64. Raises ValueError for a reward of another shape, and for one that is not finite."""
        reward = self.reward(denoised)
        if not isinstance(reward, Tensor) or reward.shape != (len(denoised),):
            given = f"shape {list(reward.shape)}" if isinstance(reward, Tensor) else type(reward).__name__
            raise ValueError(f"reward: gave {given}; needed is a tensor [{len(denoised)}], a number for each sample")
        if not bool(reward.isfinite().all()):
            wrong = int((~reward.isfinite()).sum())
            raise ValueError(f"reward: is not finite for {wrong} of {len(reward)} samples at sigma {sigma:.4g}")
        return at(self.scale, sigma) * reward.double()


@dataclass(frozen=True)
class Target:
    """exp(sum of tilts) times the product of the denoisers' laws to the exponents.

    Rewards look at the prediction sum_i b_i D_i / B, with B = sum_i b_i, which is the sample itself at sigma = 0.
    Made by `product`, `annealed`, `geometric_average` and `reward_tilted`.
    """

    denoisers: tuple[Denoiser, ...]
    exponents: tuple[Exponent, ...]
    tilts: tuple[Tilt, ...] = ()

    def __post_init__(self) -> None:
        if not self.denoisers or len(self.denoisers) != len(self.exponents):
            raise ValueError(
                f"exponents: are {len(self.exponents)}; needed is one for each of {len(self.denoisers)} laws"
            )

    @property
    def varies(self) -> bool:
        """Whether an exponent depends on sigma."""
        return any(callable(b) for b in self.exponents)

    def exponents_at(self, sigma: float) -> list[float]:
        """The exponents at a noise level. Raises ValueError where they are not finite or their sum is not positive."""
        values = [at(b, sigma) for b in self.exponents]
        if not all(math.isfinite(b) for b in values) or not sum(values) > 0:
            raise ValueError(f"exponents: {values} at sigma {sigma:.4g}; needed are finite numbers of a positive sum")
        return values

    def predict(self, xs: Sequence[Tensor], sigma: Tensor, cond: Any = None) -> list[Tensor]:
        """Every denoiser's prediction at its own x [B, ...]; what shares a network is one batch of it.

        cond: for the denoisers that are not `Conditioned`.
        """
        parts = [(d.denoiser, d.cond) if isinstance(d, Conditioned) else (d, cond) for d in self.denoisers]
        networks: dict[tuple[int, bool], list[int]] = {}  # the terms of each; with and without conditions do not join
        for i, (network, own) in enumerate(parts):
            networks.setdefault((id(network), own is None), []).append(i)
        out: list[Tensor] = [xs[0]] * len(parts)
        for terms in networks.values():
            questions = {(id(xs[i]), id(parts[i][1])): i for i in terms}  # the same question is asked once
            asked = list(questions.values())
            if len(asked) == 1:
                answers = [self.denoisers[asked[0]](xs[asked[0]], sigma, cond)]
            else:
                own_conds = [_on(parts[i][1], xs[0].device) for i in asked]
                conds = join_conditions(own_conds, len(xs[0]))
                joined = parts[asked[0]][0](torch.cat([xs[i] for i in asked]), sigma, conds)
                answers = list(joined.chunk(len(asked)))
            found = dict(zip(questions, answers, strict=True))
            for i in terms:
                out[i] = found[id(xs[i]), id(parts[i][1])]
        return out

    def tilt(self, denoised: Tensor, sigma: float, *, gradient: bool | None = None) -> Tensor:
        """The tilts' sum at predictions [B, ...], in nats, [B], float64. gradient: only those that (do not) steer."""
        total = denoised.new_zeros(len(denoised), dtype=torch.float64)
        for tilt in self.tilts:
            if gradient is None or tilt.gradient == gradient:
                total = total + tilt(denoised, sigma)
        return total


def product(denoisers: Sequence[Denoiser | Target], exponents: Sequence[Exponent] | None = None) -> Target:
    """prod_i q_i^b_i; without exponents, all 1. A factor may be a target, which is raised to its exponent as a whole.

    Raises ValueError for another number of exponents, and where their sum is not positive.
    """
    powers: Sequence[Exponent] = [1.0] * len(denoisers) if exponents is None else exponents
    if not denoisers or len(powers) != len(denoisers):
        raise ValueError(f"exponents: are {len(powers)}; needed is one for each of {len(denoisers)} denoisers")
    for b in powers:
        if not callable(b) and not isinstance(b, int | float):
            raise ValueError(f"exponents: {b!r}; accepted are numbers, and functions of sigma that give them")
    parts = [
        f if isinstance(f, Target) else Target((f,), (1.0,))
        for f in denoisers  # a factor as a target of its own
    ]
    target = Target(
        tuple(d for part in parts for d in part.denoisers),
        tuple(_times(b, own) for part, b in zip(parts, powers, strict=True) for own in part.exponents),
        tuple(t._replace(scale=_times(b, t.scale)) for part, b in zip(parts, powers, strict=True) for t in part.tilts),
    )
    if not target.varies:
        target.exponents_at(0.0)
    return target


def annealed(denoiser: Denoiser | Target, beta: Exponent) -> Target:
    """q^beta, sharper above 1 and flatter below: beta is an inverse temperature. Raises ValueError for beta <= 0."""
    return product([denoiser], [beta])


def geometric_average(uncond: Denoiser, cond: Denoiser, guidance_scale: Exponent) -> Target:
    """q_u^(1 - w) q_c^w, what classifier-free guidance of scale w promises at every level (w = 1: the conditional law).

    For one network under two conditions: geometric_average(Conditioned(network, null), network, w).
    """
    scale = guidance_scale
    uncond_exponent: Exponent = (lambda sigma: 1.0 - scale(sigma)) if callable(scale) else 1.0 - scale
    return product([uncond, cond], [uncond_exponent, scale])


def reward_tilted(
    target: Denoiser | Target, reward: Reward, scale: Exponent = 1.0, *, gradient: bool = False
) -> Target:
    """q(x) exp(scale * reward(x)), through rewards of the predictions on the way.

    reward: predictions [B, ...] -> [B]. scale: nats for one unit of reward; a function of sigma that is small where
    predictions are far from samples saves particles, its value at the last level is the target's. gradient: moves the
    particles by it too, if it is differentiable; the target is the same.
    """
    base = target if isinstance(target, Target) else product([target])
    return replace(base, tilts=(*base.tilts, Tilt(reward, scale, gradient)))


def at(value: Exponent, sigma: float) -> float:
    """An exponent or a scale at a noise level."""
    return float(value(sigma) if callable(value) else value)


def _times(a: Exponent, b: Exponent) -> Exponent:
    if callable(a) or callable(b):
        return lambda sigma: at(a, sigma) * at(b, sigma)
    return a * b


def _on(cond: Any, device: torch.device) -> Any:
    """A condition with its tensors on a device."""
    if isinstance(cond, dict):
        return {key: _on(value, device) for key, value in cond.items()}
    if isinstance(cond, list | tuple):
        return type(cond)(_on(value, device) for value in cond)
    return cond.to(device) if isinstance(cond, Tensor) else cond
