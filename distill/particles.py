"""Images by a Feynman-Kac corrector: each is drawn from its own weighted particles, of which none is another image's.

Sample k, with its particles, depends on (seed, k) and their number only.
"""

import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from distill.folders import pipeline_folder
from distill.generate import usable_device
from distill.noise import PARTICLES
from distill.sections import TargetName
from distill.teacher import Teacher
from samplers import (
    Conditioned,
    Corrector,
    Denoiser,
    SampleNoise,
    Target,
    annealed,
    diagnose,
    draw,
    feynman_kac,
    geometric_average,
    karras_sigmas,
    product,
    reward_tilted,
    start_particles,
)

LabelledReward = Callable[[Tensor, Tensor | None], Tensor]

_AT_ONCE = 4096  # particles in a batch of the network


@dataclass(frozen=True)
class TargetChoice:
    """What to sample from a model whose guided law (at `guidance`) is the base.

    guided: the geometric average itself. annealed: the base to the power beta. product: the laws of `classes`
    multiplied, each to the power beta. reward: the base times exp(scale * reward(images, labels)); steer: by its
    gradient too. particles: for each image.
    """

    name: TargetName
    beta: float = 1.0
    classes: tuple[int, ...] = ()
    reward: LabelledReward | None = None
    scale: float = 1.0
    steer: bool = False
    particles: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta: {self.beta}; accepted are positive numbers")
        if type(self.particles) is not int or self.particles < 1:
            raise ValueError(f"particles: {self.particles}; accepted are whole numbers of at least 1")
        if self.name == "product" and len(self.classes) < 2:
            raise ValueError(f"classes: {list(self.classes)}; a product needs at least two")
        if (self.name == "reward") != (self.reward is not None):
            raise ValueError("reward: is for the target 'reward', which needs one")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale: {self.scale}; accepted are finite numbers")


