"""Whether a result still says what its inputs say: its key, its inputs hashed again, its values worked out again."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.run import differences
from tools.digest import HashCache
from tools.jobs import Batch, Job
from tools.manifest import manifest_of
from tools.processes import own_device
from tools.results import Result, Values
from tools.workers import Worker

NEAR = 1e-6  # of a number: what other hardware may do to its last digits


def verify(path: str | Path, device: str | None = None, recompute: bool = False) -> Iterator[tuple[bool, str]]:
    """What was looked at, and whether it holds: the key, the inputs, and the values.

    Values are worked out from the features beside the result, or, with recompute, from the inputs, which takes as long
    as the first time. Raises ValueError for what is no result, or one whose facts are not those of its key.
    """
    path = Path(path)
    result = Result.load(path)
    yield True, f"key: {result.key}, and the file is as it was written"

    axes = {axis: [value] for axis, value in result.inputs["axes"].items()}
    point = axes | {"source": {result.name: result.inputs["source"]}}
    fields = result.inputs["manifest"] | {"matrix": point, "exclude": []}
    there = Path(result.provenance["folder"])
    for holder, name in ((fields, "reference"), (point, "source"), (point, "teleport"), (point, "prompts")):
        if name in holder:
            holder[name] = _found(holder[name], there)
    manifest = manifest_of(fields, str(path))
    with tempfile.TemporaryDirectory() as spare:
        beside = path.parent.parent if path.parent.name == "results" and not recompute else Path(spare)
        try:
            batch = Batch(manifest, beside, device or _device(result), hashes=HashCache())
        except ValueError as error:
            yield False, f"inputs: cannot be read any more: {error}"
            return
        if not batch.jobs:
            yield False, f"inputs: have changed: {'; '.join(batch.notes)}"
            return
        (job,) = batch.jobs
        changed = differences(result.facts | result.inputs["facts"], job.facts | job.stream.facts)
        if changed:
            yield False, f"inputs: have changed: {'; '.join(changed)}"
            return
        yield True, "inputs: unchanged"
        again = job.result({}, {})
        wrong = [part for part in ("axes", "n", "nfe") if getattr(again, part) != getattr(result, part)]
        if wrong:
            yield False, f"{wrong[0]}: {getattr(result, wrong[0])}, where its inputs give {getattr(again, wrong[0])}"

        missing = sum(
            bool(batch.cache.missing(stream, extractors, chunk))
            for stream, extractors in batch.streams_of(job)
            for chunk in range(stream.chunks)
        )
        if missing and not recompute:
            yield False, f"values: not looked at, {missing} chunks of features are not there (--recompute makes them)"
            return
        try:
            found = _recomputed(batch, job) if recompute else batch.judge(job).values
        except ValueError as error:  # chunks that were changed
            yield False, f"values: {error}"
            return
        yield _compared(result.values, found)


def _found(value: Any, folder: Path) -> Any:
    """Paths as they were written, or, where there is nothing here, in the folder that the batch ran in."""
    if isinstance(value, dict):
        return {name: _found(v, folder) for name, v in value.items()}
    if isinstance(value, list):
        return [_found(v, folder) for v in value]
    here = not isinstance(value, str) or value.startswith("digits") or Path(value).exists()
    return value if here or not (folder / value).exists() else str(folder / value)


def _recomputed(batch: Batch, job: Job) -> Values:
    (again,) = Worker(batch).run()
    return again.values


def _compared(kept: Values, found: Values) -> tuple[bool, str]:
    """Equal numbers are equal bits: they were written with all their digits.

    Another processor or another torch moves the last ones: those hold too, and it is said.
    """
    ours, theirs = _flat(kept), _flat(found)
    wrong = [
        f"{place} is {theirs.get(place)!r}, and was {ours.get(place)!r}"
        for place in {**ours, **theirs}
        if ours.get(place) != theirs.get(place)
    ]
    count = sum(map(len, found.values()))
    if not wrong:
        return True, f"values: all {count} are the same to the bit"
    if ours.keys() == theirs.keys() and all(_near(ours[place], theirs[place]) for place in ours):
        return (
            True,
            f"values: all {count} are the same to {NEAR:g} of each, not to the bit (other versions, processor?)",
        )
    return False, f"values: {'; '.join(wrong)}"


def _near(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=NEAR, abs_tol=1e-12)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_near, a, b))
    return bool(a == b)


def _device(result: Result) -> str:
    """The kind of device that the features were made on: on another their bits are others."""
    kind = str(result.inputs["facts"]["device"])
    return kind if kind == "cpu" else own_device()


def _flat(values: Values) -> dict[str, Any]:
    """extractor metric field -> what it is."""
    return {
        f"{space} {metric} {field}": value
        for space, metrics in values.items()
        for metric, estimate in metrics.items()
        for field, value in asdict(estimate).items()
    }
