"""Snapshots of a real run, judged by a process beside it: equal to a plain score, resumable, and it ends."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distill.command import distill
from tests.distill.tiny import TRAIN, save_teacher, write_config
from tests.tools.batches import forked, save_pictures
from tools.results import Result

ASKED = ("--reference", "ref", "--features", "pixels=fd,kd", "--n", "16")
LOGGING = {"log_every": 1, "sample_every": 100, "checkpoint_every": 3, "keep_every": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and a run of six updates with three snapshots."""
    folder = tmp_path_factory.mktemp("watched")
    save_pictures(folder / "ref", 60, seed=5)
    save_teacher(folder / "pipeline")
    student = {"sigma_init": 2.5, "optimizer": {"lr": 1e-2}, "ema": 0.5}
    result = distill("train", "--config", write_config(folder, TRAIN, logging=LOGGING, student=student), cwd=folder)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "w")
    return tmp_path / "w"


def lines(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "student/evaluation.jsonl").read_text().splitlines()]


def test_every_snapshot_is_judged_once_as_a_score_would(place: Path) -> None:
    first = forked("watch", "student", *ASKED, "--once", cwd=place)
    assert first.returncode == 0, first.stderr
    found = lines(place)
    assert [line["step"] for line in found] == [2, 4, 6]
    assert len({line["values"]["pixels"]["fd"]["value"] for line in found}) == 3
    for line in found:
        kept = Result.load(place / f"student/evaluation/results/{line['key']}.json")
        assert kept.values["pixels"]["fd"].value == line["values"]["pixels"]["fd"]["value"]
    scored = forked("batch", "m.yaml", cwd=write_manifest_of_run(place))
    assert scored.returncode == 0, scored.stderr
    [last] = (place / "runs/m/results").glob("*.json")
    whole = Result.load(last)  # of the run itself, whose last checkpoint is the last snapshot
    for metric in ("fd", "kd"):
        assert whole.values["pixels"][metric].value == found[-1]["values"]["pixels"][metric]["value"]
    assert (place / "student/evaluation.png").stat().st_size > 5000

    (place / "student/evaluation.png").unlink()
    again = forked("watch", "student", *ASKED, "--once", cwd=place)
    assert again.returncode == 0, again.stderr
    assert lines(place) == found
    assert not (place / "student/evaluation.png").exists()  # nothing was left to do

    shutil.rmtree(place / "student/snapshots/step-00000002")  # another one, as GPUs make it again
    shutil.copytree(place / "student/snapshots/step-00000004", place / "student/snapshots/step-00000002")
    again = forked("watch", "student", *ASKED, "--once", cwd=place)
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in lines(place)] == [2, 4, 6]
    assert lines(place)[1:] == found[1:]
    assert lines(place)[0]["values"]["pixels"]["fd"]["value"] == found[1]["values"]["pixels"]["fd"]["value"]


def write_manifest_of_run(place: Path) -> Path:
    text = "reference: ref\nfeatures: {pixels: [fd, kd]}\nn: 16\nmatrix: {source: student}\n"
    (place / "m.yaml").write_text(text)
    return place


def test_a_watch_sees_what_comes_and_ends_with_the_run(place: Path) -> None:
    """The last snapshot and the last checkpoint are held back, and come when the first two are judged."""
    run, later = place / "student", place / "later"
    later.mkdir()
    for name in ("snapshots/step-00000006", "checkpoints/step-00000006"):
        shutil.move(run / name, later / name.split("/")[0])

    def bring() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (run / "evaluation.jsonl").is_file():
            time.sleep(0.05)
        for name in ("snapshots", "checkpoints"):
            shutil.move(later / name, run / name / "step-00000006")

    helper = threading.Thread(target=bring)
    helper.start()
    result = forked("watch", "student", *ASKED, "--every", "0.1", cwd=place)
    helper.join()
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in lines(place)] == [2, 4, 6]


def test_other_settings_damaged_snapshots_and_what_is_no_run_are_named(place: Path) -> None:
    weights = place / "student/snapshots/step-00000004/average.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    broken = forked("watch", "student", *ASKED, "--once", cwd=place)
    assert broken.returncode == 2
    assert "step-00000004" in broken.stderr
    assert [line["step"] for line in lines(place)] == [2, 6]
    other = forked(
        "watch", "student", "--reference", "ref", "--features", "pixels=fd", "--n", "16", "--once", cwd=place
    )
    assert other.returncode == 2
    assert "step 2 was judged by other settings" in other.stderr
    for arguments, message in (
        (("pipeline",), "is no run folder of `distill train`"),
        (("student", "--manifest", "m.yaml", "--n", "8"), "and a manifest; accepted is one"),
        (("student", "--every", "0"), "accepted are positive seconds"),
    ):
        wrong = forked("watch", *arguments, cwd=place)
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), wrong.stderr
        assert message in wrong.stderr
