"""The benchmark's own arithmetic: what it prints is what was measured, and a missed bar is said to be missed."""

from typing import Any

import pytest

from tools.bench import orders
from tools.bench_digits import digits_table
from tools.results import Spread


def test_orders_are_those_of_the_methods() -> None:
    rows = [line.split("|") for line in orders().splitlines()[2:]]
    measured = {row[1].strip(): float(row[-2]) for row in rows}
    assert measured["euler"] == pytest.approx(1, rel=0.05)
    assert measured["heun"] == pytest.approx(2, rel=0.05)


def result(fd: float, recall: float) -> dict[str, Any]:
    def entry(fd: float, recall: float, nfe: int) -> dict[str, Any]:
        means = {"fd": fd, "pixel_fd": 0.5, "precision": 0.9, "recall": recall, "class_entropy": 1.0}
        summary = {name: Spread(mean, 0.01, 3) for name, mean in (means | {"class_accuracy": 0.99}).items()}
        return {"summary": summary, "nfe": nfe, "images_per_second": 200.0}

    return {"teacher": entry(0.4, 0.8, 35), "student": entry(fd, recall, 1), "seconds": {"teacher": 9, "student": 7}}


def test_bars_are_ratios_to_the_teacher_and_judged_by_the_worst_seed() -> None:
    table = digits_table([4, 5], [result(0.48, 0.76), result(0.52, 0.73)])
    assert "| 4 | teacher | 0.400 ± 0.010 |" in table
    assert "| 35 | 200 | 9 |" in table
    assert "| FD, ratio to the teacher's | 1.250 | 1.300 | at most 1.25 | no |" in table
    assert "| pixel FD, ratio | 1.000 | 1.000 | at most 1.75 | yes |" in table
    assert "| recall, ratio | 0.931 | 0.912 | at least 0.9 | yes |" in table
    assert "| class entropy | 1.000 | 1.000 | at least 0.98 | yes |" in table
