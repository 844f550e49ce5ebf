"""A run that is killed, at any moment and again, ends bit for bit where an uninterrupted one does."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distill.command import distill
from tests.distill.runs import assert_same, kill_somewhere, lines
from tests.distill.tiny import TEACH, TRAIN, save_teacher, write_config


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "teach"])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(place: Path, kind: str) -> None:
    """checkpoint_every 1: a checkpoint is being written most of the time. `teach` has dropout."""
    base, steps = {"train": TRAIN, "teach": TEACH}[kind], 17
    changes: dict[str, Any] = {
        "steps": steps,
        "logging": {"log_every": 1, "sample_every": 10, "checkpoint_every": 1},
    }
    if kind == "train":
        changes["fake"] = {"steps": 2}
    else:
        changes["network"] = {"channels": [8], "dropout": 0.3}
    config = write_config(place, base, **changes)
    whole = distill(kind, "--config", config, "--run", "whole", cwd=place)
    assert whole.code == 0, whole.err

    rng, reached = random.Random(5), []
    command = (kind, "--config", config, "--run", "killed", "--resume")
    for until in (0, 5, 10, 16):
        reached.append(kill_somewhere(command, place / "killed", place, rng, until))
    assert reached == sorted(reached)
    assert 0 < reached[-1] < steps
    last = distill(*command, cwd=place)
    assert last.code == 0, last.err

    assert_same(place / "killed", place / "whole")
    assert [line["step"] for line in lines(place / "killed")] == list(range(1, steps + 1))
    pictures = [sorted(p.name for p in (place / r / "samples").iterdir()) for r in ("killed", "whole")]
    assert pictures[0] == pictures[1] == [f"step-{s:08d}.png" for s in (10, 17)]
    assert (place / "killed" / "curves.png").read_bytes()
    if kind == "teach":
        a, b = (
            load_file(place / r / "model/unet/diffusion_pytorch_model.safetensors").values()
            for r in ("killed", "whole")
        )
        assert all(bool((x == y).all()) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_dropout_is_a_function_of_the_step(place: Path) -> None:
    """Resumed in the middle it goes on as without a stop; with another seed it does not."""
    network = {"channels": [8], "dropout": 0.3}
    config = write_config(place, TEACH, network=network, steps=4)
    for run, extra in (("whole", ()), ("other", ("--seed", 1))):
        assert distill("teach", "--config", config, "--run", run, *extra, cwd=place).code == 0
    shutil.copytree(place / "whole", place / "cut")
    shutil.rmtree(place / "cut/checkpoints/step-00000004")
    assert distill("teach", "--config", config, "--run", "cut", "--resume", cwd=place).code == 0
    assert_same(place / "cut", place / "whole")
    assert lines(place / "other") != lines(place / "whole")


@pytest.mark.slow
def test_a_truncated_checkpoint_is_passed_over_and_the_metrics_are_cut_to_it(place: Path) -> None:
    config = write_config(place, TRAIN)
    assert distill("train", "--config", config, "--run", "whole", cwd=place).code == 0
    shutil.copytree(place / "whole", place / "harmed")
    teacher = load_file(place / "pipeline/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    student, average = (
        load_file(place / f"whole/checkpoints/step-00000006/{n}.safetensors")["network.conv_in.weight"]
        for n in ("student", "average")
    )
    assert 0 < (average - teacher).norm() < (student - teacher).norm()  # the average is on its way
    victim = place / "harmed/checkpoints/step-00000006/student.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    left = place / "harmed/checkpoints/.step-00000006.tmp"
    left.mkdir()
    (left / "student.safetensors").write_bytes(b"half")
    for name in (".config.yaml.0badcafe.tmp", "samples/.step-00000006.png.0badcafe.tmp"):
        (place / "harmed" / name).write_bytes(b"half")
    with (place / "harmed/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "secon')  # a line that a kill cut short

    exported = distill("export", "harmed", "exported", cwd=place)
    assert exported.code == 0, exported.err
    assert "harmed: step-00000006 is not whole, or not what was written; taken is step-00000004" in exported.err
    resumed = distill("train", "--config", config, "--run", "harmed", "--resume", cwd=place)
    assert resumed.code == 0, resumed.err
    assert resumed.out.startswith("step 5/6")
    assert_same(place / "harmed", place / "whole")
    seconds = [json.loads(line)["seconds"] for line in (place / "harmed/metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)  # the clock goes on, it does not start again


def test_a_finished_run_can_be_resumed_and_longer_ones_refused(place: Path) -> None:
    config = write_config(place, TRAIN, steps=2)
    assert distill("train", "--config", config, cwd=place).code == 0
    shutil.copytree(place / "student", place / "before")
    again = distill("train", "--config", place / "student/config.yaml", "--resume", cwd=place)
    assert again.code == 0
    assert "step 1" not in again.out
    assert_same(place / "student", place / "before")

    changed = distill(
        "train", "--config", config, "--resume", "--steps", 4, "--student.optimizer.lr", 1, "--logging.log_every", 2,
        cwd=place,
    )  # fmt: skip
    assert changed.code == 2
    assert changed.err == (
        "distill: error: --resume: the configuration of student has changed in steps, student.optimizer.lr\n"
    )
    assert_same(place / "student", place / "before")


@pytest.mark.slow
def test_what_is_logged_does_not_change_what_is_learned(place: Path) -> None:
    config = write_config(place, TRAIN)
    runs = {"often": (1, 1, 1), "seldom": (4, 5, 6)}
    for run, (log, sample, save) in runs.items():
        logging = f'{{"log_every": {log}, "sample_every": {sample}, "checkpoint_every": {save}}}'
        assert distill("train", "--config", config, "--run", run, "--logging", logging, cwd=place).code == 0
    files = [place / run / "checkpoints/step-00000006/student.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    often, seldom = (lines(place / run) for run in runs)
    assert [line["step"] for line in seldom] == [4, 6]
    for line, part in zip(seldom, (often[:4], often[4:]), strict=True):
        assert line["fake_loss"] == pytest.approx(sum(p["fake_loss"] for p in part) / len(part), rel=1e-5)


def test_a_student_waits_for_its_fake_score(place: Path) -> None:
    """At step 0 the fake score is the teacher: what its difference to it says is rounding, and the student stays."""
    config = write_config(place, TRAIN, steps=1)
    assert distill("train", "--config", config, cwd=place).code == 0
    teacher = load_file(place / "pipeline/unet/diffusion_pytorch_model.safetensors")
    student, fake = (
        load_file(place / f"student/checkpoints/step-00000001/{n}.safetensors") for n in ("student", "fake")
    )
    assert all(bool((student[f"network.{key}"] == value).all()) for key, value in teacher.items())
    assert any(bool((fake[f"network.{key}"] != value).any()) for key, value in teacher.items())


def test_another_teacher_at_the_same_path_is_refused(place: Path) -> None:
    config = write_config(place, TRAIN, steps=2)
    assert distill("train", "--config", config, cwd=place).code == 0
    shutil.rmtree(place / "pipeline")
    save_teacher(place / "pipeline", seed=1)
    result = distill("train", "--config", config, "--resume", cwd=place)
    assert result.code == 2
    assert result.err == ("distill: error: --resume: the weights in pipeline are not what this run began with\n")
