"""What a discriminator adds to the trainer: the ratio r, the adversarial term, and an update of its own.

Two published places for its heads: on the frozen teacher's encoder (f-distill) and on the encoder of the online fake
score, trained jointly (DMD2). Either way the logits of the student's step come from the pass that predicts anyway.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.discriminator import Discriminator, frozen
from distill.losses import difference_penalty, discriminator_loss, gradient_penalty
from distill.taps import Tap
from samplers import Denoiser, SampleNoise
from samplers.denoiser import expand, repeat_conditions

DIFFERENCE = 0.1  # the step of the finite-difference form of R1, in units of the data


class Comparison(NamedTuple):
    """Both predictions at a noised sample, like x, without a graph; logits [B, heads], or None, with one to x."""

    denoised_fake: Tensor
    denoised_target: Tensor
    logits: Tensor | None


class Adversary(Protocol):
    """Compares noised samples of the student with those of the target, at the same noise level."""

    def compare(self, fake: Denoiser, target: Denoiser, x: Tensor, sigma: Tensor, cond: Any) -> Comparison:
        """At x [B, ...] and sigma [B]. If x has a graph, the logits have one to x, and to nothing else."""
        ...

    def learn(
        self, denoising: Callable[[], Tensor], x0: Tensor, sigma: Tensor, cond: Any, noise: SampleNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a step of the fake score minimises, [], and its metrics, each [].

        denoising(): the denoising loss [B] of the fake score on the student's samples x0 [B, ...] at sigma [B].
        noise: continues the streams of the samples.
        """
        ...


