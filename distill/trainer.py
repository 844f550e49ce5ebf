"""The one trainer: distribution matching of a one-step student against a target, with an online fake score.

Diff-Instruct (Luo et al. 2023) and DMD (Yin et al. 2024) are the target "teacher" with weight 1. Other methods are
other objects given to the same loop: a divergence with its ratio, an adversarial term, a moving target.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distill.adversary import Adversary, ScoreOnly
from distill.discriminator import log_ratio
from distill.losses import adversarial_loss, denoising_loss, distribution_matching_loss, level_weight, matching_weight
from distill.noise import Share
from distill.optim import Update
from distill.student import Student
from distill.targets import Target
from distill.weights import RatioWeight, weight_statistics
from samplers import Denoiser, SampleNoise
from samplers.denoiser import expand


class Stepper(Protocol):
    """What `train` drives: a `Trainer`, or a `distill.pretrain.Pretrainer`."""

    def step(self, n: int) -> dict[str, Tensor]:
        """Update number n, a function of n and the weights; returns its metrics, each []."""
        ...


Weighting = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, D_target(x_sigma), sigma) -> [B]


def by_distance(x: Tensor, denoised_target: Tensor, sigma: Tensor) -> Tensor:
    """`matching_weight`, DMD's."""
    return matching_weight(x, denoised_target)


def unweighted(x: Tensor, denoised_target: Tensor, sigma: Tensor) -> Tensor:
    """1, Diff-Instruct's."""
    return torch.ones_like(sigma)


def by_level(sigma_data: float) -> Weighting:
    """`level_weight`: the gradient stays that of the divergence, at every level."""
    return lambda x, denoised_target, sigma: level_weight(sigma, sigma_data)


class _Part(NamedTuple):
    """A part of a batch: the student's samples, their conditions and their streams."""

    x0: Tensor
    cond: Any
    noise: SampleNoise


