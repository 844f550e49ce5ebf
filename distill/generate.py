"""Images from a folder: a teacher through a solver, a student by its steps; sample k depends on (seed, k) only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.folders import load_pipeline
from distill.noise import GENERATION
from distill.recipe import LANDING, Recipe, Sampling, gaussian_of, read_recipe
from distill.student import Student
from distill.student_run import StudentRun
from distill.teacher import PromptsInWords, Teacher
from samplers import SOLVERS, Denoiser, SampleNoise, denoiser_from, sample, teleported
from samplers.solvers import Solver
from samplers.teleport_checks import check_gaussian, family_of


@dataclass(frozen=True)
class ImageGenerator:
    """Makes sample number k from (seed, k): the same image in any batch.

    nfe: network evaluations for a sample (a guided one evaluates twice a step and counts so). shape: [C, H, W] of an
    image. solver, sigmas: of a diffusion model; student: of a student. latents: what is sampled instead of pixels, and
    how it becomes images.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    n_classes: int | None
    nfe: int
    solver: Solver | None
    sigmas: Tensor
    device: torch.device
    stream: int = GENERATION
    latents: Teacher | None = None
    student: Student | None = None

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Balanced class labels [B]: k modulo the number of classes; None if the model is unconditional."""
        return None if self.n_classes is None else torch.tensor([k % self.n_classes for k in indices])

    @torch.no_grad()
    def __call__(self, seed: int, indices: Sequence[int], labels: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W], nominally in [-1, 1], on the CPU. labels [B]: instead of the balanced ones."""
        noise = SampleNoise(seed, indices, self.stream)
        labels = self.labels(indices) if labels is None else labels
        cond = None if labels is None else labels.to(self.device)
        if self.latents is None:
            return self._sample(noise, self.shape, cond).cpu()
        if self.latents.words is not None:  # prompt k modulo their number
            cond = self.latents.condition_of(torch.tensor(list(indices)))
        return self.latents.pictures(self._sample(noise, self.latents.shape, cond)).cpu()

    def _sample(self, noise: SampleNoise, shape: Sequence[int], cond: Any) -> Tensor:
        z = noise.normal(shape, device=self.device)
        if self.student is not None:
            return self.student(z, cond, noise)
        assert self.solver is not None
        return sample(self.solver, self.denoiser, self.sigmas[0] * z, self.sigmas, cond, noise)


def load_generator(
    path: str | Path,
    sampler: str = "heun",
    steps: int = 18,
    guidance: float = 1.0,
    device: str = "cpu",
    *,
    teleport: str | Path | None = None,
    sigma_skip: float | None = None,
    tolerance: float = 0.05,
    prompts: str | Path | None = None,
) -> ImageGenerator:
    """Reads a run folder of this library or a pipeline folder, and says how to sample it.

    A student (a run of `distill train` or one checkpoint of it, an exported one, or a stock consistency model) takes
    its own steps; `sampler`, `steps`, `guidance`, and what follows `device`, except the prompts, are for diffusion
    models only (see `distill.recipe.Sampling`).
    Raises ValueError for a folder that is none of these, an unknown sampler or device, guidance of a diffusion model
    that has no null label, a Gaussian of something else, and prompts that are missing, or of no use.
    """
    usable_device(device)
    sampling = Sampling(sampler, steps, guidance, _name(teleport), sigma_skip, tolerance, _name(prompts))
    return generator_of(read_recipe(path, sampling), device)


def generator_of(recipe: Recipe, device: str = "cpu") -> ImageGenerator:
    """The networks of a recipe, on a device. Raises ValueError for files that do not fit each other, and the device."""
    where = usable_device(device)
    generator = _generator(recipe, where)
    if recipe.gaussian is None or recipe.sigma_skip is None or generator.solver is None:
        return generator
    gaussian = gaussian_of(recipe.gaussian)
    if generator.latents is not None:
        pipe = generator.latents.pipe
        check_gaussian(pipe, family_of(pipe), gaussian)
    solver = teleported(generator.solver, gaussian.to(where), recipe.sigma_skip, landing=LANDING)
    return replace(generator, solver=solver)


def _generator(recipe: Recipe, device: torch.device) -> ImageGenerator:
    """Without a jump."""
    latents, student = None, None
    denoiser: Denoiser
    if recipe.latent:
        guidance = 1.0 if recipe.student is not None else recipe.settings["guidance"]
        latents = Teacher.of_pipeline(_pipeline(recipe).to(device), guidance, **recipe.asked)
        if recipe.prompts is not None:
            latents = latents.under(PromptsInWords(recipe.prompts, latents.embed))
        denoiser = latents.guided
    elif recipe.kind == "run":
        run = StudentRun.read(recipe.files[0].parent)
        denoiser = denoiser_from(run.load_network(), run.scheduler).to(device)
    else:
        teacher = Teacher.load(recipe.folder)
        teacher.denoiser.to(device)
        plain = recipe.student is not None
        denoiser = teacher.denoiser if plain else replace(teacher, guidance=recipe.settings["guidance"]).guided
    if recipe.student is not None:
        student = Student(denoiser, recipe.student.sigmas, recipe.student.start, recipe.student.noises)
    solver = None if student is not None else SOLVERS[recipe.settings["sampler"]]
    return ImageGenerator(
        denoiser,
        recipe.shape,
        recipe.n_classes,
        recipe.nfe,
        solver,
        recipe.sigmas,
        device,
        latents=latents,
        student=student,
    )


def _pipeline(recipe: Recipe) -> Any:
    """A pipeline of latents; that of a run is its teacher's, with the student's network in it."""
    if recipe.base is None:
        return load_pipeline(recipe.folder)
    run = StudentRun.read(recipe.files[0].parent)
    pipe = load_pipeline(recipe.base, without=(run.part,))
    pipe.register_modules(**{run.part: run.load_network(recipe.base)})
    return pipe


def _name(file: str | Path | None) -> str | None:
    return None if file is None else str(file)


def usable_device(name: str) -> torch.device:
    """A device that exists; ValueError for any other name."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    if device.type == "meta":
        raise ValueError(f"device: {name!r} cannot be used here (nothing is computed on it)")
    return device
