"""The tiny families are pipelines that stock diffusers loads offline, from safetensors, and makes pictures with."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.distill import families
from tests.distill.foreign import Foreign


@pytest.fixture(scope="module")
def foreign() -> Iterator[Foreign]:
    program = Foreign()
    yield program
    program.end()


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_stock_pipeline_makes_pictures_of_a_family(name: str, tmp_path: Path, foreign: Foreign) -> None:
    folder = families.save(name, tmp_path / name)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 200_000
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl", ".model")]

    call = families.conditions(name) | families.CALL.get(name, {}) | {"num_inference_steps": 2}
    made = foreign.pictures(folder, call, load=families.LOAD.get(name))
    size = 16 if (folder / "vae").is_dir() else 8
    assert made.shape == (2, size, size, 3)
    assert np.isfinite(made).all()
    assert made.std() > 0.05  # no grey plane
    if name in families.PROMPTED:
        same = call | {"prompt": [families.PROMPTS[0]] * 2}
        first, second = foreign.pictures(folder, same, load=families.LOAD.get(name)), made
        assert np.allclose(first[0], second[0], atol=1e-5)
        assert np.abs(first[1] - second[1]).max() > 2e-3  # the words decide


@pytest.mark.slow
def test_a_folder_names_the_classes_of_published_ones(tmp_path: Path) -> None:
    folder = families.save("sdxl", tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    pads = [
        json.loads((folder / part / "tokenizer_config.json").read_text())["pad_token"]
        for part in ("tokenizer", "tokenizer_2")
    ]
    assert pads == ["<|endoftext|>", "!"]
