"""Real samples for a discriminator: from data, or made by the teacher once and kept.

A fake and the real sample beside it have the same condition, so that the ratio is that of the conditional densities,
whatever the shares of the classes in the data.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from distill import checkpoint
from distill.config import Train
from distill.data import ImageFiles, Images, continuous
from distill.encoded import LATENTS, MANIFEST, Encoded, encoder_facts
from distill.folders import FACTS, network_part, part_folder, pipeline_folder
from distill.latents import schedule
from distill.methods import Real
from distill.noise import TEACHER_SAMPLES
from distill.progress import Progress
from distill.subject import Subject
from samplers import SOLVERS, GaussianMixture, SampleNoise, sample
from samplers.atomic import atomic_write
from samplers.noise import moved

CHUNK = 256  # samples in a file of the cache
LATENTS_AT_ONCE = 8
_FORMAT = 1


class RealImages:
    """(noise, cond) -> images [B, ...] on `device`, each drawn from those of its condition: labels [B], prompts with
    their numbers, or None.

    n_conditions: of the teacher; None is one without. Raises ValueError for images of another shape than `shape`, or a
    condition of the teacher that has none.
    """

    def __init__(
        self, images: Images, shape: tuple[int, ...], n_conditions: int | None, device: torch.device | str = "cpu"
    ) -> None:
        tables = tables_of(images, shape, n_conditions)
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}
        if tables:
            for place in {torch.device("cpu"), torch.device(device)}:  # prompts' numbers are on the CPU
                self._tables[place] = tuple(table.to(place) for table in tables)
        self._images = images.images.to(device)

    def __call__(self, noise: SampleNoise, cond: Any) -> Tensor:
        device, u = self._images.device, noise.uniform()
        if not self._tables:
            return continuous(self._images[(u * len(self._images)).long().to(device, non_blocking=True)])
        key = getattr(cond, "numbers", cond)
        order, starts, counts = self._tables.get(key.device) or self._tables[torch.device(key.device.type)]
        rows = order[starts[key] + (u.to(key.device, non_blocking=True) * counts[key]).long()]
        return continuous(self._images[rows.to(device, non_blocking=True)])


class RealRows:
    """(noise, cond) -> latents [B, c, h, w], float32, read from disk as they are asked for: those beside the prompts of
    a batch, or drawn from those of its classes.

    Raises ValueError for rows without latents or of another shape, and as `RealImages` for their classes.
    """

    def __init__(
        self, rows: Encoded, shape: tuple[int, ...], n_conditions: int | None, device: torch.device | str = "cpu"
    ) -> None:
        if rows.shape != tuple(shape):
            found = "no latents" if rows.shape is None else f"latents of {list(rows.shape)}"
            raise ValueError(f"real.encoded: {rows.folder} has {found}; the teacher's are {list(shape)}")
        self._rows, self._device = rows, device
        self._classes = None if rows.embeddings else _by_class(rows.labels, n_conditions, "real.encoded")

    def __call__(self, noise: SampleNoise, cond: Any) -> Tensor:
        numbers = getattr(cond, "numbers", cond)  # on the CPU
        if self._classes is not None:
            order, starts, counts = self._classes
            numbers = order[starts[numbers] + (noise.uniform() * counts[numbers]).long()]
        return moved(self._rows.rows(numbers.tolist(), [LATENTS])[LATENTS], self._device).float()


def tables_of(images: Images | ImageFiles, shape: tuple[int, ...], n_conditions: int | None) -> tuple[Tensor, ...]:
    """Of images with conditions: their numbers in the order of the conditions, where each begins there, how many it
    has. Raises ValueError as `RealImages`."""
    if images.shape != tuple(shape):
        raise ValueError(f"real.data: its images are {list(images.shape)}, the teacher's {list(shape)}")
    return () if n_conditions is None else _by_class(images.labels, n_conditions)


def check_classes(data: Sequence[str], teacher: Mapping[str, int]) -> None:
    """Raises ValueError where a class of the data has the name of one of the teacher's, and another label."""
    for label, name in enumerate(data):
        if teacher.get(name, label) != label:
            raise ValueError(
                f"real: class {name!r} of the data has label {label}, and the teacher's {teacher[name]}; classes are "
                "in the order of their folders' names"
            )


def _by_class(labels: Tensor | None, n_conditions: int | None, key: str = "real.data") -> tuple[Tensor, Tensor, Tensor]:
    """Images in the order of their classes; where each class starts there; how many it has. On the CPU.

    Raises ValueError for images without classes, and a class of the teacher that has none.
    """
    if labels is None or n_conditions is None:
        raise ValueError(f"{key}: has no classes, and the teacher has {n_conditions}")
    counts = labels.bincount(minlength=n_conditions)
    if len(counts) > n_conditions or not bool(counts.all()):
        empty = [label for label, count in enumerate(counts.tolist()) if not count]
        found = f"none of class {empty[0]}" if empty else f"{len(counts)} classes"
        raise ValueError(f"{key}: has {found}; needed are images of each of the teacher's {n_conditions}")
    return labels.argsort(stable=True), counts.cumsum(0) - counts, counts


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


