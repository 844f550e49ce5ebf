"""What saves memory changes no family's losses; adapters hold one copy of the base weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.config import Train
from distill.lora import shared_copy
from distill.subject import load_subject
from tests.distill import families
from tests.distill.command import distill
from tests.distill.runs import lines
from tests.distill.tiny import write_config

SAVING = {"checkpointing": True, "accumulation": 2, "ema": "cpu"}
NETWORKS = ("ddpm", "dit", "sd15", "sdxl", "pixart", "sd3", "flux")  # one family of each class of networks, and SDXL


def base(name: str, place: Path, **changes: Any) -> dict[str, Any]:
    families.save(name, place / "teacher")
    (place / "prompts.txt").write_text("\n".join(families.PROMPTS) + "\n")
    size = {side: families.CALL[name][side] for side in ("height", "width")} if name == "flux" else {}
    return {
        "command": "train",
        "run": "student",
        "teacher": {"path": str(place / "teacher")},
        "prompts": {"file": str(place / "prompts.txt")} | size if name in families.PROMPTED else {},
        "student": {"sigma_init": 2.5 if name == "ddpm" else None, "optimizer": {"lr": 1e-3}},
        "batch_size": 4,
        "steps": 3,
        "logging": {"log_every": 1, "sample_every": 100, "checkpoint_every": 3},
    } | changes


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [None, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_saves_memory_changes_no_loss(name: str, adapters: int | None, tmp_path: Path) -> None:
    config = base(name, tmp_path)
    config["student"]["lora"] = {"rank": adapters}
    config["fake"] = {"lora": {"rank": adapters}}
    logged = []
    saving = SAVING if adapters is None else {key: SAVING[key] for key in ("checkpointing", "accumulation")}
    for memory in ({}, saving):
        shutil.rmtree(tmp_path / "student", ignore_errors=True)
        result = distill("train", "--config", write_config(tmp_path, config, memory=memory), cwd=tmp_path)
        assert result.code == 0, result.err[-3000:]
        logged.append(lines(tmp_path / "student"))
    for plain, other in zip(*logged, strict=True):
        for key, value in plain.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def bytes_of(*modules: nn.Module) -> int:
    """What the weights of modules take, those that are shared once."""
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("name", ["ddpm", "dit", "sdxl", "pixart", "sd3", "flux"])
def test_adapters_hold_one_copy_of_the_base(name: str, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 1}}
    config = Train.model_validate(base(name, tmp_path, fake=lora))
    student = config.student.model_copy(update={"lora": config.fake.lora})
    subject = load_subject(config.model_copy(update={"student": student}), torch.device("cpu"))
    assert subject.network is not None
    average = shared_copy(subject.student)
    alone = bytes_of(subject.network)
    networks = subject.student, subject.fake, average
    adapters = sum(
        tensor.numel() * tensor.element_size()
        for network in networks
        for key, tensor in network.named_parameters()
        if ".lora_" in key
    )
    assert adapters > 0
    assert bytes_of(subject.network, *networks) == alone + adapters
    full = load_subject(Train.model_validate(base(name, tmp_path)), torch.device("cpu"))
    assert full.network is not None
    assert bytes_of(full.network, full.student, full.fake) == 3 * alone
