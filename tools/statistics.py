"""Mean and covariance of a stream of features, in float64.

Rows are folded in blocks of 512, rows 0-511, 512-1023, ... of the stream, whatever batches they came in: one
rank-512 update in place is far cheaper than eight of 64, and the result has the same bits for every way to cut the
stream. They are centred on the mean of the first block, and streams are merged by the pairwise update of Chan, Golub
and LeVeque, "Algorithms for computing the sample variance" (1983), eq. 2.1: a mean of 1e5 standard deviations costs no
digits that matter. Files are `.npz` with `mu` and `sigma`, as clean-fid, pytorch-fid and EDM write them, and `n` and
`extractor` besides.
"""

import hashlib
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import blas
from torch import Tensor

from samplers.atomic import atomic_write

BLOCK = 512  # rows in one rank-k update
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class _Moments:
    """Of `count` rows (None: unknown): mean [d] and unbiased covariance [d, d] (zeros for one row)."""

    count: int | None
    mean: Float64
    covariance: Float64


class _Stream:
    """Sums over full blocks, about the mean of the first: count, sum of x - shift [d], its products [d, d]."""

    def __init__(self, first: Float64) -> None:
        self.count, self.shift = 0, first.mean(axis=0)
        self.total = np.zeros(len(self.shift))
        self.products: Float64 = np.zeros((len(self.shift), len(self.shift)), order="F")  # lower triangle

    def add(self, rows: Float64) -> None:
        rows -= self.shift
        self.count += len(rows)
        self.total += rows.sum(axis=0)
        self.products = blas.dsyrk(1.0, rows.T, beta=1.0, c=self.products, lower=1, overwrite_c=1)

    def moments(self) -> _Moments:
        offset = self.total / self.count
        with np.errstate(over="ignore", invalid="ignore"):  # `covariance` names the overflow
            scatter = self.products - np.outer(offset, offset) * self.count
        scatter = np.tril(scatter) + np.tril(scatter, -1).T
        return _Moments(self.count, self.shift + offset, scatter / max(self.count - 1, 1))


