"""What a run distils: a diffusers teacher or an exact toy, and the networks of the student and the fake score."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import pictures, toy
from distill.config import Train
from distill.noise import GENERATION
from distill.student import OneStep
from distill.teacher import Teacher
from samplers import Denoiser, GaussianMixture, NetworkDenoiser, SampleNoise

PREVIEW_ROWS = 8
PREVIEW_POINTS = 2000


@dataclass(frozen=True)
class Subject:
    """A teacher as the trainer needs it.

    target: the denoiser to match, guided if the run says so. network: the denoiser whose encoder can be read, None of
    a toy. student, fake: what is trained, at its start. shape: of a sample. conditions(noise, device): of a batch.
    mixture: what a toy is. preview(student, path): draws a student.
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
    preview: Callable[[OneStep, Path], None]
    mixture: GaussianMixture | None = None


def load_subject(config: Train, device: torch.device) -> Subject:
    """The subject that a configuration names; its networks are made on the CPU, the target is on `device`.

    Raises ValueError as `Teacher.load`, and for a student's start outside the teacher's range.
    """
    if config.teacher.name != "pipeline":
        return _toy(config, device)
    teacher = Teacher.load(str(config.teacher.path), config.teacher.guidance)
    OneStep(teacher.denoiser, config.student.sigma_init)
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
        lambda student, path: pictures.save_grid(_grid(student, teacher.shape, teacher.n_classes, device), path),
    )


def _toy(config: Train, device: torch.device) -> Subject:
    torch.manual_seed(config.seed)
    mixture = toy.MIXTURES[config.teacher.name]()
    student, fake = toy.networks(mixture, config.toy)
    mixture = mixture.to(device)
    shape = (mixture.dim,)
    reference = mixture.sample(PREVIEW_POINTS, generator=torch.Generator(device).manual_seed(0))

    def preview(student: OneStep, path: Path) -> None:
        z = SampleNoise(0, range(PREVIEW_POINTS), GENERATION).normal(shape, device=device)
        with torch.no_grad():
            pictures.save_points(student(z), reference, path)

    return Subject(
        mixture,
        None,
        student,
        fake,
        shape,
        None,
        toy.SIGMA_MIN,
        toy.SIGMA_MAX,
        lambda noise, device: None,
        preview,
        mixture,
    )


def preview_start(shape: tuple[int, ...], n_classes: int | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Noise and labels of a grid of ten columns; always the same noise, so that grids can be compared."""
    n = 10 * PREVIEW_ROWS
    z = SampleNoise(0, range(n), GENERATION).normal(shape, device=device)
    return z, None if n_classes is None else torch.arange(n, device=device) % 10 % n_classes


@torch.no_grad()
def _grid(student: OneStep, shape: tuple[int, ...], n_classes: int | None, device: torch.device) -> Tensor:
    return student(*preview_start(shape, n_classes, device))
