"""Rows of latents and embeddings: they are what the stock pipelines' own parts make, read in any order; refusals."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distill import data
from distill.config import Encode
from distill.encode import encode
from distill.encoded import COMMON, MANIFEST, Encoded, encoder_facts, shard_name
from distill.noise import LATENTS
from samplers import SampleNoise
from samplers.pipelines import vae_facts
from tests.distill import families
from tests.truth import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
WORDS = ("a red fox", "two green hills, at night", "hill", "a red fox", "fox")
SLOW = ("sd21", "sdxl", "pixart-sigma", "sd3", "flux-schnell")


def pictures(root: Path, n: int = len(WORDS), classes: tuple[str, ...] = ("",), words: bool = False) -> Path:
    """n real files of 16x16, and the words beside each."""
    rng = np.random.default_rng(0)
    for k in range(n):
        file = root / classes[k % len(classes)] / f"{k:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
        if words:
            file.with_suffix(".txt").write_text(WORDS[k % len(WORDS)])
    return root


def folder_of(path: Path) -> dict[str, Any]:
    return {"name": "folder", "path": str(path), "size": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with words in `images`, in classes in `classes`, and what was made of some in `sd15` and `dit`."""
    place = tmp_path_factory.mktemp("encoded")
    pictures(place / "images", words=True)
    pictures(place / "classes", classes=("zebra", "ant"))
    for name, where in (("sd15", "images"), ("dit", "classes")):
        families.save(name, place / "pipelines" / name)
        config = {"data": folder_of(place / where), "rows": 2, "dtype": "float32", "flip": True}
        more = {"negative_prompt": "dark night"} if name == "sd15" else {}
        encode(Encode(pipeline=str(place / "pipelines" / name), out=str(place / name), **config, **more))
    return place


def stock_embeddings(name: str, pipe: Any, words: list[str]) -> dict[str, torch.Tensor]:
    """By the pipeline's own method, for all the words at once; of no prompt, what it calls negative."""
    if name.startswith("flux"):
        texts, pooled, _ = pipe.encode_prompt(words, None)
        return {"prompt_embeds": texts, "pooled_prompt_embeds": pooled}
    if name.startswith("pixart"):
        texts, mask, *_ = pipe.encode_prompt(words, do_classifier_free_guidance=False)
        return {"prompt_embeds": texts, "prompt_attention_mask": mask}
    if name.startswith(("sdxl", "sd3")):
        given = (words, None, None) if name.startswith("sd3") else (words,)
        texts, _, pooled, _ = pipe.encode_prompt(*given, do_classifier_free_guidance=False)
        return {"prompt_embeds": texts, "pooled_prompt_embeds": pooled}
    return {"prompt_embeds": pipe.encode_prompt(words, "cpu", 1, False)[0]}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in families.PROMPTED]
)
def test_rows_are_what_the_stock_parts_make(tmp_path: Path, name: str) -> None:
    """Latents that the pipeline decodes to what its VAE's posterior sample is; embeddings of its own encode_prompt."""
    folder = families.save(name, tmp_path / "pipe")
    pictures(tmp_path / "images", words=True)
    config = Encode(
        pipeline=str(folder),
        out=str(tmp_path / "out"),
        data=folder_of(tmp_path / "images"),
        rows=2,
        batch=3,
        seed=5,
        dtype="float32",
    )
    encoded = encode(config)
    assert (len(encoded), encoded.shape, encoded.labels, encoded.classes) == (5, (4, 8, 8), None, ())
    order = [3, 0, 4, 4, 1]
    rows = encoded.rows(order)

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **families.LOAD.get(name, {}))
    images = data.continuous(data.folder(tmp_path / "images", 16).images)
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
        texts = stock_embeddings(name, pipe, [WORDS[k] for k in order])
    z = posterior.mean + posterior.std * SampleNoise(5, range(5), LATENTS).normal((4, 8, 8))
    decoded = rows["latents"] / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0.0)
    assert relative_error(decoded, z[order]) < 1e-5
    assert rows.keys() == {"latents", *texts}
    for key, expected in texts.items():
        assert relative_error(rows[key].float(), expected.float()) < 1e-5, key
        assert relative_error(rows[key][1].float(), expected[2].float()) > 1e-3  # another prompt is another row
        assert encoded.null[key].shape == expected[:1].shape
    encoded.check(type(pipe).__name__, vae_facts(pipe.vae), encoder_facts(folder))
    encoded.verify()


