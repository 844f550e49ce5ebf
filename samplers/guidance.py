"""Exact classifier-free guidance in a stock diffusers pipeline: `with feynman_kac_guidance(pipe, particles=K): ...`.

Guidance of scale w follows the score of q_u^(1-w) q_c^w at every level, which is not the noised law of that product. Of
K images of a prompt, weighted and resampled on the way, the law is the product at sigma = 0 (Skreta et al. 2025, arXiv
2503.02819, Proposition 3.1). A particle at level v = sigma^2 gains w (w - 1) / 2 |D_c - D_u|^2 dv / v^2, from the two
predictions that the pipeline has made anyway: no further network call.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from samplers.adapters import coordinates_of
from samplers.feynman_kac import FeynmanKacState
from samplers.gaussian import PATHS
from samplers.guidance_checks import check_call, check_eta, check_groups, check_pipeline, is_guided, scale_of
from samplers.network_hook import NetworkHook
from samplers.particles import Particles, Resampling
from samplers.resampling import LogWeights
from samplers.solvers import Generator
from samplers.teleport_scheduler import path_of
from samplers.weighing_scheduler import WeighingScheduler

Rule = Literal["left", "trapezoid"]
_RESAMPLING = Resampling(threshold=1.0, clamp=1.0)
_FINITE = 1e8  # where the coefficients of a state at sigma = infinity are evaluated


class _Asked(NamedTuple):
    """A call of the network: its input, its keyword arguments and what it gave."""

    x: Tensor
    arguments: dict[str, Any]
    out: Tensor


class FeynmanKacGuidance:
    """A pipeline whose guidance is corrected, from `attach` to `detach` or inside `with`. Printed: the last run's line.

    Made by `feynman_kac_guidance`. Of the last run: scale, and states, a list that `samplers.diagnosis.diagnose` reads:
    one at the beginning of every step, weighted and not yet resampled, and one at the end. Only the last has samples:
    x, latents in EDM coordinates [groups K, ...].
    """

    def __init__(
        self,
        pipe: Any,
        particles: int,
        resampling: Resampling,
        rule: Rule,
        equal_weights: bool,
        generator: Generator,
    ) -> None:
        self.pipe, self.k, self.resampling, self.rule = pipe, particles, resampling, rule
        self.equal_weights, self.generator = equal_weights, generator
        self.branches = check_pipeline(pipe)
        self.scale: float | None = None
        self.states: list[FeynmanKacState] = []
        self._hook = NetworkHook("feynman_kac_guidance", self._ask)
        self._weighing: WeighingScheduler | None = None
        self._asked: list[_Asked] = []
        self._factors: list[float] = []
        self._last_weighed = -1
        self._carried: Particles | None = None
        self._draws: Generator = None

    def attach(self) -> Self:
        """Correct every call from now on. Raises ValueError, and changes nothing, if the pipeline is not right."""
        self.branches = check_pipeline(self.pipe)
        self._hook.attach(getattr(self.pipe, self.branches.family.network))
        self._weighing = WeighingScheduler(self.pipe.scheduler, self._begun, self._before, self._after)
        self._weighing.attach()
        return self

    def detach(self) -> None:
        """Give the pipeline back as it was; nothing if it is not attached."""
        if self._weighing is None or self._hook.network is None:
            return
        self._weighing.detach()
        self._hook.detach()
        self._asked = []

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def particles(self) -> Particles | None:
        """Weights, ancestors and log-evidence at the end of the last run, [groups, K]; None before the first."""
        return self.states[-1].particles if self.states else None

    def __str__(self) -> str:
        if not self.states:
            return f"no run yet; {self.k} particles a prompt"
        states, p = self.states, self.states[-1].particles
        groups, steps = len(p.log_evidence), len(self._factors)
        if self.scale is None or self.scale == 1:
            return f"no guidance to correct: {groups} x {self.k} samples of the conditional law, {steps} steps"
        ess = min(float(s.ess.min()) for s in states)
        clipped = max(float(s.particles.clipped.max()) for s in states)
        times = float(sum(s.particles.resampled.double().mean() for s in states))
        return (
            f"guidance {self.scale:g} corrected, {groups} x {self.k} particles: resampled {times:.1f} times in {steps} "
            f"steps, ESS at least {ess:.1f}, {int(p.unique_ancestors.min())} of {self.k} ancestors left, "
            f"{f'at most {clipped:.0%} of the weight clamped, ' if clipped else ''}"
            f"{'equal weights' if float(p.weights.ess.min()) > self.k - 1e-6 else 'images are weighted'}"
        )

    def _begun(self) -> None:
        self._hook.reattach()
        self.states, self.scale, self._asked, self._carried = [], None, [], None
        check_call(self.pipe)
        assert self._weighing is not None
        self._factors = factors(self._weighing.levels, self.rule)
        weighed = [
            k
            for k, c in enumerate(self._factors)
            if c > 0 and self.resampling.acts_at(self._weighing.levels[k])  # where weights change for the last time
        ]
        self._last_weighed = max(weighed, default=-1)
        self._draws = torch.Generator().manual_seed(0) if self.generator is None else self.generator

    def _ask(self, network: Any, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._weighing is None or self.pipe.scheduler is not self._weighing.scheduler:
            raise ValueError("scheduler: was replaced while guidance is corrected; detach first, and attach again")
        if kwargs.get("skip_layers"):
            raise ValueError("skip_guidance_layers: is guidance by a third prediction; accepted is None")
        answer = inner(*args, **kwargs)
        out = answer[0] if isinstance(answer, tuple) else answer.sample
        self._asked.append(_Asked(args[0] if args else kwargs["hidden_states"], kwargs, out))
        return answer

    def _before(self, k: int, given: dict[str, Any]) -> Tensor | None:
        """Weigh the particles at a step's beginning; the rows to step from."""
        weighing = self._weighing
        assert weighing is not None
        check_eta(weighing.scheduler, given)
        if len(self._asked) != 1:
            raise ValueError(f"pipe: asked its network {len(self._asked)} times for a step; accepted is once")
        asked, output, rows = self._asked.pop(), given["model_output"], len(given["sample"])
        guided = is_guided(self.branches, self._hook.network, asked.x, asked.arguments, rows)
        batch = rows // 2 if guided and self.branches.doubled else rows
        sigma = weighing.levels[k]
        if self._carried is None:
            check_groups(self.k, batch, asked.x, asked.arguments)
            equal = LogWeights.equal(batch // self.k, self.k, output.device)
            self._carried = Particles.begin(equal, sigma)

        increments = torch.zeros(batch, dtype=torch.float64, device=output.device)
        if guided:
            halves = asked.out[:, : output.shape[1]].chunk(2)
            cond, uncond = halves if self.branches.conditional_first else halves[::-1]
            scale = scale_of(self.pipe, output[:batch], cond, uncond, self.scale)
        else:
            scale = 1.0
        if scale is not None:
            if self.scale is not None and scale != self.scale:
                raise ValueError(
                    f"guidance_scale: went from {self.scale:g} to {scale:g} at step {k}; accepted is one scale a run "
                    "(samplers.feynman_kac takes a function of sigma)"
                )
            self.scale = scale
        if guided and scale is not None and self.resampling.acts_at(sigma):
            increments = 0.5 * scale * (scale - 1) * self._factors[k] * self._disagreement(cond, uncond, sigma)

        weighed = self._carried.weigh(increments, self.resampling, sigma)
        self._note(weighed, k, sigma, output.new_empty((batch, 0)))
        final = self.equal_weights and k == self._last_weighed
        resampling = replace(self.resampling, threshold=1.0) if final else self.resampling
        self._carried, index = weighed.resample(resampling, self._draws, sigma)
        return torch.cat([index, index + batch]) if index is not None and rows > batch else index

    def _disagreement(self, cond: Tensor, uncond: Tensor, sigma: float) -> Tensor:
        """|D_c - D_u|^2 from the network's own outputs, [B], float64."""
        level = torch.tensor(min(sigma, _FINITE), dtype=torch.float64)
        out = float(coordinates_of(self.pipe.scheduler)(level).out)
        difference = cond.to(torch.promote_types(cond.dtype, torch.float32)) - uncond
        return out**2 * difference.flatten(1).double().square().sum(1)

    def _after(self, k: int, stepped: Tensor) -> None:
        if self._weighing is None or self._carried is None or k + 1 < len(self._factors):
            return
        sigma = self._weighing.levels[-1]
        x = stepped[: self._carried.roots.numel()]
        alpha = PATHS[path_of(self._weighing.scheduler)](torch.tensor(sigma, dtype=torch.float64))[0]
        self._note(self._carried, k + 1, sigma, x / alpha.to(x))

    def _note(self, particles: Particles, step: int, sigma: float, x: Tensor) -> None:
        self.states.append(FeynmanKacState(x, torch.tensor(sigma, dtype=torch.float64), x, step, particles))


def factors(levels: list[float], rule: Rule) -> list[float]:
    """What w (w - 1) / 2 |D_c - D_u|^2 is multiplied with before each step; levels: sigma before the steps and after.

    left: (v - v') / v^2 for a step down from v = sigma^2 to v'. trapezoid: of |D_c - D_u|^2 / v in log v, half of the
    step's log (v / v') at each end; over wide steps that is cut to 1 - v' / v, with which one end alone is right for
    equal predictions (the lower) and equal differences of scores (the upper). A step to 0 has none, and the last that
    has one takes it at its beginning, as `left`: what is resampled by it moves with noise once more.
    """
    v = [sigma**2 for sigma in levels]
    upper = [1 - below / above if below > 0 else 0.0 for above, below in itertools.pairwise(v)]
    lower = [0.0] * len(upper)
    if rule == "trapezoid":
        last = max((k for k, part in enumerate(upper) if part), default=0)
        lower = [min(-0.5 * math.log1p(-part), part) if part < 1 else 1.0 for part in upper]
        upper[:last], lower[last] = lower[:last], 0.0
    return [(before + after) / at for before, after, at in zip([0.0, *lower], upper, v, strict=False)]


def feynman_kac_guidance(
    pipe: Any,
    particles: int,
    *,
    resampling: Resampling | None = None,
    rule: Rule = "trapezoid",
    equal_weights: bool = True,
    generator: Generator = None,
) -> FeynmanKacGuidance:
    """A diffusers pipeline whose guided images of a prompt follow q_u^(1-w) q_c^w, w its guidance_scale, not nearly so.

    particles: K, the images of a prompt that compete; call the pipeline with num_images_per_prompt=K (DiT: every class
    label K times in a row). The first K images are of the first prompt. equal_weights: the images come out equally
    weighted, resampled for the last time before the last noisy step that has a weight; False leaves the weights in
    `particles.weights`. resampling: None is Resampling(threshold=1, clamp=1), as in `samplers.feynman_kac`: in many
    dimensions one image could have all of a step's weight. What was clamped is told; Resampling() clamps nothing.
    rule: how the weight is integrated over a step, see `factors`. generator: for resampling; None is one that begins
    anew, with one seed, in every run. The pipeline's own random numbers are as many as ever, and with K = 1 the run is
    the stock one.
    Raises ValueError, with nothing changed, for a pipeline, scheduler or setting that cannot be right; for what only a
    call tells (guidance_rescale, eta, conditions that are not groups of K), when that is known.
    """
    if isinstance(particles, bool) or not isinstance(particles, int) or particles < 1:
        raise ValueError(f"particles: {particles!r}; accepted are whole numbers of at least 1")
    if rule not in get_args(Rule):
        raise ValueError(f"rule: {rule!r}; accepted are {', '.join(get_args(Rule))}")
    return FeynmanKacGuidance(
        pipe, particles, _RESAMPLING if resampling is None else resampling, rule, equal_weights, generator
    )
