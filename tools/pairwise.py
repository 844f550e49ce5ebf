"""Kernel distances, precision, recall, density and coverage of two sets of features, from one pass over their products.

Every product of two rows is computed once, whatever is asked for. What the numbers are and who defined them is in
kernels.py and neighbours.py.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tools.gram import Visitor, check_features, few, prepare, visit
from tools.jackknife import BLOCKS, Estimate, of_blocks
from tools.kernels import Cubic, KernelSums, UnitGaussian
from tools.neighbours import NAMES, Neighbours

ASKED = ("kd", *NAMES)
KNOWN = (*ASKED, "clip-mmd")


@dataclass(frozen=True)
class Pairwise:
    """The numbers that were asked for; None are the others."""

    kernel_distance: Estimate | None = None
    mmd: Estimate | None = None
    precision: Estimate | None = None
    recall: Estimate | None = None
    density: Estimate | None = None
    coverage: Estimate | None = None


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]: of the fake rows that look real, and of the real rows that the fake ones cover."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """How many k-th real balls hold a fake row, over k (1 for equal laws); the share of real balls that hold one."""

    density: float
    coverage: float


def pairwise(
    real: Tensor,
    fake: Tensor,
    *,
    asked: Collection[str] = ASKED,
    k_manifold: int = 3,
    k_density: int = 5,
    blocks: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Pairwise:
    """All numbers of `asked`, of real [M, d] and fake [N, d] features, on `device` (None: where `real` is).

    kd: U-statistic of the kernel (x.y/d + 1)^3, unbiased, so it may be below 0. Its standard error is that of both
        sets, by leaving out each row; the interval is 1.96 of them wide to either side.
    clip-mmd: 1000 x the V-statistic of a Gaussian kernel, sigma = 10, of unit vectors; debiased and error as kd.
    precision, recall: k_manifold neighbours. density, coverage: k_density. Errors by `blocks` of the fake rows [N]
        (None: `block_of`), of the fake set alone, as are all `leave_one_out`; that of recall is about 1.4 times too
        large. Fewer than ten fake rows have none.

    In float32 products are of centred rows. What its rounding could decide is computed in float64 instead: shares with
    a ball whose radius is below 1/32 of its row's distance from the centre (clusters far apart, copies of a row), and
    clip-mmd of rows as near to zero. Float64 resolves a millionth; below 1e-7 rows are equal. Time is that of M^2/2 +
    N^2/2 + M N products of rows. Raises ValueError for unknown names, other shapes, values that are not finite (saying
    which rows), too few rows, k not in 1 ... rows - 1, rows of zeros for clip-mmd, features too large for the
    arithmetic, and where float64 is needed on a device that has none.
    """
    device = torch.device(device or real.device)
    _check(real, fake, asked, k_manifold, k_density, dtype)
    grouped = None if blocks is None and len(fake) < BLOCKS else of_blocks(blocks, len(fake))

    one_pass = partial(_one_pass, real.detach(), fake.detach(), k_manifold, k_density, grouped, device)
    found, unresolved = one_pass(asked, dtype)
    if unresolved:
        found |= one_pass(unresolved, torch.float64)[0]
    return Pairwise(**found)


def _one_pass(
    real: Tensor,
    fake: Tensor,
    k_manifold: int,
    k_density: int,
    blocks: Tensor | None,
    device: torch.device,
    asked: Collection[str],
    dtype: torch.dtype,
) -> tuple[dict[str, Estimate], list[str]]:
    """The numbers, by the fields of Pairwise, and the names of those that need float64 and are computed in float32."""
    pair = prepare(real, fake, blocks, dtype, device)
    visitors: list[Visitor] = []
    unresolved: list[str] = []
    cubic = gaussian = neighbours = None
    if "kd" in asked:
        visitors.append(cubic := KernelSums(Cubic(pair), pair))
    if "clip-mmd" in asked:
        kernel = UnitGaussian(pair)
        if dtype == torch.float64 or kernel.resolved:
            visitors.append(gaussian := KernelSums(kernel, pair))
        else:
            unresolved.append("clip-mmd")
    if set(asked) & set(NAMES):
        visitors.append(neighbours := Neighbours(pair, asked, k_manifold, k_density))
    if visitors:
        visit(pair, visitors)

    found = {}
    if cubic:
        found["kernel_distance"] = cubic.finish().kernel_distance()
    if gaussian:
        found["mmd"] = gaussian.finish().mmd()
    if neighbours:
        found |= neighbours.finish()
        unresolved += [] if dtype == torch.float64 else neighbours.unresolved()
    return found, unresolved


def kernel_distance(real: Tensor, fake: Tensor, blocks: Tensor | None = None) -> Estimate:
    """The `kd` of `pairwise`."""
    distance = pairwise(real, fake, asked=("kd",), blocks=blocks).kernel_distance
    assert distance is not None
    return distance


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """The shares of `pairwise`, without their errors."""
    both = pairwise(real, fake, asked=("precision", "recall"), k_manifold=k)
    assert both.precision is not None
    assert both.recall is not None
    return PrecisionRecall(both.precision.value, both.recall.value)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """The shares of `pairwise`, without their errors."""
    both = pairwise(real, fake, asked=("density", "coverage"), k_density=k)
    assert both.density is not None
    assert both.coverage is not None
    return DensityCoverage(both.density.value, both.coverage.value)


def _check(
    real: Tensor, fake: Tensor, asked: Collection[str], k_manifold: int, k_density: int, dtype: torch.dtype
) -> None:
    unknown = set(asked) - set(KNOWN)
    if unknown or not asked or isinstance(asked, str):
        raise ValueError(f"asked: {asked!r}; accepted are some of {', '.join(KNOWN)}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: {dtype}; accepted are torch.float32, torch.float64")
    for name, features in (("real", real), ("fake", fake)):
        check_features(name, features, real.shape[-1] if real.ndim else 0)
        if len(features) < 2:
            raise ValueError(f"{name}: {len(features)} rows have no distance (2 or more)")
        zero = (features.abs().amax(dim=1) == 0).nonzero()[:, 0] if "clip-mmd" in asked else features.new_empty(0)
        if len(zero):
            raise ValueError(f"{name}: {len(zero)} of {len(features)} rows are zero and have no direction: {few(zero)}")

    balls = {"precision": (k_manifold, real), "recall": (k_manifold, fake)}
    balls |= dict.fromkeys(("density", "coverage"), (k_density, real))
    for name in set(asked) & set(NAMES):
        k, rows = balls[name]
        if not 1 <= k < len(rows):
            whose = "real" if rows is real else "fake"
            raise ValueError(f"k: {name} of {k} neighbours among {len(rows)} {whose} rows; accepted are 1 to rows - 1")