class ScoreOnly:
    """No discriminator: the fake score alone follows the student."""

    @torch.no_grad()
    def compare(self, fake: Denoiser, target: Denoiser, x: Tensor, sigma: Tensor, cond: Any) -> Comparison:
        return Comparison(fake(x, sigma, cond), target(x, sigma, cond), None)

    def learn(
        self, denoising: Callable[[], Tensor], x0: Tensor, sigma: Tensor, cond: Any, noise: SampleNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = denoising().mean()
        return loss, {"fake_loss": loss.detach()}


@dataclass(kw_only=True)
class _Heads:
    """What both places for the heads share.

    network: the denoiser whose encoder is read: itself, not as it is wrapped for several processes. tap: where.
    heads: the discriminator, itself; train_heads: as it is called for its update. reals(noise, cond) -> x0 [B, ...]:
    real samples of those conditions. weight: of the discriminator's loss beside the denoising loss. r1: gamma of the
    penalty gamma / 2 |grad ln r|^2 at real samples (Mescheder et al. 2018), exact or by a finite difference.
    """

    network: nn.Module
    tap: Tap
    heads: Discriminator
    train_heads: Callable[[Sequence[Tensor]], Tensor]
    reals: Callable[[SampleNoise, Any], Tensor]
    weight: float = 1.0
    r1: float = 0.0
    r1_exact: bool = True

    def _read(self, features: Sequence[Tensor], rows: int) -> Tensor:
        """Logits of the first `rows` rows: of a guided pass, those with the condition."""
        return self.heads([f[:rows] for f in features])

    def _discrimination(
        self, fake: Tensor | list[Tensor], sigma: Tensor, cond: Any, noise: SampleNoise, graph: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss, [], and its metrics, for the student's samples noised to sigma [B].

        fake: those, [B, ...], or the features of their pass. Whatever is not known yet is encoded in one batch, with a
        graph through the encoder if `graph`.
        """
        x0 = self.reals(noise, cond)
        real = x0 + expand(sigma, x0) * noise.normal(x0.shape[1:], x0.dtype, x0.device)
        batches = [real] if isinstance(fake, list) else [fake, real]
        exact = bool(self.r1) and self.r1_exact
        if exact:
            real.requires_grad_(True)
        elif self.r1:
            batches.append(real + DIFFERENCE * noise.normal(x0.shape[1:], x0.dtype, x0.device))

        n = len(batches)
        inputs = (torch.cat(batches), sigma.repeat(n), repeat_conditions(cond, n, len(real)))
        with torch.set_grad_enabled(graph or exact), _twice_differentiable(exact):
            features = self.tap.encode(lambda: self.network(*inputs))
            if isinstance(fake, list):
                features = [torch.cat(pair) for pair in zip(fake, features, strict=True)]
            with torch.enable_grad():
                logits = self.train_heads(features)
        of_fake, of_real, *of_moved = logits.split(len(real))
        loss = discriminator_loss(of_real, of_fake).mean()
        metrics = {"discriminator_loss": loss.detach()}
        if self.r1:
            penalty = (
                gradient_penalty(of_real, real) if exact else difference_penalty(of_real, of_moved[0], DIFFERENCE)
            ).mean()
            loss = loss + 0.5 * self.r1 * penalty
            metrics["gradient_penalty"] = penalty.detach()
        return loss, metrics


@dataclass(kw_only=True)
class TeacherHeads(_Heads):
    """Heads on the frozen teacher's encoder (Xu et al. 2025); only they are trained, at the student's noise levels.

    level: u [B] in [0, 1) -> sigma [B]. Cost: in the student's step no pass, and where the adversarial term is on the
    encoder's share of a backward pass; in each fake step the encoder over 2 B samples without a graph (with R1: over
    3 B, or with a graph to the inputs).
    """

    level: Callable[[Tensor], Tensor]

    def compare(self, fake: Denoiser, target: Denoiser, x: Tensor, sigma: Tensor, cond: Any) -> Comparison:
        with torch.no_grad():
            denoised_fake = fake(x, sigma, cond)
        with frozen(self.network, self.heads):
            with self.tap.record(end="graph") as features:
                denoised_target = target(x, sigma, cond)
            return Comparison(denoised_fake, denoised_target.detach(), self._read(features, len(x)))

    def learn(
        self, denoising: Callable[[], Tensor], x0: Tensor, sigma: Tensor, cond: Any, noise: SampleNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        fake_loss = denoising().mean()
        sigma = self.level(noise.uniform()).to(x0.device)
        x = x0 + expand(sigma, x0) * noise.normal(x0.shape[1:], x0.dtype, x0.device)
        with frozen(self.network):
            loss, metrics = self._discrimination(x, sigma, cond, noise, graph=False)
        return fake_loss + self.weight * loss, {"fake_loss": fake_loss.detach()} | metrics


@dataclass(kw_only=True)
class FakeHeads(_Heads):
    """Heads on the encoder of the online fake score, trained jointly with it (Yin et al. 2024), at its noise levels.

    Cost: in the student's step as `TeacherHeads`, on the fake score's pass; in each fake step the encoder over B real
    samples (2 B with the finite-difference penalty), with a graph: the student's are read from the denoising pass.
    """

    def compare(self, fake: Denoiser, target: Denoiser, x: Tensor, sigma: Tensor, cond: Any) -> Comparison:
        with torch.no_grad():
            denoised_target = target(x, sigma, cond)
        with frozen(self.network, self.heads):
            with self.tap.record(end="graph") as features:
                denoised_fake = self.network(x, sigma, cond)
            return Comparison(denoised_fake.detach(), denoised_target, self._read(features, len(x)))

    def learn(
        self, denoising: Callable[[], Tensor], x0: Tensor, sigma: Tensor, cond: Any, noise: SampleNoise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with self.tap.record() as features:
            fake_loss = denoising().mean()
        loss, metrics = self._discrimination(features, sigma, cond, noise, graph=True)
        return fake_loss + self.weight * loss, {"fake_loss": fake_loss.detach()} | metrics


@contextmanager
def _twice_differentiable(needed: bool) -> Iterator[None]:
    """Attention by plain arithmetic where a gradient is differentiated again: the fused kernels cannot."""
    if not needed:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
