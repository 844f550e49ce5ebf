"""Evaluation: what a number of samples is worth, and how sure that is.

numbers    statistics.py streaming mean and covariance, clean-fid's .npz; frechet.py, pairwise.py (gram.py, kernels.py,
           neighbours.py), vendi.py, classes.py the metrics; jackknife.py their errors; metrics.py all of them at once;
           streaming.py as torchmetrics; conformance.py inputs that break other implementations
features   features.py (presets.py, resize.py, inception.py, vision.py, imported.py, arithmetic.py) images -> features,
           under a name that says how; digits_classifier.py the judge of the embedded digits
sources    sources.py (image_files.py, image_arrays.py) images from files, archives, runs, pipelines; digest.py hashes
batches    manifest.py what is asked for; jobs.py (references.py) keys; cache.py chunks; workers.py, processes.py who
           does it; results.py, report.py, verification.py (provenance.py) what comes of it; fid.py (arguments.py) the
           `distill-fid` command

The public names below are imported when they are first used, so that `distill-fid --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.classes import class_entropy as class_entropy
    from tools.classes import inception_score as inception_score
    from tools.digits_classifier import DigitsClassifier as DigitsClassifier
    from tools.features import Extractor as Extractor
    from tools.features import load_extractor as load_extractor
    from tools.frechet import frechet_distance as frechet_distance
    from tools.frechet import frechet_estimate as frechet_estimate
    from tools.jackknife import Estimate as Estimate
    from tools.manifest import Manifest as Manifest
    from tools.manifest import read_manifest as read_manifest
    from tools.metrics import Reference as Reference
    from tools.metrics import evaluate as evaluate
    from tools.pairwise import density_coverage as density_coverage
    from tools.pairwise import kernel_distance as kernel_distance
    from tools.pairwise import precision_recall as precision_recall
    from tools.presets import PRESETS as PRESETS
    from tools.processes import run_batch as run_batch
    from tools.results import Result as Result
    from tools.results import compare as compare
    from tools.results import read_results as read_results
    from tools.sources import SourceSettings as SourceSettings
    from tools.sources import open_source as open_source
    from tools.statistics import FeatureStatistics as FeatureStatistics
    from tools.streaming import FrechetMetric as FrechetMetric
    from tools.streaming import InceptionScoreMetric as InceptionScoreMetric
    from tools.streaming import PairwiseMetric as PairwiseMetric
    from tools.streaming import VendiMetric as VendiMetric
    from tools.vendi import vendi_score as vendi_score

_HOMES = {
    "DigitsClassifier": "tools.digits_classifier",
    "Estimate": "tools.jackknife",
    "Extractor": "tools.features",
    "FeatureStatistics": "tools.statistics",
    "FrechetMetric": "tools.streaming",
    "InceptionScoreMetric": "tools.streaming",
    "Manifest": "tools.manifest",
    "PRESETS": "tools.presets",
    "PairwiseMetric": "tools.streaming",
    "Reference": "tools.metrics",
    "Result": "tools.results",
    "SourceSettings": "tools.sources",
    "VendiMetric": "tools.streaming",
    "class_entropy": "tools.classes",
    "compare": "tools.results",
    "density_coverage": "tools.pairwise",
    "evaluate": "tools.metrics",
    "frechet_distance": "tools.frechet",
    "frechet_estimate": "tools.frechet",
    "inception_score": "tools.classes",
    "kernel_distance": "tools.pairwise",
    "load_extractor": "tools.features",
    "open_source": "tools.sources",
    "precision_recall": "tools.pairwise",
    "read_manifest": "tools.manifest",
    "read_results": "tools.results",
    "run_batch": "tools.processes",
    "vendi_score": "tools.vendi",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tools' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
