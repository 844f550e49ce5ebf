"""What is no teacher of a known family, or does not belong to it, is refused in one line before a run begins."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from samplers.prompts import PIPELINES
from tests.distill import families
from tests.distill.command import distill
from tests.distill.runs import assert_refused, entries
from tests.distill.tiny import write_config
from tests.some import some

TRAIN: dict[str, Any] = {
    "command": "train",
    "run": "student",
    "teacher": {"path": "teacher"},
    "prompts": {"file": "prompts.txt"},
    "student": {"sigma_init": None},
    "batch_size": 2,
    "steps": 2,
    "logging": {"log_every": 1, "sample_every": 100, "checkpoint_every": 1},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three families; tests must not write into them."""
    place = tmp_path_factory.mktemp("families")
    for name in ("sd15", "sdxl", "dit"):
        families.save(name, place / name)
    return place


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    """A Stable Diffusion in `teacher`, prompts, and a configuration that is accepted as it is."""
    shutil.copytree(saved / "sd15", tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(families.PROMPTS) + "\n")
    write_config(tmp_path, TRAIN)
    return tmp_path


def change(file: Path, **values: Any) -> None:
    """Other values of some keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(place: Path, *parts: str, options: tuple[object, ...] = ()) -> None:
    """One line that has these parts, and nothing written."""
    before = entries(place)
    assert_refused(distill("train", "--config", "config.yaml", *options, cwd=place), *parts)
    assert entries(place) == before


def empty(place: Path) -> None:
    shutil.rmtree(place / "teacher")
    (place / "teacher").mkdir()


def no_index(place: Path) -> None:
    (place / "teacher/model_index.json").write_text("not JSON")


def without(part: str) -> Callable[[Path], None]:
    return lambda place: shutil.rmtree(place / "teacher" / part)


def null(part: str) -> Callable[[Path], None]:
    """The pipeline says itself that it lacks a part."""

    def harm(place: Path) -> None:
        change(place / "teacher/model_index.json", **{part: [None, None]})
        shutil.rmtree(place / "teacher" / part)

    return harm


def renamed(place: Path) -> None:
    file = place / "teacher/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["stranger"] = weights.pop(min(weights))
    save_file(weights, file, {"format": "pt"})


def truncated(place: Path) -> None:
    file = place / "teacher/unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


# what is done to a folder, and what the message says
FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no folder": (lambda place: shutil.rmtree(place / "teacher"), ("teacher", "there is no such folder")),
    "no pipeline": (empty, ("teacher", "is no pipeline folder of diffusers")),
    "no JSON": (no_index, ("teacher", "model_index.json")),
    "unknown": (
        lambda place: change(place / "teacher/model_index.json", _class_name="AuraFlowPipeline"),
        ("AuraFlowPipeline", "UNet2DModel", *(name for name, kind in PIPELINES.items() if kind.network != "unet")),
    ),
    "no network": (without("unet"), ("teacher/unet",)),
    "no VAE": (without("vae"), ("teacher/vae",)),
    "no scheduler": (without("scheduler"), ("teacher/scheduler",)),
    "no text encoder": (without("text_encoder"), ("teacher/text_encoder",)),
    "no tokenizer": (without("tokenizer"), ("teacher/tokenizer",)),
    "null VAE": (null("vae"), ("teacher", "vae")),
    "null text encoder": (null("text_encoder"), ("prompts.file", "teacher has no text_encoder", "prompts.encoded")),
    "null network": (null("unet"), ("teacher", "unet")),
    "other config": (
        lambda place: change(place / "teacher/unet/config.json", cross_attention_dim=24),
        ("teacher/unet", "attn2"),
    ),
    "other names": (renamed, ("teacher/unet: its weights are not those of its config.json",)),
    "truncated": (truncated, ("teacher/unet", "cannot be read")),
    "other VAE config": (
        lambda place: change(place / "teacher/vae/config.json", latent_channels=8),
        ("teacher/vae", "encoder.conv_out.weight"),
    ),
    "other encoder config": (
        lambda place: change(place / "teacher/text_encoder/config.json", num_hidden_layers=3),
        ("teacher/text_encoder", "its weights are not those of its config.json"),
    ),
}


QUICK = ("unknown", "null VAE", "other names", "latin")  # the others are slow


@pytest.mark.parametrize("harm", some(FOLDERS, QUICK))
def test_a_folder_that_is_no_whole_pipeline_of_a_known_family(harm: str, place: Path) -> None:
    do, parts = FOLDERS[harm]
    do(place)
    refused(place, *parts)


PROMPTS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("prompts.txt", b"", ("prompts.txt", "is empty")),
    "blank": ("prompts.txt", b"a fox\n\na hill\n", ("prompts.txt", "line 2")),
    "latin": ("prompts.txt", "a fox\na hill\na caf\u00e9\n".encode("latin-1"), ("prompts.txt", "UTF-8", "line 3")),
    "column": ("prompts.csv", b"text,number\na fox,1\n", ("prompts.csv", "caption", "text")),
    "row": ("prompts.jsonl", b'{"caption": "a fox"}\n[1]\n', ("prompts.jsonl", "line 2")),
    "kind": ("prompts.xyz", b"a fox\n", ("prompts.xyz", ".txt", ".csv", ".jsonl")),
}


@pytest.mark.parametrize("case", some(PROMPTS, QUICK))
def test_a_file_of_prompts_that_is_none(case: str, place: Path) -> None:
    name, content, parts = PROMPTS[case]
    (place / name).write_bytes(content)
    refused(place, *parts, options=("--prompts.file", name))


@pytest.mark.slow
def test_words_for_a_model_of_words_only(place: Path, saved: Path) -> None:
    refused(place, "prompts", options=("--prompts.file", "null"))
    shutil.rmtree(place / "teacher")
    shutil.copytree(saved / "dit", place / "teacher")
    refused(place, "prompts.file", "DiTPipeline", options=())


def test_a_class_out_of_range(place: Path) -> None:
    shutil.rmtree(place / "teacher")
    families.save("ddpm-classes", place / "teacher")
    facts = {"kind": "teacher", "classes": [str(k) for k in range(12)], "null_label": None}
    (place / "teacher/distill.json").write_text(json.dumps(facts))
    refused(place, "speaks of label 11", "the network has 10 labels", options=("--prompts.file", "null"))


@pytest.mark.slow
def test_settings_that_a_family_has_no_use_for(place: Path, saved: Path) -> None:
    refused(place, "height", "17", "multiples of 2", options=("--prompts.height", 17))
    refused(place, "student.sigma_init", "1000", options=("--student.sigma_init", 1000.0))
    shutil.rmtree(place / "teacher")
    shutil.copytree(saved / "dit", place / "teacher")
    dit = ("--prompts.file", "null")
    refused(place, "negative_prompt", options=(*dit, "--teacher.negative_prompt", "blurred"))


def encode(place: Path, pipeline: str) -> None:
    options = ("--pipeline", pipeline, "--prompts", "prompts.txt", "--out", "encoded")
    result = distill("encode", *options, cwd=place)
    assert result.code == 0, result.err


@pytest.mark.slow
def test_embeddings_of_another_family_and_of_other_text_encoders(place: Path, saved: Path) -> None:
    encode(place, str(saved / "sdxl"))
    options = ("--prompts.file", "null", "--prompts.encoded", "encoded")
    refused(place, "encoded", "StableDiffusionXLPipeline", "StableDiffusionPipeline", options=options)
    shutil.rmtree(place / "encoded")
    encode(place, "teacher")
    file = place / "teacher/text_encoder/model.safetensors"
    save_file({key: value * 1.01 for key, value in load_file(file).items()}, file, {"format": "pt"})
    refused(place, "encoded", "text_encoder", options=options)


@pytest.mark.slow
def test_a_dry_run_refuses_what_the_run_would(place: Path) -> None:
    encode(place, "teacher")
    encoded = ("--prompts.file", "null", "--prompts.encoded", "encoded")
    few = ("--real.name", "teacher", "--real.count", 1, "--divergence.name", "jensen-shannon")
    latents = ("--prompts.file", "null", "--real.name", "encoded", "--real.encoded", "encoded")
    adapters = ("--student.lora.rank", 2, "--memory.ema", "cpu")
    for options, *parts in (
        ((*encoded, "--teacher.guidance", 2.0, "--teacher.negative_prompt", "x"), "teacher.negative_prompt", "encoded"),
        ((*latents, "--divergence.name", "jensen-shannon"), "real.encoded: encoded has no latents"),
        (few, "real.count: 1 is less than one for each of"),
        ((*few[:-3], 9, *few[-2:], "--memory.accumulation", 2), "divergence.normalise: over parts of one sample"),
        (adapters, "memory.ema: cpu"),
    ):
        refused(place, *parts, options=options)
        refused(place, *parts, options=(*options, "--dry-run"))
    away = distill("train", "--config", "config.yaml", *latents[:-1], "away", "--dry-run", cwd=place)
    assert away.code == 0, away.err
    assert "real.encoded: away is not here, so it was not looked at" in away.out
    away = distill("train", "--config", "config.yaml", "--prompts.file", "away.txt", "--dry-run", cwd=place)
    assert away.code == 0, away.err
    assert "prompts.file: away.txt is not here, so it was not looked at" in away.out


@pytest.mark.slow
def test_a_run_goes_on_with_the_words_that_it_began_with(place: Path) -> None:
    result = distill("train", "--config", "config.yaml", "--steps", 1, cwd=place)
    assert result.code == 0, result.err
    words = (place / "prompts.txt").read_text()
    (place / "prompts.txt").write_text(words.upper())
    refused(
        place,
        "--resume: prompts.file: its files are not those that student began with",
        options=("--resume", "--steps", 1),
    )
    (place / "prompts.txt").write_text(words)
    assert distill("train", "--config", "config.yaml", "--resume", "--steps", 1, cwd=place).code == 0


@pytest.mark.slow
def test_a_checkpoint_of_another_family(place: Path, saved: Path) -> None:
    result = distill("train", "--config", "config.yaml", "--steps", 1, cwd=place)
    assert result.code == 0, result.err
    shutil.rmtree(place / "teacher")
    shutil.copytree(saved / "sdxl", place / "teacher")
    refused(
        place, "--resume: the weights in teacher are not what this run began with", options=("--resume", "--steps", 1)
    )
