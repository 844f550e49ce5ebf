"""Images from a folder: a teacher through a solver, a student in one step; sample k depends on (seed, k) only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distill.export import load_student_network
from distill.noise import GENERATION
from distill.run import read_record
from distill.student import OneStep
from distill.teacher import Teacher, pipeline_folder, sample_shape
from samplers import SOLVERS, Denoiser, SampleNoise, denoiser_from, karras_sigmas, nfe, sample
from samplers.solvers import Solver


@dataclass(frozen=True)
class ImageGenerator:
    """Makes sample number k from (seed, k): the same image in any batch.

    nfe: network evaluations for a sample (a guided one evaluates twice a step and counts so). shape: [C, H, W].
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    n_classes: int | None
    nfe: int
    solver: Solver | None
    sigmas: Tensor
    device: torch.device
    stream: int = GENERATION

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Balanced class labels [B]: k modulo the number of classes; None if the model is unconditional."""
        return None if self.n_classes is None else torch.tensor([k % self.n_classes for k in indices])

    @torch.no_grad()
    def __call__(self, seed: int, indices: Sequence[int], labels: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W], nominally in [-1, 1], on the CPU. labels [B]: instead of the balanced ones."""
        noise = SampleNoise(seed, indices, self.stream)
        z = noise.normal(self.shape, device=self.device)
        labels = self.labels(indices) if labels is None else labels
        cond = None if labels is None else labels.to(self.device)
        if self.solver is None:
            return OneStep(self.denoiser, float(self.sigmas[0]))(z, cond).cpu()
        return sample(self.solver, self.denoiser, self.sigmas[0] * z, self.sigmas, cond, noise).cpu()


def load_generator(
    path: str | Path, sampler: str = "heun", steps: int = 18, guidance: float = 1.0, device: str = "cpu"
) -> ImageGenerator:
    """Reads a run folder of this library or a pipeline folder, and says how to sample it.

    A student (a run of `distill train`, an exported one, or a stock consistency model) runs in one step; `sampler`,
    `steps` and `guidance` are for diffusion models only. Raises ValueError for a folder that is none of these, an
    unknown sampler or device, or guidance of a diffusion model that has no null label.
    """
    if sampler not in SOLVERS:
        raise ValueError(f"sampler: {sampler!r}; accepted are {', '.join(SOLVERS)}")
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance: {guidance}; accepted are finite scales from 0")
    where = usable_device(device)
    if _is_student_run(Path(path)):
        network, scheduler, facts, config = load_student_network(Path(path))
        denoiser = denoiser_from(network, scheduler).to(where)
        shape = sample_shape(network)
        start = config.student.sigma_init
        n_classes = len(facts["classes"]) or network.config.num_class_embeds
        return _one_step(denoiser, shape, n_classes, start, where)

    teacher = Teacher.load(pipeline_folder(path))
    denoiser = teacher.denoiser.to(where)
    consistency = type(teacher.scheduler).__name__ == "CMStochasticIterativeScheduler"
    if teacher.facts.get("kind", "student" if consistency else "teacher") == "student":
        return _one_step(denoiser, teacher.shape, teacher.n_classes, teacher.sigma_max, where)

    teacher = replace(teacher, guidance=guidance)
    sigmas = karras_sigmas(steps, teacher.sigma_min, teacher.sigma_max)
    solver = SOLVERS[sampler]
    evaluations = nfe(solver, sigmas) * (1 if guidance == 1 else 2)
    return ImageGenerator(teacher.guided, teacher.shape, teacher.n_classes, evaluations, solver, sigmas, where)


def _one_step(
    denoiser: Denoiser, shape: tuple[int, ...], n_classes: int | None, sigma_init: float, device: torch.device
) -> ImageGenerator:
    sigmas = torch.tensor([sigma_init, 0.0], dtype=torch.float64)
    return ImageGenerator(denoiser, shape, n_classes, 1, None, sigmas, device)


def _is_student_run(path: Path) -> bool:
    return bool(read_record(path).get("command") == "train")


def usable_device(name: str) -> torch.device:
    """A device that exists; ValueError for any other name."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
