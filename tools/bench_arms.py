"""The loops whose cost `tools.bench_cost` compares: the published one, and ours with one part changed at a time.

All start from copies of the same networks. The published loop is that of DMD2 (Yin et al. 2024b, arXiv 2405.14867): new
samples for every fake step, the student's batch serving the first; heads on the fake score's encoder; separate
encoder-only passes over real, generated and (for the adversarial term, noised anew) the student's samples; predictions
without a graph; the denoising and the classification loss in one backward. The loops over parameters for clipping and
averages, and a number read from every loss, are those of FastGen, where f-distill (Xu et al. 2025, arXiv 2502.15681) is
published, but for one average instead of three. On CPUs they cost next to nothing; on accelerators each read number is
a wait that is not seen here.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from distill.adversary import FakeHeads, TeacherHeads
from distill.average import Average
from distill.data import Images
from distill.discriminator import Discriminator, frozen
from distill.divergences import DIVERGENCES
from distill.export import teacher_scheduler
from distill.losses import adversarial_loss, denoising_loss, discriminator_loss, matching_weight
from distill.losses import distribution_matching_loss as matching_loss
from distill.methods import StudentNoise
from distill.noise import Share, karras_level, log_normal_level
from distill.optim import Update, adamw
from distill.pretrain import build_unet
from distill.real import RealImages
from distill.sections import LogNormal, Network
from distill.sections import Optimizer as OptimizerConfig
from distill.student import OneStep
from distill.taps import Tap
from distill.targets import Fixed
from distill.trainer import Trainer
from distill.weights import RatioWeight
from samplers import NetworkDenoiser, denoiser_from
from samplers.denoiser import expand

LOW, HIGH, DATA = 0.002, 80.0, 0.5  # noise levels and the data's standard deviation, as in EDM
ADVERSARIAL_WEIGHT, DISCRIMINATOR_WEIGHT, CLIP, DECAY = 3e-3, 1e-2, 10.0, 0.999  # DMD2 on ImageNet-64, but for DECAY
UNET = Network(channels=(32, 64, 64), layers=2)
RATES = OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2)
student_level = partial(karras_level, config=StudentNoise(), sigma_min=LOW, sigma_max=HIGH)
fake_level = partial(log_normal_level, config=LogNormal(), sigma_min=LOW, sigma_max=HIGH)
Step = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """Images [3, size, size], `batch` of them, for UNets of that form; `fake_steps` is K."""

    batch: int = 32
    size: int = 16
    network: Network = UNET
    fake_steps: int = 5


@dataclass
class Networks:
    """An arm's own copies of the networks, and where the heads read."""

    student: NetworkDenoiser
    fake: NetworkDenoiser
    teacher: NetworkDenoiser
    average: NetworkDenoiser
    heads: Discriminator

    def bottleneck(self, network: NetworkDenoiser) -> Tap:
        return Tap(network.network, (-1,))


def networks(sizes: Sizes) -> Networks:
    """Untrained networks: what they have learned does not change what they cost."""
    torch.manual_seed(0)
    unet = build_unet(sizes.network, sizes.size, 3, None)
    teacher = denoiser_from(unet, teacher_scheduler(DATA, LOW, HIGH)).requires_grad_(False)
    x = torch.zeros(1, 3, sizes.size, sizes.size)
    with torch.no_grad():
        heads = Discriminator(Tap(unet, (-1,)).encode(lambda: teacher(x, torch.ones(1))))
    student, fake = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    return Networks(student, fake, teacher, copy.deepcopy(teacher), heads)


