"""Two processes learn what one does: `accelerate launch` for real, on the CPU, replicated and sharing networks out."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from distill import checkpoint
from tests.distill import families
from tests.distill.command import distill
from tests.distill.runs import DDP, FSDP, assert_refused, assert_same, forked, launch, launcher, lines
from tests.distill.tiny import TEACH, TRAIN, save_teacher, write_config

DISBACK: dict[str, Any] = {
    "target": {"name": "nodes", "updates": 2},
    "degradation": {"steps": 4, "check_every": 2, "nodes": 2},
}
F_DISTILL: dict[str, Any] = {
    "divergence": {"name": "jensen-shannon", "bins": 2},
    "adversarial_weight": 0.1,
    "real": {"name": "teacher", "count": 8, "sampler": "euler", "steps": 2, "cache": "cache"},
}
ADAPTERS: dict[str, Any] = {"student": {"lora": {"rank": 2}}, "fake": {"lora": {"rank": 2}}}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), [("train", DDP), ("train", FSDP), ("teach", DDP)])
def test_two_processes_learn_what_one_does(place: Path, kind: str, how: tuple[object, ...]) -> None:
    """The first ten losses agree to 1e-4; a run begun by two is resumed by one."""
    base = {"train": TRAIN | {"fake": {"steps": 2}}, "teach": TEACH}[kind]
    logging = {"log_every": 1, "sample_every": 100, "checkpoint_every": 5}
    config = write_config(place, base, steps=10, batch_size=16, logging=logging)
    assert distill(kind, "--config", config, "--run", "one", cwd=place).code == 0
    text = launch(place, kind, "--config", config, "--run", "two", kind=how)
    assert text.startswith("0\n"), text
    one, two = lines(place / "one"), lines(place / "two")
    assert [line["step"] for line in two] == list(range(1, 11))  # written by one process only
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"step"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-9), (name, a["step"])

    found = checkpoint.newest(place / "two/checkpoints")
    assert found is not None
    assert found.name == "step-00000010"
    resumed = distill(kind, "--config", config, "--run", "two", "--resume", cwd=place)
    assert resumed.code == 0, resumed.err


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused_once(place: Path) -> None:
    config = write_config(place, TRAIN, batch_size=7)
    text = launch(place, "train", "--config", config)
    assert not text.startswith("0\n")
    assert text.count("distill: error: batch_size: 7 does not divide among 2 processes") == 1
    assert not (place / "student").exists()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The disk of a second machine, with the same teacher."""
    save_teacher(tmp_path / "elsewhere/pipeline")
    return tmp_path / "elsewhere"


@pytest.mark.slow
def test_all_processes_go_on_from_the_same_checkpoint_or_none(place: Path, elsewhere: Path) -> None:
    config = write_config(place, TRAIN, steps=6)
    text = forked(place, "train", "--config", config, other=elsewhere)
    assert text.startswith("0\n"), text
    shutil.rmtree(place / "student/checkpoints/step-00000006")
    before = lines(place / "student")
    text = forked(place, "train", "--config", config, "--resume", other=elsewhere)
    assert text.startswith("2\n"), text
    assert "--resume: process 1 does not see student/checkpoints/step-00000004 as the first process does" in text
    assert text.count("distill: error") == 1
    assert lines(place / "student") == before
    shutil.copytree(place / "student", elsewhere / "student")
    text = forked(place, "train", "--config", config, "--resume", other=elsewhere)
    assert text.startswith("0\n"), text
    assert lines(place / "student") == before


@pytest.mark.slow
def test_what_ends_another_process_than_the_first_is_told(place: Path, elsewhere: Path) -> None:
    config = write_config(place, TRAIN)
    shutil.rmtree(elsewhere / "pipeline/unet")
    text = forked(place, "train", "--config", config, other=elsewhere)
    assert text.startswith("2\n"), text
    assert text.count("distill: error: process 1: pipeline/unet: is missing") == 1
    assert "Traceback" not in text


