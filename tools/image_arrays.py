"""Images in one array of a file: ADM's .npz (`arr_0`), and `images` of a safetensors file; rows are read as needed."""

import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.data import Split, digits
from tools.digest import HashCache, digest_json
from tools.features import quantise
from tools.image_files import Shape

Rows = Callable[[int], Tensor]  # a row's number -> uint8, as it lies in the file


class ImageArray:
    """Images [N, C, H, W] or [N, H, W, C] (C is 1 or 3), uint8, and labels [N] or None.

    The first layout wins where both could be meant. Raises ValueError, naming the file, for another shape or type.
    """

    skipped = 0

    def __init__(self, shape: Sequence[int], rows: Rows, labels: Tensor | None, facts: dict[str, Any]) -> None:
        self._count, self._rows, self.labels, self.facts = shape[0], rows, labels, facts
        self._last = shape[1] not in (1, 3)
        c, h, w = (shape[3], *shape[1:3]) if self._last else shape[1:]
        self.shape: Shape | None = (c, h, w)

    def __len__(self) -> int:
        return self._count

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """uint8 [C, H, W] each. Raises ValueError if the file is not what was hashed."""
        rows = [self._rows(number) for number in numbers]
        return [row.permute(2, 0, 1).contiguous() if self._last else row for row in rows]

    def close(self) -> None:
        """Rows are mapped from the disk; there is nothing to close."""


def digits_array(split: Split) -> ImageArray:
    """The embedded digits, a half of them, as a PNG would hold them."""
    half = digits(split)
    levels = quantise(half.images)
    facts = {"kind": "digits", "half": split, "sha256": digest_json(levels.flatten().tolist())}
    return ImageArray(list(levels.shape), lambda number: levels[number], half.labels, facts)


def npz_array(path: Path, hashes: HashCache) -> ImageArray:
    """`arr_0` of an .npz, [N, H, W, C], with `arr_1` for labels [N] where there is one (Dhariwal & Nichol 2021)."""
    (file,) = hashes.hash_all([path])
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" not in names:
            hint = "; it holds statistics, which are a reference, not images" if "mu" in names else ""
            raise ValueError(f"has {', '.join(names) or 'nothing'}, but no arr_0{hint}")
        images = _mapped(path, "arr_0")
        labels = np.array(_mapped(path, "arr_1")) if "arr_1" in names else None
        own = _checked(images.shape, str(images.dtype), labels)
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error

    def row(number: int) -> Tensor:
        with file.unchanged():
            return torch.from_numpy(np.array(images[number]))

    return ImageArray(images.shape, row, own, {"kind": "npz", "count": len(images), "sha256": file.sha256})


def safetensors_array(path: Path, hashes: HashCache) -> ImageArray:
    """`images` of a safetensors file, with `labels` [N] where there are some."""
    (file,) = hashes.hash_all([path])
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            if "images" not in names:
                raise ValueError(f"has {', '.join(sorted(names)[:4]) or 'nothing'}, but no images")
            images = tensors.get_slice("images")
            labels = tensors.get_tensor("labels").numpy() if "labels" in names else None
            shape, dtype = images.get_shape(), str(images.get_dtype())
            own = _checked(shape, {"U8": "uint8"}.get(dtype, dtype), labels)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error

    def row(number: int) -> Tensor:
        with file.unchanged():
            return images[number : number + 1][0]

    return ImageArray(shape, row, own, {"kind": "safetensors", "count": shape[0], "sha256": file.sha256})


def _checked(shape: Sequence[int], dtype: str, labels: np.ndarray | None) -> Tensor | None:
    """The labels, int64. Raises ValueError for images or labels that are not as `ImageArray` says."""
    if dtype != "uint8" or len(shape) != 4 or not min(shape) or not {shape[1], shape[3]} & {1, 3}:
        raise ValueError(
            f"its images are {dtype} {list(shape)}; accepted are uint8 [N, C, H, W] or [N, H, W, C] of 1 or 3 channels"
        )
    if labels is None:
        return None
    if labels.dtype.kind not in "iu" or labels.shape != (shape[0],) or labels.min() < 0:
        raise ValueError(
            f"its labels are {labels.dtype} {list(labels.shape)}; accepted are classes [{shape[0]}] from 0"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _mapped(path: Path, name: str) -> np.ndarray:
    """An array of an .npz without reading it, if it is not compressed."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays[name])
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            header = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects; accepted are numbers")
    with path.open("rb") as file:  # the member's own header has a name and an extra field that may be longer here
        file.seek(member.header_offset + 26)
        lengths = struct.unpack("<HH", file.read(4))
    start = member.header_offset + 30 + sum(lengths) + header
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
