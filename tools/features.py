"""Images -> features, under a name that says how the images were prepared.

Every extractor first rounds the images to the 256 grey levels of a PNG, so that samples in memory, samples read
from files and the reference are judged alike. The name holds this, the size, and a hash of the weights where there
are any; it is printed with every number, and numbers under different names do not compare.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tools import digits_classifier

Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class Features:
    """A named map from images [B, C, H, W] in [-1, 1] to features [B, dim], with (C, H, W) = `shape`."""

    name: str
    dim: int
    shape: Shape
    extract: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Raises ValueError for another shape, and for NaN or infinite pixels (saying in how many images)."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images: shape {list(images.shape)} is not {['B', *self.shape]}, as {self.name} reads")
        return self.extract(dequantise(quantise(images)))


def quantise(images: Tensor) -> Tensor:
    """What a PNG would hold: floor(127.5 x + 128), clipped to 0 ... 255; uint8, the shape of `images`.

    Raises ValueError for NaN or infinite pixels.
    """
    bad = int((~images.isfinite().flatten(1).all(dim=1)).sum())
    if bad:
        raise ValueError(f"images: {bad} of {len(images)} have NaN or infinite pixels")
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)  # the cast floors what is not negative


def dequantise(levels: Tensor) -> Tensor:
    """Grey levels 0 ... 255 -> float32 in [-1, 1]."""
    return levels.float() / 127.5 - 1


def _digits(shape: Shape) -> Features:
    if shape != digits_classifier.IMAGE_SHAPE:
        raise ValueError(f"features: digits reads images of 1x8x8, not {'x'.join(map(str, shape))} (pixels reads any)")
    classifier = digits_classifier.DigitsClassifier.load()
    name = f"digits-{classifier.fingerprint()}|1x8x8|u8"
    return Features(name, digits_classifier.FEATURE_DIM, shape, classifier.features)


def _pixels(shape: Shape) -> Features:
    channels, height, width = shape
    return Features(f"pixels|{channels}x{height}x{width}|u8", channels * height * width, shape, _flattened)


def _flattened(images: Tensor) -> Tensor:
    return images.flatten(1)


EXTRACTORS: dict[str, Callable[[Shape], Features]] = {"digits": _digits, "pixels": _pixels}
