"""Tables and pictures of results: that every number is in them, once and in its place."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools.jackknife import BLOCKS, Estimate, jackknife
from tools.report import columns_of, csv_table, difference_table, markdown_table, plot_quality, rows_of
from tools.results import Difference, Result

AXES = {"sampler": "heun", "steps": 18, "guidance": 1.0, "teleport": None, "draw": 0}


def result(name: str, values: dict[str, dict[str, Estimate]], nfe: int | None = None, **axes: Any) -> Result:
    """What exists already (no nfe) has no axis but the draw."""
    point = (AXES if nfe is not None else {"draw": 0}) | axes
    facts = {
        "extractors": {space: f"{space}|8x8" for space in values},
        "references": {space: {"n": 9} for space in values},
        "stream": f"{name} {point}",
    }
    inputs = {"source": f"runs/{name}", "facts": {"source": name}, "manifest": {"reference": "digits"}}
    return Result(name, point, 2000, nfe, values, facts, inputs, {"images_per_second": 900.0 if nfe else None})


def fd(value: float, *, debiased: float | None = None, error: float | None = None) -> dict[str, dict[str, Estimate]]:
    return {"digits": {"fd": Estimate(value, error, debiased)}}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace(r"\|", "¦").strip("|").split("|")]


def table(results: list[Result]) -> tuple[list[str], list[list[str]], list[str]]:
    """Heads, rows and notes of the Markdown."""
    text = markdown_table(results)
    assert text.endswith("\n")
    lines = text.splitlines()
    end = lines.index("")
    heads, rule, rows = cells(lines[0]), cells(lines[1]), [cells(line) for line in lines[2:end]]
    assert rule == [":--", *["--:"] * (len(heads) - 1)]
    assert all(len(row) == len(heads) for row in rows)
    return heads, rows, lines[end + 1 :]


# The table


def test_draws_of_a_point_are_a_row_with_their_mean_and_deviation() -> None:
    draws = [result("t", fd(v, debiased=v - 1), 35, draw=k) for k, v in enumerate((2.0, 4.0))]
    heads, rows, _ = table([*draws, result("folder", fd(0.5, error=0.125))])
    assert heads == ["", "fd", "fd, debiased", "NFE", "images/s", "n x draws"]
    assert rows == [
        ["t", "3 ± 1.4", "2 ± 1.4", "35", "900", "2000 x 2"],
        ["folder", "0.5 ± 0.12", "–", "–", "–", "2000 x 1"],
    ]


def test_points_that_differ_in_an_axis_are_rows_and_the_axis_a_column() -> None:
    points = [result("t", fd(v), nfe, steps=s, teleport=g)
              for v, nfe, s, g in ((1, 3, 2, None), (2, 7, 4, None), (3, 3, 2, "g.npz"))]  # fmt: skip
    heads, rows, _ = table([*points, result("folder", fd(9))])
    assert heads[:3] == ["", "steps", "teleport"]
    assert [row[:4] for row in rows] == [
        ["t", "2", "–", "1"], ["t", "4", "–", "2"], ["t", "2", "g.npz", "3"], ["folder", "–", "–", "9"],
    ]  # fmt: skip


def test_results_of_another_extractor_reference_or_source_are_rows_of_their_own() -> None:
    one = result("t", fd(1), 3)
    others = [
        replace(one, facts=one.facts | {"extractors": {"digits": "digits|u8"}}),
        replace(one, facts=one.facts | {"references": {"digits": {"n": 8}}}),
        replace(
            one, facts=one.facts | {"stream": "trained on"}, inputs=one.inputs | {"facts": {"source": "trained on"}}
        ),
        replace(one, n=1000),
    ]
    assert [len(row.results) for row in rows_of([one, *others])] == [1] * 5


def test_a_metric_that_was_added_later_is_of_no_new_draw() -> None:
    draws = [result("t", fd(1.0 + draw), 3, draw=draw) for draw in (0, 1)]
    later = [
        replace(
            r, values={"digits": r.values["digits"] | {"kd": Estimate(5.0)}}, facts=r.facts | {"metrics": ["fd", "kd"]}
        )
        for r in draws
    ]
    (row,) = rows_of([*draws, *later])
    assert len(row.results) == 2
    assert row.spread("digits", "kd").mean == 5
    assert row.spread("digits", "fd").spread == pytest.approx(0.5**0.5)
    other = replace(later[0], values=fd(7.0))
    with pytest.raises(ValueError, match="of the same samples, with another digits fd"):
        rows_of([draws[0], other])


def test_one_name_for_two_models_says_which() -> None:
    old = result("t", fd(1.0), 3)
    new = replace(old, facts=old.facts | {"stream": "new"}, inputs=old.inputs | {"facts": {"source": "new"}})
    _, rows, _ = table([old, new])
    assert len({row[0] for row in rows}) == 2
    assert all(row[0].startswith("t [") for row in rows)


def test_columns_of_several_extractors_say_which() -> None:
    values = {"digits": {"fd": Estimate(1), "kd": Estimate(2)}, "pixels": {"fd": Estimate(3)}}
    heads, rows, notes = table([result("a", values), result("b", {"digits": {"kd": Estimate(4)}})])
    assert heads[1:6] == ["digits fd", "digits fd, debiased", "digits kd", "pixels fd", "pixels fd, debiased"]
    assert [row[1:6] for row in rows] == [["1", "–", "2", "3", "–"], ["–", "–", "4", "–", "–"]]
    assert notes[:2] == ["- digits: digits|8x8", "- pixels: pixels|8x8"]
    assert columns_of([result("a", values)]) == [("digits", "fd"), ("digits", "kd"), ("pixels", "fd")]


def test_a_metric_that_a_draw_lacks_is_not_averaged_over_the_others() -> None:
    both = {"digits": {"fd": Estimate(1), "kd": Estimate(2)}}
    _, rows, _ = table([result("a", both, 3), result("a", fd(3), 3, draw=1)])
    assert [row[1:4] for row in rows] == [["2 ± 1.4", "–", "–"]]


def test_warnings_and_the_reference_stand_below_once() -> None:
    few = {"digits": {"fd": Estimate(1, warning="few samples"), "kd": Estimate(1)}}
    _, _, notes = table([result("a", few, draw=k) for k in range(3)])
    assert notes[0] == "- digits: digits|8x8"
    assert notes[1] == "- reference: digits"
    assert notes[2].startswith("- ± of several draws is their standard deviation, of one its jackknife error")
    assert notes[3:] == ["- warning: digits fd: few samples"]


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    _, rows, _ = table([result("a|b", fd(1))])
    assert rows[0][0] == "a¦b"


# CSV


def test_csv_has_every_number_with_all_its_digits() -> None:
    full = jackknife(0.1 + 0.2, [1 / k for k in range(1, BLOCKS + 1)])
    results = [
        result('a, "b"\n', {"digits": {"fd": full, "kd": Estimate(-1e-17)}}, 35, draw=3),
        result("folder", {"pixels": {"fd": Estimate(2.5)}}),
    ]
    read = list(csv.DictReader(io.StringIO(csv_table(results))))
    assert len(read) == 3
    assert [(r["name"], r["extractor"], r["metric"], r["draw"]) for r in read] == [
        ('a, "b"\n', "digits|8x8", "fd", "3"), ('a, "b"\n', "digits|8x8", "kd", "3"),
        ("folder", "pixels|8x8", "fd", "0"),
    ]  # fmt: skip
    assert full.interval is not None
    assert [float(read[0][c]) for c in ("value", "standard_error", "debiased", "low", "high")] == [
        full.value, full.standard_error, full.debiased, *full.interval,
    ]  # fmt: skip
    assert float(read[1]["value"]) == -1e-17
    assert [read[1][c] for c in ("standard_error", "debiased", "low", "high")] == [""] * 4
    assert (read[0]["sampler"], read[0]["steps"], read[0]["teleport"], read[0]["nfe"]) == ("heun", "18", "", "35")
    assert (read[2]["sampler"], read[2]["steps"], read[2]["nfe"], read[2]["n"]) == ("", "", "", "2000")
    assert [r["key"] for r in read] == [results[0].key, results[0].key, results[1].key]


# Pictures


def test_pictures_of_quality_against_evaluations_are_pictures(tmp_path: Path) -> None:
    values = {"digits": {"fd": Estimate(1.0, 0.1), "vendi@2": Estimate(2.0)}, "a.b:c": {"fd": Estimate(2.0)}}
    line = [result("t", values, nfe, steps=nfe) for nfe in (4, 8)]
    level = result("folder", fd(0.5, error=0.1))
    files = plot_quality([*line, level], tmp_path / "plots")
    assert [file.name for file in files] == ["digits-fd.png", "digits-vendi@2.png", "a.b_c-fd.png"]
    assert sorted(files) == sorted((tmp_path / "plots").iterdir())
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert (image.format, image.size) == ("PNG", (660, 440))
            extremes = image.convert("L").getextrema()
            assert extremes[0] < 100 < 250 < extremes[1]


def test_error_bars_and_levels_are_drawn(tmp_path: Path) -> None:
    """The same points with another error, or without the level line, are another picture."""

    def picture(name: str, error: float, *more: Result) -> bytes:
        line = [result("t", fd(nfe, error=error), nfe, steps=nfe) for nfe in (4, 8)]
        (file,) = plot_quality([*line, *more], tmp_path / name)
        return file.read_bytes()

    plain = picture("a", 0.5)
    assert picture("b", 0.5) == plain
    assert picture("c", 1.0) != plain
    level = picture("d", 0.5, result("folder", fd(6)))
    assert level != plain
    assert picture("e", 0.5, result("folder", fd(6, error=0.5))) != level


def test_a_metric_of_which_no_line_has_two_points_has_no_picture(tmp_path: Path) -> None:
    results = [result("student", fd(1), 1), result("teacher", fd(1), 35), result("folder", fd(2))]
    assert plot_quality(results, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


# Differences


def difference(metric: str, low: float, high: float, paired: bool = True) -> Difference:
    middle = (low + high) / 2
    return Difference("digits", metric, 1.0, 1.0 + middle, middle, (high - low) / 4, (low, high), paired)


def test_a_difference_says_whether_it_is_one() -> None:
    found = [difference("fd", -3, -1), difference("kd", -1, 3), difference("precision", 0.5, 0.75)]
    lines = difference_table(found, "A|1", "B").splitlines()
    assert cells(lines[0]) == ["", "A¦1", "B", "difference", "95 % interval", ""]
    assert [cells(line) for line in lines[2:5]] == [
        ["digits fd", "1", "-1", "-2", "-3 to -1", "differ"],
        ["digits kd", "1", "2", "+1", "-1 to +3", "no difference shown"],
        ["digits precision", "1", "1.625", "+0.625", "+0.5 to +0.75", "differ"],
    ]
    assert lines[5:] == ["", "- paired by sample number", "- differences of fd are of the debiased values"]


def test_differences_without_pairs_are_named() -> None:
    nothing = Difference("digits", "vendi", 1.0, 2.0, 1.0, None, None, False)
    lines = difference_table([difference("kd", 1, 2), nothing], "A", "B").splitlines()
    assert cells(lines[3]) == ["digits vendi", "1", "2", "+1", "–", "–"]
    assert lines[5:] == ["- paired by sample number", "- not paired, the errors of both are added: digits vendi"]
    assert "- paired" not in difference_table([nothing], "A", "B")