class PublishedLoop:
    """DMD2's loop, as the module describes it."""

    def __init__(self, nets: Networks, images: Tensor, sizes: Sizes) -> None:
        self.nets, self.images, self.sizes, self.tap = nets, images, sizes, nets.bottleneck(nets.fake)
        self.student = OneStep(nets.student, HIGH)
        self.trained = {
            "student": list(nets.student.parameters()),
            "fake": [*nets.fake.parameters(), *nets.heads.parameters()],
        }
        self.optimizers: dict[str, Optimizer] = {
            name: AdamW(parameters, lr=RATES.lr, betas=RATES.betas, weight_decay=RATES.weight_decay)
            for name, parameters in self.trained.items()
        }

    def step(self, n: int) -> dict[str, float]:
        """Update number n: one of the student, K of the fake score."""
        metrics: dict[str, float] = {}
        for k in range(self.sizes.fake_steps):
            with torch.set_grad_enabled(k == 0):
                x = self.student(torch.randn(self.sizes.batch, *self.images.shape[1:]))
            if k == 0:
                metrics |= self._student_turn(x)
            metrics |= self._fake_turn(x.detach())
        return metrics

    def _student_turn(self, x: Tensor) -> dict[str, float]:
        x_sigma, sigma = self._noised(x.detach(), student_level)
        with torch.no_grad():
            target = self.nets.teacher(x_sigma, sigma)
            fake = self.nets.fake(x_sigma, sigma)
        matching = matching_loss(x, fake, target, matching_weight(x, target)).mean()
        with frozen(self.nets.fake, self.nets.heads):
            adversarial = adversarial_loss(self._logits(x)).mean()
            self._update("student", matching + ADVERSARIAL_WEIGHT * adversarial)
        with torch.no_grad():
            for kept, current in zip(self.nets.average.parameters(), self.nets.student.parameters(), strict=True):
                kept.lerp_(current, 1 - DECAY)
        return {"student_loss": matching.item(), "adversarial_loss": adversarial.item()}

    def _fake_turn(self, x0: Tensor) -> dict[str, float]:
        sigma = fake_level(torch.rand(len(x0), dtype=torch.float64))
        denoising = denoising_loss(self.nets.fake, x0, sigma, torch.randn_like(x0), sigma_data=DATA).mean()
        real = self.images[torch.randint(len(self.images), (len(x0),))]
        classification = discriminator_loss(self._logits(real), self._logits(x0)).mean()
        self._update("fake", denoising + DISCRIMINATOR_WEIGHT * classification)
        return {"fake_loss": denoising.item(), "discriminator_loss": classification.item()}

    def _noised(self, x: Tensor, level: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        sigma = level(torch.rand(len(x), dtype=torch.float64))
        return x + expand(sigma, x) * torch.randn_like(x), sigma

    def _logits(self, x: Tensor) -> Tensor:
        """An encoder-only pass of the fake score on samples noised anew."""
        x_sigma, sigma = self._noised(x, student_level)
        return self.nets.heads(self.tap.encode(lambda: self.nets.fake(x_sigma, sigma)))

    def _update(self, name: str, loss: Tensor) -> None:
        loss.backward()
        gradients = [p.grad for p in self.trained[name] if p.grad is not None]
        norm = sum(gradient.norm().item() ** 2 for gradient in gradients) ** 0.5
        for gradient in gradients:
            gradient.mul_(min(1.0, CLIP / (norm + 1e-6)))
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()


@dataclass
class Arm:
    """One way of training: `step` is an update of the student and what goes with it."""

    name: str
    nets: Networks
    step: Step
    optimizers: list[Optimizer]


def arms(sizes: Sizes) -> list[Arm]:
    """The published loop, then ours: the same algorithm, then f-distill's, and that without one part at a time."""
    nets = networks(sizes)
    generator = torch.Generator().manual_seed(0)
    images = DATA * torch.randn(512, 3, sizes.size, sizes.size, generator=generator)
    loop = PublishedLoop(copy.deepcopy(nets), images, sizes)
    return [
        Arm("(a) published loop, heads on the fake score", loop.nets, loop.step, list(loop.optimizers.values())),
        _ours("(b) ours, heads on the fake score", copy.deepcopy(nets), images, sizes, "fake"),
        _ours("(c) ours, heads on the teacher, f-weighted", copy.deepcopy(nets), images, sizes, "teacher", True),
        _ours("(d) (c) without the adversarial term", copy.deepcopy(nets), images, sizes, "teacher", True, 0.0),
        _ours("(e) (c) with h = 1", copy.deepcopy(nets), images, sizes, "teacher"),
    ]


def _ours(
    name: str, nets: Networks, images: Tensor, sizes: Sizes, heads: str, weighted: bool = False,
    adversarial_weight: float = ADVERSARIAL_WEIGHT,
) -> Arm:  # fmt: skip
    network = nets.fake if heads == "fake" else nets.teacher
    common: dict[str, Any] = {
        "network": network, "tap": nets.bottleneck(network), "heads": nets.heads, "train_heads": nets.heads,
        "reals": RealImages(Images(images), tuple(images.shape[1:]), None), "weight": DISCRIMINATOR_WEIGHT,
    }  # fmt: skip
    optimizers = [adamw(nets.student, RATES), adamw(nets.fake, RATES, nets.heads)]
    student_update, fake_update = (Update(optimizer, lambda step: RATES.lr, CLIP) for optimizer in optimizers)
    trainer = Trainer(
        OneStep(nets.student, HIGH), nets.fake, Fixed(nets.teacher), student_update, fake_update,
        student_level, fake_level, Share(0, sizes.batch), tuple(images.shape[1:]),
        ratio_weight=RatioWeight(DIVERGENCES["jensen-shannon"]) if weighted else None,
        adversary=FakeHeads(**common) if heads == "fake" else TeacherHeads(**common, level=student_level),
        adversarial_weight=adversarial_weight,
        fake_steps=sizes.fake_steps,
        sigma_data=DATA,
        average=Average(nets.average, nets.student, DECAY),
    )  # fmt: skip
    return Arm(name, nets, trainer.step, optimizers)
