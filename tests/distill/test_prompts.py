"""Pipelines of latents: our samples are the stock loop's, picture by picture, whatever their batch."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.generate import load_generator
from distill.noise import GENERATION
from distill.recipe import Sampling, read_recipe
from samplers import SampleNoise, denoiser_from, euler, flow_sigmas, heun, karras_sigmas, sample, teleported
from samplers.bound import Bound
from samplers.pipelines import vae_facts
from tests.samplers.test_prompts import with_words
from tests.samplers.tiny_pipelines import dit, gaussian, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tests.some import some
from tests.truth import relative_error
from tools.sources import SourceSettings, open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what diffusers does with numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
WORDS = ("a red fox", "green hill", "a fox")


def pipelines() -> dict[str, Any]:
    made = {"sd": stable_diffusion(), "sdxl": with_words(stable_diffusion_xl())}
    for pipe in made.values():
        pipe.scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    return made | {"sd3": with_words(stable_diffusion_3()), "dit": dit()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders sd, sdxl, sd3 and dit, and words.txt."""
    place = tmp_path_factory.mktemp("pipelines")
    for name, pipe in pipelines().items():
        pipe.save_pretrained(place / name)
    (place / "words.txt").write_text("\n".join(WORDS) + "\n", "utf-8")
    return place


def options(place: Path, name: str) -> dict[str, str]:
    return {} if name == "dit" else {"prompts": str(place / "words.txt")}


@pytest.mark.parametrize("name", some(["sd", "sdxl", "sd3"]))
@pytest.mark.parametrize("guidance", some([3.0, 1.0]))
def test_a_sample_is_the_stock_pipelines(saved: Path, name: str, guidance: float) -> None:
    steps, indices = 5, [1, 4, 6]  # prompts 1, 1, 0
    generator = load_generator(saved / name, "euler", steps, guidance, **options(saved, name))
    ours = generator(3, indices)
    assert ours.shape == (3, *generator.shape)

    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved / name, local_files_only=True, **absent)
    z = SampleNoise(3, indices, GENERATION).normal((4, 8, 8))
    if name == "sd3":
        levels = flow_sigmas(steps, 9999.0, 3.0)
        times = levels / (1 + levels)
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        given: dict[str, Any] = {"sigmas": times[:-1].tolist(), "latents": z * times[0].float()}
    else:
        low, high = (float(((1 - a) / a).sqrt()) for a in pipe.scheduler.alphas_cumprod[[0, -1]].double())
        levels = karras_sigmas(steps, low, high)
        pipe.scheduler.set_timesteps(sigmas=levels.tolist())
        given = {"sigmas": levels.tolist(), "latents": z * levels[0].float() / pipe.scheduler.init_noise_sigma}
    assert torch.allclose(generator.sigmas, levels, rtol=1e-6)
    prompts = [WORDS[k % 3] for k in indices]
    stock = pipe(prompts, guidance_scale=guidance, output_type="np", **given).images
    expected = torch.as_tensor(stock).permute(0, 3, 1, 2)
    assert relative_error((ours / 2 + 0.5).clamp(0, 1), expected) < 1e-3
    other = load_generator(saved / name, "euler", steps, 5.0, **options(saved, name))(3, indices)
    assert relative_error((other / 2 + 0.5).clamp(0, 1), expected) > 1e-2


def test_dit_is_sampled_under_balanced_labels(saved: Path) -> None:
    generator = load_generator(saved / "dit", "euler", 4, 2.0)
    assert generator.labels([5, 1003]).tolist() == [5, 3]
    pipe = diffusers.DiTPipeline.from_pretrained(saved / "dit", local_files_only=True)
    rows = []
    for k in (5, 1003):
        under, none = denoiser_from(pipe, k % 1000), denoiser_from(pipe)

        def guided(x: Tensor, sigma: Tensor, cond: Any = None, under: Any = under, none: Any = none) -> Tensor:
            return 2 * under(x, sigma) - none(x, sigma)

        z = SampleNoise(0, [k], GENERATION).normal((4, 8, 8))
        rows.append(sample(euler, guided, generator.sigmas[0] * z, generator.sigmas))
    with torch.no_grad():
        expected = pipe.vae.decode(torch.cat(rows) / pipe.vae.config.scaling_factor).sample
    assert relative_error(generator(0, [5, 1003]), expected) < 1e-4


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "dit"])
def test_a_source_of_it_knows_beforehand_what_it_makes(saved: Path, name: str) -> None:
    source = open_source(saved / name, SourceSettings("heun", 3, 2.0, **options(saved, name)))
    assert (source.shape, source.n_classes, source.nfe) == ((3, 8, 8), 1000 if name == "dit" else None, 10)
    first, again = source.read(0, range(4)), source.read(0, [2, 9, 0, 3])
    assert all(torch.equal(again.images[row], first.images[k]) for row, k in ((0, 2), (2, 0), (3, 3)))
    assert (first.labels is None) == (name != "dit")
    text = str(source.facts)
    assert str(saved) not in text
    assert source.facts == json.loads(json.dumps(source.facts))