@dataclass
class ParticleGenerator:
    """Makes sample number k from (seed, k).

    nfe: evaluations of the network for one image, all its particles together; a product with the Jacobian, for a probe
    of the trace or to steer, counts as two. lowest_ess, fewest_ancestors, most_clipped: of any image's particles so
    far, at any step; the last is the share of a step's weight that clamping moved.
    """

    teacher: Teacher
    choice: TargetChoice
    sigmas: Tensor
    device: torch.device
    corrector: Corrector = field(default_factory=Corrector)
    lowest_ess: float = math.inf
    fewest_ancestors: float = math.inf
    most_clipped: float = 0.0

    @property
    def nfe(self) -> int:
        target = self.target(None)
        total = sum(target.exponents_at(float(self.sigmas[0])))
        traced = self.corrector.traces(total) and total != 1
        probes = (self.corrector.probes or math.prod(self.teacher.shape)) if traced else 0
        asked = {(id(d.denoiser), id(d.cond)) if isinstance(d, Conditioned) else id(d) for d in target.denoisers}
        products = probes + self.choice.steer
        return (len(self.sigmas) - 1) * self.choice.particles * len(asked) * (1 + 2 * products)

    @property
    def report(self) -> str:
        """What became of the particles so far, in one line."""
        clipped = f"; up to {self.most_clipped:.0%} of a step's weight was clamped" if self.most_clipped else ""
        return (
            f"of {self.choice.particles} particles at least {self.lowest_ess:.1f} carried weight, and at least "
            f"{self.fewest_ancestors:.0f} have descendants{clipped}"
        )

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Balanced class labels [B]; None if the model or the target has no use for one."""
        n = self.teacher.n_classes
        return None if n is None or self.choice.name == "product" else torch.tensor([k % n for k in indices])

    def target(self, labels: Tensor | None) -> Target:
        """For a batch of these labels, one for each particle [B]."""
        choice, denoiser = self.choice, self.teacher.denoiser
        if choice.name == "product":
            return product(
                [self._base(denoiser, label) for label in choice.classes], [choice.beta] * len(choice.classes)
            )
        base = self._base(denoiser)
        if choice.name == "annealed":
            return annealed(base, choice.beta)
        if choice.reward is None:
            return base
        reward = choice.reward
        return reward_tilted(base, lambda x: reward(x, labels), choice.scale, gradient=choice.steer)

    @functools.cached_property
    def _uncond(self) -> Conditioned:
        """One object, so that a target of several classes asks for it once."""
        null = torch.tensor([self.teacher.null_label], device=self.device)
        return Conditioned(self.teacher.denoiser, null)

    def _base(self, denoiser: Denoiser, label: int | None = None) -> Target:
        """The guided law, of the batch's labels or of one class."""
        w = self.teacher.guidance
        own = denoiser if label is None else Conditioned(denoiser, torch.tensor([label], device=self.device))
        if w == 1:
            return product([own])
        uncond = self._uncond
        return product([uncond]) if w == 0 else geometric_average(uncond, own, w)

    def __call__(self, seed: int, indices: Sequence[int], labels: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W], nominally in [-1, 1], on the CPU. labels [B]: instead of the balanced ones."""
        if not len(indices):
            raise ValueError("indices: there are none")
        labels = self.labels(indices) if labels is None else labels
        at_once = max(1, _AT_ONCE // self.choice.particles)
        batches = [slice(i, i + at_once) for i in range(0, len(indices), at_once)]
        return torch.cat([self._batch(seed, indices[b], None if labels is None else labels[b]) for b in batches])

    def _batch(self, seed: int, indices: Sequence[int], labels: Tensor | None) -> Tensor:
        k, n = self.choice.particles, len(indices)
        noise = SampleNoise(seed, [index * k + j for index in indices for j in range(k)], PARTICLES)
        own = None if labels is None else labels.to(self.device).repeat_interleave(k)
        target, sigma = self.target(own), float(self.sigmas[0])
        x, log_weights = start_particles(
            target, self.teacher.shape, sigma, k, groups=n, cond=own, generator=noise, device=self.device
        )
        states = feynman_kac(
            target, x, self.sigmas, own, noise, groups=n, log_weights=log_weights, corrector=self.corrector
        )
        diagnosis = diagnose(states)
        self.lowest_ess = min(self.lowest_ess, float(diagnosis.ess.min()))
        self.fewest_ancestors = min(self.fewest_ancestors, float(diagnosis.unique_ancestors.min()))
        self.most_clipped = max(self.most_clipped, float(diagnosis.clipped.max()))
        return draw(diagnosis.last, 1, noise).cpu()


def load_particle_generator(
    path: str | Path, choice: TargetChoice, steps: int, guidance: float = 1.0, device: str = "cpu"
) -> ParticleGenerator:
    """Reads a run of `distill teach` or a pipeline folder.

    Raises ValueError for one that is no diffusion model, and guidance or classes that it does not have.
    """
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance: {guidance}; accepted are finite scales from 0")
    where = usable_device(device)
    teacher = Teacher.load(pipeline_folder(path), guidance)
    consistency = type(teacher.scheduler).__name__ == "CMStochasticIterativeScheduler"
    if teacher.facts.get("kind", "student" if consistency else "teacher") == "student":
        raise ValueError(
            f"{path}: is a student, which knows its own noise levels only; targets are sampled from diffusion models"
        )
    if choice.name == "guided" and teacher.guidance == 1:
        raise ValueError("guidance: 1 is the model itself; the target 'guided' needs another scale")
    if choice.name == "product" and guidance == 0:
        raise ValueError("guidance: 0 takes the classes away that the target 'product' multiplies")
    for label in choice.classes:
        if not 0 <= label < (teacher.n_classes or 0):
            raise ValueError(f"classes: {label}; the model has {teacher.n_classes or 'no'} classes, from 0")
    teacher.denoiser.to(where)
    sigmas = karras_sigmas(steps, teacher.sigma_min, teacher.sigma_max)
    return ParticleGenerator(teacher, choice, sigmas, where)


def import_reward(name: str) -> LabelledReward:
    """The function MODULE:FUNCTION of images [B, C, H, W] and labels [B] (None without classes) that gives [B]."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute) or module.startswith("."):
        raise ValueError(f"reward: {name!r}; needed is MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())  # a file beside the user, whose command lies elsewhere
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module does
        raise ValueError(f"reward: {name!r} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ValueError(f"reward: {name!r} is not a function")
    return found