@dataclass
class Trainer:
    """Everything one update of the student needs; `step` is the algorithm.

    student, fake: trained by their updates. target: the denoiser to match, fixed or on its way to the teacher: on the
    way h = 1, unless the adversary bridges, and the adversarial term waits for the teacher. shape: of one sample.
    conditions(noise, device): conditions of a batch. student_level, fake_level: u [B] in [0, 1) -> sigma [B].
    ratio_weight(ln r [B], sigma [B]) -> h(r) [B]: the divergence; None is h = 1, reverse KL. weighting: makes the noise
    levels alike in size. adversary: estimates r, and gives the adversarial term, which is added with
    `adversarial_weight`; fake_update then trains its heads too. average(n): told when the student is as it is after
    update n. parts: a process's batch is computed in so many, one after the other; the weights that are normalised over
    a batch are then over a part. Of a student of several steps an update trains one, on what those before it made, and
    `hold` updates in a row the same; begins_last: the last step first, where the fake score knows its samples already.

    Cost of an update at batch B with K = fake_steps, in network passes over B samples (a guided target counts 2):
    forwards: student 1, target 1, fake 1 + K; backwards: student 1, fake K. The student does not move during the fake
    steps, so its samples serve all of them, noised afresh. What an adversary adds is said in `distill.adversary`; the
    weights add nothing to it. A path adds nothing but what its target's docstring says.
    """

    student: Student
    fake: Denoiser
    target: Target
    student_update: Update
    fake_update: Update
    student_level: Callable[[Tensor], Tensor]
    fake_level: Callable[[Tensor], Tensor]
    share: Share
    shape: tuple[int, ...]
    conditions: Callable[[SampleNoise, torch.device | str], Any] = lambda noise, device: None
    ratio_weight: Callable[[Tensor, Tensor], Tensor] | None = None
    weighting: Weighting = by_distance
    adversary: Adversary = field(default_factory=ScoreOnly)
    adversarial_weight: float = 0.0
    fake_steps: int = 1
    sigma_data: float = 0.5
    average: Callable[[int], object] | None = None
    parts: int = 1
    hold: int = 25
    begins_last: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if isinstance(self.adversary, ScoreOnly) and (self.ratio_weight is not None or self.adversarial_weight):
            raise ValueError(
                f"adversary: is none; ratio_weight ({self.ratio_weight}) and adversarial_weight "
                f"({self.adversarial_weight}) need one that estimates the ratio"
            )

    def step(self, n: int) -> dict[str, Tensor]:
        """Update number n (from 0) of the student, then K of the fake score; returns its metrics, each [].

        A function of n and the weights: every random number comes from the streams of the samples.
        """
        if self.target.begin(n) and isinstance(self.ratio_weight, RatioWeight):
            self.ratio_weight.reset()
        if self.adversary.bridges and self.target.final:
            self.adversary.settle()
        parts: list[_Part] = []
        metrics: list[dict[str, Tensor]] = []
        self.student_update(self._student_losses(n, parts, metrics), n)
        if self.average is not None:
            self.average(n)
        for k in range(self.fake_steps):
            self.fake_update(self._fake_losses(parts, metrics), n * self.fake_steps + k)
        names = dict.fromkeys(name for found in metrics for name in found)
        return {name: torch.stack([found[name] for found in metrics if name in found]).mean(0) for name in names}

    def _student_losses(self, n: int, parts: list["_Part"], metrics: list[dict[str, Tensor]]) -> Iterator[Tensor]:
        """The student's loss on each part of its batch; what the fake score learns from is left in `parts`."""
        step = self.student.trained_step(self.share.seed, n, self.hold, self.begins_last)
        for p in range(self.parts):
            with self.student_update.no_sync(p + 1 < self.parts):
                noise = self.share.noise(n, p, self.parts)
                cond = self.conditions(noise, self.device)
                x = self.student.rollout(noise.normal(self.shape, device=self.device), cond, noise, step)
                sigma = self.student_level(noise.uniform()).to(self.device, non_blocking=True)
                x_sigma = x + expand(sigma, x) * noise.normal(self.shape, device=self.device)
                loss, found = self._student_loss(x, x_sigma, sigma, cond, last=p + 1 == self.parts)
                parts.append(_Part(x.detach(), cond, noise))
                metrics.append(found)
                yield loss / self.parts

    def _fake_losses(self, parts: list["_Part"], metrics: list[dict[str, Tensor]]) -> Iterator[Tensor]:
        """The losses of a step of the fake score, and of the heads, on the student's samples noised afresh."""
        for p, (part, found) in enumerate(zip(parts, metrics, strict=True)):
            x0, cond, noise = part
            sigma = self.fake_level(noise.uniform()).to(self.device, non_blocking=True)
            eps = noise.normal(self.shape, device=self.device)
            denoising = partial(denoising_loss, self.fake, x0, sigma, eps, cond, self.sigma_data)
            with self.fake_update.no_sync(p + 1 < self.parts):
                for loss in self.adversary.learn(denoising, x0, sigma, cond, noise, found):
                    yield loss / self.parts

    def _student_loss(
        self, x: Tensor, x_sigma: Tensor, sigma: Tensor, cond: Any, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_sigma_fixed, final = x_sigma.detach(), self.target.final
        adversary = self.adversary if final or self.adversary.bridges else ScoreOnly()
        denoised_fake, denoised_target, logits, pull = adversary.compare(
            self.fake, self.target, x_sigma_fixed, sigma, cond, adversarial=bool(self.adversarial_weight) and final
        )
        weight = self.weighting(x.detach(), denoised_target, sigma).to(x)
        metrics = {"gap": (denoised_fake - denoised_target).square().mean()}
        if last:  # once an update
            metrics |= self.target.observe(x_sigma_fixed, sigma, denoised_fake, denoised_target)
        if logits is not None:
            ratio = log_ratio(logits)
            h = torch.ones_like(ratio) if self.ratio_weight is None else self.ratio_weight(logits.mean(1), sigma)
            weight = weight * h.to(x)
            metrics |= {"log_ratio": ratio.mean()} | weight_statistics(h)

        matching = distribution_matching_loss(x, denoised_fake, denoised_target, weight).mean()
        loss = matching
        metrics["student_loss"] = matching.detach()
        if logits is not None and pull is not None:
            loss = loss + self.adversarial_weight * (x_sigma * pull).flatten(1).sum(1).mean()
            metrics["adversarial_loss"] = adversarial_loss(logits).mean()
        return loss, metrics


def train(stepper: Stepper, steps: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
    """Updates `start` .. `steps` - 1; yields the metrics of each, as device scalars for the caller to read."""
    for n in range(start, steps):
        yield stepper.step(n)
