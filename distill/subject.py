"""What a run distils: a diffusers teacher or an exact toy, and the networks of the student and the fake score."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import pictures, toy
from distill.config import FirstStage, Train
from distill.noise import GENERATION, check_log_normal, check_range
from distill.student import OneStep
from distill.teacher import Teacher
from samplers import Denoiser, GaussianMixture, NetworkDenoiser, SampleNoise, heun, karras_sigmas, sample

PREVIEW_ROWS = 8
PREVIEW_POINTS = 2000
Generate = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Subject:
    """A teacher as the trainer needs it.

    target: the denoiser to match, guided if the run says so. network: the denoiser whose encoder can be read and whose
    weights can be copied, None of an exact toy. student, fake: what is trained, at its start. shape: of a sample.
    conditions(noise, device): of a batch. mixture: what a toy is. preview(generate, path): draws what generate(z, cond)
    makes of standard normal z [N, ...].
    """

    target: Denoiser
    network: NetworkDenoiser | None
    student: nn.Module
    fake: NetworkDenoiser
    shape: tuple[int, ...]
    n_classes: int | None
    sigma_min: float
    sigma_max: float
    conditions: Callable[[SampleNoise, torch.device | str], Any]
    preview: Callable[[Generate, Path], None]
    mixture: GaussianMixture | None = None


def load_subject(config: Train | FirstStage, device: torch.device) -> Subject:
    """The subject that a configuration names; its networks are made on the CPU, the target is on `device`.

    Raises ValueError as `Teacher.load`, and for a student's start outside the teacher's range.
    """
    if config.teacher.name != "pipeline":
        return _toy(config, device)
    teacher = Teacher.load(str(config.teacher.path), config.teacher.guidance)
    OneStep(teacher.denoiser, sigma_init(config))
    teacher.denoiser.to(device)
    return Subject(
        teacher.guided,
        teacher.denoiser,
        teacher.clone().eval(),
        teacher.clone().eval(),
        teacher.shape,
        teacher.n_classes,
        teacher.sigma_min,
        teacher.sigma_max,
        teacher.conditions,
        lambda generate, path: pictures.save_grid(_grid(generate, teacher.shape, teacher.n_classes, device), path),
    )


def checked_subject(config: Train | FirstStage, device: torch.device) -> tuple[Subject, float, float]:
    """The subject and the range of noise levels, both found good before anything is written."""
    subject = load_subject(config, device)
    if isinstance(config, FirstStage):
        low, high = check_range(config.sigma_min, config.sigma_max, subject.sigma_min, subject.sigma_max)
        check_log_normal("fake.noise", config.noise, low, high)
        return subject, low, high
    low, high = check_range(config.noise.sigma_min, config.noise.sigma_max, subject.sigma_min, subject.sigma_max)
    check_log_normal("fake.noise", config.fake.noise, low, high)
    if config.real.name == "teacher" and config.real.count < (subject.n_classes or 1):
        raise ValueError(f"real.count: {config.real.count} is less than one for each of {subject.n_classes} classes")
    return subject, low, high


def _toy(config: Train | FirstStage, device: torch.device) -> Subject:
    torch.manual_seed(config.seed)
    mixture = toy.MIXTURES[config.teacher.name]()
    student: nn.Module
    if config.teacher.path is None:
        network = None
        student, fake = toy.networks(mixture, config.toy)
    else:
        network = toy.load_denoiser(config.teacher.path, config.teacher.name)
        OneStep(network, sigma_init(config))
        student, fake = (copy.deepcopy(network).requires_grad_(True) for _ in range(2))
        network.to(device)
    mixture = mixture.to(device)
    shape = (mixture.dim,)

    return Subject(
        mixture if network is None else network,
        network,
        student,
        fake,
        shape,
        None,
        toy.SIGMA_MIN,
        toy.SIGMA_MAX,
        lambda noise, device: None,
        toy_preview(mixture, device),
        mixture,
    )


def sampled(denoiser: NetworkDenoiser) -> Generate:
    """Generation by 18 Heun steps from the highest noise level."""
    sigmas = karras_sigmas(18, denoiser.sigma_min, denoiser.sigma_max)
    return lambda z, cond: sample(heun, denoiser, sigmas[0] * z, sigmas, cond)


def toy_preview(mixture: GaussianMixture, device: torch.device) -> Callable[[Generate, Path], None]:
    """Draws points over those of the mixture; always of the same noise."""
    shape = (mixture.dim,)
    reference = mixture.sample(PREVIEW_POINTS, generator=torch.Generator(device).manual_seed(0))

    def preview(generate: Generate, path: Path) -> None:
        z = SampleNoise(0, range(PREVIEW_POINTS), GENERATION).normal(shape, device=device)
        with torch.no_grad():
            pictures.save_points(generate(z, None), reference, path)

    return preview


def sigma_init(config: Train | FirstStage) -> float:
    """The noise level of a student's input."""
    return config.student.sigma_init if isinstance(config, Train) else config.sigma_init


def preview_start(shape: tuple[int, ...], n_classes: int | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Noise and labels of a grid of ten columns; always the same noise, so that grids can be compared."""
    n = 10 * PREVIEW_ROWS
    z = SampleNoise(0, range(n), GENERATION).normal(shape, device=device)
    return z, None if n_classes is None else torch.arange(n, device=device) % 10 % n_classes


@torch.no_grad()
def _grid(generate: Generate, shape: tuple[int, ...], n_classes: int | None, device: torch.device) -> Tensor:
    return generate(*preview_start(shape, n_classes, device))
