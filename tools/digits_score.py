"""The numbers of the demo's table, of digits that are in memory: what the benchmarks compare.

fd is 100 x the Fréchet distance over the trace of the reference's covariance, in the classifier's features, so that
100 is about what a constant image gets; pixel_fd is the plain distance of the pixels in [-1, 1]. Why both: features see
what classes are made of and forgive noise, pixels the other way round.
"""

from dataclasses import dataclass

from torch import Tensor

from distill.data import digits
from tools.digits_classifier import IMAGE_SHAPE
from tools.features import Extractor, load_extractor
from tools.metrics import Reference, evaluate

METRICS = {  # field -> extractor and metric
    "fd": ("digits", "relative-fd"),
    "pixel_fd": ("pixels", "fd"),
    "precision": ("digits", "precision"),
    "recall": ("digits", "recall"),
    "class_entropy": ("digits", "class-entropy"),
    "class_accuracy": ("digits", "class-accuracy"),
}


@dataclass(frozen=True)
class DigitsJudge:
    """Judges images against the held-out half of the embedded digits."""

    extractors: dict[str, Extractor]
    references: dict[str, Reference]

    @classmethod
    def load(cls) -> "DigitsJudge":
        images = digits("held-out").images
        extractors = {space: load_extractor(space, IMAGE_SHAPE) for space in ("digits", "pixels")}
        references = {space: Reference.of(e(images).features, e.name) for space, e in extractors.items()}
        return cls(extractors, references)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """The numbers of METRICS, of images [N, 1, 8, 8] in [-1, 1] that labels [N] were asked for."""
        found: dict[tuple[str, str], float] = {}
        for space, extractor in self.extractors.items():
            metrics = [metric for own, metric in METRICS.values() if own == space]
            seen = extractor(images)
            estimates = evaluate(seen.features, self.references[space], metrics, logits=seen.logits, labels=labels)
            found |= {(space, metric): estimate.value for metric, estimate in estimates.items()}
        return {name: found[place] for name, place in METRICS.items()}