def test_the_negative_prompt_and_none_are_kept(place: Path) -> None:
    encoded = Encoded.read(place / "sd15")
    pipe = diffusers.DiffusionPipeline.from_pretrained(place / "pipelines/sd15", local_files_only=True)
    with torch.no_grad():
        of_no, of_dark = (pipe.encode_prompt(words, "cpu", 1, False)[0] for words in ("", "dark night"))
    assert relative_error(encoded.null["prompt_embeds"], of_no) < 1e-6
    assert relative_error(encoded.negative["prompt_embeds"], of_dark) < 1e-6
    assert relative_error(of_no, of_dark) > 1e-3
    assert encoded.negative_prompt == "dark night"


def test_mirror_images_are_the_second_half(place: Path) -> None:
    for name, where in (("sd15", "images"), ("dit", "classes")):
        encoded = Encoded.read(place / name)
        images = data.found_images(place / where)
        assert len(encoded) == 2 * len(images)
        flipped = torch.stack([data.ImageFiles(images, 16, 3).read([k])[0].flip(-1) for k in range(len(images))])
        noise = SampleNoise(0, range(len(images)), LATENTS)
        noise.normal((4, 8, 8))  # the images' own
        vae = families.vae(0.18215)
        with torch.no_grad():
            posterior = vae.encode(flipped).latent_dist
        z = posterior.mean + posterior.std * noise.normal((4, 8, 8))
        assert relative_error(encoded.rows(range(5, 10))["latents"], z * vae.config.scaling_factor) < 1e-5
        for key in encoded.embeddings:
            assert torch.equal(encoded.rows([6])[key], encoded.rows([1])[key])
    labels = encoded.labels  # DiT's
    assert labels is not None
    assert encoded.classes == ("ant", "zebra")
    assert labels.tolist() == [0, 0, 1, 1, 1] * 2


def test_only_what_is_asked_for_is_read(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "sd15", tmp_path / "sd15")
    encoded = Encoded.read(tmp_path / "sd15")
    (tmp_path / "sd15" / shard_name(1)).unlink()
    assert encoded.rows([0, 1, 9]).keys() == {"latents", "prompt_embeds"}
    assert encoded.rows([0, 1], ["prompt_embeds"]).keys() == {"prompt_embeds"}
    assert encoded.rows([])["latents"].shape == (0, 4, 8, 8)
    with pytest.raises(ValueError, match=rf"{shard_name(1)} is damaged"):
        encoded.rows([2])
    for numbers in ([10], [-1]):
        with pytest.raises(ValueError, match=rf"row {numbers[0]}; .*sd15 has rows 0 \.\. 9"):
            encoded.rows(numbers)
    with pytest.raises(ValueError, match=r"has no pooled; there are latents, prompt_embeds"):
        encoded.rows([0], ["pooled"])


