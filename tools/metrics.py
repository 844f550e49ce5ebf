"""Distances between sets of features, as closed formulas: tensors or statistics in, numbers out.

Fréchet: Heusel et al. 2017, "GANs trained by a two time-scale update rule", eq. 6.
Precision and recall: Kynkäänniemi et al. 2019, "Improved precision and recall metric", eq. 1-3.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack
from torch import Tensor

from tools.statistics import FeatureStatistics

DISTANCE_BLOCK = 1024  # rows of a distance matrix held at once


@dataclass(frozen=True)
class FrechetDistance:
    """`value` = `mean_term` + `trace_term`: |mu1 - mu2|^2 and tr S1 + tr S2 - 2 tr (S1 S2)^1/2."""

    value: float
    mean_term: float
    trace_term: float


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]: of the fake rows that look real, and of the real rows that the fake ones cover."""

    precision: float
    recall: float


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> FrechetDistance:
    """The squared 2-Wasserstein distance of the two Gaussians with these means and covariances; never negative.

    tr (S1 S2)^1/2 is the nuclear norm of A^T B for any factors A A^T = S1, B B^T = S2; here the sum of the roots of
    the eigenvalues of A^T S2 A, with A the pivoted Cholesky factor of the covariance of lower rank. The product
    S1 S2 is never formed: its square root is where complex and negative distances come from. Equal statistics
    give exactly 0; otherwise rounding is about 1e-14 of the traces, and a trace term below 0 by that much is 0.

    Raises ValueError for unequal dim, fewer than two rows, or values that are not finite.
    """
    if a.dim != b.dim:
        raise ValueError(f"dim: statistics of {a.dim} and of {b.dim} features have no distance")
    mean_term = float((a.mean - b.mean).square().sum())
    trace_term = _trace_term(a.covariance, b.covariance)
    if not math.isfinite(mean_term + trace_term):
        raise ValueError("distance: not finite; the features are too large for float64 squares (up to 1e150)")
    return FrechetDistance(mean_term + trace_term, mean_term, trace_term)


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
    """A [d, rank] with A A^T = covariance: Cholesky with complete pivoting, which finds the rank (LAPACK dpstrf)."""
    factor, pivots, rank, _ = lapack.dpstrf(covariance.numpy(), lower=1)
    rows: NDArray[np.float64] = np.empty((len(pivots), rank))
    rows[pivots - 1] = np.tril(factor)[:, :rank]
    return torch.from_numpy(rows)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """How much of `fake` [M, d] lies on the manifold of `real` [N, d], and the other way round.

    A set's manifold is the union of balls around its points, each as wide as the way to its k-th neighbour.
    Distances are float32, after the common mean is taken off: uncentred they lose digits that decide.

    Raises ValueError for other shapes, NaN or infinite values, or k not in 1 ... min(N, M) - 1.
    """
    for name, features in (("real", real), ("fake", fake)):
        if features.ndim != 2 or features.shape[1] != real.shape[-1]:
            raise ValueError(f"{name}: shape {list(features.shape)} is not [N, {real.shape[-1]}]")
        bad = int((~features.isfinite().all(dim=1)).sum())
        if bad:
            raise ValueError(f"{name}: {bad} of {len(features)} rows have NaN or infinite values")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k: {k} neighbours, of {len(real)} real and {len(fake)} fake rows (1 to the fewer - 1)")

    centre = torch.cat([real, fake]).double().mean(dim=0)
    real, fake = (real.double() - centre).float(), (fake.double() - centre).float()
    real_radii, fake_radii = _squared_radii(real, k), _squared_radii(fake, k)

    covered = 0
    on_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    for start in range(0, len(real), DISTANCE_BLOCK):
        block = slice(start, start + DISTANCE_BLOCK)
        distances = _squared_distances(real[block], fake)
        on_real |= (distances <= real_radii[block, None]).any(dim=0)
        covered += int((distances <= fake_radii).any(dim=1).sum())
    return PrecisionRecall(float(on_real.double().mean()), covered / len(real))


def _squared_radii(points: Tensor, k: int) -> Tensor:
    """[N]: the squared distance of each point to its k-th neighbour among the others."""
    radii = []
    for start in range(0, len(points), DISTANCE_BLOCK):
        distances = _squared_distances(points[start : start + DISTANCE_BLOCK], points)
        distances.diagonal(offset=start).fill_(math.inf)  # a point is not its own neighbour
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return torch.addmm(squares, x, y.T, alpha=-2).clamp(min=0)


def class_entropy(labels: Tensor, n_classes: int) -> float:
    """The entropy of the histogram of labels [N] over ln n_classes: 1 when all classes are equally frequent.

    Raises ValueError for no labels, fewer than two classes, or a label outside 0 ... n_classes - 1.
    """
    if n_classes < 2:
        raise ValueError(f"n_classes: {n_classes} (2 or more)")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels: shape {list(labels.shape)} is not [N] with N of 1 or more")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"labels: {int(labels.min())} to {int(labels.max())} are not all in 0 to {n_classes - 1}")
    shares = torch.bincount(labels.cpu(), minlength=n_classes).double() / len(labels)
    return float(torch.special.entr(shares).sum()) / math.log(n_classes)
