"""One pass over the Gram matrices of two sets of features, in blocks, for everything that is made of inner products.

The rows are taken relative to the common mean and to a power of two near the largest of them: float32 products of
such rows lose no digit that decides, whatever the features' offset and scale, but where `resolved` says so. What the
mean takes away is kept in float64: x.y / scale^2 = tile + offset_x + offset_y. Of the two square matrices only the
upper triangle is computed. Rows are sorted by jackknife block and no tile spans two: sums over tiles are over blocks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from tools.arithmetic import full_precision

CHUNK = 256  # rows that are held in float64 at once, in the cache
PANEL = 2  # tiles that are multiplied at once
RESOLVED = 2**13  # epsilons: from here on rounding moved shares by less than 0.2 standard errors
CPU_TILE, DEVICE_TILE = 512, 4096  # rows: small enough for a cache, large enough for a device


@dataclass(frozen=True)
class Tile:
    """Consecutive rows of one jackknife block."""

    rows: slice
    block: int


@dataclass(frozen=True)
class Points:
    """One set: `rows` [N, d] = (features - centre) / scale, and what a pass needs beside them, sorted by block.

    squares [N] = |rows|^2 and offsets [N], both float64 on the CPU, belong to the rows as they were rounded.
    """

    name: str  # real or fake
    rows: Tensor
    squares: Tensor
    offsets: Tensor
    block: Tensor  # [N] int64, rising
    tiles: tuple[Tile, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_blocks(self) -> int:
        return self.tiles[-1].block + 1


@dataclass(frozen=True)
class Pair:
    """Both sets, relative to the same centre and scale."""

    real: Points
    fake: Points
    scale_square: float

    @property
    def dim(self) -> int:
        return self.real.rows.shape[1]


class Visitor(Protocol):
    """What is made of the tiles, products of rows i with rows j, which it leaves as they are.

    `within` sees each pair of tiles of one set once, and those with i = j on the diagonal, whose own diagonal is every
    row with itself; `across` sees real against fake, after all of `within`.
    """

    def within(self, points: Points, i: Tile, j: Tile, tile: Tensor) -> None: ...

    def across(self, i: Tile, j: Tile, tile: Tensor) -> None: ...


def prepare(real: Tensor, fake: Tensor, blocks: Tensor | None, dtype: torch.dtype, device: torch.device) -> Pair:
    """Centre, scale and sort real [M, d] and fake [N, d], the fake rows by their `blocks` [N] (None: all are one).

    Raises ValueError for features whose mean is not finite in float64, and for float64 where a device has none.
    """
    if dtype == torch.float64 and device.type == "mps":
        raise ValueError(
            "device: mps has no float64, which is used where dtype says so and for sets that are wide beside their "
            "neighbourhoods; accepted is cpu"
        )
    chunks = [chunk for features in (real, fake) for chunk in features.split(CHUNK)]
    centre = torch.stack([chunk.sum(dim=0, dtype=torch.float64).cpu() for chunk in chunks]).sum(dim=0) / (
        len(real) + len(fake)
    )
    ends = torch.stack([end.cpu().double() for chunk in chunks for end in (chunk.amin(dim=0), chunk.amax(dim=0))])
    largest = float((ends - centre).abs().max())
    if not math.isfinite(largest):
        raise ValueError("features: too large for their mean to be finite in float64 (up to 1e300)")
    scale = math.ldexp(1, math.frexp(largest)[1]) if largest else 1.0
    scaled_centre = centre / scale

    def points(name: str, features: Tensor, block: Tensor) -> Points:
        order = torch.argsort(block, stable=True)
        rows = features.new_empty(features.shape, dtype=dtype, device=device)
        squares, offsets = [], []
        for at in torch.arange(len(order)).split(CHUNK):
            exact = features[order[at].to(features.device)].cpu().double()
            rounded = exact.sub_(centre).div_(scale).to(dtype)
            rows[at[0] : at[-1] + 1] = rounded
            exact.copy_(rounded)
            offsets.append(exact @ scaled_centre + scaled_centre.square().sum() / 2)
            squares.append(exact.square_().sum(dim=1))
        return Points(name, rows, torch.cat(squares), torch.cat(offsets), block[order], tiles(block[order], device))

    one = torch.zeros(len(real), dtype=torch.int64)
    several = torch.zeros(len(fake), dtype=torch.int64) if blocks is None else blocks.cpu()
    return Pair(points("real", real, one), points("fake", fake, several), float(torch.tensor(scale).double().square()))


def tiles(block: Tensor, device: torch.device) -> tuple[Tile, ...]:
    """Cut rows that are sorted by block into tiles of nearly equal size."""
    size, result, start = CPU_TILE if device.type == "cpu" else DEVICE_TILE, [], 0
    for name, count in zip(*(found.tolist() for found in block.unique_consecutive(return_counts=True)), strict=True):
        width = math.ceil(count / math.ceil(count / size))
        cuts = range(start, start + count, width)
        result += [Tile(slice(cut, min(cut + width, start + count)), name) for cut in cuts]
        start += count
    return tuple(result)


def visit(pair: Pair, visitors: Sequence[Visitor]) -> None:
    """Compute every tile once and show it to all visitors."""
    with full_precision(pair.real.rows.device):
        for points in (pair.real, pair.fake):
            for at, i in enumerate(points.tiles):
                rows = points.rows[i.rows]
                for j, tile in chain([(i, square(rows))], _products(rows, points, points.tiles[at + 1 :])):
                    for visitor in visitors:
                        visitor.within(points, i, j, tile)
        for i in pair.real.tiles:
            for j, tile in _products(pair.real.rows[i.rows], pair.fake, pair.fake.tiles):
                for visitor in visitors:
                    visitor.across(i, j, tile)


def _products(rows: Tensor, others: Points, tiles: Sequence[Tile]) -> Iterator[tuple[Tile, Tensor]]:
    """The tiles of `rows` with consecutive tiles of others; a few are multiplied at once, which is faster."""
    for first in range(0, len(tiles), PANEL):
        together = tiles[first : first + PANEL]
        start, stop = together[0].rows.start, together[-1].rows.stop
        panel = rows @ others.rows[start:stop].T
        for j in together:
            yield j, panel[:, j.rows.start - start : j.rows.stop - start]


def square(rows: Tensor) -> Tensor:
    """rows rows^T [m, m]; numpy sees that the two are one and does half of the work."""
    return torch.from_numpy(rows.numpy() @ rows.numpy().T) if rows.device.type == "cpu" else rows @ rows.T


def resolved(points: Points, distances: Tensor) -> bool:
    """Whether squared distances [N], of the rows from something, are above the rounding of what they are made of.

    They are differences of squares: of clusters far apart, or of copies of a row, products leave nothing but rounding.
    """
    least = RESOLVED * torch.finfo(points.rows.dtype).eps
    return bool((distances.cpu().double() >= least * points.squares).all())


def check_features(name: str, features: Tensor, dim: int) -> None:
    """Raises ValueError for another shape than [N, dim], no features, complex ones, and rows that are not finite."""
    if features.ndim != 2 or features.shape[1] != dim or not dim:
        raise ValueError(f"{name}: shape {list(features.shape)} is not [N, {dim or 'd'}] with d of 1 or more")
    if features.is_complex():
        raise ValueError(f"{name}: dtype {features.dtype} is not real")
    if features.sum(dim=1).isfinite().all():  # the fast way to know; a sum of finite numbers may still overflow
        return
    bad = (~features.isfinite().all(dim=1)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} of {len(features)} rows have NaN or infinite values: {few(bad)}")


def few(rows: Tensor) -> str:
    """The first numbers of the rows that something is wrong with."""
    return "rows " + ", ".join(map(str, rows[:5].tolist())) + (", ..." if len(rows) > 5 else "")
