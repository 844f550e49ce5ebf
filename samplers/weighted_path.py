"""One step of a Feynman-Kac corrector: how particles move, and what their log-weights gain.

Powers and products of noised laws are not the noised laws of anything, so particles that follow the sum of the scores
collect a factor on their way (Skreta et al. 2025, arXiv 2503.02819). With s_i = (D_i - x) / v, v = sigma^2, S = sum
b_i s_i, B = sum b_i, a particle that moves down by dv with drift c S dv and noise of variance zeta^2 dv gains
dv [(c - (1 + zeta^2) / 2) div S + (c - zeta^2 / 2) |S|^2 - sum b_i |s_i|^2 / 2].
score form: c = (1 + zeta^2) / 2, no divergence. trace form: c = (zeta^2 + 1 / B) / 2, exact for Gaussians.
Climbing back (churn) costs what descending gave. Rewards are weighed by their change, and steering by their gradient by
the ratio of the two steps' densities, exact for finite steps too (Wu et al. 2023, arXiv 2306.17775).
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from samplers.noise import SampleNoise, normal_like
from samplers.particles import Resampling
from samplers.solvers import Generator
from samplers.targets import Target

Form = Literal["score", "trace"]
Proposal = Literal["multistep", "ancestral", "euler_maruyama"]
Rule = Literal["left", "trapezoid"]


@dataclass(frozen=True)
class Corrector:
    """How particles move and what they are weighed by.

    form: `score` or `trace` (see the module); None is the score form where the exponents sum to 1 and the trace form
    elsewhere. zeta: the step's noise over the model's own (0: particles are weighted, and never
    resampled, for copies would not separate); None is 1 in the score form and B^-1/2 in the trace form,
    which is the model's own sampler with its noise scaled. proposal: `ancestral` integrates the noise exactly and
    holds the prediction, `multistep` extrapolates it from the evaluation before (DPM-Solver++(2M) as an SDE, Lu et al.
    2022), `euler_maruyama` holds the drift. rule: where a step's weight is taken, at its beginning (`left`) or at both
    ends (`trapezoid`); None is both ends in the trace form without churn, and else the beginning, which in few steps
    errs less. probes: random directions for the trace, shared by
    a group's particles; None is the exact trace, d products. churn: EDM's S_churn: after a step
    of n noise climbs by the factor 1 + min(churn / n, sqrt 2 - 1) (Karras et al. 2022, Algorithm 2).
    resampling: None is Resampling() but for guidance (several denoisers in the score form), where few steps need
    Resampling(threshold=1, clamp=1); what was clamped is in the states.
    """

    form: Form | None = None
    zeta: float | None = None
    proposal: Proposal = "multistep"
    rule: Rule | None = None
    probes: int | None = 1
    churn: float = 0.0
    resampling: Resampling | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("form", Form), ("proposal", Proposal), ("rule", Rule)):
            value = getattr(self, name)
            if value not in get_args(kinds) and not (name != "proposal" and value is None):
                raise ValueError(f"{name}: {value!r}; accepted are {', '.join(get_args(kinds))}")
        if self.zeta is not None and not 0 <= self.zeta < math.inf:
            raise ValueError(f"zeta: {self.zeta}; accepted are numbers of at least 0")
        if self.probes is not None and (type(self.probes) is not int or self.probes < 1):
            raise ValueError(f"probes: {self.probes}; accepted are whole numbers of at least 1, and None for all")
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"churn: {self.churn}; accepted are numbers of at least 0")
        if not isinstance(self.resampling, Resampling | None):
            raise ValueError(f"resampling: {self.resampling!r}; accepted are Resampling(...) and None")

    def left(self, total: float) -> bool:
        """Whether a step's weight is taken at its beginning, for exponents of this sum."""
        return self.rule == "left" or (self.rule is None and (self.churn > 0 or not self.traces(total)))

    def traces(self, total: float) -> bool:
        """Whether the weight has a trace, for exponents of this sum. (With a sum of 1 the trace's factor is 0.)"""
        return self.form == "trace" if self.form is not None else abs(total - 1) > 1e-9

    def resamples(self, target: Target, sigma: float) -> Resampling:
        """When and how, for a target at the first noise level of a run."""
        if self.resampling is not None:
            return self.resampling
        guidance = len(target.denoisers) > 1 and not self.traces(sum(target.exponents_at(sigma)))
        return Resampling(threshold=1.0, clamp=1.0) if guidance else Resampling()

    def noise(self, total: float) -> float:
        """zeta for exponents of this sum."""
        if self.zeta is not None:
            return self.zeta
        return total**-0.5 if self.traces(total) else 1.0


