"""What was measured, as a Markdown table for people and as JSON for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samplers.atomic import atomic_write
from tools.scores import Estimate, Score, estimate, summarise

COLUMNS = {  # heading -> the number of a Score, and how it is written
    "FD": ("fd", ".2f"),
    "pixel FD": ("pixel_fd", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "class entropy": ("class_entropy", ".4f"),
    "class accuracy": ("class_accuracy", ".3f"),
}


@dataclass(frozen=True)
class Entry:
    """One row: a named source with the scores of its draws, its network evaluations per sample, images per second."""

    name: str
    source: str
    scores: tuple[Score, ...]
    nfe: int | None = None
    images_per_second: tuple[float, ...] = ()


def markdown_table(entries: Sequence[Entry]) -> str:
    """Mean ± sample standard deviation over draws, a dash where there is no number; ends in a newline."""
    heads = ["", *COLUMNS, "NFE", "images/s", "n x draws"]
    lines = [_line(heads), _line([":--", *["--:"] * (len(heads) - 1)])]
    for entry in entries:
        summary = summarise(entry.scores)
        numbers = [_written(summary[field], form) for field, form in COLUMNS.values()]
        nfe = "–" if entry.nfe is None else str(entry.nfe)
        speed = _written(estimate(entry.images_per_second), ",.0f")
        size = f"{entry.scores[0].n} x {len(entry.scores)}"
        lines.append(_line([entry.name.replace("|", r"\|"), *numbers, nfe, speed, size]))
    return "\n".join(lines) + "\n"


def write_json(path: str | Path, entries: Sequence[Entry], settings: dict[str, Any]) -> None:
    """Write {"settings", "entries": [the fields of an Entry and its "summary"]}, whole or not at all.

    Raises ValueError for a number that is not finite: JSON has none.
    """
    rows = [
        asdict(entry)
        | {
            "summary": {name: value and asdict(value) for name, value in summarise(entry.scores).items()},
        }
        for entry in entries
    ]
    text = json.dumps({"settings": settings, "entries": rows}, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as file:
        file.write((text + "\n").encode())


def _written(value: Estimate | None, form: str) -> str:
    if value is None:
        return "–"
    return f"{value.mean:{form}}" + ("" if value.std is None else f" ± {value.std:{form}}")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
