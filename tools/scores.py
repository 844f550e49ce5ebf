"""All the numbers of one set of images against a reference, and their mean and spread over several draws.

FD is 100 x the Fréchet distance over the trace of the reference's covariance, so that 100 is about what a constant
image gets, in the extractor's features; pixel FD is the plain distance of the pixels in [-1, 1]. Why both: features
see what classes are made of and forgive noise, pixels the other way round.
Why draws: at n = 2000 two draws of one generator differ by as much as two methods often do.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tools.digits_classifier import N_CLASSES, DigitsClassifier
from tools.features import EXTRACTORS, Features, dequantise, quantise
from tools.frechet import frechet_distance
from tools.metrics import class_entropy, precision_recall
from tools.statistics import FeatureStatistics

BATCH = 500  # images whose features are computed at once


@dataclass(frozen=True)
class Score:
    """One draw of `n` images, judged. The class numbers are None without a classifier, the accuracy without labels."""

    fd: float
    pixel_fd: float
    precision: float
    recall: float
    class_entropy: float | None
    class_accuracy: float | None
    n: int


@dataclass(frozen=True)
class Estimate:
    """The mean over draws and their sample standard deviation (N - 1; None for a single draw)."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Reference:
    """The images to compare with, seen through an extractor once: rows [N, dim] and the statistics of both spaces."""

    features: Features
    pixels: Features
    classifier: DigitsClassifier | None
    rows: Tensor
    statistics: FeatureStatistics
    pixel_statistics: FeatureStatistics

    @classmethod
    def of(cls, images: Tensor, features: str = "digits") -> "Reference":
        """Images [N, C, H, W] in [-1, 1], and the name of an extractor; `digits` also gives the class numbers.

        Raises ValueError for an unknown extractor, one that does not read such images, fewer than four images,
        and images whose features do not vary.
        """
        if features not in EXTRACTORS:
            raise ValueError(f"features: {features!r} is not one of {', '.join(EXTRACTORS)}")
        if images.ndim != 4 or len(images) < 4:
            raise ValueError(f"reference: shape {list(images.shape)} is not [N, C, H, W] with N of 4 or more")
        channels, height, width = images.shape[1:]
        extractor = EXTRACTORS[features]((channels, height, width))
        pixels = EXTRACTORS["pixels"]((channels, height, width))
        classifier = DigitsClassifier.load() if features == "digits" else None

        # In an order of our own: `score` may take the first rows, and folders are often sorted by class.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        rows = _rows(extractor, images[order])
        reference = cls(
            extractor, pixels, classifier, rows, _statistics(rows), _statistics(_rows(pixels, images[order]))
        )
        if not reference.statistics.covariance.trace() > 0:
            raise ValueError(f"reference: all {len(images)} images have the same {extractor.name} features")
        return reference


def score(images: Tensor, reference: Reference, labels: Tensor | None = None, k: int = 3) -> Score:
    """Judge images [n, C, H, W] in [-1, 1], of which labels [n] were asked for, if any.

    Precision and recall (k-th neighbours) use the first m = min(n, N) of the images and of the reference's N rows:
    recall would rise with n alone. So images should not be sorted.

    Raises ValueError for images or labels of another shape, and values that are not finite.
    """
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"labels: shape {list(labels.shape)} is not [{len(images)}], one for each image")
    rows = _rows(reference.features, images)
    distance = frechet_distance(_statistics(rows), reference.statistics)
    pixels = frechet_distance(_statistics(_rows(reference.pixels, images)), reference.pixel_statistics)
    m = min(len(rows), len(reference.rows))
    manifold = precision_recall(reference.rows[:m], rows[:m], k)

    entropy = accuracy = None
    if reference.classifier is not None:
        predicted = reference.classifier.predict(dequantise(quantise(images)))
        entropy = class_entropy(predicted, N_CLASSES)
        accuracy = None if labels is None else float((predicted == labels).double().mean())

    scaled = 100 * distance.value / float(reference.statistics.covariance.trace())
    return Score(scaled, pixels.value, manifold.precision, manifold.recall, entropy, accuracy, len(images))


def summarise(rows: Sequence[Score]) -> dict[str, Estimate | None]:
    """Mean and spread over draws of every number of a `Score` but n; None where no draw has it.

    Raises ValueError for no draws, and for draws of different n (their distances have different biases).
    """
    sizes = {row.n for row in rows}
    if len(sizes) != 1:
        raise ValueError(f"rows: {len(rows)} draws with n of {sorted(sizes)} (one or more, all with the same n)")
    names = [field.name for field in fields(Score) if field.name != "n"]
    return {name: estimate([getattr(row, name) for row in rows]) for name in names}


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and sample standard deviation; None for no values. Raises ValueError when only some are None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len(known) != len(values):
        raise ValueError(f"values: {len(values) - len(known)} of {len(values)} draws lack a number that others have")
    return Estimate(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _rows(features: Features, images: Tensor) -> Tensor:
    return torch.cat([features(batch) for batch in images.split(BATCH)])


def _statistics(rows: Tensor) -> FeatureStatistics:
    result = FeatureStatistics(rows.shape[1])
    result.update(rows)
    return result
