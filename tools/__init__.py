"""Evaluation: what a number of samples is worth, and how sure that is.

statistics.py         streaming mean and covariance of features; reads and writes clean-fid's .npz
metrics.py            Fréchet distance, precision and recall, class entropy: tensors in, numbers out
features.py           images -> features, under a name that says how they were prepared
digits_classifier.py  the small classifier whose features judge the embedded digits, and how it is trained
sources.py            where images come from: a folder, the digits, a generator
scores.py             all the numbers of one set of images; their mean and spread over draws; tables
fid.py                the `distill-fid` command        atomic.py   a file is whole or it is not there

The public names below are imported when they are first used, so that `distill-fid --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.digits_classifier import DigitsClassifier as DigitsClassifier
    from tools.features import EXTRACTORS as EXTRACTORS
    from tools.features import Features as Features
    from tools.frechet import frechet_distance as frechet_distance
    from tools.metrics import class_entropy as class_entropy
    from tools.metrics import precision_recall as precision_recall
    from tools.scores import Reference as Reference
    from tools.scores import score as score
    from tools.statistics import FeatureStatistics as FeatureStatistics

_HOMES = {
    "DigitsClassifier": "tools.digits_classifier",
    "EXTRACTORS": "tools.features",
    "FeatureStatistics": "tools.statistics",
    "Features": "tools.features",
    "Reference": "tools.scores",
    "class_entropy": "tools.metrics",
    "frechet_distance": "tools.frechet",
    "precision_recall": "tools.metrics",
    "score": "tools.scores",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tools' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
