"""Two processes learn what one does: `accelerate launch` for real, on the CPU."""

from pathlib import Path

import pytest

from distill import checkpoint
from tests.distill.command import distill
from tests.distill.runs import DDP, FSDP, launch, lines
from tests.distill.tiny import TEACH, TRAIN, write_config


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
