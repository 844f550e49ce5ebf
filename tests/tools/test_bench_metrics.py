"""The table of what metrics cost, at a small size: its rows, its errors, and how a bar is judged."""

import pytest

from tools.bench_metrics import Sizes, Timed, metrics_tables, row, timed


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_comparison_has_a_row_and_our_numbers_are_the_truth() -> None:
    table = metrics_tables(Sizes(dim=48, rows=150, stream=700, subsets=4, repetitions=1))
    rows = {line[0]: line for line in map(cells, table.splitlines()[4:])}
    assert [name.split(",")[0] for name in rows] == ["Fréchet"] * 6 + [
        "covariance of batches of 64",
        "kernel distance",
        "Vendi score",
        "Vendi score",
        "kernel distance",
    ]
    assert [line[4] for line in rows.values()] == ["8", "", "", "", "25", "", "4", "5", "", "15", ""]
    for name, line in rows.items():
        ours = float(line[6])
        assert ours < (1e-4 if name.startswith("kernel") else 1e-10), name
    assert float(rows["kernel distance, 4 subsets of clean-fid"][7]) > 1e-6  # noise of subsets


def test_a_bar_is_met_where_the_ratio_reaches_it() -> None:
    ours, theirs = Timed(0.5, 2.0), Timed(4.0, 2.002)
    assert cells(row("it", ours, theirs, 2.0, 8.0)) == ["it", "0.50", "4.00", "8.0", "8", "yes", "0e+00", "1e-03"]
    assert cells(row("it", ours, theirs, 2.0, 8.1))[5] == "no"
    assert cells(row("it", ours, theirs, 2.0))[4:6] == ["", ""]
    assert cells(row("it", ours, Timed(4.0, None), 2.0, 8.0))[3:] == ["", "8", "no", "0e+00", "raised"]


def test_calls_are_repeated_and_what_raises_has_no_value() -> None:
    seen = []

    def call() -> float:
        seen.append(1)
        print("noise")
        return len(seen)

    assert timed(call, 3).value == 3
    assert timed(lambda: 1 / len(None)).value is None  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 / 0)
