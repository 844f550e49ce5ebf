"""Two processes learn what one does: `accelerate launch` for real, on the CPU."""

import json
import socket
from pathlib import Path

import pytest

from distill import checkpoint
from tests.distill.command import distill, fresh
from tests.distill.tiny import TEACH, TRAIN, write_config


def launch(place: Path, *arguments: object) -> str:
    """`accelerate launch` with two processes on a port that is free; returns both streams."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # With --cpu the launcher starts one process whatever --num_processes says (accelerate 1.15), unless through MPI;
    # with --multi_gpu it starts two, and the environment keeps them on the CPU.
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1)
    more = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port, "-m", "distill.cli")
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true"}
    result = fresh(*launcher, *more, *arguments, cwd=place, timeout=400, **environment)
    return f"{result.returncode}\n{result.stdout}\n{result.stderr}"


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "teach"])
def test_two_processes_learn_what_one_does(place: Path, kind: str) -> None:
    """The first ten losses agree to 1e-4; a run begun by two is resumed by one."""
    base = {"train": TRAIN | {"fake": {"steps": 2}}, "teach": TEACH}[kind]
    logging = {"log_every": 1, "sample_every": 100, "checkpoint_every": 5}
    config = write_config(place, base, steps=10, batch_size=16, logging=logging)
    assert distill(kind, "--config", config, "--run", "one", cwd=place).code == 0
    text = launch(place, kind, "--config", config, "--run", "two")
    assert text.startswith("0\n"), text
    one, two = metrics(place / "one"), metrics(place / "two")
    assert [line["step"] for line in two] == list(range(1, 11))  # written by one process only
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"seconds", "step"}:
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
