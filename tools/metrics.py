"""All numbers of one set of features against a reference: every metric by its name, what they share computed once.

The formulas and their sources are in frechet.py, pairwise.py, vendi.py and classes.py.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tools.classes import class_accuracy, class_entropy, inception_score
from tools.frechet import frechet_estimate
from tools.gram import check_features
from tools.jackknife import BLOCKS, Estimate, block_of, jackknife
from tools.manifest import DEFAULT_METRICS, known_metric
from tools.pairwise import pairwise
from tools.statistics import FeatureStatistics
from tools.vendi import vendi_score

_MANIFOLD = ("precision", "recall", "density", "coverage")  # they rise or fall with the number of samples
NEEDS_ROWS = ("kd", "clip-mmd", *_MANIFOLD)  # of the reference
NEEDS_LOGITS = ("inception-score", "class-entropy", "class-accuracy")


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: statistics, and the rows [M, d] that they are of, where those are known."""

    statistics: FeatureStatistics
    rows: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, extractor: str | None = None) -> "Reference":
        """Of features [M, d]. Raises ValueError for fewer than two, not finite, or all the same."""
        statistics = FeatureStatistics(rows.shape[-1], extractor)
        statistics.update(rows)
        if not statistics.covariance.trace() > 0:
            raise ValueError(f"reference: all {len(rows)} samples have the same features ({extractor})")
        return cls(statistics, rows)


def evaluate(
    features: Tensor,
    reference: Reference,
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    logits: Tensor | None = None,
    labels: Tensor | None = None,
    device: torch.device | str | None = None,
    errors: bool = True,
) -> dict[str, Estimate]:
    """The metrics of features [N, d], each with what is known of its error, in the order they are asked for.

    logits [N, C]: of the extractor's own classifier, for the three metrics of classes; labels [N]: what was asked of
    the generator, for class-accuracy. Row k is sample k, which decides its jackknife block. Precision, recall, density
    and coverage are of min(N, M) rows of both sides: they move with the number; which rows of the larger one is drawn
    once and for all. device: where pairs are compared (None: where they are). errors=False: of fd and vendi the values
    only, in a tenth of the time.
    Raises ValueError for unknown metrics, metrics that need what is not there, and features that do not fit.
    """
    for name in metrics:
        try:
            known_metric(name)
        except ValueError as error:
            raise ValueError(f"metrics: {error}") from error
    if not metrics:
        raise ValueError(f"metrics: none; accepted are {', '.join(DEFAULT_METRICS)} and others")
    features = torch.as_tensor(features).detach()
    check_features("features", features, reference.statistics.dim)
    _check_needs(metrics, reference, len(features), logits, labels)
    found = _pairs(features, reference, [name for name in metrics if name in NEEDS_ROWS], device)

    if {"fd", "relative-fd"} & set(metrics):
        found["fd"] = frechet_estimate(features, reference.statistics, errors=errors)
    if "relative-fd" in metrics:
        found["relative-fd"] = _scaled(found["fd"], 100 / float(reference.statistics.covariance.trace()))
    for name in metrics:
        base, _, order = name.partition("@")
        if base == "vendi":
            found[name] = vendi_score(features, float(order or 1), errors=errors)
    if logits is not None:
        found |= _of_classes(logits, labels, metrics)
    return {name: found[name] for name in metrics}


def _of_classes(logits: Tensor, labels: Tensor | None, metrics: Sequence[str]) -> dict[str, Estimate]:
    found, predicted, n_classes = {}, logits.argmax(1), logits.shape[1]
    if "inception-score" in metrics:
        found["inception-score"] = inception_score(logits)
    if "class-entropy" in metrics:
        found["class-entropy"] = _jackknifed(lambda rows: class_entropy(predicted[rows], n_classes), len(logits))
    if "class-accuracy" in metrics and labels is not None:
        found["class-accuracy"] = _jackknifed(lambda rows: class_accuracy(predicted[rows], labels[rows]), len(logits))
    return found


def _jackknifed(statistic: Callable[[Tensor], float], n: int) -> Estimate:
    """Of a function of which rows there are, [N] bool, at no cost worth a formula."""
    value = statistic(torch.ones(n, dtype=torch.bool))
    if n < BLOCKS:
        return Estimate(value)
    blocks = block_of(range(n))
    return jackknife(value, [statistic(blocks != b) for b in range(BLOCKS)])


def _check_needs(
    metrics: Sequence[str], reference: Reference, n: int, logits: Tensor | None, labels: Tensor | None
) -> None:
    for rows, needed in ((logits, "logits"), (labels, "labels")):
        if rows is not None and len(rows) != n:
            raise ValueError(f"{needed}: shape {list(rows.shape)}; needed are {n} rows, one for each of the features")
    if logits is not None:
        check_features("logits", logits, logits.shape[-1])
        n_classes = logits.shape[1]
        known = labels is None or (
            not labels.is_floating_point() and bool(((labels >= 0) & (labels < n_classes)).all())
        )
        if not known and "class-accuracy" in metrics:
            raise ValueError(f"labels: needed are whole numbers of the classifier's {n_classes} classes, from 0")
    for name in metrics:
        if name in NEEDS_ROWS and reference.rows is None:
            raise ValueError(f"metrics: {name} needs the reference's images; statistics alone are not enough")
        if name in NEEDS_LOGITS and logits is None:
            raise ValueError(
                f"metrics: {name} needs an extractor that classifies ({reference.statistics.extractor} does not)"
            )
        if name == "class-accuracy" and labels is None:
            raise ValueError("metrics: class-accuracy needs samples that were asked for by class")
        if name == "relative-fd" and not reference.statistics.covariance.trace() > 0:
            raise ValueError("metrics: relative-fd needs a reference that varies")


def _pairs(
    fake: Tensor, reference: Reference, asked: Collection[str], device: torch.device | str | None
) -> dict[str, Estimate]:
    """One pass over the pairs; two where the sides differ in number and both kinds are asked for."""
    if not asked:
        return {}
    assert reference.rows is not None
    real, m = reference.rows, min(len(fake), len(reference.rows))
    manifold = [name for name in asked if name in _MANIFOLD]
    passes = [(list(asked), real, fake)]
    if len(real) != len(fake) and manifold:
        others = [name for name in asked if name not in _MANIFOLD]
        passes = [(others, real, fake), (manifold, _some(real, m), _some(fake, m))]
    found: dict[str, Estimate] = {}
    for names, of_real, of_fake in passes:
        if names:
            result = pairwise(of_real, of_fake, asked=names, device=device)
            for name in names:
                estimate = getattr(result, {"kd": "kernel_distance", "clip-mmd": "mmd"}.get(name, name))
                assert estimate is not None
                found[name] = estimate
    return found


def _some(rows: Tensor, m: int) -> Tensor:
    """m of the rows [N, d], in their order, drawn from N and m alone: a set may be sorted by class."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:m].sort().values
    return rows[chosen.to(rows.device)]


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate of a number that is `factor` times as large."""

    def times(value: float | None) -> float | None:
        return None if value is None else value * factor

    interval, left = estimate.interval, estimate.leave_one_out
    return replace(
        estimate,
        value=estimate.value * factor,
        standard_error=times(estimate.standard_error),
        debiased=times(estimate.debiased),
        interval=interval and (interval[0] * factor, interval[1] * factor),
        leave_one_out=left and tuple(value * factor for value in left),
    )
