"""Real samples for a discriminator: from data, or made by the teacher once and kept.

A fake and the real sample beside it have the same condition, so that the ratio is that of the conditional densities,
whatever the shares of the classes in the data.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distill import checkpoint
from distill.data import Images
from distill.folders import FACTS, pipeline_folder
from distill.generate import ImageGenerator, load_generator
from distill.noise import TEACHER_SAMPLES
from distill.progress import Progress
from distill.sections import Real, TeacherSource
from samplers import GaussianMixture, SampleNoise
from samplers.atomic import atomic_write

CHUNK = 256  # samples in a file of the cache
_FORMAT = 1


class RealImages:
    """(noise, cond) -> images [B, ...] on `device`, each drawn from those of its class; cond: labels [B] or None.

    Raises ValueError for images of another shape than `shape`, or a class of the teacher that has none.
    """

    def __init__(
        self, images: Images, shape: tuple[int, ...], n_classes: int | None, device: torch.device | str = "cpu"
    ) -> None:
        if tuple(images.images.shape[1:]) != tuple(shape):
            raise ValueError(f"real.data: its images are {list(images.images.shape[1:])}, the teacher's {list(shape)}")
        order = torch.arange(len(images))
        self._counts = self._starts = None
        if n_classes is not None:
            if images.labels is None:
                raise ValueError(f"real.data: has no classes, and the teacher has {n_classes}")
            counts = images.labels.bincount(minlength=n_classes)
            if len(counts) > n_classes or not bool(counts.all()):
                empty = [label for label, count in enumerate(counts.tolist()) if not count]
                found = f"none of class {empty[0]}" if empty else f"{len(counts)} classes"
                raise ValueError(f"real.data: has {found}; needed are images of each of the teacher's {n_classes}")
            order = images.labels.argsort(stable=True)
            self._counts, self._starts = counts.to(device), (counts.cumsum(0) - counts).to(device)
        self._images = images.images[order].to(device)

    def __call__(self, noise: SampleNoise, cond: Any) -> Tensor:
        u = noise.uniform().to(self._images.device)
        if self._counts is None or self._starts is None:
            return self._images[(u * len(self._images)).long()]
        return self._images[self._starts[cond] + (u * self._counts[cond]).long()]


class RealMixture:
    """Samples of a mixture, each from its own stream, [B, d]."""

    def __init__(self, mixture: GaussianMixture, device: torch.device | str = "cpu") -> None:
        self._mixture, self._device = mixture, device
        self._below = mixture.log_weights.exp().cumsum(0)

    def __call__(self, noise: SampleNoise, cond: Any) -> Tensor:
        u = noise.uniform().to(self._below)
        component = torch.searchsorted(self._below, u).clamp_max(len(self._below) - 1)
        eps = noise.normal((self._mixture.dim,), self._below.dtype, self._below.device)
        return self._mixture.place(component, eps).to(self._device)


def teacher_samples(source: TeacherSource, real: Real, accelerator: Accelerator) -> Images:
    """`real.count` samples of the teacher, balanced over its classes, from the cache or made now.

    The cache is a folder named by a hash of what made the samples: weights, coordinates, guidance, sampler, steps and
    seed (key.json in it says them). Sample k does not depend on the count. Files hold CHUNK samples each and appear
    when complete, so a run that was killed goes on where it stopped. Processes share the work.
    """
    generator = load_generator(str(source.path), real.sampler, real.steps, source.guidance, str(accelerator.device))
    generator = replace(generator, stream=TEACHER_SAMPLES)
    key = cache_key(source, real)
    text = json.dumps(key, sort_keys=True)
    folder = Path(real.cache) / hashlib.sha256(text.encode()).hexdigest()[:16]
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "key.json") as file:
            file.write(json.dumps(key, indent=1).encode())
    accelerator.wait_for_everyone()

    chunks = range((real.count + CHUNK - 1) // CHUNK)
    own = [c for c in chunks if c % accelerator.num_processes == accelerator.process_index]
    if any(_read(folder, c, generator) is None for c in chunks):
        with Progress(real.count, "teacher sample") as progress:
            for done, c in enumerate(own, start=1):
                if _read(folder, c, generator) is None:
                    _make(folder, c, generator, real.seed)
                progress(min(real.count, done * CHUNK * accelerator.num_processes))
    accelerator.wait_for_everyone()

    images = []
    for c in chunks:
        found = _read(folder, c, generator)
        if found is None:  # on a machine of its own, without the others' disk
            _make(folder, c, generator, real.seed)
            found = _read(folder, c, generator)
        assert found is not None
        images.append(found)
    return Images(torch.cat(images)[: real.count], generator.labels(range(real.count)))


def cache_key(source: TeacherSource, real: Real) -> dict[str, Any]:
    """All that decides sample k of a teacher, but k."""
    folder = pipeline_folder(str(source.path))
    files = [*sorted((folder / "unet").glob("*")), folder / "scheduler/scheduler_config.json", folder / FACTS]
    return {
        "format": _FORMAT,
        "teacher": {str(f.relative_to(folder)): checkpoint.sha256(f) for f in files if f.is_file()},
        "guidance": source.guidance,
        "sampler": real.sampler,
        "steps": real.steps,
        "seed": real.seed,
    }


def _make(folder: Path, chunk: int, generator: ImageGenerator, seed: int) -> None:
    images = generator(seed, range(chunk * CHUNK, (chunk + 1) * CHUNK))
    with atomic_write(_file(folder, chunk)) as file:
        file.write(save({"images": images.contiguous()}))


def _read(folder: Path, chunk: int, generator: ImageGenerator) -> Tensor | None:
    """A chunk's images, or None where there is no whole one."""
    file = _file(folder, chunk)
    try:
        images = load(file.read_bytes())["images"]
    except (OSError, SafetensorError, KeyError):
        return None
    return images if images.shape == (CHUNK, *generator.shape) else None


def _file(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:06d}.safetensors"
