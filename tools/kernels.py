"""Maximum mean discrepancies, from the row sums of their kernels.

Gretton et al. 2012, "A kernel two-sample test": the U-statistic (lemma 6) and the V-statistic (eq. 5). The kernels:
Bińkowski et al. 2018, "Demystifying MMD GANs" (KID), (x.y/d + 1)^3; Jayasumana et al. 2024, "Rethinking FID" (CMMD),
exp(-|x - y|^2 / 2 sigma^2) of unit vectors with sigma = 10. Each is split into a part that is summed exactly, in
float64, and a small rest that is summed over tiles: differences of means near 1 would lose what is asked for.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from tools.gram import Pair, Points, Tile, resolved
from tools.jackknife import Estimate

NORMAL = 1.96  # standard errors to either side, for 95 %
SIGMA = 10.0


class Kernel(Protocol):
    """k(x_i, y_j) = base + rest, of what `marks` [N, r] says of each row and of the tile of their products."""

    name: str

    def marks(self, points: Points) -> Tensor:
        """[N, r], float64."""

    def base(self, i: Tensor, j: Tensor) -> Tensor:
        """[m]: the base summed over rows j, for every row i, from the marks [m, r] and [n, r]."""

    def of_itself(self, i: Tensor) -> Tensor:
        """[m]: the base of each row with itself."""

    def rest(self, tile: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """[m, n], in the tile's dtype; the tile stays as it is."""