class Found(NamedTuple):
    """What is known of the particles at a level sigma: [B, ...], or [terms, B, ...] for the last three tensors.

    rate: of the log-weight, per unit of v, without what all particles share. steer: the gradient of steering tilts.
    before: the prediction at the evaluation before, and h_before the step in log sigma since then.
    Scores, their divergences and log q_i are kept for exponents that vary.
    """

    denoised: Tensor
    rate: Tensor
    tilt: Tensor
    steer: Tensor | None = None
    before: Tensor | None = None
    scores: Tensor | None = None
    divergences: Tensor | None = None
    logs: Tensor | None = None
    h_before: float = 0.0

    def take(self, index: Tensor) -> "Found":
        """The same of the particles with these indices [B]."""
        taken = self._replace(denoised=self.denoised[index], rate=self.rate[index], tilt=self.tilt[index])
        own = {name: getattr(self, name) for name in ("steer", "before")}
        per_term = {name: getattr(self, name) for name in ("scores", "divergences", "logs")}
        own = {name: v if v is None else v[index] for name, v in own.items()}
        per_term = {name: v if v is None else v[:, index] for name, v in per_term.items()}
        return taken._replace(**own, **per_term)


class WeightedPath:
    """One run's evaluations and steps."""

    def __init__(self, target: Target, corrector: Corrector, cond: Any, generator: Generator, groups: int) -> None:
        self.target, self.corrector, self.cond, self.generator = target, corrector, cond, generator
        self.groups = groups
        self.climb = 1.0
        self._turns = 0  # of the probes
        self._signs: Tensor | None = None

    def check(self, grid: list[float]) -> None:
        """Exponents at all levels; what the weight can and cannot be; how far a step climbs."""
        corrector, worst = self.corrector, (math.inf, 0.0, 0.0)
        self.climb = 1 + min(corrector.churn / (len(grid) - 1), 2**0.5 - 1)
        for sigma in grid[:-1] if grid[-1] == 0 else grid:  # the last step to 0 weighs nothing
            total = sum(self.target.exponents_at(sigma))
            zeta, traces = corrector.noise(total), corrector.traces(total)
            if self.target.varies and not traces and zeta != 1:
                raise ValueError(f"zeta: {zeta}; exponents that depend on sigma need 1, or form 'trace'")
            if not traces and total > 1 + 1e-9:
                worst = min(worst, (zeta**2 - (1 - 1 / total), zeta, total))
        if corrector.churn and corrector.rule == "trapezoid":
            raise ValueError("rule: 'trapezoid' needs an evaluation at the level that churn leaves; accepted is 'left'")
        margin, zeta, total = worst
        if margin <= 0:
            warnings.warn(
                f"zeta: {zeta:.3g} with exponents of sum {total:.3g} gives weights without a finite variance: zeta^2 = "
                f"{zeta**2:.3g} is not above 1 - 1 / B = {1 - 1 / total:.3g}; raise zeta or use form 'trace'",
                UserWarning,
                stacklevel=3,
            )

    def evaluate(self, x: Tensor, sigma: float) -> Found:
        """Everything at x [B, ...] but log q_i, which a path carries along and `evaluate` begins only at its start."""
        target, v = self.target, sigma**2
        exponents = target.exponents_at(sigma)
        total = sum(exponents)
        traces, zeta = self.corrector.traces(total), self.corrector.noise(total)
        climbs = self.climb > 1 and traces and abs(total - 1) > 1e-9  # with other noise than the model's
        by_term = target.varies and (zeta != 1 or climbs)
        diverges = by_term or (traces and abs(total - 1) > 1e-9)
        steers = any(tilt.gradient for tilt in target.tilts)
        level = torch.tensor(sigma, dtype=x.dtype, device=x.device)
        with torch.set_grad_enabled(diverges or steers):
            copies = len(exponents) if by_term else 1
            leaves = [x.detach().clone().requires_grad_(diverges or steers) for _ in range(copies)]
            predictions = target.predict([leaves[min(i, copies - 1)] for i in range(len(exponents))], level, self.cond)
            for i, d in enumerate(predictions):
                if d.shape != x.shape:
                    raise ValueError(f"denoisers: number {i} gave {list(d.shape)} for x of {list(x.shape)}")
            if diverges or steers:
                _check_derivatives(exponents, predictions, "form: 'trace'" if diverges else "gradient: True")
            mean = _weighted(exponents, predictions) / total
            steer = self._steer(mean, leaves, sigma, keep=diverges) if steers else None
            traced = self._traces(predictions if by_term else [mean], leaves) if diverges else None

        mean, predictions = mean.detach(), [d.detach() for d in predictions]
        axes = tuple(range(1, x.ndim))
        rate = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if len(predictions) > 1:
            for b, d in zip(exponents, predictions, strict=True):
                rate -= 0.5 * b * (d - mean).square().sum(axes).double() / v**2
        if traces and traced is not None and abs(total - 1) > 1e-9:
            joint = _weighted(exponents, traced) / total if by_term else traced[0]
            rate += 0.5 * (1 - total) * joint.double() / v
        elif not traces:
            rate += 0.5 * total * (total - 1) * (mean - x).square().sum(axes).double() / v**2
        with torch.no_grad():
            tilt = target.tilt(mean, sigma)
        scores = divergences = None
        if target.varies:
            scores = torch.stack([(d - x) / v for d in predictions])
            if by_term and traced is not None:
                divergences = (torch.stack(traced).double() - x[0].numel()) / v
        return Found(mean, rate, tilt, steer=steer, scores=scores, divergences=divergences)

    def _steer(self, mean: Tensor, leaves: list[Tensor], sigma: float, keep: bool) -> Tensor:
        """The gradient of the steering tilts, like x."""
        total = self.target.tilt(mean, sigma, gradient=True).sum()
        if not total.requires_grad:
            raise ValueError("reward: has no gradient; leave out gradient=True, the target is the same")
        return sum(torch.autograd.grad(total, leaves, retain_graph=keep))  # type: ignore[return-value]

    def _traces(self, outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        """The traces of the Jacobians of outputs [B, ...] by their leaves, each [B], exact or by probes."""
        x = leaves[0]
        exact = self.corrector.probes is None
        n = self.corrector.probes or x[0].numel()
        found = [torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in outputs]
        for j in range(n):
            probe = self._probe(x) if not exact else torch.eye(n, device=x.device)[j].to(x).reshape(x[:1].shape)
            products = torch.autograd.grad([(out * probe).sum() for out in outputs], leaves, retain_graph=j + 1 < n)
            for total, product in zip(found, products, strict=True):
                total += (product * probe).flatten(1).sum(1).double() / (1 if exact else n)
        return found

    def _probe(self, x: Tensor) -> Tensor:
        """Random signs that a group's particles share, like x.

        A run's probes take turns: as many in a row as the next power of 2 above d are fresh signs times the rows of a
        Hadamard matrix, whose products average to the identity. So a trace that changes slowly has hardly any noise in
        few dimensions, and as many probes at once are the exact trace.
        """
        d = x[0].numel()
        turn = self._turns % (1 << max(0, d - 1).bit_length())
        self._turns += 1
        if turn == 0 or self._signs is None:
            self._signs = self._group_noise(x).sign()
        places, parity = torch.arange(d), torch.zeros(d, dtype=torch.int64)
        for bit in range(turn.bit_length()):
            parity += (places >> bit) & (turn >> bit) & 1
        return self._signs * (1 - 2 * (parity % 2)).to(x).reshape(x[:1].shape)

    def _group_noise(self, x: Tensor) -> Tensor:
        """Normal numbers that a group's particles share, like x."""
        k = len(x) // self.groups
        generator = self.generator[::k] if isinstance(self.generator, SampleNoise) else self.generator
        return normal_like(x[::k], generator).repeat_interleave(k, 0)

    def step(
        self, x: Tensor, found: Found, sigma: float, sigma_next: float, weighs: bool, last: bool
    ) -> tuple[Tensor, float, Found, Tensor, Tensor]:
        """One step down, and up again with churn unless it is the last: the particles, their level, what is known
        there, the increments by the laws (0 if not `weighs`), and those by rewards and by exponents that changed."""
        corrector, exponents = self.corrector, self.target.exponents_at(sigma)
        total = sum(exponents)
        moved, rewards = self._descend(x, found, sigma, sigma_next, total)
        if sigma_next == 0:
            before = found.tilt
            with torch.no_grad():
                tilt = self.target.tilt(moved, 0.0)
            found = found._replace(denoised=moved, tilt=tilt)
            return moved, 0.0, found, torch.zeros_like(tilt), rewards + tilt - before

        raised = sigma_next if last else min(sigma_next * self.climb, sigma)
        climbed, v, v_next = moved, sigma**2, sigma_next**2
        if raised > sigma_next:
            upper = sum(self.target.exponents_at(raised))
            noise = (raised**2 - v_next) / (upper if corrector.traces(upper) else 1.0)
            climbed = moved + noise**0.5 * normal_like(moved, self.generator)
        after = self.evaluate(climbed, raised)._replace(before=found.denoised, h_before=math.log(sigma / raised))
        rewards = rewards + after.tilt - found.tilt
        base = (v - v_next) * (found.rate if corrector.left(total) else 0.5 * (found.rate + after.rate))
        base = base - (raised**2 - v_next) * after.rate
        if corrector.traces(total):  # what all particles share, integrated exactly
            base = base + (total - 1) * x[0].numel() * math.log(sigma / raised)
        if found.logs is not None:
            logs = self._carried(found, after, x, moved, climbed, (sigma, sigma_next, raised))
            after = after._replace(logs=logs)
            changes = torch.tensor(self.target.exponents_at(raised)) - torch.tensor(exponents)
            rewards = rewards + weighs * (changes.to(base)[:, None] * logs).sum(0)
        return climbed, raised, after, base * float(weighs), rewards  # NaN stays NaN, and is raised

    def _descend(self, x: Tensor, found: Found, sigma: float, sigma_next: float, total: float) -> tuple[Tensor, Tensor]:
        """The particles at sigma_next, and what steering adds to their log-weights."""
        corrector, v, v_next = self.corrector, sigma**2, sigma_next**2
        zeta, nothing = corrector.noise(total), torch.zeros_like(found.rate)
        if sigma_next == 0:
            return found.denoised, nothing
        pull = 0.5 * (1 + zeta**2 * total) if corrector.traces(total) else 0.5 * (1 + zeta**2) * total
        if corrector.proposal == "euler_maruyama":
            moved, variance = torch.lerp(x, found.denoised, pull * (1 - v_next / v)), zeta**2 * (v - v_next)
        else:  # dx = pull (D - x) dv / v + zeta dw, solved for a constant D
            ratio, power, denoised = v_next / v, 2 * pull - 1, found.denoised
            if corrector.proposal == "multistep" and found.before is not None and found.h_before > 0:
                denoised = torch.lerp(
                    found.before, denoised, 1 + 0.5 * min(1.0, math.log(sigma / sigma_next) / found.h_before)
                )
            moved = torch.lerp(denoised, x, ratio**pull)
            spread = -math.log(ratio) if abs(power) < 1e-9 else (1 - ratio**power) / power
            variance = zeta**2 * v_next * spread
        if not variance:
            return moved, nothing
        noise = normal_like(x, self.generator)
        moved = moved + variance**0.5 * noise
        if found.steer is None:
            return moved, nothing
        g = found.steer.flatten(1).double()
        density_ratio = -(variance**0.5) * (g * noise.flatten(1)).sum(1) - 0.5 * variance * g.square().sum(1)
        return moved + variance * found.steer, density_ratio

    def _carried(
        self, found: Found, after: Found, x: Tensor, moved: Tensor, climbed: Tensor, sigmas: tuple[float, float, float]
    ) -> Tensor:
        """log q_i along a step, [terms, B], by Ito's formula; sigmas: before, at `moved` and at `climbed`.

        Down: dL = <s, dx> - |s|^2 dv / 2 + (zeta^2 - 1) div s dv / 2. Up, with the scores at the upper end, the same
        with the other sign of zeta^2 - 1.
        """
        total, upper = (sum(self.target.exponents_at(sigmas[k])) for k in (0, 2))
        zeta2, up = self.corrector.noise(total) ** 2, 1 / upper if self.corrector.traces(upper) else 1.0
        v, v_next, v_raised = (sigma**2 for sigma in sigmas)
        logs = found.logs
        assert logs is not None
        legs = [(found, moved - x, v - v_next, zeta2 - 1)]
        if v_raised > v_next:
            legs.append((after, climbed - moved, v_next - v_raised, up - 1))
        for point, dx, dv, excess in legs:
            assert point.scores is not None
            s = point.scores.flatten(2)
            logs = logs + (s * dx.flatten(1)).sum(2).double() - 0.5 * dv * s.square().sum(2).double()
            if excess:
                assert point.divergences is not None
                logs = logs + 0.5 * excess * dv * point.divergences
        return logs


def _check_derivatives(exponents: list[float], predictions: list[Tensor], asked: str) -> None:
    """Raise ValueError for a denoiser without a derivative, which would count as 0."""
    for i, (b, d) in enumerate(zip(exponents, predictions, strict=True)):
        if b and not d.requires_grad:
            raise ValueError(
                f"{asked} needs denoisers that can be differentiated, and number {i} cannot (does it run under "
                "torch.no_grad?); accepted without are form 'score' and gradient False"
            )


def _weighted(exponents: list[float], values: list[Tensor]) -> Tensor:
    """sum_i b_i v_i."""
    total = exponents[0] * values[0]
    for b, v in zip(exponents[1:], values[1:], strict=True):
        total = total + b * v
    return total
