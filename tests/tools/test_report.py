import json

import pytest

from tools.report import Entry, markdown_table, write_json
from tools.scores import Score

ENTRIES = (
    Entry("teacher", "runs/t", (Score(2, 0.5, 0.9, 0.8, 1, 0.95, 2000), Score(4, 0.7, 0.9, 0.8, 1, 0.97, 2000)), 35,
          (900.0, 1100.0)),
    Entry("a|b", "folder", (Score(0.5, 0.25, 1, 1, None, None, 50),)),
)  # fmt: skip


def test_the_table_holds_every_number_and_a_dash_where_there_is_none() -> None:
    head, rule, teacher, folder = markdown_table(ENTRIES).splitlines()
    assert head == (
        "|  | FD | pixel FD | precision | recall | class entropy | class accuracy | NFE | images/s | n x draws |"
    )
    assert rule.count("|") == head.count("|")
    assert teacher == (
        "| teacher | 3.00 ± 1.41 | 0.600 ± 0.141 | 0.900 ± 0.000 | 0.800 ± 0.000 | 1.0000 ± 0.0000 | "
        "0.960 ± 0.014 | 35 | 1,000 ± 141 | 2000 x 2 |"
    )
    assert folder == r"| a\|b | 0.50 | 0.250 | 1.000 | 1.000 | – | – | – | – | 50 x 1 |"


def test_json_holds_the_draws_and_their_summary(tmp_path) -> None:
    write_json(tmp_path / "r.json", ENTRIES, {"seed": 3})
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result["settings"] == {"seed": 3}
    teacher, folder = result["entries"]
    assert [draw["fd"] for draw in teacher["scores"]] == [2, 4]
    assert teacher["summary"]["fd"] == {"mean": 3, "std": pytest.approx(2**0.5)}
    assert (teacher["nfe"], teacher["images_per_second"]) == (35, [900, 1100])
    assert folder["summary"]["class_entropy"] is None
    assert [f.name for f in tmp_path.iterdir()] == ["r.json"]


def test_a_number_that_is_not_finite_is_not_written(tmp_path) -> None:
    entry = Entry("x", "x", (Score(float("nan"), 1, 1, 1, None, None, 9),))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "r.json", [entry], {})
    assert not list(tmp_path.iterdir())
