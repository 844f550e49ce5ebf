"""The bench of DisBack: when a quality is reached, how gains are compared, and one small setting from end to end."""

import json
import math
from pathlib import Path

import pytest

from tools import bench_disback
from tools.bench_disback import ARMS, EDM_NOISE, SETTINGS, Arm, Setting, make
from tools.bench_disback_report import draw, mismatch_table, reached, speed_up, table

SMALL = Setting("small", "ring", EDM_NOISE, 0.3, 16, 20, (1e-3, 2e-3), teacher_steps=30)


def curve(*distances: float) -> list[list[float]]:
    return [[5 * k, 100 + 40 * k, distance] for k, distance in enumerate(distances)]


def test_a_quality_is_reached_where_the_line_between_two_looks_falls_below_it_for_good() -> None:
    assert reached(curve(0.4, 0.2, 0.05, 0.04, 0.05), 0.1, 0) == (pytest.approx(5 + 5 * 2 / 3), True)
    assert reached(curve(0.4, 0.2, 0.05, 0.04, 0.05), 0.1, 1)[0] == pytest.approx(140 + 40 * 2 / 3)
    assert reached(curve(0.4, 0.05, 0.2, 0.05, 0.05, 0.05), 0.1, 0)[0] == pytest.approx(
        10 + 5 * 2 / 3
    )  # the first visit was short
    assert reached(curve(0.05, 0.05, 0.05), 0.1, 1) == (100, True)
    assert reached(curve(0.4, 0.2, 0.05, 0.05), 0.1, 0) == (15, False)  # two looks are not three


def test_a_speed_up_is_paired_and_its_interval_is_that_of_the_teachers() -> None:
    slow = {(teacher, seed): (100.0 * (1 + teacher), True) for teacher in range(4) for seed in range(2)}
    twice = {key: (time / 2, True) for key, (time, _) in slow.items()}
    assert speed_up(twice, slow) == pytest.approx((2, 2, 2), rel=1e-6)  # teachers differ, their ratios do not
    mixed = {key: (time / (4 if key[0] < 2 else 1), True) for key, (time, _) in slow.items()}
    gain, low, high = speed_up(mixed, slow)
    assert gain == pytest.approx(2)
    assert low == pytest.approx(1, abs=0.01)
    assert high == pytest.approx(4, abs=0.01)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every arm of a small setting, two teachers."""
    folder = tmp_path_factory.mktemp("disback")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "small", SMALL)
        arms = [Arm(arm.name, arm.target, updates=6, stage=4) for arm in ARMS]
        bench_disback.of_teacher(SMALL, 0, bench_disback.all_runs(SMALL, arms, [0], [0]), folder)
        bench_disback.of_teacher(SMALL, 1, bench_disback.all_runs(SMALL, arms, [1], [0]), folder)
    return folder


@pytest.mark.slow
def test_every_arm_is_made_once_and_costs_what_it_runs(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "small", SMALL)
    arms = [Arm(arm.name, arm.target, updates=6, stage=4) for arm in ARMS]
    runs = bench_disback.all_runs(SMALL, arms, [0], [0])
    assert bench_disback.of_teacher(SMALL, 0, runs, made) == 0  # nothing is left to make
    passes = {run.arm.name: json.loads((made / f"{run.key}.json").read_text())["curve"] for run in runs}
    assert [point[0] for point in passes["DI"]] == [0, 5, 10, 15, 20]
    assert passes["DI"][-1][1] == 8 * 20
    stage = 4 * 4 + 6  # four steps; the probe is made, then looked at by the teacher and four candidates
    assert passes["DI-warm"][0][1] == stage
    assert passes["DI-warm"][-1][1] == stage + 8 * 20
    assert passes["scores"][-1][1] == stage + 8 * 20 + 6
    assert len({curve[0][2] for curve in passes.values()}) == 1  # all start from the same student
    assert len({round(curve[-1][2], 9) for curve in passes.values()}) == len(arms)


def test_the_table_has_a_row_for_every_arm_and_no_gain_over_itself(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(SETTINGS, "small", SMALL)
    for name in [name for name in SETTINGS if name != "small"]:
        monkeypatch.delitem(SETTINGS, name)
    arms = [Arm(arm.name, arm.target, updates=6, stage=4) for arm in ARMS]
    rows = [line.split(" | ") for line in table(made, SMALL, arms, [0, 1], [0]).splitlines() if "DI" in line]
    assert [row[0].strip("| ") for row in rows[1:]] == ["DI", "DI-warm"]
    assert rows[1][4] == "–"
    assert "0.0" not in mismatch_table(made, [0]).splitlines()[2].split("|")[3]
    draw(made, arms, [0, 1], [0], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_make_fills_a_folder(tmp_path: Path) -> None:
    """Through worker processes, which know the settings that are there."""
    setting = SETTINGS["ring B"]
    make(tmp_path, setting, [], [], [])
    assert not list(tmp_path.iterdir())
    assert math.isclose(float(bench_disback.ring().sample(20_000).std()), 0.5, rel_tol=0.02)
