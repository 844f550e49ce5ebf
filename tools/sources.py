"""Where the images to be judged come from: a folder of images, the embedded digits, or a generator.

A generator (a run folder, a diffusers pipeline) makes each draw anew from its own seed; a folder is dealt once, in an
order that a seed decides, into draws that share no image.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from distill.data import IMAGE_SUFFIXES, Images, folder

GENERATED = ("model_index.json", "config.yaml")  # one of these makes a folder a generator, images in it or not
BATCH = 500  # samples made at once

Progress = Callable[[int], object]  # told how many images were made, after every batch


@dataclass(frozen=True)
class Draw:
    """Images [n, C, H, W] in [-1, 1], the labels [n] asked for or None, and the seconds that making them took."""

    images: Tensor
    labels: Tensor | None = None
    seconds: float | None = None


class Generator(Protocol):
    """What `distill.generate.load_generator` returns; sample k of a seed depends on (seed, k) only."""

    @property
    def nfe(self) -> int: ...

    def labels(self, indices: range) -> Tensor | None: ...

    def __call__(self, seed: int, indices: range) -> Tensor: ...


@dataclass(frozen=True)
class Fixed:
    """Images that exist already, [N, C, H, W]."""

    images: Tensor
    labels: Tensor | None = None
    nfe: int | None = None

    def draws(self, n: int, draws: int, seed: int, progress: Progress) -> Iterator[Draw]:
        """As many disjoint draws of n as there are, `draws` at most; fewer images than n are one draw of all."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        n = min(n, len(order))
        for part in order.split(n)[: min(draws, len(order) // n)]:
            progress(len(part))
            yield Draw(self.images[part], None if self.labels is None else self.labels[part])


@dataclass(frozen=True)
class Generated:
    """Images that a generator makes."""

    generator: Generator

    @property
    def nfe(self) -> int:
        return self.generator.nfe

    def draws(self, n: int, draws: int, seed: int, progress: Progress) -> Iterator[Draw]:
        """Draw j is samples 0 ... n - 1 of seed + j. One batch before the first is not timed: it warms up."""
        self.generator(seed, range(min(BATCH, n)))
        for draw in range(draws):
            batches, seconds = [], 0.0
            for start in range(0, n, BATCH):
                indices = range(start, min(start + BATCH, n))
                begun = time.perf_counter()
                batches.append(self.generator(seed + draw, indices).float().cpu())  # waits for the device
                seconds += time.perf_counter() - begun
                progress(len(indices))
            yield Draw(torch.cat(batches), self.generator.labels(range(n)), seconds)


Source = Fixed | Generated


def is_generator(path: str | Path) -> bool:
    """Whether `path` is a run folder or a pipeline folder, rather than a folder of images."""
    return any((Path(path) / name).is_file() for name in GENERATED)


def image_folder(path: str | Path) -> Images:
    """Every image below `path`, none resized: resizing decides a Fréchet distance, so it is done knowingly before.

    Grey if all images are grey, else RGB. Raises ValueError, naming the file, for images that are not square or of
    different sizes, that cannot be read, and when there is none.
    """
    from PIL import Image

    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"images: {root} is not a folder")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise ValueError(
            f"images: {root} has no images ({', '.join(IMAGE_SUFFIXES)}), and is no run or pipeline either"
        )

    size, channels = 0, 1
    for file in files:
        try:
            with Image.open(file) as image:
                width, height = image.size
                channels = channels if image.mode in ("1", "L") else 3
        except Exception as error:
            raise ValueError(f"images: {file} cannot be read as an image ({type(error).__name__})") from error
        size = size or width
        if (width, height) != (size, size):
            raise ValueError(f"images: {file} is {width}x{height}, not {size}x{size}; all must be equal squares")
    return folder(root, size, channels)
