"""One JSON file for each judged set of samples: its numbers, all that decided them, and how they came about.

A result is named after its key, the sha256 of what decides its numbers; what may differ between two runs of the same
(seconds, device, versions, the command) lies apart, under `provenance`.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from scipy.stats import t

from samplers.atomic import atomic_write
from tools.digest import digest_json
from tools.jackknife import BLOCKS, CONFIDENCE, Estimate, jackknife

VERSION = 1  # of the arithmetic: the same key means the same bits

UNPAIRED = float(t.ppf((1 + CONFIDENCE) / 2, 2 * (BLOCKS - 1)))  # of two errors with nine degrees of freedom each

Values = dict[str, dict[str, Estimate]]  # extractor as it was asked for -> metric -> estimate


@dataclass(frozen=True)
class Result:
    """name, axes: the point of the matrix. n: samples. nfe: network evaluations a sample, None for what exists already.

    facts: all that decides the values; their sha256 is the key. inputs: where source and reference were found.
    """

    name: str
    axes: dict[str, Any]
    n: int
    nfe: int | None
    values: Values
    facts: dict[str, Any]
    inputs: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def key(self) -> str:
        return digest_json(self.facts)[:32]

    @property
    def title(self) -> str:
        """The name, and the axes that say more than a default would."""
        return f"{self.name} ({', '.join(f'{a} {v}' for a, v in self.axes.items() if v is not None)})"

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises ValueError for a number that is not finite: JSON has none."""
        values = {space: {m: asdict(e) for m, e in metrics.items()} for space, metrics in self.values.items()}
        content = asdict(self) | {"values": values, "key": self.key, "version": VERSION}
        content["sha256"] = digest_json(content)
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
        with atomic_write(path) as file:
            file.write((text + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Raises ValueError, naming the file, for what is no result of this version, or was changed by hand."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_number)
            sha256, found = content.pop("sha256"), digest_json(content)
            key, version = content.pop("key"), content.pop("version")
            result = TypeAdapter(cls).validate_python(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"result: {path} is not a result of distill-fid ({_why(error)})") from error
        if version != VERSION:
            raise ValueError(f"result: {path} is of version {version}, not {VERSION}; its numbers do not compare")
        if key != result.key or sha256 != found:
            raise ValueError(f"result: {path} is not what was written: it was changed by hand")
        return result


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}"


def read_results(paths: Iterable[str | Path]) -> list[Result]:
    """Of result files, and of the folders of batches; equal results of one key count once.

    Raises ValueError for a path that has none, and for two results of one key that differ, naming both files.
    """
    found: dict[str, tuple[Path, Result]] = {}
    for path in map(Path, paths):
        batch = path / "results" if (path / "results").is_dir() or (path / "features").is_dir() else path
        files = sorted(batch.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"result: {path} has no results")
        for file in files:
            result = Result.load(file)
            first, known = found.setdefault(result.key, (file, result))
            if known.values != result.values:
                raise ValueError(f"result: {first} and {file} have one key, {result.key}, and other values")
    return [result for _, result in found.values()]


@dataclass(frozen=True)
class Difference:
    """b minus a of one metric. paired: on the same samples' noise, so that what both share is not in the error."""

    extractor: str
    metric: str
    a: float
    b: float
    difference: float
    standard_error: float | None
    interval: tuple[float, float] | None
    paired: bool


def compare(a: Result, b: Result) -> list[Difference]:
    """The differences b - a of the metrics that both have, debiased where both are.

    Paired by the leave-one-block-out values where sample k of both comes from the same noise, or is the same file's
    place in a folder of as many: the error is the jackknife's of the difference. Otherwise the errors are added in
    squares. Raises ValueError for other references, extractors or numbers of samples, naming both.
    """
    if a.n != b.n:
        raise ValueError(f"n: {a.title} has {a.n} samples, {b.title} {b.n}; the biases of unequal numbers differ")
    shared = [space for space in a.values if space in b.values]
    if not shared:
        raise ValueError(f"features: {list(a.values)} and {list(b.values)}; needed is an extractor that both have")
    paired = a.facts["pairing"] == b.facts["pairing"]
    differences = []
    for space in shared:
        for part in ("extractors", "references"):
            ours, theirs = (_named(result.facts[part][space]) for result in (a, b))
            if ours != theirs:
                raise ValueError(f"{part}: {space}: {ours} and {theirs} do not compare")
        for metric in a.values[space]:
            if metric in b.values[space]:
                differences.append(_difference(space, metric, a.values[space][metric], b.values[space][metric], paired))
    if not differences:
        raise ValueError(f"metrics: {a.title} and {b.title} have none in common")
    return differences


def _named(fact: Any) -> Any:
    """A reference without the key of its features, which is another on another kind of device."""
    return {name: v for name, v in fact.items() if name != "stream"} if isinstance(fact, dict) else fact


def _difference(space: str, metric: str, a: Estimate, b: Estimate, paired: bool) -> Difference:
    if a.leave_one_out and b.leave_one_out and paired:
        left = [y - x for x, y in zip(a.leave_one_out, b.leave_one_out, strict=True)]
        estimate = jackknife(b.value - a.value, left)
        unbiased = a.debiased is not None and b.debiased is not None
        assert estimate.debiased is not None
        middle = estimate.debiased if unbiased else estimate.value
        interval = estimate.interval and (
            estimate.interval[0] + middle - estimate.debiased,
            estimate.interval[1] + middle - estimate.debiased,
        )
        return Difference(space, metric, a.value, b.value, middle, estimate.standard_error, interval, True)
    middle = _middle(b) - _middle(a) if a.debiased is not None and b.debiased is not None else b.value - a.value
    error = None
    if a.standard_error is not None and b.standard_error is not None:
        error = math.hypot(a.standard_error, b.standard_error)
    interval = None if error is None else (middle - UNPAIRED * error, middle + UNPAIRED * error)
    return Difference(space, metric, a.value, b.value, middle, error, interval, False)


def _middle(estimate: Estimate) -> float:
    return estimate.value if estimate.debiased is None else estimate.debiased


@dataclass(frozen=True)
class Spread:
    """Of one number over draws: their mean, and how far a single draw lies from it (None: not known).

    spread: the sample standard deviation over draws, or, of a single one, its jackknife standard error: both are the
    noise of one draw.
    """

    mean: float
    spread: float | None
    draws: int

    @classmethod
    def of(cls, estimates: Sequence[Estimate], debiased: bool = False) -> "Spread":
        values = [_middle(e) if debiased else e.value for e in estimates]
        if len(values) > 1:
            return cls(statistics.fmean(values), statistics.stdev(values), len(values))
        return cls(values[0], estimates[0].standard_error, 1)