def teacher_samples(config: Train, subject: Subject, accelerator: Accelerator) -> Images:
    """`real.count` samples of the teacher, balanced over its classes or prompts, from the cache or made now.

    The cache is a folder named by a hash of what made the samples: weights, coordinates, guidance, sampler, steps and
    seed (key.json in it says them). Sample k does not depend on the count. Files hold CHUNK samples each and appear
    when complete, so a run that was killed goes on where it stopped. Processes share the work.
    """
    real = config.real
    assert subject.network is not None, "a toy is sampled exactly"
    key = cache_key(config, next(subject.network.parameters()).dtype)
    text = json.dumps(key, sort_keys=True)
    folder = Path(real.cache) / hashlib.sha256(text.encode()).hexdigest()[:16]
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "key.json") as file:
            file.write(json.dumps(key, indent=1).encode())
    accelerator.wait_for_everyone()

    chunks = range((real.count + CHUNK - 1) // CHUNK)
    own = [c for c in chunks if c % accelerator.num_processes == accelerator.process_index]
    if any(_read(folder, c, subject.shape) is None for c in chunks):
        with Progress(real.count, "teacher sample") as progress:
            for done, c in enumerate(own, start=1):
                if _read(folder, c, subject.shape) is None:
                    _make(folder, c, subject, real, accelerator.device)
                progress(min(real.count, done * CHUNK * accelerator.num_processes))
    accelerator.wait_for_everyone()

    images = []
    for c in chunks:
        found = _read(folder, c, subject.shape)
        if found is None:  # on a machine of its own, without the others' disk
            _make(folder, c, subject, real, accelerator.device)
            found = _read(folder, c, subject.shape)
        assert found is not None
        images.append(found)
    labels = None if subject.n_conditions is None else torch.arange(real.count) % subject.n_conditions
    return Images(torch.cat(images)[: real.count], labels)


def cache_key(config: Train, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """All that decides sample k of a teacher, whose weights are held in `dtype`, but k."""
    source, real, prompts = config.teacher, config.real, config.prompt_source
    folder = pipeline_folder(str(source.path))
    network = sorted(part_folder(folder, network_part(folder)).glob("*"))
    files = [*network, part_folder(folder, "scheduler") / "scheduler_config.json", folder / FACTS]
    more: dict[str, Any] = {} if dtype == torch.float32 else {"dtype": str(dtype)}
    if source.guidance_interval is not None:
        more["guidance_interval"] = source.guidance_interval
    named = [Path(file) for file in (prompts.file, prompts.encoded and f"{prompts.encoded}/{MANIFEST}") if file]
    if named:
        more |= prompts.model_dump(include={"column", "height", "width"})
        more |= source.model_dump(include={"negative_prompt", "guidance_embedding"})
        more |= {"prompts": [checkpoint.sha256(file) for file in named], "encoders": encoder_facts(folder)}
    return more | {
        "format": _FORMAT,
        "teacher": {str(f.relative_to(folder)): checkpoint.sha256(f) for f in files if f.is_file()},
        "guidance": source.guidance,
        "sampler": real.sampler,
        "steps": real.steps,
        "seed": real.seed,
    }


@torch.no_grad()
def _make(folder: Path, chunk: int, subject: Subject, real: Real, device: torch.device) -> None:
    network = subject.network
    assert network is not None, "a toy is sampled exactly"
    sigmas = schedule(network.coordinates, real.steps)
    made = []
    for start in range(chunk * CHUNK, (chunk + 1) * CHUNK, rows := CHUNK if not subject.latent else LATENTS_AT_ONCE):
        numbers = range(start, start + rows)
        noise = SampleNoise(real.seed, numbers, TEACHER_SAMPLES)
        z = noise.normal(subject.shape, device=device)
        cond = subject.condition_of(torch.tensor(numbers))
        made.append(sample(SOLVERS[real.sampler], subject.target, sigmas[0] * z, sigmas, cond, noise).cpu())
    with atomic_write(_file(folder, chunk)) as file:
        file.write(save({"images": torch.cat(made).contiguous()}))


def _read(folder: Path, chunk: int, shape: tuple[int, ...]) -> Tensor | None:
    """A chunk's images, or None where there is no whole one."""
    file = _file(folder, chunk)
    try:
        images = load(file.read_bytes())["images"]
    except (OSError, SafetensorError, KeyError):
        return None
    return images if images.shape == (CHUNK, *shape) else None


def _file(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:06d}.safetensors"