def test_more_shards_than_are_kept_open(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.encoded._OPEN", 1)
    encoded = Encoded.read(place / "sd15")
    order = [9, 0, 7, 2, 4, 0]
    rows = encoded.rows(order)["latents"]
    assert len(encoded._files) == 1
    for row, k in zip(rows, order, strict=True):
        assert torch.equal(row, encoded.rows([k])["latents"][0])


@pytest.mark.parametrize("order", [range(10), [3, 4, 5, 6, 0, 1, 1, 2, 9, 8, 4, 5], range(1, 7), [9], [4, 5]])
def test_a_row_is_the_same_whatever_is_read_with_it(place: Path, order: Any) -> None:
    """Spans over the ends of shards (2 rows, the last of 1) and over the middle, where the mirror images begin."""
    encoded = Encoded.read(place / "sd15")
    for name, value in encoded.rows(order).items():
        assert torch.equal(value, torch.cat([encoded.rows([k])[name] for k in order]))


def test_prompts_alone_and_images_of_classes(place: Path, tmp_path: Path) -> None:
    pipeline = str(place / "pipelines/sd15")
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps({"text": w}) for w in WORDS))
    prompts = {"prompts": str(tmp_path / "words.jsonl"), "column": "text"}
    alone = encode(Encode(pipeline=pipeline, out=str(tmp_path / "words"), rows=3, dtype="float32", **prompts))
    assert (len(alone), alone.shape, alone.labels) == (5, None, None)
    both = Encoded.read(place / "sd15")
    assert torch.equal(alone.rows(range(5))["prompt_embeds"], both.rows(range(5))["prompt_embeds"])
    alone.check("StableDiffusionPipeline", None, encoder_facts(pipeline))  # no latents: any VAE will do

    config = {"data": folder_of(place / "classes"), "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=r"classes has no words for its images, which a StableDiffusionPipeline is"):
        encode(Encode(pipeline=pipeline, out=str(tmp_path / "images"), **config))
    images = encode(Encode(pipeline=str(place / "pipelines/dit"), out=str(tmp_path / "images"), **config))
    assert (images.embeddings, images.classes, len(images)) == ((), ("ant", "zebra"), 5)
    assert images.rows([0])["latents"].dtype == torch.bfloat16


def test_a_table_gives_the_images_their_words(place: Path, tmp_path: Path) -> None:
    with (tmp_path / "words.csv").open("w") as file:
        names = [f"{k:02d}.png" for k in range(5)]
        csv.writer(file).writerows([("file_name", "caption"), *zip(reversed(names), reversed(WORDS), strict=True)])
    config = {"data": folder_of(place / "images"), "dtype": "float32", "prompts": str(tmp_path / "words.csv")}
    encoded = encode(Encode(pipeline=str(place / "pipelines/sd15"), out=str(tmp_path / "out"), **config))
    own = Encoded.read(place / "sd15")
    for key, value in encoded.rows(range(5)).items():
        assert relative_error(value, own.rows(range(5))[key]) < 1e-6


def test_numbers_that_the_dtype_cannot_hold_are_named(place: Path, tmp_path: Path) -> None:
    pipe = shutil.copytree(place / "pipelines/dit", tmp_path / "pipe")
    settings = json.loads((pipe / "vae/config.json").read_text())
    (pipe / "vae/config.json").write_text(json.dumps(settings | {"scaling_factor": 1e6}))
    config = {"pipeline": str(pipe), "data": folder_of(place / "classes")}
    with pytest.raises(ValueError, match=r"ant/01\.png: its latent is too large for dtype: float16; float32 has room"):
        encode(Encode(**config, out=str(tmp_path / "out")))
    assert encode(Encode(**config, out=str(tmp_path / "wide"), dtype="float32")).rows([0])["latents"].abs().max() > 1e5


# --- refusals


def test_rows_of_another_pipeline_vae_or_text_encoder_are_refused(place: Path) -> None:
    encoded, folder = Encoded.read(place / "sd15"), place / "pipelines/sd15"
    own, encoders = vae_facts(families.vae(0.18215)), encoder_facts(folder)
    encoded.check("StableDiffusionPipeline", own, encoders)
    encoded.check("StableDiffusionPipeline", own, {})  # a machine without the text encoders

    def refused(message: str, kind: str, vae: Any, encoders: dict[str, str]) -> None:
        with pytest.raises(ValueError, match=message):
            encoded.check(kind, vae, encoders)

    kind = "StableDiffusionPipeline"
    refused(r"was made for a StableDiffusionPipeline; the teacher is a DiTPipeline", "DiTPipeline", own, encoders)
    refused(r"has latents of a AutoencoderKL; the teacher has no VAE", kind, None, encoders)
    scaled = vae_facts(families.vae(0.5))
    refused(r"latents of a VAE with scaling_factor 0\.18215; that of the teacher has 0\.5", kind, scaled, encoders)
    trained = families.vae(0.18215)
    trained.encoder.conv_out.bias[0] += 1e-3
    ours, theirs = own["sha256"], vae_facts(trained)["sha256"]
    told = rf"weights of SHA-256 {ours['float32'][:16]}; those of the teacher's are {theirs['float32'][:16]}"
    refused(told, kind, vae_facts(trained), encoders)
    refused(r"was made by a text_encoder with the hash", kind, own, encoders | {"text_encoder": "0" * 64})


def test_text_encoders_are_told_apart_by_their_weights_not_by_who_saved_them(place: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "pipelines/sd15", tmp_path / "pipe")
    own = encoder_facts(folder)
    assert own.keys() == {"text_encoder", "tokenizer"}
    config = folder / "text_encoder/config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"transformers_version": "1.0", "_name_or_path": "x"})
    )
    assert encoder_facts(folder) == own
    weights = folder / "text_encoder/model.safetensors"
    tensors = load_file(weights)
    tensors[min(tensors)].flatten()[0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    assert encoder_facts(folder)["tokenizer"] == own["tokenizer"]
    assert encoder_facts(folder)["text_encoder"] != own["text_encoder"]
    shutil.rmtree(folder / "text_encoder")
    assert encoder_facts(folder).keys() == {"tokenizer"}


def read_whole(folder: Path) -> None:
    encoded = Encoded.read(folder)
    encoded.rows(range(10))
    encoded.verify()


@pytest.mark.parametrize(
    "harm", ["truncated", "missing", "changed", "other", "unfinished", "format", "no manifest", "json", "type"]
)
def test_a_folder_that_is_not_whole_is_named(place: Path, tmp_path: Path, harm: str) -> None:
    folder = shutil.copytree(place / "sd15", tmp_path / "sd15")
    shard, manifest = folder / shard_name(1), folder / MANIFEST
    content = shard.read_bytes()
    size = len(content)
    message = {
        "truncated": rf"{shard_name(1)} is truncated: it has {size - 1} bytes of {size}",
        "missing": rf"{shard_name(1)} is missing",
        "changed": rf"{shard_name(1)} is damaged: its SHA-256 is not that of manifest\.json",
        "other": rf"{shard_name(1)} was made with other settings",
        "unfinished": r"sd15 has not finished: start `distill encode` again",
        "format": r"manifest\.json is of format 7; read is 1",
        "no manifest": r"sd15 has no manifest\.json of `distill encode`",
        "json": r"manifest\.json holds no keys",
        "type": r"manifest\.json is not the manifest of `distill encode` .count.",
    }[harm]
    if harm == "truncated":
        shard.write_bytes(content[:-1])
    elif harm == "missing":
        shard.unlink()
    elif harm == "changed":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "other":
        save_file(load_file(shard), shard, {"distill": "f" * 64})
        assert shard.stat().st_size == size
    elif harm == "format":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 7}))
    elif harm == "json":
        manifest.write_text("[]")
    elif harm == "type":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"count": "ten"}))
    else:
        manifest.unlink()
        for file in folder.glob("*.safetensors") if harm == "no manifest" else []:
            file.unlink()
    with pytest.raises(ValueError, match=message):
        read_whole(folder)


def test_the_manifest_says_what_is_there(place: Path) -> None:
    facts = json.loads((place / "sd15" / MANIFEST).read_text())
    assert facts["tensors"] == {"latents": [4, 8, 8], "mirrored": [4, 8, 8], "prompt_embeds": [32, 16]}
    assert list(facts["files"]) == [COMMON, *(shard_name(k) for k in range(3))]
    assert (facts["count"], facts["rows"], facts["dtype"], facts["pipeline"]) == (
        5,
        2,
        "float32",
        "StableDiffusionPipeline",
    )
    assert facts["vae"] == vae_facts(families.vae(0.18215))
