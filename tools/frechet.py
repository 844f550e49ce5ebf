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
PANEL = 256  # columns of a factor multiplied at once
LOST = 1e-10  # of the largest eigenvalue: one below may be that of a direction that the other covariance lacks
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
    few, many = sorted((a, b), key=lambda s: s.dim if s.count is None else min(s.count - 1, s.dim))
    trace_term = _trace_term(few.covariance, many.covariance, few.count is None or few.count > few.dim)
    if not math.isfinite(mean_term + trace_term):
        raise ValueError("distance: not finite; the features are too large for float64 squares (up to 1e150)")
    return FrechetDistance(mean_term + trace_term, mean_term, trace_term)


def frechet_estimate(
    features: Tensor, reference: FeatureStatistics, blocks: Tensor | None = None, *, errors: bool = True
) -> Estimate:
    """The distance of features [N, d] to a reference, with its error: eleven distances, one for each block left out.

    blocks [N]: of each row (None: `block_of` the row numbers). With fewer than 8 d rows the interval is too narrow,
    with fewer than 20 there is none; the estimate says so. errors=False: one distance, and no error. Raises ValueError
    as `frechet_distance` does.
    """
    check_features("features", features, reference.dim)
    if len(features) < 2 * BLOCKS or not errors:
        whole = FeatureStatistics(reference.dim)
        whole.update(features)
        few = f"{len(features)} samples are too few for an error ({2 * BLOCKS} or more)"
        return Estimate(frechet_distance(whole, reference).value, warning=few if errors else None)
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


def _trace_term(a: Tensor, b: Tensor, full: bool) -> float:
    """Of a covariance of fewer rows, or as many, and another. full: whether the fewer are enough for full rank."""
    if torch.equal(a, b):
        return 0.0

    # Even powers of two: exact, and features of scale 1e-100 or 1e80 survive being multiplied four times.
    shift_a, shift_b = _even_exponent(a), _even_exponent(b)
    a, b = a * math.ldexp(1, -shift_a), b * math.ldexp(1, -shift_b)

    eigenvalues = _eigenvalues(a, b, full)
    root = float(eigenvalues.clamp(min=0).sqrt().sum())
    cross = math.ldexp(root, (shift_a + shift_b) // 2)
    traces = math.ldexp(float(a.trace()), shift_a) + math.ldexp(float(b.trace()), shift_b)
    return max(traces - 2 * cross, 0.0)


def _eigenvalues(a: Tensor, b: Tensor, full: bool) -> Tensor:
    """Of A^T S A, with A the factor of the covariance of lower rank: the other way round costs half the digits."""
    outer, order = _factor(a, full)
    if not full:
        eigenvalues = torch.linalg.eigvalsh(_congruence(outer, b[order][:, order]))
        # Where none is lost, b has full rank where a has its own, and need not be factored.
        if not len(eigenvalues) or eigenvalues.min() > LOST * eigenvalues.max():
            return eigenvalues

    other, other_order = _factor(b, may_be_full=True)
    if other.shape[1] < outer.shape[1]:
        outer, order, b = other, other_order, a
    elif not full:
        return eigenvalues
    return torch.linalg.eigvalsh(_congruence(outer, b[order][:, order]))


def _even_exponent(covariance: Tensor) -> int:
    return 2 * (math.frexp(float(covariance.diagonal().max()))[1] // 2)


def _congruence(factor: Tensor, inner: Tensor) -> Tensor:
    """The lower triangle of L^T S L [r, r], of L [d, r] with zeros above its diagonal: a third of two products."""
    rank = factor.shape[1]
    product = inner.new_zeros(rank, rank)
    for start in range(0, rank, PANEL):
        panel = slice(start, start + PANEL)
        product[start:, panel] = factor[start:, start:].T @ (inner[start:, start:] @ factor[start:, panel])
    return product


def _factor(covariance: Tensor, may_be_full: bool) -> tuple[Tensor, Tensor | slice]:
    """L [d, rank] and an order [d] with L L^T = covariance[order][:, order].

    Where plain Cholesky meets no pivot that could be rounding, the rank is d and the order is that of the rows.
    Otherwise pivoting finds the rank, for twice the time (LAPACK dpstrf): it stops at the first pivot that is not
    positive. Raises ValueError where what is left then, seen by a random vector, is not rounding.
    """
    if may_be_full:
        least = len(covariance) * np.finfo(np.float64).eps * float(covariance.diagonal().max())
        factor, failed = lapack.dpotrf(covariance.numpy(), lower=1)
        if not failed and np.diagonal(factor).min() ** 2 > least:
            return torch.from_numpy(factor), slice(None)

    factor, pivots, rank, _ = lapack.dpstrf(covariance.numpy(), lower=1)
    lower: NDArray[np.float64] = np.ascontiguousarray(np.tril(factor[:, :rank]))
    order = pivots.astype(np.int64) - 1
    probe = np.random.Generator(np.random.Philox(0)).standard_normal(len(pivots))
    rest = (covariance.numpy() @ probe)[order] - lower @ (lower.T @ probe[order])  # its norm: Frobenius, of the rest
    if np.linalg.norm(rest) > NEGATIVE * float(covariance.trace()):
        raise ValueError("sigma: not a covariance (an eigenvalue is clearly negative)")
    return torch.from_numpy(lower), torch.from_numpy(order)
