"""Resizing as the public tools do it, a batch at a time on any device.

Why: the filter decides the FID. PIL's bicubic filter is torch's with `antialias=True` (also when enlarging: that
selects PIL's coefficient a = -1/2): to 2e-5 grey levels in float64, as PIL computes, to 4e-3 in float32. TensorFlow
1's bilinear filter, which puts pixel 0 of the result on pixel 0 of the image, differs from PIL's by 17 grey levels
(root mean square) from 32 to 299 pixels.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Filter = Callable[[Tensor, tuple[int, int]], Tensor]  # levels [B, C, H, W], (height, width) -> [B, C, height, width]


def resize(levels: Tensor, size: int, how: str, *, crop: bool = False) -> Tensor:
    """Grey levels [B, C, H, W] (float, 0 ... 255) -> [B, C, size, size].

    how: a name in `FILTERS`. crop: the short side becomes `size` and the middle is kept (the long side is rounded
    down, the margins half to even, as torchvision's Resize and CenterCrop do). Raises ValueError for another name.
    """
    if how not in FILTERS:
        raise ValueError(f"filter: {how!r}; accepted: {', '.join(FILTERS)}")
    if not crop:
        return FILTERS[how](levels, (size, size))

    height, width = levels.shape[-2:]
    short = min(height, width)
    height, width = size * height // short, size * width // short
    top, left = round((height - size) / 2), round((width - size) / 2)
    return FILTERS[how](levels, (height, width))[..., top : top + size, left : left + size]


def _interpolation(mode: str, *, antialias: bool) -> Filter:
    return partial(F.interpolate, mode=mode, antialias=antialias, align_corners=False)


def _pil(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """PIL on an image of floats: its weights are float64, and so are the sums here."""
    wide = F.interpolate(levels.double(), size, mode="bicubic", antialias=True, align_corners=False)
    return wide.clamp(0, 255).to(levels.dtype)


def _pil_uint8(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """PIL on an image of bytes: rows first, then columns, each rounded to a grey level."""
    return _rounded(_pil(_rounded(_pil(levels, (levels.shape[-2], size[1]))), size))


def _rounded(levels: Tensor) -> Tensor:
    return (levels + 0.5).floor()  # up from the half, as PIL


def _tf1_bilinear(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """TensorFlow 1's resize_bilinear: pixel i of the result is at i * (old / new), with no half pixel added."""
    for axis, new in ((-2, size[0]), (-1, size[1])):
        old = levels.shape[axis]
        at = torch.arange(new, dtype=torch.float64, device=levels.device) * (old / new)
        low = at.long().clamp(max=old - 1)
        share = (at - low).to(levels.dtype)
        if axis == -2:
            share = share[:, None]
        below, above = levels.index_select(axis, low), levels.index_select(axis, (low + 1).clamp(max=old - 1))
        levels = below + share * (above - below)
    return levels


FILTERS: dict[str, Filter] = {
    "pil-bicubic": _pil,
    "pil-bicubic-u8": _pil_uint8,
    "torch-bicubic": _interpolation("bicubic", antialias=False),
    "torch-bicubic-antialias": _interpolation("bicubic", antialias=True),
    "torch-bilinear": _interpolation("bilinear", antialias=False),
    "torch-bilinear-antialias": _interpolation("bilinear", antialias=True),
    "tf1-bilinear": _tf1_bilinear,
}
