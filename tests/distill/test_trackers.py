"""Trackers of accelerate get what metrics.jsonl gets, before and after a restart; averages that stay, stay."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file
from torch import Tensor

from distill.average import Average
from distill.config import Train
from distill.run import Run, drive
from tests.distill.command import distill
from tests.distill.tiny import TRAIN, save_teacher, unet, write_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Notebook(GeneralTracker):
    """A tracker of accelerate's own kind that writes JSON lines."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.closed = file, 0

    @property
    def tracker(self) -> Path:
        return self.file

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self) -> None:
        self.closed += 1


class Drift:
    """A network whose weights grow by 1 in each update."""

    def __init__(self) -> None:
        self.network = unet(None).requires_grad_(True)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.zero_()
        self.average = Average(copy.deepcopy(self.network).requires_grad_(False), self.network, 0.5)

    def step(self, n: int) -> dict[str, Tensor]:
        with torch.no_grad():
            torch._foreach_add_(list(self.network.parameters()), 1.0)
        self.average(n)
        return {"loss": torch.tensor(float(n))}


def driven(place: Path, steps: int, resume: bool) -> Notebook:
    notebook = Notebook(place / "notebook.jsonl")
    logging = {"log_every": 2, "sample_every": 100, "checkpoint_every": 4, "keep_every": 3}
    config = Train.model_validate(TRAIN | {"run": str(place / "run"), "steps": 10, "logging": logging})
    accelerator = Accelerator(cpu=True, log_with=[notebook])
    run, drift = Run(config, resume, accelerator), Drift()
    modules = {"student": drift.network, "average": drift.average.module}
    drive(run, drift, steps, config.logging, modules, {}, lambda path: None, 0, lambda done, values: None)
    assert notebook.closed == 1
    return notebook


def test_trackers_are_told_what_the_metrics_file_is(tmp_path: Path) -> None:
    """In one go to step 6, then resumed to step 10: every line once, at its step; the configuration by dotted keys."""
    notebook = driven(tmp_path, 6, resume=False)
    assert notebook.configuration["student.sigma_init"] == 2.5
    assert notebook.configuration["logging.log_every"] == 2
    assert notebook.configuration["teacher.path"] == "pipeline"
    assert all(isinstance(value, str | int | float) for value in notebook.configuration.values())
    driven(tmp_path, 10, resume=True)
    told = [json.loads(line) for line in notebook.file.read_text().splitlines()]
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [2, 4, 6, 8, 10]
    assert told == [{k: v for k, v in line.items() if k != "seconds"} for line in written]
    assert [line["loss"] for line in told] == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_tensorboard_is_told_too(tmp_path: Path) -> None:
    """By the command, in a process of its own; read by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save_teacher(tmp_path / "pipeline")
    logging = TRAIN["logging"] | {"trackers": ["tensorboard"]}
    config = write_config(tmp_path, TRAIN, steps=4, logging=logging)
    result = distill("train", "--config", config, cwd=tmp_path)
    assert result.code == 0, result.err
    written = [json.loads(line) for line in (tmp_path / "student/metrics.jsonl").read_text().splitlines()]
    (events,) = (tmp_path / "student").rglob("events.out.tfevents.*.0")
    told = EventAccumulator(str(events.parent)).Reload().Scalars("student_loss")
    assert [entry.step for entry in told] == [line["step"] for line in written] == [1, 2, 3, 4]
    assert [entry.value for entry in told] == pytest.approx([line["student_loss"] for line in written], rel=1e-6)


def test_averages_that_are_kept_are_those_of_their_steps(tmp_path: Path) -> None:
    """After n updates of +1 the average is a known number; older snapshots are not removed, checkpoints are."""
    driven(tmp_path, 10, resume=False)
    folders = sorted((tmp_path / "run/snapshots").iterdir())
    assert [folder.name for folder in folders] == ["step-00000003", "step-00000006", "step-00000009"]
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2
    value, expected = 0.0, {}
    for step in range(10):
        decay = min(0.5, (step + 1) / (step + 10))
        value = decay * value + (1 - decay) * (step + 1)
        expected[step + 1] = value
    for folder in folders:
        assert sorted(file.name for file in folder.iterdir()) == ["average.safetensors", "state.json"]
        step = json.loads((folder / "state.json").read_text())["step"]
        for tensor in load_file(folder / "average.safetensors").values():
            torch.testing.assert_close(tensor, torch.full_like(tensor, expected[step]), rtol=1e-5, atol=0)