def test_facts_are_of_the_words_not_of_their_file(saved: Path, tmp_path: Path) -> None:
    def facts(text: str, name: str = "sd") -> dict[str, Any]:
        (tmp_path / "some.txt").write_bytes(text.encode())
        return open_source(saved / name, SourceSettings(prompts=str(tmp_path / "some.txt"))).facts

    own = facts("a fox\nred hill")
    assert facts("\ufeffa fox\r\n red hill \r\n\n") == own
    assert facts("a fox\nred fox") != own
    assert facts("red hill\na fox") != own
    assert facts("a fox\nred hill", "sdxl") != own


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_it_begins_with_the_jump_of_its_latents_gaussian(saved: Path, name: str, tmp_path: Path) -> None:
    pipe = pipelines()[name]
    own = gaussian(facts={"vae": vae_facts(pipe.vae)}, classes=1000 if name == "dit" else None)
    own.save(tmp_path / "g.safetensors")
    jump = {"teleport": str(tmp_path / "g.safetensors"), "sigma_skip": 4.0}
    generator = load_generator(saved / name, "heun", 5, 2.0, **jump, **options(saved, name))
    plain = load_generator(saved / name, "heun", 5, 2.0, **options(saved, name))
    z = SampleNoise(1, [4, 2], GENERATION).normal((4, 8, 8))
    cond = plain.latents.condition_of(torch.tensor([4, 2]))
    x = sample(teleported(heun, own, 4.0), plain.denoiser, plain.sigmas[0] * z, plain.sigmas, cond)
    assert torch.equal(generator(1, [4, 2]), plain.latents.pictures(x))
    assert generator.nfe < plain.nfe

    facts = {"vae": vae_facts(pipe.vae) | {"scaling_factor": 0.9}}
    for wrong, message in ((gaussian(facts=facts), "scaling_factor"), (gaussian(facts={}), "fitted to pixels")):
        wrong.save(tmp_path / "g.safetensors")
        with pytest.raises(ValueError, match=message):
            load_generator(saved / name, "heun", 5, 2.0, **jump, **options(saved, name))


def test_prompts_that_cannot_be_right_are_refused(saved: Path, tmp_path: Path) -> None:
    def refused(message: str, text: bytes | None, name: str = "sd") -> None:
        file = tmp_path / "words.txt"
        if text is not None:
            file.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(saved / name, Sampling(prompts=None if text is None else str(file)))

    refused(r"prompts: None; .*sd needs a text file of them", None)
    refused(r"prompts: .*dit has classes, and no use for words", b"a fox", "dit")
    refused(r"has no words in line 2; needed is one prompt a line", b"a fox\n \nred hill")
    refused(r"words.txt is empty", b"")


def test_parts_that_are_not_whole_or_not_of_the_libraries_are_named(tmp_path: Path) -> None:
    stable_diffusion().save_pretrained(tmp_path / "sd")
    (tmp_path / "words.txt").write_text("a fox")
    index = tmp_path / "sd/model_index.json"
    whole = index.read_text()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_generator(tmp_path / "sd", steps=2, prompts=tmp_path / "words.txt")

    index.write_text(whole.replace('"UNet2DConditionModel"', '"MyOwnNetwork"'))
    refused(r"sd/unet: is a diffusers\.MyOwnNetwork, which is not here")
    index.write_text(whole.replace('"transformers",\n    "CLIPTextModel"', '"os",\n    "system"'))
    refused(r"sd/text_encoder: is a os\.system, which is not here; read are parts of diffusers and transformers")
    index.write_text(whole)
    weights = tmp_path / "sd/text_encoder/model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if "layers.0.mlp.fc1.weight" not in k}, weights, {"format": "pt"})
    refused(r"sd/text_encoder: its weights are not those of its config\.json: .*fc1")
    weights.unlink()
    torch.save(tensors, tmp_path / "sd/text_encoder/pytorch_model.bin")
    refused(r"sd/text_encoder: has no safetensors that are read, only pytorch_model\.bin")


def test_a_gaussians_file_that_is_replaced_is_read_again(saved: Path, tmp_path: Path) -> None:
    own, file = gaussian(facts={"vae": {"class": "AutoencoderKL"}}), tmp_path / "g.safetensors"
    for bound in (own.bound, Bound((6.0,), (0.01,))):
        own.with_bound(bound).save(file)
        recipe = read_recipe(saved / "dit", Sampling(teleport=str(file)))
        assert recipe.sigma_skip == bound.sigma_skip(0.05)
