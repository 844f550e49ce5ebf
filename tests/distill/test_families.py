"""Every family by the real commands: both methods, export, and stock diffusers where this library does not exist."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from distill.checkpoint import newest
from samplers.adapters import NetworkDenoiser, coordinates_of
from samplers.prompts import decode, latent_shape, prompted
from tests.distill import families
from tests.distill.command import Result, distill
from tests.distill.foreign import Foreign
from tests.distill.runs import assert_refused, lines
from tests.distill.tiny import write_config

# DisBack without data, and f-distill against samples that the teacher makes.
DISBACK: dict[str, Any] = {
    "target": {"name": "nodes", "updates": 2},
    "degradation": {"steps": 4, "check_every": 2, "nodes": 2},
}
F_DISTILL: dict[str, Any] = {
    "divergence": {"name": "jensen-shannon", "bins": 2},
    "real": {"name": "teacher", "count": 8, "sampler": "euler", "steps": 2, "cache": "cache"},
}
LORA: dict[str, Any] = {"student": {"lora": {"rank": 2, "alpha": 4.0}}, "fake": {"lora": {"rank": 2}}}
FILES = ("sd15", "sdxl", "sd3", "flux")  # whose pipelines read LoRA files
METHODS = {"disback": DISBACK, "f-distill": F_DISTILL}
everyone = pytest.mark.parametrize("name", families.FAMILIES)
one_is_quick = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES]
)


@pytest.fixture(scope="module")
def foreign() -> Iterator[Foreign]:
    program = Foreign()
    yield program
    program.end()


def configuration(name: str, place: Path, *, lr: float = 1e-3, **changes: Any) -> Path:
    """A teacher of the family in place/teacher, its prompts in place/prompts.txt, and a small run of it."""
    families.save(name, place / "teacher")
    words = name in families.PROMPTED
    (place / "prompts.txt").write_text("\n".join(families.PROMPTS) + "\n")
    size = {key: families.CALL[name][key] for key in ("height", "width") if key in families.CALL.get(name, {})}
    latents = (place / "teacher/vae").is_dir()
    base = {
        "command": "train",
        "run": "student",
        "teacher": {"path": "teacher"},
        "prompts": {"file": "prompts.txt"} | size if words else {},
        "student": {"sigma_init": None if latents else 2.5, "optimizer": {"lr": lr}},
        "fake": {"optimizer": {"lr": 1e-3}},
        "batch_size": 4,
        "steps": 4,
        "logging": {"log_every": 1, "sample_every": 100, "checkpoint_every": 2},
    }
    student = base["student"] | changes.pop("student", {})
    return write_config(place, base, student=student, **changes)


def done(result: Result) -> str:
    assert result.code == 0, result.err[-3000:]
    return result.out


def call(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What the stock pipeline of an exported student is called with for two samples."""
    latent = {"output_type": "latent"} if name in families.PROMPTED else {}
    return families.conditions(name) | families.CALL.get(name, {}) | facts.get("call", {}) | latent


def scale(name: str) -> float:
    """The guidance scale of a stock call without guidance; FLUX.1-dev is fed one instead."""
    return 3.5 if name == "flux" else 1.0


def exported(name: str, place: Path, foreign: Foreign) -> np.ndarray:
    """Exports place/student; two samples of it by a stock pipeline."""
    done(distill("export", "student", "exported", cwd=place))
    facts = json.loads((place / "exported/distill.json").read_text())
    assert facts["kind"] == "student"
    return foreign.pictures(place / "exported", call(name, facts), load=families.LOAD.get(name))


def weights(place: Path, folder: str) -> dict[str, torch.Tensor]:
    """Of the network of a pipeline folder."""
    part = "unet" if (place / folder / "unet").is_dir() else "transformer"
    return load_file(place / folder / part / "diffusion_pytorch_model.safetensors")


