"""The one trainer: distribution matching of a one-step student against a target, with an online fake score.

Diff-Instruct (Luo et al. 2023) and DMD (Yin et al. 2024) are the target "teacher" with weight 1. Other methods are
other objects given to the same loop: a divergence with its ratio, an adversarial term, a moving target.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distill.divergences import DIVERGENCES, FDivergence
from distill.losses import denoising_loss, distribution_matching_loss, matching_weight
from distill.noise import Share
from distill.optim import Update
from distill.student import OneStep, update_average
from samplers import Denoiser, SampleNoise
from samplers.denoiser import expand


class Stepper(Protocol):
    """What `train` drives: a `Trainer`, or a `distill.pretrain.Pretrainer`."""

    def step(self, n: int) -> dict[str, Tensor]:
        """Update number n, a function of n and the weights; returns its metrics, each []."""
        ...


class Adversary(Protocol):
    """Compares noised samples of the student with those of the target, at the same noise level."""

    def ratio(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """r = p_target / p_student at x [B, ...], [B], positive, without a graph."""
        ...

    def generator_loss(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """What the student minimises to be taken for the target, [B], with a graph to x."""
        ...


@dataclass
class Trainer:
    """Everything one update of the student needs; `step` is the algorithm.

    student, fake: trained by their updates. target: the frozen denoiser to match. shape: of one sample, [C, H, W].
    conditions(noise, device): conditions of a batch. student_level, fake_level: u [B] in [0, 1) -> sigma [B].
    divergence: gives the weight h(r); one that is not constant needs an `adversary` for r, whose generator loss
    is added with `adversarial_weight`. average: the running average of the student's network.

    Cost of an update at batch B with K = fake_steps, in network passes over B samples (a guided target counts 2):
    forwards: student K (one of them with a graph), target 1, fake 1 + K; backwards: student 1, fake K. The student's
    batch serves the first fake step as well; only the other K - 1 batches are generated for it, without a graph.
    """

    student: OneStep
    fake: Denoiser
    target: Denoiser
    student_update: Update
    fake_update: Update
    student_level: Callable[[Tensor], Tensor]
    fake_level: Callable[[Tensor], Tensor]
    share: Share
    shape: tuple[int, ...]
    conditions: Callable[[SampleNoise, torch.device | str], Any] = lambda noise, device: None
    divergence: FDivergence = DIVERGENCES["reverse-kl"]
    adversary: Adversary | None = None
    adversarial_weight: float = 0.0
    fake_steps: int = 1
    sigma_data: float = 0.5
    average: tuple[nn.Module, nn.Module, float] | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.adversary is None and not self.divergence.constant:
            raise ValueError(f"divergence: {self.divergence.name} needs an adversary to estimate its ratio")
        if self.adversary is None and self.adversarial_weight:
            raise ValueError(f"adversarial_weight: {self.adversarial_weight} without an adversary")

    def step(self, n: int) -> dict[str, Tensor]:
        """Update number n (from 0) of the student, then K of the fake score; returns its metrics, each [].

        A function of n and the weights: every random number comes from the streams of the samples.
        """
        noise = self.share.noise(n * self.fake_steps)
        cond = self.conditions(noise, self.device)
        x = self.student(noise.normal(self.shape, device=self.device), cond)
        sigma = self.student_level(noise.uniform()).to(self.device)
        x_sigma = x + expand(sigma, x) * noise.normal(self.shape, device=self.device)

        loss, metrics = self._student_loss(x, x_sigma, sigma, cond)
        self.student_update(loss, n)
        if self.average is not None:
            update_average(*self.average, step=n)

        batches = chain([(x.detach(), cond, noise)], self._fresh_batches(n))
        for k, (x0, cond_k, noise_k) in enumerate(batches):
            sigma = self.fake_level(noise_k.uniform()).to(self.device)
            eps = noise_k.normal(self.shape, device=self.device)
            fake_loss = denoising_loss(self.fake, x0, sigma, eps, cond_k, self.sigma_data).mean()
            self.fake_update(fake_loss, n * self.fake_steps + k)
        return metrics | {"fake_loss": fake_loss.detach()}

    def _student_loss(self, x: Tensor, x_sigma: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            noised = x_sigma.detach()
            denoised_fake = self.fake(noised, sigma, cond)
            denoised_target = self.target(noised, sigma, cond)
            ratio = self.adversary.ratio(noised, sigma, cond) if self.adversary else x.new_ones(len(x))
        weight = matching_weight(x, denoised_target, self.divergence.weight(ratio))

        matching = distribution_matching_loss(x, denoised_fake, denoised_target, weight).mean()
        loss = matching
        metrics = {"student_loss": matching.detach(), "gap": (denoised_fake - denoised_target).square().mean()}
        if self.adversary and self.adversarial_weight:
            adversarial = self.adversary.generator_loss(x_sigma, sigma, cond).mean()
            loss = loss + self.adversarial_weight * adversarial
            metrics["adversarial_loss"] = adversarial.detach()
        return loss, metrics

    def _fresh_batches(self, n: int) -> Iterator[tuple[Tensor, Any, SampleNoise]]:
        """The samples of the fake steps 1 .. K - 1, from the student as it stands."""
        for k in range(1, self.fake_steps):
            noise = self.share.noise(n * self.fake_steps + k)
            cond = self.conditions(noise, self.device)
            with torch.no_grad():
                x0 = self.student(noise.normal(self.shape, device=self.device), cond)
            yield x0, cond, noise


def train(stepper: Stepper, steps: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
    """Updates `start` .. `steps` - 1; yields the metrics of each, as device scalars for the caller to read."""
    for n in range(start, steps):
        yield stepper.step(n)
