"""Folders as they are published: older layouts and names that stock diffusers reads, and what is missing from many."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.config import Train
from distill.folders import index_of
from distill.plan import plan
from distill.skeleton import check_weights, read_skeleton
from distill.teacher import Teacher
from tests.distill import families, tiny
from tests.distill.command import distill
from tests.distill.runs import assert_refused
from tests.distill.tiny import TRAIN, write_config
from tests.truth import relative_error


def change(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def rename(weights: Path, name: Callable[[str], str], **more: Tensor) -> None:
    save_file({name(key): value for key, value in load_file(weights).items()} | more, weights, {"format": "pt"})


def old_name(key: str) -> str:
    """Of attention in files of 2022."""
    for now, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        key = key.replace(f".{now}.", f".{before}.")
    return key


@pytest.mark.slow
def test_a_ddpm_with_its_files_in_the_root_and_old_names(tmp_path: Path) -> None:
    """google/ddpm-cifar10-32 and its siblings: trained, planned, sampled, exported."""
    folder = families.save("ddpm", tmp_path / "pipeline")
    network, scheduler = diffusers.DDPMPipeline.from_pretrained(folder).components.values()
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            shutil.move(file, folder / file.name)
        (folder / part).rmdir()
    weights = folder / "diffusion_pytorch_model.safetensors"
    rename(weights, old_name)
    assert any(".query." in key for key in load_file(weights)), "the network has attention"
    change(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])

    x, sigma = torch.randn(2, *Teacher.load(folder).shape), torch.tensor(1.5)
    fresh = Teacher.load(folder)
    assert relative_error(fresh(x, sigma), type(fresh.denoiser)(network, fresh.denoiser.coordinates)(x, sigma)) < 1e-6

    config = write_config(tmp_path, TRAIN | {"student": {"sigma_init": None}, "noise": {}}, steps=2)
    for words in (["--dry-run"], []):
        done = distill("train", "--config", config, *words, cwd=tmp_path)
        assert done.code == 0, done.err
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)  # the run knows what it needs
    for words in (("export", "student", "exported"), ("sample", "a=elsewhere", "b=exported", "--n", 2, "--steps", 2)):
        done = distill(*words, cwd=tmp_path)
        assert done.code == 0, done.err
    diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "exported")


def test_what_published_files_hold_besides_is_passed_over(tmp_path: Path) -> None:
    """PixArt Alpha's transformers hold an embedding that no network of diffusers has; some indices have more keys."""
    folder = families.save("pixart", tmp_path / "pixart")
    weights = next((folder / "transformer").glob("*.safetensors"))
    rename(weights, str, **{"caption_projection.y_embedding": torch.zeros(120, 16)})
    change(folder / "model_index.json", something_else=["diffusers", "Nothing"], _name_or_path="x")
    skeleton = read_skeleton(folder)
    check_weights(skeleton.network, skeleton.part)
    assert index_of(folder)["something_else"] == ["diffusers", "Nothing"]
    change(folder / "model_index.json", something_else=[None, None])
    assert Teacher.load(folder).words is not None


@pytest.mark.parametrize("name", ["sd15", pytest.param("pixart", marks=pytest.mark.slow)])
@pytest.mark.parametrize("left", ["settings", "nothing"])
def test_a_tokenizer_needs_its_vocabulary(name: str, left: str, tmp_path: Path) -> None:
    """Of less, transformers makes a tokenizer to which all prompts are alike."""
    folder = families.save(name, tmp_path / name)
    for file in (folder / "tokenizer").iterdir():
        if left == "nothing" or file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer: is a \w+ without its vocabulary; needed is one of tokenizer\.js"):
        Teacher.load(folder)


def test_weights_of_a_variant_are_named_by_the_plan_too(tmp_path: Path) -> None:
    folder = families.save("sd15", tmp_path / "teacher")
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(
        folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    with pytest.raises(ValueError, match=r"unet: has no safetensors that are read, only diffusion_pytorch_model\.fp16"):
        Teacher.load(folder)
    (tmp_path / "words.txt").write_text("a fox\n")
    source = {"teacher": {"path": str(folder)}, "prompts": {"file": str(tmp_path / "words.txt")}}
    config = Train.model_validate({"run": "unused", "student": {"sigma_init": None}, "batch_size": 4} | source)
    assert any("has no weights that are read" in line for line in plan(config))


@pytest.mark.parametrize(
    ("name", "file", "keys", "told"),
    [
        ("sd15", "model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "has no text_encoder_2"),
        ("sd15", "model_index.json", {"_class_name": ["a"]}, r"says _class_name: \['a'\]; accepted is a name"),
        ("sd15", "model_index.json", {"vae": ["diffusers"]}, r"says vae: \['diffusers'\]; accepted is \[library, cl"),
        ("sd15", "vae/config.json", {"scaling_factor": None}, "vae: its config.json says no scaling_factor"),
        ("sd3", "vae/config.json", {"shift_factor": None}, "vae: its config.json says no shift_factor"),
        ("sd15", "unet/config.json", {"sample_size": None}, "sample_size: null in the network's config.json; needed"),
        ("sdxl", "unet", {}, "prompt_embeds: of width 16; the unet is told of words of width 24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_belong_together_is_named(
    name: str, file: str, keys: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = families.save(name, tmp_path / name)
    if keys:
        change(folder / file, **keys)
    else:
        settings = json.loads((folder / "unet/config.json").read_text()) | {"cross_attention_dim": 24}
        diffusers.UNet2DConditionModel.from_config(settings).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=told):
        Teacher.load(folder)


def test_a_consistency_model_is_no_teacher(tmp_path: Path) -> None:
    """The scheduler of EDM denoisers is that of consistency models, and only distill.json tells them apart."""
    tiny.save_teacher(tmp_path / "pipeline")
    (tmp_path / "pipeline/distill.json").unlink()
    config = write_config(tmp_path, TRAIN)
    for words in ((), ("--dry-run",)):
        refused = distill("train", "--config", config, *words, cwd=tmp_path)
        assert_refused(refused, "pipeline has the scheduler of consistency models", '"kind": "teacher"')
    assert not (tmp_path / "student").exists()
