"""The one trainer: distribution matching of a one-step student against a target, with an online fake score.

Diff-Instruct (Luo et al. 2023) and DMD (Yin et al. 2024) are the target "teacher" with weight 1. Other methods are
other objects given to the same loop: a divergence with its ratio, an adversarial term, a moving target.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.adversary import Adversary, ScoreOnly
from distill.discriminator import log_ratio
from distill.losses import adversarial_loss, denoising_loss, distribution_matching_loss, level_weight, matching_weight
from distill.noise import Share
from distill.optim import Update
from distill.student import OneStep, update_average
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


@dataclass
class Trainer:
    """Everything one update of the student needs; `step` is the algorithm.

    student, fake: trained by their updates. target: the denoiser to match, fixed or on its way to the teacher: on the
    way h = 1, unless the adversary bridges, and the adversarial term waits for the teacher. shape: of one sample.
    conditions(noise, device): conditions of a batch. student_level, fake_level: u [B] in [0, 1) -> sigma [B].
    ratio_weight(ln r [B], sigma [B]) -> h(r) [B]: the divergence; None is h = 1, reverse KL. weighting: makes the noise
    levels alike in size. adversary: estimates r, and gives the adversarial term, which is added with
    `adversarial_weight`; fake_update then trains its heads too. average: the running average of the student's network.

    Cost of an update at batch B with K = fake_steps, in network passes over B samples (a guided target counts 2):
    forwards: student 1, target 1, fake 1 + K; backwards: student 1, fake K. The student does not move during the fake
    steps, so its samples serve all of them, noised afresh. What an adversary adds is said in `distill.adversary`; the
    weights add nothing to it. A path adds nothing but what its target's docstring says.
    """

    student: OneStep
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
    average: tuple[nn.Module, nn.Module, float] | None = None
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
        noise = self.share.noise(n)
        cond = self.conditions(noise, self.device)
        x = self.student(noise.normal(self.shape, device=self.device), cond)
        sigma = self.student_level(noise.uniform()).to(self.device)
        x_sigma = x + expand(sigma, x) * noise.normal(self.shape, device=self.device)

        loss, metrics = self._student_loss(x, x_sigma, sigma, cond)
        self.student_update(loss, n)
        if self.average is not None:
            update_average(*self.average, step=n)

        x0 = x.detach()
        for k in range(self.fake_steps):
            sigma = self.fake_level(noise.uniform()).to(self.device)
            eps = noise.normal(self.shape, device=self.device)
            denoising = partial(denoising_loss, self.fake, x0, sigma, eps, cond, self.sigma_data)
            losses = self.adversary.learn(denoising, x0, sigma, cond, noise, metrics)
            self.fake_update(losses, n * self.fake_steps + k)
        return metrics

    def _student_loss(self, x: Tensor, x_sigma: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, dict[str, Tensor]]:
        x_sigma_fixed, final = x_sigma.detach(), self.target.final
        adversary = self.adversary if final or self.adversary.bridges else ScoreOnly()
        denoised_fake, denoised_target, logits, pull = adversary.compare(
            self.fake, self.target, x_sigma_fixed, sigma, cond, adversarial=bool(self.adversarial_weight) and final
        )
        weight = self.weighting(x.detach(), denoised_target, sigma).to(x)
        metrics = {"gap": (denoised_fake - denoised_target).square().mean()}
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
