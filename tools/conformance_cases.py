"""Nasty inputs of a Fréchet distance, each with its exact value: what `tools.conformance` asks of an implementation.

A case is two sets of features or two pairs of moments; truths are closed forms or the singular values of centred rows,
which are exact for every rank. Where rounding of the moments alone moves the distance by more than 1e-10 (singular
covariances without common support, float32), the case says by how much. A truth of None: the input has no distance,
and must be refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Problem:
    """Features (x [N, d], y [M, d]) or moments (mu1 [d], sigma1 [d, d], mu2, sigma2), and their distance.

    A value passes when it is real, not negative and within relative * truth + absolute of the truth.
    """

    truth: float | None
    features: tuple[Array, Array] | None = None
    moments: tuple[Array, Array, Array, Array] | None = None
    relative: float = 1e-10
    absolute: float = 0.0

    def given_moments(self) -> tuple[Array, Array, Array, Array]:
        """The moments, or those of the features in float64."""
        if self.moments is not None:
            return self.moments
        assert self.features is not None
        return moments_of(*self.features)


def moments_of(x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """Mean [d] and unbiased covariance [d, d] of both sets in float64, whatever is in them."""
    with np.errstate(all="ignore"):
        (mu1, a), (mu2, b) = _centre(x), _centre(y)
        return mu1, a.T @ a / np.float64(len(a) - 1), mu2, b.T @ b / np.float64(len(b) - 1)


def distance_of(x: Array, y: Array) -> float:
    """|mu1 - mu2|^2 + |A|^2 + |B|^2 - 2 |A B^T|_*, of the centred rows A, B over (N - 1)^1/2: exact for every rank."""
    (mean, a), (other, b) = _centre(x), _centre(y)
    a, b = a / math.sqrt(len(a) - 1), b / math.sqrt(len(b) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mean - other) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def _centre(rows: Array) -> tuple[Array, Array]:
    rows = np.asarray(rows, np.float64)
    mean = rows.sum(axis=0) / np.float64(len(rows))
    return mean, rows - mean


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape)


def dyadic(n: int, d: int, seed: int = 0) -> Array:
    """Multiples of 1/64 in [-2, 2), [n, d]: adding a power of two to them, or doubling them, rounds nothing."""
    return np.random.Generator(np.random.Philox(seed)).integers(-128, 128, (n, d)) / 64


def rotation(d: int, seed: int = 9) -> Array:
    return np.linalg.qr(normal(d, d, seed=seed))[0]


def positive(d: int, seed: int = 3) -> Array:
    """A symmetric positive definite T [d, d] with eigenvalues between 1 and about 5."""
    root = normal(d, d, seed=seed) / math.sqrt(d)
    return root @ root.T + np.eye(d)


def transported(sigma: Array, t: Array) -> Problem:
    """S2 = T S1 T with T positive definite: (S1 S2)^1/2 has the trace of S1 T, however badly S1 is conditioned."""
    other = t @ sigma @ t
    other = (other + other.T) / 2
    truth = float(1 + np.trace(sigma) + np.trace(other) - 2 * (sigma * t).sum())
    mean = np.zeros(len(t))
    return Problem(truth, moments=(mean, sigma, mean + 1 / math.sqrt(len(t)), other))


def spectrum(values: Array) -> Array:
    q = rotation(len(values))
    sigma = (q * values) @ q.T
    return (sigma + sigma.T) / 2


def _sets(x: Array, y: Array, truth: float | None = None, relative: float = 1e-10, absolute: float = 0.0) -> Problem:
    return Problem(distance_of(x, y) if truth is None else truth, (x, y), None, relative, absolute)


def _bad_sets(x: Any, y: Any) -> Problem:
    return Problem(None, (np.asarray(x), np.asarray(y)))


def _bad_moments(mean: Array, sigma: Array) -> Problem:
    return Problem(None, moments=(np.zeros(6), np.eye(6), mean, sigma))


def _with(rows: Array, value: float, *places: tuple[int, int]) -> Array:
    rows = rows.copy()
    for place in places:
        rows[place] = value
    return rows


def _wider(rows: Array, more: Array) -> Array:
    return np.hstack([rows, more])


def _in_one_dimension(x: Array, y: Array) -> float:
    return float((x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2)


def _rank_one(full: bool) -> Problem:
    """x = a u^T: the square root of S1 S2 has the trace sd(a) (u^T S2 u)^1/2, and against y = b v^T that is |u.v|."""
    a, u = normal(40), normal(8, seed=1)
    y = normal(40, 8, seed=2) if full else np.outer(normal(40, seed=2), normal(8, seed=3))
    x = np.outer(a, u)
    mu1, s1, mu2, s2 = moments_of(x, y)
    root = math.sqrt(float(a.var(ddof=1) * (u @ s2 @ u)))
    return _sets(x, y, float(((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2)) - 2 * root)


def _float32_moments(same: bool) -> Problem:
    x, y = normal(15, 30), normal(12, 30, seed=1)
    mu1, s1, mu2, s2 = (m.astype(np.float32) for m in moments_of(x, y))
    if same:
        return Problem(0.0, moments=(mu1, s1, mu1.copy(), s1.copy()))
    return Problem(distance_of(x, y), moments=(mu1, s1, mu2, s2), relative=2e-3)


def _perturbed(change: Array) -> Problem:
    well = transported(spectrum(np.linspace(1, 9, 6)), positive(6))
    assert well.moments is not None
    mu1, s1, mu2, s2 = well.moments
    return Problem(well.truth, moments=(mu1, s1 + change, mu2, s2))


def _commuting() -> Problem:
    s1, s2 = np.array([9.0, 4, 1, 1, 0.25, 16]), np.array([1.0, 4, 16, 0.0625, 0.25, 4])
    truth = 24 + float(((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum())
    return Problem(truth, moments=(np.zeros(6), spectrum(s1), np.full(6, 2.0), spectrum(s2)))


def _apart(rotate: bool) -> Problem:
    """Supports without a common direction: S1 S2 is 0. Rotated, rounding leaves 1e-16, and its square root is seen."""
    x, y = _wider(X, 0 * X), _wider(0 * Y, Y)
    truth = float(sum((r.var(axis=0, ddof=1) + r.mean(axis=0) ** 2).sum() for r in (x, y)))
    q = rotation(12) if rotate else np.eye(12)
    return _sets(x @ q, y @ q, truth, relative=1e-6 if rotate else 1e-10)


def _scaled(scale: float, wide: bool = True) -> Problem:
    n, m, d = (50, 60, 6) if wide else (12, 9, 30)
    x, y = normal(n, d), 2 * normal(m, d, seed=1) + 1
    return _sets(x * scale, y * scale, distance_of(x, y) * scale * scale)


def _hilbert(d: int) -> Array:
    return 1 / (np.arange(d)[:, None] + np.arange(d) + 1.0)


X, Y = normal(60, 6), 1.5 * normal(50, 6, seed=1) + 0.5
A, B = dyadic(64, 5), 2 * dyadic(32, 5, seed=1)
FEW, LESS = normal(12, 30), 2 * normal(9, 30, seed=1) + 1
EYE, ZERO = np.eye(6), np.zeros(6)
SKEW = np.triu(np.ones((6, 6)), 1) - np.tril(np.ones((6, 6)), -1)

CASES: dict[str, Callable[[], Problem]] = {
    # sets that are equal, or almost
    "identical sets": lambda: _sets(X, X.copy(), 0.0, 0),
    "identical sets, N < d": lambda: _sets(FEW, FEW.copy(), 0.0, 0),
    "identical constant sets": lambda: _sets(np.full((9, 6), 0.1), np.full((9, 6), 0.1), 0.0, 0),
    "the same rows in another order": lambda: _sets(X, X[::-1].copy(), 0.0, absolute=1e-12),
    "the same rows in another order, N < d": lambda: _sets(FEW, FEW[::-1].copy(), 0.0, absolute=1e-11),
    "sets 1e-12 apart": lambda: _sets(X, X + 1e-12 * normal(60, 6, seed=5), 0.0, absolute=1e-12),
    "a set twice over": lambda: _sets(X, np.vstack([X, X])),
    # means
    "shifted by 3": lambda: _sets(A, A + 3, 45.0, 1e-12),
    "mirrored": lambda: _sets(X + 2, -X - 2, 4 * float(((X + 2).mean(0) ** 2).sum()), 1e-12),
    "both at 2^20": lambda: _sets(A + 2**20, B + 2**20, distance_of(A, B)),
    "constant sets": lambda: _sets(np.zeros((3, 6)), np.ones((4, 6)), 6.0),
    "constant against not": lambda: _sets(np.full((50, 6), 7.0), Y),
    # ranks
    "rank 1 both": lambda: _rank_one(full=False),
    "rank 1 against full": lambda: _rank_one(full=True),
    "N < d both": lambda: _sets(FEW, LESS),
    "N < d one": lambda: _sets(FEW, normal(200, 30, seed=1)),
    "N < d, y = 3 x": lambda: _sets(FEW, 3 * FEW, 4 * float((FEW.mean(0) ** 2 + FEW.var(0, ddof=1)).sum())),
    "N = d": lambda: _sets(normal(30, 30), normal(30, 30, seed=1)),
    "N = d + 1": lambda: _sets(normal(31, 30), normal(31, 30, seed=1)),
    "N = 2": lambda: _sets(X[:2], Y[:2]),
    "N = 2 against many": lambda: _sets(X[:2], Y),
    "d = 1": lambda: _sets(X[:, :1], Y[:, :1], _in_one_dimension(X[:, 0], Y[:, 0])),
    "d = 1, N = 2": lambda: _sets(np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]]), 4 + 2.0),
    "one constant feature": lambda: _sets(_wider(X, 0 * X[:, :1] + 7), normal(50, 7, seed=1)),
    "dead features in both": lambda: _sets(_wider(X, 0 * X), _wider(Y, 0 * Y), distance_of(X, Y)),
    "dead features in one": lambda: _sets(X * [1, 1, 1, 0, 0, 0], Y),
    "every feature twice": lambda: _sets(_wider(X, X), _wider(Y, Y), 2 * distance_of(X, Y)),
    "a feature and its negative": lambda: _sets(_wider(X, -X), normal(50, 12, seed=1)),
    "disjoint supports": lambda: _apart(rotate=False),
    "disjoint supports, rotated": lambda: _apart(rotate=True),
    # spectra
    "commuting": _commuting,
    "well conditioned, d = 128": lambda: transported(spectrum(np.linspace(1, 9, 128)), positive(128)),
    "a spectrum of 16 decades": lambda: transported(spectrum(np.logspace(0, -16, 40)), positive(40)),
    "Hilbert's matrix": lambda: transported(_hilbert(14), positive(14)),
    "features of 1e-9, 1 and 1e9": lambda: _sets(X[:, :3] * [1e-9, 1, 1e9], Y[:, :3]),
    "one row at 1e8": lambda: _sets(_with(X, 1e8, (4, 2)), Y),
    "Cauchy rows": lambda: _sets(X / normal(60, 6, seed=7), Y / normal(50, 6, seed=8)),
    "sparse positive rows": lambda: _sets(np.maximum(FEW - 1, 0), np.maximum(LESS - 3, 0)),
    # scales
    "scale 1e-100": lambda: _scaled(1e-100),
    "scale 1e-100, N < d": lambda: _scaled(1e-100, wide=False),
    "scale 1e-10": lambda: _scaled(1e-10),
    "scale 1e80": lambda: _scaled(1e80),
    "scale 1e80, N < d": lambda: _scaled(1e80, wide=False),
    "scale 1e140": lambda: _scaled(1e140),
    "squares that underflow": lambda: _sets(X * 1e-200, Y * 1e-200, 0.0, absolute=1e-300),
    "scale 1e-100 against 1": lambda: _sets(X * 1e-100, Y),
    "scale 1e-80 against 1e80": lambda: _sets(X * 1e-80, Y * 1e80, distance_of(0 * X, Y) * 1e160),
    # types and layouts
    "float32 features": lambda: _sets(X.astype(np.float32), Y.astype(np.float32)),
    "float16 features to 300": lambda: _sets((100 * X).astype(np.float16), (100 * Y).astype(np.float16)),
    "uint8 features": lambda: _sets((40 * abs(X)).astype(np.uint8), (40 * abs(Y)).astype(np.uint8)),
    "big-endian features": lambda: _sets(X.astype(">f8"), Y.astype(">f8")),
    "transposed and reversed views": lambda: _sets(np.asfortranarray(X), Y[::-1, ::-1][:, ::-1], distance_of(X, Y)),
    "float32 moments": lambda: _float32_moments(same=False),
    "identical float32 moments": lambda: _float32_moments(same=True),
    "moments asymmetric by 1e-13": lambda: _perturbed(1e-13 * SKEW),
    "moments of zero covariance": lambda: Problem(6.0, moments=(ZERO, 0 * EYE, ZERO + 1, 0 * EYE)),
    "big-endian moments": lambda: Problem(6.0, moments=(ZERO.astype(">f8"), EYE.astype(">f8"), ZERO + 1, EYE)),
    # what has no distance
    "one NaN": lambda: _bad_sets(_with(X, NAN, (3, 2)), Y),
    "one NaN of 128 features": lambda: _bad_sets(_with(normal(200, 128), NAN, (3, 2)), normal(200, 128, seed=1)),
    "one infinite value": lambda: _bad_sets(X, _with(Y, INF, (3, 2))),
    "infinities of both signs": lambda: _bad_sets(_with(_with(X, INF, (3, 2)), -INF, (4, 2)), Y),
    "only NaN": lambda: _bad_sets(X * NAN, Y),
    "too large to square": lambda: _bad_sets(X * 1e200, Y),
    "N = 1": lambda: _bad_sets(X[:1], Y),
    "no rows": lambda: _bad_sets(X[:0], Y),
    "no features": lambda: _bad_sets(X[:, :0], Y[:, :0]),
    "unequal d": lambda: _bad_sets(X, Y[:, :5]),
    "unequal d, one is 1": lambda: _bad_sets(X, Y[:, :1]),
    "NaN in mu": lambda: _bad_moments(ZERO * NAN, EYE),
    "NaN in sigma": lambda: _bad_moments(ZERO, EYE * NAN),
    "infinite sigma": lambda: _bad_moments(ZERO, EYE + INF),
    "sigma of another size": lambda: _bad_moments(ZERO, np.eye(5)),
    "sigma that is not square": lambda: _bad_moments(ZERO, EYE[:, :5]),
    "sigma that is not symmetric": lambda: _bad_moments(ZERO, EYE + 0.3 * SKEW),
    "a negative variance": lambda: _bad_moments(ZERO, EYE - np.diag([0, 0, 3, 0, 0, 0])),
    "sigma that is negative definite": lambda: _bad_moments(ZERO, -EYE),
    "sigma with a negative eigenvalue": lambda: _bad_moments(ZERO, EYE - 0.5),
}
