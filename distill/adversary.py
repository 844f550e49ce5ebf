"""What a discriminator adds to the trainer: the ratio r, the adversarial term, and an update of its own.

Two published places for its heads: on the frozen teacher's encoder (f-distill) and on the encoder of the online fake
score, trained jointly (DMD2). Either way the logits of the student's step come from the pass that predicts anyway.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.discriminator import Discriminator, frozen
from distill.losses import adversarial_loss, difference_penalty, discriminator_loss, gradient_penalty
from distill.taps import Tap
from samplers import Denoiser, SampleNoise
from samplers.denoiser import expand, repeat_conditions

DIFFERENCE = 0.1  # the step of the finite-difference form of R1, in units of the data
Denoising = Callable[[], Tensor]
Metrics = dict[str, Tensor]


class Comparison(NamedTuple):
    """What is seen at a noised sample; nothing has a graph.

    denoised_fake, denoised_target: both predictions, like x. logits [B, heads]: None without a discriminator. pull:
    the gradient of each sample's `adversarial_loss` in x, like x, if it was asked for.
    """

    denoised_fake: Tensor
    denoised_target: Tensor
    logits: Tensor | None = None
    pull: Tensor | None = None


class Adversary(Protocol):
    """Compares noised samples of the student with those of the target, at the same noise level.

    bridges: whether its ratio is that of the target on a path, too, or only that of the teacher.
    """

    @property
    def bridges(self) -> bool: ...

    def settle(self) -> None:
        """Is told, where it bridges, that the target is the teacher for good."""
        ...

    def compare(
        self, fake: Denoiser, target: Denoiser, x: Tensor, sigma: Tensor, cond: Any, adversarial: bool
    ) -> Comparison:
        """At x [B, ...] and sigma [B]; with the pull if `adversarial`."""
        ...

    def learn(
        self, denoising: Denoising, x0: Tensor, sigma: Tensor, cond: Any, noise: SampleNoise, metrics: Metrics
    ) -> Iterator[Tensor]:
        """The losses, each [], that a step of the fake score minimises together; one graph lives at a time.

        denoising(): the denoising loss [B] of the fake score on the student's samples x0 [B, ...] at sigma [B].
        noise: continues the streams of the samples. metrics: is filled, each [].
        """
        ...


class ScoreOnly:
    """No discriminator: the fake score alone follows the student."""

    bridges = False

    def settle(self) -> None:
        pass

    @torch.no_grad()
    def compare(
        self, fake: Denoiser, target: Denoiser, x: Tensor, sigma: Tensor, cond: Any, adversarial: bool = False
    ) -> Comparison:
        return Comparison(fake(x, sigma, cond), target(x, sigma, cond))

    def learn(
        self, denoising: Denoising, x0: Tensor, sigma: Tensor, cond: Any, noise: SampleNoise, metrics: Metrics
    ) -> Iterator[Tensor]:
        loss = denoising().mean()
        metrics["fake_loss"] = loss.detach()
        yield loss


@dataclass(kw_only=True)
class _Heads:
    """What both places for the heads share.

    network: the denoiser whose encoder is read: itself, not as it is wrapped for several processes. tap: where.
    heads: the discriminator, itself; train_heads: as it is called for its update. reals(noise, cond) -> x0 [B, ...]:
    real samples of those conditions. weight: of the discriminator's loss beside the denoising loss. r1: gamma of the
    penalty gamma / 2 |grad ln r|^2 at real samples (Mescheder et al. 2018), exact or by a finite difference.

    starts: as reals, samples of the first student. Then the heads, of two ratios, estimate ln p / q and ln p_start / q,
    and on a score interpolation (1 - f) s_start + f s, the geometric bridge of both laws, ln r is f times the one and
    1 - f times the other, up to a constant at each noise level, which the normalisation of r by its mean there finds.
    Without R1. Costs, until the teacher is reached, a pass of the first student and the encoder over B samples more in
    each fake step.
    """

    network: nn.Module
    tap: Tap
    heads: Discriminator
    train_heads: Callable[[Sequence[Tensor]], Tensor]
    reals: Callable[[SampleNoise, Any], Tensor]
    weight: float = 1.0
    r1: float = 0.0
    r1_exact: bool = True
    starts: Callable[[SampleNoise, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.heads.ratios != (1 if self.starts is None else 2):
            raise ValueError(f"heads: of {self.heads.ratios} ratios; needed are 2 with samples of a start, 1 without")
        if self.starts is not None and self.r1:
            raise ValueError(f"r1: {self.r1}; a bridge has no penalty, accepted is 0")

    @property
    def bridges(self) -> bool:
        return self.starts is not None

    def settle(self) -> None:
        self.starts = None

    def _used(self, logits: Tensor) -> Tensor:
        """Logits [B, heads, 2] on a bridge; otherwise [B, heads], of heads that have learned two ratios the first."""
        return logits if self.bridges or self.heads.ratios == 1 else logits[..., 0]

    def _of_both(self, real: Tensor, start: Tensor) -> Tensor:
        """Logits [B, heads, 2] of each ratio's own numerator."""
        return torch.stack([real[..., 0], start[..., 1]], -1)

    def _judge(
        self, denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Any, adversarial: bool, fraction: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A prediction by `denoiser`, whose pass runs `network`, with the logits and the pull of the same pass.

        Of a guided pass the first rows are read, those with the condition. The pull is taken when the encoder has run,
        so that its graph, which keeps only what each block was given, is gone before the decoder runs.
        """
        x = x.detach().requires_grad_(adversarial)
        found: list[Tensor] = []

        def end(features: list[Tensor]) -> None:
            # The heads are no part of a block that is run again, nor of what is computed in bfloat16.
            with saved_tensors_hooks(_as_it_is, _as_it_is), _in_full(x.device.type):
                logits = self.heads([f[: len(x)] for f in features])
                logits = self._used(logits)
                if self.bridges:
                    logits = torch.lerp(logits[..., 1], logits[..., 0], fraction)
                found.append(logits.detach())
                if adversarial:
                    found.extend(torch.autograd.grad(adversarial_loss(logits).sum(), x))

        with (
            frozen(self.network, self.heads),
            _checkpointed(self.network, adversarial),
            torch.set_grad_enabled(adversarial),
            self.tap.record(end=end),
        ):
            denoised = denoiser(x, sigma, cond)
        return denoised.detach(), found[0], found[1] if adversarial else None

    def _real(self, sigma: Tensor, cond: Any, noise: SampleNoise) -> list[Tensor]:
        """Real samples noised to sigma [B]; then, where R1 is a difference, the same ones moved; on a bridge, noised
        samples of its start."""
        x0 = self.reals(noise, cond)
        real = x0 + expand(sigma, x0) * noise.normal(x0.shape[1:], x0.dtype, x0.device)
        if self.starts is not None:
            start = self.starts(noise, cond)
            return [real, start + expand(sigma, start) * noise.normal(start.shape[1:], start.dtype, start.device)]
        if not self.r1:
            return [real]
        if self.r1_exact:
            return [real.requires_grad_(True)]
        return [real, real + DIFFERENCE * noise.normal(x0.shape[1:], x0.dtype, x0.device)]

    def _encode(self, batches: list[Tensor], sigma: Tensor, cond: Any) -> list[Tensor]:
        """The features of several batches of the same levels and conditions, in one pass."""
        n = len(batches)
        inputs = torch.cat(batches), sigma.repeat(n), repeat_conditions(cond, n, len(batches[0]))
        with _twice_differentiable(bool(self.r1) and self.r1_exact):
            return self.tap.encode(lambda: self.network(*inputs))

    def _penalised(
        self, loss: Tensor, real: Tensor, of_real: Tensor, of_moved: Sequence[Tensor], metrics: Metrics
    ) -> Tensor:
        """The weighted loss with its R1 term, []. real: the noised samples; of_real, of_moved: their logits."""
        if self.r1:
            if self.r1_exact:
                squared = gradient_penalty(of_real, real)
            else:
                squared = difference_penalty(of_real, of_moved[0], DIFFERENCE)
            penalty = squared.mean()
            metrics["gradient_penalty"] = penalty.detach()
            loss = loss + 0.5 * self.r1 * penalty
        return self.weight * loss


@dataclass(kw_only=True)
class TeacherHeads(_Heads):
    """Heads on the frozen teacher's encoder (Xu et al. 2025); only they are trained, at the student's noise levels.

    level: u [B] in [0, 1) -> sigma [B]. Cost: in the student's step no pass, and where the adversarial term is on the
    encoder's share of a pass and of a backward pass; in each fake step the encoder over 2 B samples without a graph
    (with R1: over 3 B, or with a graph to the inputs).
    """

    level: Callable[[Tensor], Tensor]

    def compare(
        self, fake: Denoiser, target: Denoiser, x: Tensor, sigma: Tensor, cond: Any, adversarial: bool
    ) -> Comparison:
        with torch.no_grad():
            denoised_fake = fake(x, sigma, cond)
        denoised_target, logits, pull = self._judge(target, x, sigma, cond, adversarial, _fraction(target))
        return Comparison(denoised_fake, denoised_target, logits, pull)

    def learn(
        self, denoising: Denoising, x0: Tensor, sigma: Tensor, cond: Any, noise: SampleNoise, metrics: Metrics
    ) -> Iterator[Tensor]:
        level = self.level(noise.uniform()).to(x0.device, non_blocking=True)
        fake = x0 + expand(level, x0) * noise.normal(x0.shape[1:], x0.dtype, x0.device)
        real = self._real(level, cond, noise)
        with frozen(self.network), torch.set_grad_enabled(real[0].requires_grad):
            features = self._encode([fake, *real], level, cond)
        of_fake, of_real, *of_others = self._used(self.train_heads(features)).split(len(x0))
        if self.bridges:
            of_real = self._of_both(of_real, of_others[0])
        loss = discriminator_loss(of_real, of_fake).mean(0).sum()
        metrics["discriminator_loss"] = loss.detach()
        yield self._penalised(loss, real[0], of_real, of_others, metrics)
        del features, of_fake, of_real, of_others, loss

        fake_loss = denoising().mean()
        metrics["fake_loss"] = fake_loss.detach()
        yield fake_loss


@dataclass(kw_only=True)
class FakeHeads(_Heads):
    """Heads on the encoder of the online fake score, trained jointly with it (Yin et al. 2024), at its noise levels.

    Cost: in the student's step as `TeacherHeads`, on the fake score's pass; in each fake step the encoder over B real
    samples (2 B with the finite-difference penalty), with a graph: the student's are read from the denoising pass.
    """

    def compare(
        self, fake: Denoiser, target: Denoiser, x: Tensor, sigma: Tensor, cond: Any, adversarial: bool
    ) -> Comparison:
        with torch.no_grad():
            denoised_target = target(x, sigma, cond)
        denoised_fake, logits, pull = self._judge(self.network, x, sigma, cond, adversarial, _fraction(target))
        return Comparison(denoised_fake, denoised_target, logits, pull)

    def learn(
        self, denoising: Denoising, x0: Tensor, sigma: Tensor, cond: Any, noise: SampleNoise, metrics: Metrics
    ) -> Iterator[Tensor]:
        # Not through what wraps the networks for several processes: gradients are reduced with the second loss.
        real = self._real(sigma, cond, noise)
        of_real, *of_others = self._used(self.heads(self._encode(real, sigma, cond))).split(len(x0))
        if self.bridges:
            of_real = self._of_both(of_real, of_others[0])
        loss = adversarial_loss(of_real).mean(0).sum()
        metrics["discriminator_loss"] = loss.detach()
        yield self._penalised(loss, real[0], of_real, of_others, metrics)
        del of_real, of_others, loss

        with self.tap.record() as features:
            fake_loss = denoising().mean()
        of_student = adversarial_loss(-self._used(self.train_heads(features))).mean(0).sum()
        metrics["discriminator_loss"] = metrics["discriminator_loss"] + of_student.detach()
        metrics["fake_loss"] = fake_loss.detach()
        yield fake_loss + self.weight * of_student


def _fraction(target: Denoiser) -> float:
    """How far on its path a target is; a plain denoiser is at the end."""
    return getattr(target, "fraction", 1.0)


def _in_full(device_type: str) -> AbstractContextManager[Any]:
    """No autocast, on devices that have one."""
    able = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if able else nullcontext()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _checkpointed(denoiser: nn.Module, wanted: bool) -> Iterator[None]:
    """A diffusers network that keeps of its graph only what each block was given, where it knows how to."""
    network: Any = getattr(denoiser, "network", denoiser)
    able = getattr(network, "_supports_gradient_checkpointing", False) and not network.is_gradient_checkpointing
    if not (wanted and able):
        yield
        return
    network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()


@contextmanager
def _twice_differentiable(needed: bool) -> Iterator[None]:
    """Attention by plain arithmetic where a gradient is differentiated again: the fused kernels cannot."""
    if not needed:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
