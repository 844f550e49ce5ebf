"""Distances between sets of features, as closed formulas: tensors or statistics in, numbers out.

Fréchet: Heusel et al. 2017, "GANs trained by a two time-scale update rule", eq. 6.
Precision and recall: Kynkäänniemi et al. 2019, "Improved precision and recall metric", eq. 1-3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DISTANCE_BLOCK = 1024  # rows of a distance matrix held at once


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]: of the fake rows that look real, and of the real rows that the fake ones cover."""

    precision: float
    recall: float


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