@torch.no_grad()
def of_the_run(name: str, place: Path) -> np.ndarray:
    """The same two samples by the average in a run's checkpoint, as a denoiser in this library's coordinates."""
    pipe = DiffusionPipeline.from_pretrained(place / "teacher", **families.LOAD.get(name, {}))
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    kept = load_file(newest(place / "student/checkpoints") / "average.safetensors")
    network.load_state_dict({key.removeprefix("network."): value for key, value in kept.items()})
    size = [families.CALL.get(name, {}).get(side) for side in ("height", "width")]
    latent = name in families.PROMPTED or name == "dit"
    shape = latent_shape(pipe, *size) if latent else (3, 8, 8)
    facts = json.loads((place / "exported/distill.json").read_text())
    asked = families.conditions(name)
    made = []
    for k, z in enumerate(torch.randn((2, *shape), generator=torch.Generator().manual_seed(3))):
        condition = asked.get("prompt", asked.get("class_labels", [None, None]))[k]
        if latent:
            conditioned = prompted(pipe, condition, height=size[0], width=size[1])
            denoiser, cond = conditioned.denoiser, conditioned.cond
        else:
            denoiser = NetworkDenoiser(network, coordinates_of(pipe.scheduler))
            cond = None if condition is None else torch.tensor([condition])
        made.append(denoiser(facts["start"] * z[None], torch.tensor(facts["sigmas"][0]), cond))
    x = torch.cat(made)
    if name in families.PROMPTED:
        return x.numpy()
    return ((decode(pipe, x) if latent else x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def error(made: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference beside the largest value."""
    assert made.shape == truth.shape
    assert np.isfinite(made).all()
    return float(np.abs(made - truth).max() / np.abs(truth).max())


@one_is_quick
def test_a_student_before_training_is_the_teachers_prediction_by_one_step(
    name: str, tmp_path: Path, foreign: Foreign
) -> None:
    """Both by stock pipelines: the teacher with a stock scheduler of which one step is its prediction of x0."""
    file = configuration(name, tmp_path, lr=1e-30, steps=1)
    done(distill("train", "--config", file, cwd=tmp_path))
    made = exported(name, tmp_path, foreign)

    where: dict[str, Any] = {}
    if name.startswith("ddpm"):  # the timestep whose level is nearest to 2.5
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        alphas = (1 - betas).cumprod(0)
        where = {"timestep": int((((1 - alphas) / alphas).log() / 2 - math.log(2.5)).abs().argmin())}
    elif name.startswith("edm"):
        where = {"sigma_max": 2.5}
    arguments = call(name, {}) | ({"guidance_scale": scale(name)} if (tmp_path / "teacher/vae").is_dir() else {})
    truth = foreign.pictures(tmp_path / "teacher", arguments, load=families.LOAD.get(name), one_step=where)
    assert error(made, truth) <= 1e-4
    assert np.abs(made[0] - made[1]).max() > 1e-2  # two samples


@pytest.mark.slow
@everyone
@pytest.mark.parametrize("method", METHODS)
def test_a_family_is_trained_exported_and_sampled_by_stock_diffusers(
    name: str, method: str, tmp_path: Path, foreign: Foreign
) -> None:
    changes = METHODS[method]
    if method == "f-distill":  # a real sample or more for each class
        changes = changes | {"real": changes["real"] | {"count": families.LABELS.get(name, 8)}}
    file = configuration(name, tmp_path, **changes)
    done(distill("train", "--config", file, cwd=tmp_path))
    logged = lines(tmp_path / "student")
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for line in logged for value in line.values())
    assert len({line["fake_loss"] for line in logged}) == 4

    made = exported(name, tmp_path, foreign)
    before, after = weights(tmp_path, "teacher"), weights(tmp_path, "exported")
    moved = [key for key in after if key in before and not torch.equal(after[key], before[key])]
    assert len(moved) > 0.9 * len(after)

    truth = of_the_run(name, tmp_path)
    assert error(made, truth) <= 1e-4


@pytest.mark.slow
@everyone
def test_adapters_are_trained_merged_and_written_as_a_stock_file(name: str, tmp_path: Path, foreign: Foreign) -> None:
    """Checkpoints hold no copy of the base; merged into it, or read by diffusers, adapters are one student."""
    file = configuration(name, tmp_path, **LORA)
    done(distill("train", "--config", file, cwd=tmp_path))
    base = weights(tmp_path, "teacher")
    for network in ("student", "fake", "average"):
        kept = load_file(newest(tmp_path / "student/checkpoints") / f"{network}.safetensors")
        assert all(".lora_A.default.weight" in key or ".lora_B.default.weight" in key for key in kept)
        assert sum(value.numel() for value in kept.values()) < 0.5 * sum(value.numel() for value in base.values())

    merged = exported(name, tmp_path, foreign)
    after = weights(tmp_path, "exported")
    assert after.keys() == base.keys()
    moved = [key for key in after if not torch.equal(after[key], base[key])]
    assert moved
    assert len(moved) < len(after)
    for key in moved:  # alpha / rank = 2
        inner, outer = (kept[f"network.{key.removesuffix('.weight')}.lora_{part}.default.weight"] for part in "AB")
        assert len(inner) == 2
        assert torch.allclose(after[key], base[key] + 2 * outer @ inner, atol=1e-6)
    if name in FILES:
        done(distill("export", "student", "adapters", "--lora", cwd=tmp_path))
        assert (tmp_path / "adapters/pytorch_lora_weights.safetensors").is_file()
        facts = json.loads((tmp_path / "exported/distill.json").read_text())
        lora = tmp_path / "teacher", tmp_path / "adapters"
        made = foreign.pictures(tmp_path / "exported", call(name, facts), load=families.LOAD.get(name), lora=lora)
        assert error(made, merged) <= 1e-4
        plain = foreign.pictures(tmp_path / "teacher", call(name, facts), load=families.LOAD.get(name))
        assert error(plain, merged) > 1e-3


@pytest.mark.slow
@everyone
def test_a_student_of_four_steps(name: str, tmp_path: Path, foreign: Foreign) -> None:
    """Stock diffusers makes four steps of it, which are not one."""
    file = configuration(name, tmp_path, student={"steps": 4, "hold": 1})
    result = distill("train", "--config", file, cwd=tmp_path)
    if name == "edm":
        assert_refused(result, "student.steps", "EDMEulerScheduler")
        return
    done(result)
    made = exported(name, tmp_path, foreign)
    facts = json.loads((tmp_path / "exported/distill.json").read_text())
    assert len(facts["sigmas"]) == 4
    once = of_the_run(name, tmp_path)
    assert made.shape == once.shape
    assert np.isfinite(made).all()
    assert np.abs(made - once).max() > 1e-2 * np.abs(once).max()
