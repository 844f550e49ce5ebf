"""Exported students of every family in stock pipelines: the same pictures, whole and by adapters, in few steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConsistencyModelPipeline

from distill.export import export_lora, export_student
from distill.student_run import StudentRun
from tests.distill import families
from tests.distill.student_runs import load, network_of, pictures, save_run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ADAPTED = ("sdxl", "sd3", "flux", "dit", "pixart", "edm-classes")


def stock(pipe: Any, run: Path) -> Any:
    """A pipeline in memory with the student's scheduler."""
    scheduler = StudentRun.read(run).steps.scheduler
    if type(pipe).__name__ in ("DDPMPipeline", "ConsistencyModelPipeline"):
        pipe = ConsistencyModelPipeline(pipe.unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    return pipe


def call_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "distill.json").read_text())["call"]


def assert_same(made: torch.Tensor, truth: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert made.isfinite().all()
    assert (made[0] - made[1]).abs().max() > 1e-2  # two samples
    assert (made - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("edm-classes", 1),
        ("sd15", 4),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in families.FAMILIES if name != "edm-classes"),
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in ("dit", "flux", "ddpm-v", "pixart")),
    ],
)
def test_a_student(name: str, steps: int, tmp_path: Path) -> None:
    pipe = save_run(name, tmp_path, steps=steps)
    kind = export_student(tmp_path / "run", tmp_path / "exported")
    exported, call = load(name, tmp_path / "exported"), call_of(tmp_path / "exported")
    assert type(exported).__name__ == kind
    assert call["num_inference_steps"] == steps
    truth = pictures(name, stock(pipe, tmp_path / "run"), call)
    assert_same(pictures(name, exported, call), truth)
    texts = [file for file in (tmp_path / "exported").rglob("*") if file.suffix in (".json", ".md")]
    assert not any(str(tmp_path) in file.read_text() for file in texts)

    pipe = load(name, tmp_path / "teacher")  # whose network is another
    if not name.startswith(("ddpm", "edm")):
        assert (pictures(name, stock(pipe, tmp_path / "run"), call) - truth).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sd15", *(pytest.param(name, marks=pytest.mark.slow) for name in ADAPTED)])
def test_adapters(name: str, tmp_path: Path) -> None:
    """Merged in a folder; as a file, which the stock loader reads; both are the network with adapters beside it."""
    pipe = save_run(name, tmp_path, rank=2, alpha=6.0)
    export_student(tmp_path / "run", tmp_path / "exported")
    call = call_of(tmp_path / "exported")
    truth = pictures(name, stock(pipe, tmp_path / "run"), call)
    assert_same(pictures(name, load(name, tmp_path / "exported"), call), truth, 1e-4)

    file = export_lora(tmp_path / "run", tmp_path / "lora")
    assert call_of(tmp_path / "lora") == call
    teacher = load(name, tmp_path / "teacher")
    before = pictures(name, stock(teacher, tmp_path / "run"), call)
    if hasattr(teacher, "load_lora_weights"):
        assert file == "pytorch_lora_weights.safetensors"
        teacher.load_lora_weights(tmp_path / "lora")
    else:
        from peft import PeftModel

        part, network = network_of(teacher)
        teacher.register_modules(**{part: PeftModel.from_pretrained(network, tmp_path / "lora").merge_and_unload()})
    assert_same(pictures(name, stock(teacher, tmp_path / "run"), call), truth, 1e-4)
    assert (truth - before).abs().max() > 1e-2
