"""Training images: the embedded digits, or any folder of images, in memory or read as they are needed.

The digits are the 1,797 real 8x8 handwritten digits that scikit-learn carries (UCI Optical Recognition of
Handwritten Digits), so the whole road can be walked without a download. They are split once, stratified by
class, into a training half and a held-out half that nothing is ever trained on.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "held-out"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Images:
    """Images [N, C, H, W], float32 in [-1, 1] or the levels 0 .. 255 (uint8, a quarter of the memory), and their class
    labels [N] (int64), or None.

    `classes` names the classes in the order of their labels.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W]."""
        return tuple(self.images.shape[1:])

    def read(self, numbers: Sequence[int] | Tensor) -> Tensor:
        """The images with these numbers, [B, C, H, W], float32 in [-1, 1]."""
        return continuous(self.images[torch.as_tensor(numbers)])

    def name(self, number: int) -> str:
        """What to call an image in a message."""
        return f"image {number}"


@dataclass(frozen=True)
class ImageFiles:
    """A folder of images that stay in their files until they are read. See `image_files`."""

    files: tuple[Path, ...]
    size: int
    channels: int
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W]."""
        return self.channels, self.size, self.size

    def read(self, numbers: Sequence[int]) -> Tensor:
        """The images with these numbers, [B, C, H, W], float32 in [-1, 1]. Raises ValueError, naming the file."""
        return continuous(torch.stack([_read(self.files[number], self.size, self.channels) for number in numbers]))

    def name(self, number: int) -> str:
        """What to call an image in a message."""
        return str(self.files[number])

    def load(self) -> Images:
        """All of them in memory, uint8. Raises ValueError, naming the file, for one that cannot be read."""
        levels = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        for row, file in zip(levels, self.files, strict=True):
            row.copy_(_read(file, self.size, self.channels))
        return Images(levels, self.labels, self.classes)


def continuous(images: Tensor) -> Tensor:
    """Levels 0 .. 255 as numbers in [-1, 1], float32; images of floating point as they are."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def digits(split: Split) -> Images:
    """The embedded 8x8 digits, [N, 1, 8, 8]: N = 899 to train on, 898 held out."""
    images, labels, train = _digits()
    chosen = train if split == "train" else ~train
    return Images(images[chosen], labels[chosen], tuple("0123456789"))


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = torch.from_numpy(data.target.astype(np.int64))
    images = torch.from_numpy(data.images.astype(np.float32))[:, None] / 8 - 1

    train = torch.zeros(len(labels), dtype=torch.bool)
    rng = np.random.Generator(np.random.Philox(0))
    seen = taken = 0
    for digit in range(10):  # half of every class, the odd ones in turns
        members = rng.permutation(np.flatnonzero(data.target == digit))
        seen += len(members)
        half = (seen + 1) // 2 - taken
        train[torch.from_numpy(members[:half])] = True
        taken += half
    return images, labels, train


def folder(path: str | Path, size: int, channels: int = 3) -> Images:
    """Every image below `path`, in memory: what `image_files` finds, [N, channels, size, size], uint8."""
    return image_files(path, size, channels).load()


def image_files(path: str | Path, size: int, channels: int = 3) -> ImageFiles:
    """Every image below `path`, not yet read; the sub-folders are the classes, if there are any.

    Images are centre-cropped to a square and resized (antialiased bicubic). Raises ValueError when there is none, or
    some lie in class folders and some beside them; reading raises it, naming the file, when one cannot be read.
    """
    root = Path(path)
    files = found_images(root)
    parents = [f.relative_to(root).parts[0] if len(f.relative_to(root).parts) > 1 else None for f in files]
    if None in parents:
        if any(parents):
            loose = next(f for f, parent in zip(files, parents, strict=True) if parent is None)
            raise ValueError(
                f"data.path: {loose} lies beside class folders; put every image into a class folder or none"
            )
        return ImageFiles(files, size, channels)
    classes = sorted({p for p in parents if p is not None})
    label = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([label[p] for p in parents if p is not None])
    return ImageFiles(files, size, channels, labels, tuple(classes))


def found_images(root: Path) -> tuple[Path, ...]:
    """The files of images below a folder, in the order of their paths, but for hidden ones. Raises ValueError where
    there are none."""
    if not root.is_dir():
        raise ValueError(f"data.path: {root} is not a folder of images")
    named = (f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    shown = (f for f in named if not any(part.startswith(".") for part in f.relative_to(root).parts))
    files = tuple(sorted(f for f in shown if f.is_file()))
    if not files:
        raise ValueError(f"data.path: {root} has no images (looked for {', '.join(IMAGE_SUFFIXES)})")
    return files


def images_identity(files: Sequence[Path], root: Path) -> str:
    """A SHA-256 of the names below `root` and the sizes of images; their contents would take as long as a training."""
    stated = [[file.relative_to(root).as_posix(), file.stat().st_size] for file in files]
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _read(file: Path, size: int, channels: int) -> Tensor:
    """Its levels, [channels, size, size], uint8."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(("I", "F")):  # Pillow would clip these to 8 bits without a word
                raise ValueError(f"its mode is {opened.mode}; accepted are images of 8 bits a channel")
            image = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except Exception as error:
        raise ValueError(f"data.path: {file} cannot be read as an image ({error})") from error
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    array = torch.from_numpy(np.array(image))
    return array[None] if channels == 1 else array.permute(2, 0, 1)


def epoch_order(n: int, seed: int, numbers: range) -> Tensor:
    """Which of n images the samples with these global numbers see, [B]: every epoch is a fresh permutation of all."""
    epochs = {number // n for number in numbers}
    orders = {
        e: np.random.Generator(np.random.Philox(key=np.array([seed, e], np.uint64))).permutation(n) for e in epochs
    }
    return torch.tensor([int(orders[number // n][number % n]) for number in numbers])
