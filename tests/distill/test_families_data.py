"""Captioned pictures and prompts through `distill encode` into a run: latents as the real, their words beside them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.encoded import Encoded
from tests.distill import families
from tests.distill.command import distill
from tests.distill.runs import assert_refused, lines
from tests.distill.tiny import write_config

pytestmark = pytest.mark.slow
TRAIN: dict[str, Any] = {
    "command": "train",
    "run": "student",
    "teacher": {"path": "teacher"},
    "student": {"sigma_init": None},
    "divergence": {"name": "jensen-shannon", "bins": 2},
    "batch_size": 4,
    "steps": 3,
    "logging": {"log_every": 1, "sample_every": 100, "checkpoint_every": 3},
}
REAL = {"name": "encoded", "encoded": "encoded"}
CAPTIONS = ("a red fox", "two green hills", "a fox on a hill", "night")


def run(place: Path, *options: object, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of a small run."""
    shutil.rmtree(place / "student", ignore_errors=True)
    result = distill("train", "--config", write_config(place, TRAIN, **changes), *options, cwd=place)
    assert result.code == 0, result.err[-3000:]
    return lines(place / "student")


def pictures(folder: Path, count: int = 4) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{k}.png")


def encode(place: Path, *options: object) -> Encoded:
    result = distill("encode", "--pipeline", "teacher", "--out", "encoded", "--dtype", "float32", *options, cwd=place)
    assert result.code == 0, result.err
    return Encoded.read(place / "encoded")


IMAGES = ("--data.name", "folder", "--data.path", "pictures", "--data.size", 16)


def captioned(name: str, place: Path) -> Path:
    """The family in place/teacher, and four pictures with their words in place/pictures."""
    families.save(name, place / "teacher")
    pictures(place / "pictures")
    for k, caption in enumerate(CAPTIONS):
        (place / f"pictures/{k}.txt").write_text(caption)
    return place


def size_of(name: str) -> dict[str, Any]:
    return {side: families.CALL[name][side] for side in ("height", "width")} if name.startswith("flux") else {}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "sd3", "sd3-no-t5", "flux"])
def test_captioned_pictures_are_the_real_beside_their_words(name: str, tmp_path: Path) -> None:
    """Without the text encoders, which are not read any more; the export has them of a whole teacher."""
    place = captioned(name, tmp_path)
    shutil.copytree(place / "teacher", place / "whole")
    rows = encode(place, *IMAGES)
    assert len(rows) == 4
    assert rows.shape == (4, 8, 8)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        shutil.rmtree(place / "teacher" / part, ignore_errors=True)
    logged = run(place, real=REAL, prompts=size_of(name))
    assert len(logged) == 3
    assert len({line["discriminator_loss"] for line in logged}) == 3
    exported = distill("export", "student", "exported", "--base", "whole", cwd=place)
    assert exported.code == 0, exported.err
    assert "| Real samples | latents of images |" in (place / "exported/README.md").read_text()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "sd3", "flux"])
def test_encoded_prompts_train_as_the_files_own(name: str, tmp_path: Path) -> None:
    """The same losses, with guidance away from the same negative prompt."""
    families.save(name, tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    encode(tmp_path, "--prompts", "prompts.txt", "--negative_prompt", "bad, x")
    changes: dict[str, Any] = {
        "teacher": {"path": "teacher", "guidance": 3.0, "negative_prompt": "bad, x"},
        "divergence": {"name": "reverse-kl"},
    }
    of_file = run(tmp_path, prompts={"file": "prompts.txt"} | size_of(name), **changes)
    of_folder = run(tmp_path, prompts={"encoded": "encoded"} | size_of(name), **changes)
    unguided = run(tmp_path, prompts={"encoded": "encoded"} | size_of(name), divergence={"name": "reverse-kl"})
    for line, other in zip(of_file, of_folder, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key
    assert unguided[0]["student_loss"] != pytest.approx(of_file[0]["student_loss"], rel=1e-4)


def test_folders_of_classes_are_the_real_of_a_dit(tmp_path: Path) -> None:
    """Of a network with a class for each folder, whose null label is the last."""
    families.save("dit", tmp_path / "teacher")
    for name in ("fox", "hill"):
        pictures(tmp_path / "pictures" / name)
    rows = encode(tmp_path, *IMAGES)
    assert rows.classes == ("fox", "hill")
    refused = distill("train", "--config", write_config(tmp_path, TRAIN, real=REAL), cwd=tmp_path)
    assert_refused(refused, "class 2", "1000")


def test_a_run_has_one_source_of_words(tmp_path: Path) -> None:
    """Real latents are those of the prompt: other prompts than theirs have none."""
    place = captioned("sd15", tmp_path)
    encode(place, *IMAGES)
    (place / "prompts.txt").write_text("a cow\n" * 9)
    config = write_config(place, TRAIN, real=REAL)
    refused = distill("train", "--config", config, "--prompts.file", "prompts.txt", cwd=place)
    assert_refused(refused, "prompts.txt", "real.name: encoded")
    shutil.copytree(place / "encoded", place / "others")
    refused = distill("train", "--config", config, "--prompts.encoded", "others", cwd=place)
    assert_refused(refused, "others", "real.name: encoded")


def test_latents_of_another_vae_are_refused(tmp_path: Path) -> None:
    place = captioned("sd15", tmp_path)
    encode(place, *IMAGES)
    shutil.rmtree(place / "teacher/vae")
    families.vae(scale=0.5).save_pretrained(place / "teacher/vae")
    result = distill("train", "--config", write_config(place, TRAIN, real=REAL), cwd=place)
    assert_refused(result, "encoded", "VAE", "scaling_factor 0.18215", "0.5")
    torch.manual_seed(3)
    other = families.vae()
    with torch.no_grad():
        other.encoder.conv_in.weight.mul_(1.01)
    other.save_pretrained(place / "teacher/vae")
    result = distill("train", "--config", write_config(place, TRAIN, real=REAL), cwd=place)
    assert_refused(result, "encoded", "VAE")
    assert not (place / "student").exists()