@pytest.mark.slow
def test_parts_of_a_batch_are_the_same_samples_on_any_number_of_processes(place: Path) -> None:
    """What is normalised over a part is the same then. How many parts there are is part of such a run."""
    weighted: dict[str, Any] = {"divergence": {"name": "forward-kl", "bins": 2}}
    weighted["real"] = F_DISTILL["real"] | {"count": 20}
    base = TRAIN | weighted | {"discriminator": {"lr": 1e-2}, "memory": {"accumulation": 2}}
    config = write_config(place, base, batch_size=16)
    assert distill("train", "--config", config, "--run", "one", cwd=place).code == 0
    text = forked(place, "train", "--config", config, "--run", "two")
    assert text.startswith("0\n"), text
    for a, b in zip(lines(place / "one"), lines(place / "two"), strict=True):
        assert b["student_loss"] == pytest.approx(a["student_loss"], rel=1e-5)
    changed = write_config(place, base | {"memory": {}}, "changed.yaml", batch_size=16)
    refused = distill("train", "--config", changed, "--run", "two", "--resume", cwd=place)
    assert_refused(refused, "has changed in memory.accumulation")
    launched = launch(place, "train", "--config", changed, "--run", "three", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2")
    assert launched.startswith("0\n"), launched
    refused = distill("train", "--config", changed, "--run", "three", "--resume", cwd=place)
    assert_refused(refused, "has changed in memory.accumulation")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how", "method"),
    [
        ("sd15", FSDP, F_DISTILL),
        ("sd15", DDP, ADAPTERS | {"memory": {"accumulation": 2, "checkpointing": True}}),
        ("flux", FSDP, DISBACK | {"memory": {"checkpointing": True}}),
        ("flux", DDP, F_DISTILL),
    ],
    ids=["sd15-fsdp", "sd15-ddp-adapters", "flux-fsdp-disback", "flux-ddp"],
)
def test_families_on_two_processes(name: str, how: tuple[object, ...], method: dict[str, Any], tmp_path: Path) -> None:
    """The first five losses agree to 1e-3 with those of one process; so do the averages that are kept.

    Where a loss is rounding alone (the first step, at which the fake score is the teacher) it is compared to the
    largest of its kind.
    """
    families.save(name, tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(families.PROMPTS) + "\n")
    sizes = {key: families.CALL[name][key] for key in ("height", "width") if key in families.CALL.get(name, {})}
    base: dict[str, Any] = {
        "command": "train",
        "run": "student",
        "teacher": {"path": "teacher"},
        "prompts": {"file": "prompts.txt"} | sizes,
        "fake": {"optimizer": {"lr": 1e-3}} | method.get("fake", {}),
        "batch_size": 8,
        "steps": 5,
        "logging": {"log_every": 1, "sample_every": 3, "checkpoint_every": 5, "keep_every": 4},
    }
    student = {"sigma_init": None, "optimizer": {"lr": 1e-3}} | method.get("student", {})
    config = write_config(tmp_path, base | {k: v for k, v in method.items() if k != "fake"} | {"student": student})
    one = distill("train", "--config", config, "--run", "one", cwd=tmp_path)
    assert one.code == 0, one.err
    text = forked(tmp_path, "train", "--config", config, "--run", "two", kind=how)
    assert text.startswith("0\n"), text
    logged, found = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    for key in [key for key in logged[-1] if key == "gap" or key.endswith("loss")]:  # others are each process's own
        size = max(abs(line[key]) for line in logged if key in line)
        for a, b in zip(logged, found, strict=True):
            assert b.get(key, 0) == pytest.approx(a.get(key, 0), rel=1e-3, abs=1e-4 * size), (key, a["step"])
    kept = [load_file(tmp_path / run / "snapshots/step-00000004/average.safetensors") for run in ("one", "two")]
    assert kept[0].keys() == kept[1].keys()
    both = [torch.cat([weights[key].flatten() for key in sorted(weights)]) for weights in kept]
    assert (both[0] - both[1]).norm() < 1e-3 * both[0].norm()
    assert len(list((tmp_path / "two/samples").iterdir())) == 2
    resumed = distill("train", "--config", config, "--run", "two", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err


def begin(place: Path, run: Path, how: tuple[object, ...], config: Path, until: int) -> subprocess.Popen[bytes]:
    """Starts a launcher with two processes, and returns it when so many lines are written."""
    words = (sys.executable, *launcher(how), "-m", "distill.cli", "train", "--config", config, "--run", run, "--resume")
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [str(word) for word in words], cwd=place, env=os.environ | environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    while started.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= until):
        time.sleep(0.001)
    return started


def family(started: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A launcher's processes: not of its group, they go on without it."""
    return psutil.Process(started.pid).children(recursive=True)


def kill(started: subprocess.Popen[bytes], processes: list[psutil.Process]) -> None:
    for process in (started, *processes):
        process.kill()
    assert started.wait() == -signal.SIGKILL
    assert not psutil.wait_procs(processes, timeout=30)[1]


@pytest.mark.slow
def test_what_a_killed_launcher_leaves_keeps_its_run(place: Path) -> None:
    """They train on: nothing is resumed beside them."""
    config = write_config(place, TRAIN, steps=100_000)
    started = begin(place, place / "left", DDP, config, until=2)
    left = family(started)
    kill(started, [])
    refused = forked(place, "train", "--config", config, "--run", "left", "--resume")
    going_on = [process.is_running() for process in left]
    kill(started, left)
    assert all(going_on)
    assert refused.startswith("2\n"), refused
    assert "run: left is being written by another process" in refused
    before = lines(place / "left")[-1]["step"]
    started = begin(place, place / "left", DDP, config, until=before + 2)
    kill(started, family(started))
    assert lines(place / "left")[-1]["step"] > before


@pytest.mark.slow
@pytest.mark.parametrize("how", [DDP, FSDP])
def test_two_processes_that_are_killed_go_on_bit_for_bit(place: Path, how: tuple[object, ...]) -> None:
    logging = {"log_every": 1, "sample_every": 100, "checkpoint_every": 2, "keep_every": 5}
    config = write_config(place, TRAIN, steps=40, logging=logging)
    text = forked(place, "train", "--config", config, "--run", "whole", kind=how)
    assert text.startswith("0\n"), text
    started = begin(place, place / "killed", how, config, until=17)
    time.sleep(random.Random(17).random() * 0.03)
    kill(started, family(started))
    assert lines(place / "killed")[-1]["step"] < 40
    text = forked(place, "train", "--config", config, "--run", "killed", "--resume", kind=how)
    assert text.startswith("0\n"), text
    assert_same(place / "killed", place / "whole")
    steps = [f"step-{step:08d}" for step in range(5, 41, 5)]
    for run in ("killed", "whole"):
        assert sorted(folder.name for folder in (place / run / "snapshots").iterdir()) == steps
        assert checkpoint.newest(place / run / "snapshots") == place / run / "snapshots" / steps[-1]
    for step in steps:
        files = [place / run / "snapshots" / step / "average.safetensors" for run in ("killed", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()
