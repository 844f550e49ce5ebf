"""A teacher under guidance is the stock pipeline under guidance, for every family that has it: one step, no latents
clamped, with the pipeline's own negative prompt and with another."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

from distill import Teacher
from tests.distill import families
from tests.distill.foreign import Foreign

pytestmark = pytest.mark.slow
SCALE = 3.0
NEGATIVE = "!!, x"


@pytest.fixture(scope="module")
def foreign() -> Iterator[Foreign]:
    program = Foreign()
    yield program
    program.end()


def teacher_of(name: str, folder: Path, **settings: Any) -> Teacher:
    size = {side: families.CALL[name][side] for side in ("height", "width")} if name.startswith("flux") else {}
    return Teacher.load(folder, **size, **settings)


@torch.no_grad()
def predicted(name: str, teacher: Teacher) -> np.ndarray:
    """The prediction of x0 from where the stock pipeline starts, for two samples, each by itself."""
    sigma = torch.tensor(teacher.denoiser.sigma_limit)
    start = 1 + sigma if name.startswith(("sd3", "flux")) else (1 + sigma**2).sqrt()
    made = []
    for k, z in enumerate(torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(3))):
        if teacher.words is None:
            cond: Any = torch.tensor([families.conditions(name)["class_labels"][k]])
        else:
            cond = teacher.words.condition(teacher.embed(families.PROMPTS[k]))
        made.append(teacher(start * z[None], sigma, cond))
    x = torch.cat(made)
    return (teacher.pictures(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() if name == "dit" else x.numpy()


def stock(name: str, folder: Path, foreign: Foreign, scale: float, negative: str | None) -> np.ndarray:
    call = families.conditions(name) | families.CALL.get(name, {})
    call |= {} if name == "dit" else {"output_type": "latent"}
    if name.startswith("flux"):  # what is guided by a scale is its embedding
        call |= {"true_cfg_scale": scale, "negative_prompt": [negative or ""] * 2, "guidance_scale": 3.5}
    else:
        call |= {"guidance_scale": scale} | ({} if negative is None else {"negative_prompt": [negative] * 2})
    return foreign.pictures(folder, call, load=families.LOAD.get(name), one_step={})


@pytest.mark.parametrize(
    ("name", "negative"),
    [("dit", None), *((name, negative) for name in families.PROMPTED for negative in (None, NEGATIVE))],
)
def test_guidance_is_the_stock_pipelines(name: str, negative: str | None, tmp_path: Path, foreign: Foreign) -> None:
    folder = families.save(name, tmp_path / name)
    teacher = teacher_of(name, folder, guidance=SCALE, negative_prompt=negative)
    ours = predicted(name, teacher)
    theirs = stock(name, folder, foreign, SCALE, negative)
    scale = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= 1e-5 * scale
    plain = predicted(name, teacher_of(name, folder))
    assert np.abs(ours - plain).max() > 1e-3 * scale  # there is guidance to speak of
    if negative is not None:
        default = predicted(name, teacher_of(name, folder, guidance=SCALE))
        assert np.abs(ours - default).max() > 1e-3 * scale


def test_a_pixart_of_1024_pixels_is_told_its_size(tmp_path: Path, foreign: Foreign) -> None:
    """Its latents are 128 wide, by which the pipeline knows it."""
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=128,
        patch_size=16,
    )
    with torch.no_grad():
        for weights in network.adaln_single.emb.aspect_ratio_embedder.parameters():
            weights.mul_(20)
    parts = families.FAMILIES["pixart"]().components | {"transformer": network}
    PixArtAlphaPipeline(**parts).save_pretrained(tmp_path / "pixart")
    teacher = teacher_of("pixart", tmp_path / "pixart", guidance=SCALE)
    ours, theirs = predicted("pixart", teacher), stock("pixart", tmp_path / "pixart", foreign, SCALE, None)
    assert np.abs(ours - theirs).max() <= 3e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["dit", "sd15", "flux"])
def test_guidance_has_an_interval(name: str, tmp_path: Path) -> None:
    """Inside it is the guided prediction, outside the conditional one, bit for bit."""
    folder = families.save(name, tmp_path / name)
    inside = teacher_of(name, folder, guidance=SCALE, interval=(1.0, 2e8))
    outside = teacher_of(name, folder, guidance=SCALE, interval=(0.5, 1.0))
    assert np.array_equal(predicted(name, inside), predicted(name, teacher_of(name, folder, guidance=SCALE)))
    assert np.array_equal(predicted(name, outside), predicted(name, teacher_of(name, folder)))