class Cubic:
    """k = (t + p_i + p_j)^3, of centred products t: the base is (p_i + p_j)^3, the rest has a factor t."""

    name = "kd"

    def __init__(self, pair: Pair) -> None:
        self.factor = pair.scale_square / pair.dim
        if not self.factor * self.factor <= torch.finfo(pair.real.rows.dtype).max:
            raise _too_large(self, pair)

    def marks(self, points: Points) -> Tensor:
        return (self.factor * points.offsets + 0.5)[:, None]

    def base(self, i: Tensor, j: Tensor) -> Tensor:
        p, q = i[:, 0], j[:, 0]
        sums = [float((q**power).sum()) for power in range(4)]
        return ((sums[0] * p + 3 * sums[1]) * p + 3 * sums[2]) * p + sums[3]

    def of_itself(self, i: Tensor) -> Tensor:
        return (2 * i[:, 0]) ** 3

    def rest(self, tile: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p = i + j.T  # t^3 + 3 t^2 p + 3 t p^2 = 3 t ((p + t) p + t^2 / 3), in place
        return (
            p.add(tile, alpha=self.factor)
            .mul_(p)
            .addcmul_(tile, tile, value=self.factor**2 / 3)
            .mul_(tile)
            .mul_(3 * self.factor)
        )


class UnitGaussian:
    """k = e^((c_ij - 1) / sigma^2), c the cosine of the uncentred rows: the base is 1, the rest e^(...) - 1.

    c = (tile + o_i + o_j) / (l_i l_j) of offsets o and lengths l. With 1 / l = (1 + a) / L and o / l = (1 + b) L / 2,
    c - 1 = (a_i + b_i + a_j + b_j + a_i b_j + b_i a_j) / 2 + (1 + a_i) (1 + a_j) tile / L^2, where no term is much
    larger than the sum when all rows are far from zero and near each other.
    """

    name = "clip-mmd"

    def __init__(self, pair: Pair) -> None:
        self.length = float(torch.cat([_lengths(pair.real), _lengths(pair.fake)]).mean())
        self.resolved = all(resolved(points, _lengths(points).square()) for points in (pair.real, pair.fake))

    def marks(self, points: Points) -> Tensor:
        lengths = _lengths(points)
        a, b = self.length / lengths - 1, 2 * points.offsets / lengths / self.length - 1
        return torch.stack([a, b, (a + b) / 2, (1 + a) / self.length], dim=1)

    def base(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.full((len(i),), float(len(j)), dtype=torch.float64)

    def of_itself(self, i: Tensor) -> Tensor:
        return torch.ones(len(i), dtype=torch.float64)

    def rest(self, tile: Tensor, i: Tensor, j: Tensor) -> Tensor:
        (a, b, half, inverse), (c, d, other_half, other_inverse) = i.T[:, :, None], j.T
        cosine = tile.mul(inverse).mul_(other_inverse).add_(half).add_(other_half)
        cosine.addcmul_(a, d, value=0.5).addcmul_(b, c, value=0.5)
        return cosine.mul_(1 / SIGMA**2).expm1_()


def _lengths(points: Points) -> Tensor:
    """[N]: |x| / scale of the uncentred rows."""
    return (points.squares + 2 * points.offsets).sqrt()


def _too_large(kernel: Kernel, pair: Pair) -> ValueError:
    return ValueError(f"{kernel.name}: not finite; the features are too large for products in {pair.real.rows.dtype}")


class KernelSums:
    """A visitor of tiles: the sums of k over the other rows of each set, by jackknife block of the fake rows."""

    def __init__(self, kernel: Kernel, pair: Pair) -> None:
        self.kernel, self.pair = kernel, pair
        self.marks = {points.name: kernel.marks(points) for points in (pair.real, pair.fake)}
        self.cast = {name: marks.to(pair.real.rows) for name, marks in self.marks.items()}
        m, n, blocks = len(pair.real), len(pair.fake), pair.fake.n_blocks
        self.real_real, self.real_fake = _zeros(m, 1), _zeros(m, blocks)
        self.fake_real, self.fake_fake = _zeros(n, 1), _zeros(n, blocks)

    def within(self, points: Points, i: Tile, j: Tile, tile: Tensor) -> None:
        marks = self.cast[points.name]
        rest = self.kernel.rest(tile, marks[i.rows], marks[j.rows])
        sums = self.real_real if points.name == "real" else self.fake_fake
        if i == j:
            rest.fill_diagonal_(0)
        else:
            sums[j.rows, i.block] += rest.sum(dim=0).cpu()
        sums[i.rows, j.block] += rest.sum(dim=1).cpu()

    def across(self, i: Tile, j: Tile, tile: Tensor) -> None:
        rest = self.kernel.rest(tile, self.cast["real"][i.rows], self.cast["fake"][j.rows])
        self.real_fake[i.rows, j.block] += rest.sum(dim=1).cpu()
        self.fake_real[j.rows, 0] += rest.sum(dim=0).cpu()

    def finish(self) -> "Discrepancy":
        """Add the exact parts. Raises ValueError where the features were too large."""
        fake = self.pair.fake
        x, y = self.marks["real"], self.marks["fake"]
        self.real_real[:, 0] += self.kernel.base(x, x) - self.kernel.of_itself(x)
        self.fake_real[:, 0] += self.kernel.base(y, x)
        for b in range(fake.n_blocks):
            own = fake.block == b
            self.real_fake[:, b] += self.kernel.base(x, y[own])
            self.fake_fake[:, b] += self.kernel.base(y, y[own])
            self.fake_fake[own, b] -= self.kernel.of_itself(y[own])
        if not all(
            bool(sums.isfinite().all()) for sums in (self.real_real, self.real_fake, self.fake_real, self.fake_fake)
        ):
            raise _too_large(self.kernel, self.pair)
        return Discrepancy(self.real_real[:, 0], self.real_fake, self.fake_real[:, 0], self.fake_fake, fake.block)


class Discrepancy:
    """The statistics, of row sums without a row itself: real [M] and [M, blocks], fake [N] and [N, blocks]."""

    def __init__(self, real_real: Tensor, real_fake: Tensor, fake_real: Tensor, fake_fake: Tensor, block: Tensor):
        self.real_real, self.real_fake, self.fake_real = real_real, real_fake.sum(dim=1), fake_real
        self.fake_fake, self.block = fake_fake.sum(dim=1), block
        blocks = fake_fake.shape[1]
        self.fake_counts = torch.bincount(block, minlength=blocks)
        self.by_block = real_fake.sum(dim=0)
        self.between_blocks = _zeros(blocks, blocks).index_add_(0, block, fake_fake)

    @property
    def unbiased(self) -> float:
        """The U-statistic; below 0 as often as above when the sets are of one law."""
        m, n = len(self.real_real), len(self.fake_fake)
        return float(_u(self.real_real.sum(), self.fake_fake.sum(), self.fake_real.sum(), m, n))

    def biased(self, of_itself: float) -> float:
        """The V-statistic, of a kernel that is `of_itself` for every row with itself."""
        m, n = len(self.real_real), len(self.fake_fake)
        return float(_v(self.real_real.sum(), self.fake_fake.sum(), self.fake_real.sum(), m, n, of_itself))

    def leave_one_out(self, of_itself: float | None = None) -> tuple[float, ...] | None:
        """Without each of the fake blocks: the U-statistic, or the V-statistic where `of_itself` is given.

        None where there is one block, and where fewer than two rows would be left.
        """
        if len(self.fake_counts) == 1 or len(self.fake_fake) - int(self.fake_counts.max()) < 2:
            return None
        n = len(self.fake_fake) - self.fake_counts
        between = self.between_blocks
        fake = between.sum() - between.sum(dim=0) - between.sum(dim=1) + between.diagonal()
        cross, m, real = self.by_block.sum() - self.by_block, len(self.real_real), self.real_real.sum()
        values = _u(real, fake, cross, m, n) if of_itself is None else _v(real, fake, cross, m, n, of_itself)
        return tuple(values.tolist())

    @property
    def standard_error(self) -> float | None:
        """Of the U-statistic, by leaving out every row of either set; None for fewer than three rows.

        Where the two laws are equal, so that first-order terms vanish, it is up to sqrt 2 too large.
        """
        m, n = len(self.real_real), len(self.fake_fake)
        if min(m, n) < 3:
            return None
        real, fake, cross = self.real_real.sum(), self.fake_fake.sum(), self.fake_real.sum()
        without_real = _u(real - 2 * self.real_real, fake, cross - self.real_fake, m - 1, n)
        without_fake = _u(real, fake - 2 * self.fake_fake, cross - self.fake_real, m, n - 1)
        variance = sum((len(v) - 1) * v.var(correction=0) for v in (without_real, without_fake))
        return math.sqrt(variance)

    def kernel_distance(self) -> Estimate:
        """The U-statistic and its error."""
        value, error = self.unbiased, self.standard_error
        return Estimate(value, error, None, _interval(value, error), self.leave_one_out())

    def mmd(self, scale: float = 1000.0) -> Estimate:
        """`scale` x the V-statistic, as it is published; debiased, error and interval are of the U-statistic."""
        debiased, error, left = scale * self.unbiased, self.standard_error, self.leave_one_out(of_itself=1.0)
        error = None if error is None else scale * error
        left = None if left is None else tuple(scale * value for value in left)
        return Estimate(scale * self.biased(of_itself=1.0), error, debiased, _interval(debiased, error), left)


def _u(real: Tensor, fake: Tensor, cross: Tensor, m: int, n: int | Tensor) -> Tensor:
    return real / (m * (m - 1)) + fake / (n * (n - 1)) - 2 * cross / (m * n)


def _v(real: Tensor, fake: Tensor, cross: Tensor, m: int, n: int | Tensor, of_itself: float) -> Tensor:
    return (real + m * of_itself) / m**2 + (fake + n * of_itself) / n**2 - 2 * cross / (m * n)


def _interval(value: float, error: float | None) -> tuple[float, float] | None:
    return None if error is None else (value - NORMAL * error, value + NORMAL * error)


def _zeros(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64)
