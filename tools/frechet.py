"""The Fréchet distance of two sets of features: FID, when the features are Inception's.

Heusel et al. 2017, "GANs trained by a two time-scale update rule", eq. 6; the closed form is that of Dowson and Landau
1982. Its plain estimate is too large by about tr(S) d / N; the jackknife takes off what falls as 1 / N.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from torch import Tensor

from tools.gram import check_features
from tools.jackknife import BLOCKS, Estimate, jackknife, of_blocks
from tools.statistics import FeatureStatistics

ENOUGH = 8  # samples a feature: below, the intervals cover less than they say
NEGATIVE = 1e-4  # of the trace: float32 statistics are indefinite by 1e-6 of it


@dataclass(frozen=True)
class FrechetDistance:
    """`value` = `mean_term` + `trace_term`: |mu1 - mu2|^2 and tr S1 + tr S2 - 2 tr (S1 S2)^1/2."""

    value: float
    mean_term: float
    trace_term: float


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> FrechetDistance:
    """The squared 2-Wasserstein distance of the two Gaussians with these means and covariances; never negative.

    tr (S1 S2)^1/2 is the nuclear norm of A^T B for any factors A A^T = S1, B B^T = S2; here the sum of the roots of
    the eigenvalues of A^T S2 A, with A the pivoted Cholesky factor of the covariance of lower rank. The product
    S1 S2 is never formed: its square root is where complex and negative distances come from. Equal statistics
    give exactly 0; otherwise rounding is about 1e-14 of the traces, and a trace term below 0 by that much is 0.

    Raises ValueError for unequal dim, other extractors, fewer than two rows, values that are not finite, or a matrix
    with a negative eigenvalue.
    """
    if a.dim != b.dim:
        raise ValueError(f"dim: statistics of {a.dim} and of {b.dim} features have no distance")
    if a.extractor and b.extractor and a.extractor != b.extractor:
        raise ValueError(f"extractor: statistics of {a.extractor} and of {b.extractor} have no distance")
    mean_term = float((a.mean - b.mean).square().sum())
    trace_term = _trace_term(a.covariance, b.covariance)
    if not math.isfinite(mean_term + trace_term):
        raise ValueError("distance: not finite; the features are too large for float64 squares (up to 1e150)")
    return FrechetDistance(mean_term + trace_term, mean_term, trace_term)


def frechet_estimate(features: Tensor, reference: FeatureStatistics, blocks: Tensor | None = None) -> Estimate:
    """The distance of features [N, d] to a reference, with its error: eleven distances, one for each block left out.

    blocks [N]: of each row (None: `block_of` the row numbers). With fewer than 8 d rows the interval is too narrow,
    with fewer than 20 there is none; the estimate says so. Raises ValueError as `frechet_distance` does.
    """
    check_features("features", features, reference.dim)
    if len(features) < 2 * BLOCKS:
        whole = FeatureStatistics(reference.dim)
        whole.update(features)
        few = f"{len(features)} samples are too few for an error ({2 * BLOCKS} or more)"
        return Estimate(frechet_distance(whole, reference).value, warning=few)
    blocks = of_blocks(blocks, len(features))
    parts = []
    for block in range(BLOCKS):
        parts.append(FeatureStatistics(reference.dim))
        parts[-1].update(features[blocks == block])
    return estimate_of_parts(parts, reference)


def estimate_of_parts(parts: Sequence[FeatureStatistics], reference: FeatureStatistics) -> Estimate:
    """The same from the statistics of the ten blocks, where the rows are not kept."""
    whole, *others = _all_and_all_but_one(parts)
    value = frechet_distance(whole, reference).value
    left = [frechet_distance(other, reference).value for other in others]
    warning = None
    if whole.count is not None and whole.count < ENOUGH * whole.dim:
        per = f"fewer than {ENOUGH} a feature"
        warning = f"{whole.count} samples of {whole.dim} features: with {per} the interval is too narrow"
    return jackknife(value, left, warning)


def _all_and_all_but_one(parts: Sequence[FeatureStatistics]) -> Iterator[FeatureStatistics]:
    """The statistics of all parts together, then of all but each, from running merges of those before and after it."""
    after = [FeatureStatistics(parts[0].dim)]
    for part in reversed(parts):
        after.append(after[-1].copy())
        after[-1].merge(part)
    yield after.pop()

    before = FeatureStatistics(parts[0].dim)
    for part in parts:
        rest = after.pop()
        rest.merge(before)
        yield rest
        before.merge(part)


def _trace_term(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0

    # Even powers of two: exact, and features of scale 1e-100 or 1e80 survive being multiplied four times.
    shift_a, shift_b = _even_exponent(a), _even_exponent(b)
    a, b = a * math.ldexp(1, -shift_a), b * math.ldexp(1, -shift_b)

    outer, inner = _factor(a), b
    other = _factor(b)
    if other.shape[1] < outer.shape[1]:  # the other way round costs half the digits
        outer, inner = other, a

    product = outer.T @ inner @ outer
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    root = float(eigenvalues.clamp(min=0).sqrt().sum())
    cross = math.ldexp(root, (shift_a + shift_b) // 2)
    traces = math.ldexp(float(a.trace()), shift_a) + math.ldexp(float(b.trace()), shift_b)
    return max(traces - 2 * cross, 0.0)


def _even_exponent(covariance: Tensor) -> int:
    return 2 * (math.frexp(float(covariance.diagonal().max()))[1] // 2)


def _factor(covariance: Tensor) -> Tensor:
    """A [d, rank] with A A^T = covariance: Cholesky with complete pivoting, which finds the rank (LAPACK dpstrf).

    It stops at the first pivot that is not positive. Raises ValueError where what is left then, seen by a random
    vector, is not rounding.
    """
    factor, pivots, rank, _ = lapack.dpstrf(covariance.numpy(), lower=1)
    rows: NDArray[np.float64] = np.empty((len(pivots), rank))
    rows[pivots - 1] = np.tril(factor)[:, :rank]
    probe = np.random.Generator(np.random.Philox(0)).standard_normal(len(pivots))
    rest = covariance.numpy() @ probe - rows @ (rows.T @ probe)  # |rest| estimates the Frobenius norm of what is left
    if np.linalg.norm(rest) > NEGATIVE * float(covariance.trace()):
        raise ValueError("sigma: not a covariance (an eigenvalue is clearly negative)")
    return torch.from_numpy(rows)