class FeatureStatistics:
    """Count, mean and unbiased covariance of features [N, dim] that arrive in batches.

    extractor: the name of what made the features, kept in files; statistics of two extractors have no distance.
    Bits: they depend on the order of the rows only, not on how `update` calls cut them. `merge` folds what is pending,
    so a.merge(b) equals b.merge(a) to the bit, while other groupings agree to rounding (1e-15 or so). For the same bits
    on any number of processes, make one object per fixed chunk of samples and merge them in chunk order.

    Raises ValueError for dim < 1.
    """

    def __init__(self, dim: int, extractor: str | None = None) -> None:
        if dim < 1:
            raise ValueError(f"dim: {dim} is not a number of features (1 or more)")
        self.dim, self.extractor = dim, extractor
        self._merged: _Moments | None = None  # of other streams, or of this one before a merge
        self._stream: _Stream | None = None
        self._read: _Moments | None = None  # of everything, until more arrives
        self._pending: Float64 = np.empty((BLOCK, dim))
        self._rows = 0  # of _pending that are filled

    def update(self, features: Tensor | NDArray) -> None:
        """Add features [N, dim], of any real dtype, on any device; nothing is added when this raises.

        Raises ValueError for another shape, for NaN or infinite values (saying how many rows have them), and for
        statistics that were loaded without their count.
        """
        rows = _rows(features, self.dim)
        self._known_count("update")

        self._read = None
        while len(rows):
            taken = rows[: BLOCK - self._rows]
            self._pending[self._rows : self._rows + len(taken)] = taken
            self._rows += len(taken)
            rows = rows[len(taken) :]
            if self._rows == BLOCK:
                self._stream = self._stream or _Stream(self._pending)
                self._stream.add(self._pending)
                self._rows = 0

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the rows that `other` has seen, which itself stays as it is.

        Raises ValueError for another dim or extractor, and when either side was loaded without its count.
        """
        if other.dim != self.dim:
            raise ValueError(f"dim: cannot merge statistics of {other.dim} features into {self.dim}")
        if self.extractor and other.extractor and other.extractor != self.extractor:
            raise ValueError(f"extractor: cannot merge statistics of {other.extractor} into {self.extractor}")
        self._known_count("merge")
        other._known_count("merge")

        self._merged = _join(self._moments(), other._moments())
        self._stream, self._rows, self._read = None, 0, None
        self.extractor = self.extractor or other.extractor

    def copy(self) -> "FeatureStatistics":
        """The same rows in an object of its own."""
        twin = FeatureStatistics(self.dim, self.extractor)
        twin._merged = self._moments()
        return twin

    @property
    def count(self) -> int | None:
        """The number of rows seen; None when a file did not say."""
        moments = self._moments()
        return 0 if moments is None else moments.count

    @property
    def mean(self) -> Tensor:
        """[dim], float64. Raises ValueError when no row was seen."""
        moments = self._moments()
        if moments is None:
            raise ValueError("count: 0 rows have no mean (1 or more)")
        return torch.from_numpy(moments.mean.copy())

    @property
    def covariance(self) -> Tensor:
        """[dim, dim], float64, divided by N - 1, symmetric to the bit.

        Raises ValueError for fewer than two rows, and when the features are too large for float64 squares.
        """
        moments = self._moments()
        if moments is None or (moments.count is not None and moments.count < 2):
            raise ValueError(f"count: {self.count} rows have no covariance (2 or more)")
        if not np.isfinite(moments.covariance).all():
            raise ValueError("covariance: not finite; the features are too large for float64 squares (up to 1e150)")
        return torch.from_numpy(moments.covariance.copy())

    def save(self, path: str | Path) -> None:
        """Write `mu` [dim], `sigma` [dim, dim], `n` and `extractor` to a `.npz` file, whole or not at all."""
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.count is not None:
            arrays["n"] = np.asarray(self.count, dtype=np.int64)
        if self.extractor is not None:
            arrays["extractor"] = np.asarray(self.extractor)
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Read a `.npz` with `mu` and `sigma`; without `n` the count is unknown and nothing can be added.

        A file written by `save` gives back the same bits. Raises ValueError, naming the file, when it cannot be
        read, lacks a key, holds pickled objects or values that are not finite, or sigma is no covariance.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, sigma = (np.asarray(file[key], dtype=np.float64) for key in ("mu", "sigma"))
                count = int(file["n"]) if "n" in file.files else None
                extractor = str(file["extractor"]) if "extractor" in file.files else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile) as error:
            raise ValueError(f"statistics: {path} is not an .npz with mu and sigma ({_one_line(error)})") from error

        if count is not None and count < 2:
            raise ValueError(f"statistics: {path} has n = {count} (2 or more)")
        try:
            return cls.of_moments(mean, sigma, count, extractor)
        except ValueError as error:
            raise ValueError(f"statistics: {path} has {error}") from error

    @classmethod
    def of_moments(
        cls, mean: NDArray, covariance: NDArray, count: int | None = None, extractor: str | None = None
    ) -> "FeatureStatistics":
        """Of `count` rows (None: unknown) with this mean [d] and unbiased covariance [d, d].

        Raises ValueError for other shapes, values that are not finite, or what is no covariance: not symmetric to 1e-5
        of its largest entry, or with a negative variance.
        """
        mean, sigma = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
        if mean.ndim != 1 or sigma.shape != (*mean.shape, *mean.shape) or not len(mean):
            raise ValueError(f"mu {mean.shape} and sigma {sigma.shape}, not [d] and [d, d]")
        if not (np.isfinite(mean).all() and np.isfinite(sigma).all()):
            raise ValueError("values that are not finite")
        if np.abs(sigma - sigma.T).max() > 1e-5 * np.abs(sigma).max() or (np.diag(sigma) < 0).any():
            raise ValueError("a sigma that is not a covariance (not symmetric, or negative)")
        statistics = cls(len(mean), extractor)
        if count != 0:
            statistics._merged = _Moments(count, mean, sigma / 2 + sigma.T / 2)
        return statistics

    def digest(self) -> str:
        """SHA-256 of count, mean and covariance, in hexadecimal."""
        parts = (str(self.count).encode(), self.mean.numpy().tobytes(), self.covariance.numpy().tobytes())
        return hashlib.sha256(b" ".join(parts)).hexdigest()

    def _known_count(self, what: str) -> None:
        if self._merged is not None and self._merged.count is None:
            raise ValueError(f"count: cannot {what} statistics that were loaded from a file without n")

    def _moments(self) -> _Moments | None:
        """Everything seen so far, without touching the pending rows: reading does not move the blocks."""
        if self._read is None:
            stream = None if self._stream is None else self._stream.moments()
            pending = _block_moments(self._pending[: self._rows]) if self._rows else None
            self._read = reduce(_join, (self._merged, stream, pending))
        return self._read


def _rows(features: Tensor | NDArray, dim: int) -> Float64:
    if isinstance(features, Tensor):
        real, given = not features.is_complex(), str(features.dtype)
    else:
        features = np.asarray(features)
        real, given = features.dtype.kind in "fiub", str(features.dtype)
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features: shape {list(features.shape)} is not [N, {dim}]")
    if not real:
        raise ValueError(f"features: dtype {given} is not real")
    if isinstance(features, Tensor):
        features = features.detach().to("cpu", torch.float64).numpy()
    rows: Float64 = np.ascontiguousarray(features, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # a sum may overflow where no row is bad
        suspect = not np.isfinite(rows.sum())
    if suspect:
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise ValueError(f"features: {len(bad)} of {len(rows)} rows have NaN or infinite values (rows {shown})")
    return rows


def _block_moments(rows: Float64) -> _Moments:
    mean = rows.mean(axis=0)
    centred = rows - mean
    with np.errstate(over="ignore"):  # `covariance` names the overflow
        scatter = centred.T @ centred  # numpy sees the product with itself: BLAS syrk, symmetric to the bit
    return _Moments(len(rows), mean, scatter / max(len(rows) - 1, 1))


def _join(a: _Moments | None, b: _Moments | None) -> _Moments | None:
    """The moments of the rows of both; written symmetrically, so that the order of the two does not matter."""
    if a is None or b is None:
        return b if a is None else a
    assert a.count is not None
    assert b.count is not None
    n = a.count + b.count
    shift = b.mean - a.mean
    with np.errstate(over="ignore", invalid="ignore"):
        between = np.outer(shift, shift) * (a.count * b.count / n)
        scatter = (a.covariance * (a.count - 1) + b.covariance * (b.count - 1)) + between
    return _Moments(n, (a.mean * a.count + b.mean * b.count) / n, scatter / (n - 1))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
