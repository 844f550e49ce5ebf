"""The recipes of published runs fit the machine that their headers name, at the cost that they state."""

import re
from pathlib import Path

import pytest
import yaml

from distill.config import Train
from distill.hardware import Hardware
from distill.plan import plan
from tests.distill.published import save, save_edm
from tests.some import some

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = {  # the teacher, and the machine of the header
    "cifar10-disback": ("cifar10", "1xH100,bf16"),
    "cifar10-f-distill": ("cifar10", "8xH100,bf16"),
    "ffhq-disback": ("ffhq", "8xH100,bf16"),
    "afhqv2-disback": ("ffhq", "8xH100,bf16"),
    "imagenet64-disback": ("imagenet64", "8xH100,bf16"),
    "imagenet64-f-distill": ("imagenet64", "8xH100,bf16"),
    "sd15-f-distill": ("StableDiffusionPipeline", "8xH100,bf16"),
    "sd15-lora-four-steps": ("StableDiffusionPipeline", "RTX4090,bf16"),
    "sdxl-disback": ("StableDiffusionXLPipeline", "8xH100,bf16,fsdp"),
    "sdxl-lora-four-steps": ("StableDiffusionXLPipeline", "H100,bf16"),
}


@pytest.mark.parametrize("name", some(sorted(RECIPES), 1))
def test_a_recipe_costs_what_its_header_states(name: str, tmp_path: Path) -> None:
    teacher, machine = RECIPES[name]
    text = (FOLDER / f"{name}.yaml").read_text()
    header = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    stated = re.search(r"([\d.]+e\+?\d+) FLOP, (\d+) hours? at 35 %", header)
    assert stated is not None, header
    folder = (save if teacher.endswith("Pipeline") else save_edm)(teacher, tmp_path / "teacher")
    content = yaml.safe_load(text)
    content["teacher"] |= {"path": str(folder)}
    said = "\n".join(plan(Train.model_validate(content), Hardware.parse(machine)))
    found = re.search(r"updates: ([\d.]+e\+\d+) FLOP, ([\d.]+) hours at 35%", said)
    assert found is not None, said
    assert ", which fits into " in said
    assert float(found[1]) == pytest.approx(float(stated[1]), rel=0.12)  # ImageNet's is a UNet2DModel a tenth smaller
    assert float(found[2]) == pytest.approx(float(stated[2]), rel=0.12, abs=0.5)
