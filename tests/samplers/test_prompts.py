"""A pipeline's prompts as denoisers: our own loop over them is the stock pipeline's, picture by picture."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDPMPipeline, DDPMScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from samplers.adapters import denoiser_from
from samplers.feynman_kac import draw, feynman_kac
from samplers.prompts import decode, latent_shape, prompted
from samplers.solvers import euler
from samplers.start import start_particles
from samplers.targets import annealed, geometric_average, product
from samplers.weighing_scheduler import levels_of
from samplers.weighted_path import Corrector
from tests.samplers.networks import unet
from tests.samplers.tiny_pipelines import (
    ARGUMENTS,
    MAKERS,
    Calls,
    ddim,
    ddpm,
    dit,
    embeddings,
    flux,
    quiet,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    tokenizer,
)
from tests.truth import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what diffusers does with numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS = 10
WORDS = ["a red fox", "green hill"]
FINITE = torch.linspace(0.999, 0.1, STEPS).tolist()  # a flow from t = 1 begins at sigma = infinity


def encoder(cls: type, seed: int) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16 if seed == 1 else 8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return cls(config).eval().requires_grad_(False)


def with_words(pipe: Any) -> Any:
    """The same network and VAE, with two tiny text encoders."""
    words, seeds = tokenizer(), (0, 1) if type(pipe).__name__.endswith("XLPipeline") else (2, 3)
    first = CLIPTextModel if seeds[0] == 0 else CLIPTextModelWithProjection
    parts = {
        "tokenizer": words,
        "tokenizer_2": words,
        "text_encoder": encoder(first, seeds[0]),
        "text_encoder_2": encoder(CLIPTextModelWithProjection, seeds[1]),
    }
    return quiet(type(pipe)(**(pipe.components | parts)))


def pixels(make: Callable[[], Any]) -> Any:
    pipe = make()
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return pipe


def latents(make: Callable[[], Any], scheduler: str, **settings: Any) -> Any:
    pipe = make()
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler")(**settings)
    return pipe


# a pipeline, what its call is given for two pictures, and what `denoiser_from` is given for each
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], list[Any]]] = {
    "sd": (lambda: latents(stable_diffusion, "EulerDiscrete"), {"prompt": WORDS}, list(WORDS)),
    "sd-v": (
        lambda: latents(stable_diffusion, "DDIM", clip_sample=False, prediction_type="v_prediction"),
        {"prompt": WORDS},
        list(WORDS),
    ),
    "sdxl": (
        lambda: latents(lambda: with_words(stable_diffusion_xl()), "EulerDiscrete"),
        {"prompt": WORDS},
        list(WORDS),
    ),
    "sd3": (
        lambda: latents(lambda: with_words(stable_diffusion_3()), "FlowMatchEulerDiscrete"),
        {"prompt": WORDS, "sigmas": FINITE},
        list(WORDS),
    ),
    "dit": (dit, {"class_labels": [7, 300]}, [7, 300]),
    "ddpm": (lambda: pixels(ddpm), {"batch_size": 2}, [None, None]),
    "ddim": (lambda: pixels(ddim), {"batch_size": 2}, [None, None]),
}
everyone = pytest.mark.parametrize("name", list(CASES))


def stock(pipe: Any, arguments: dict[str, Any], seed: int = 0) -> Tensor:
    """The pipeline's own pictures, [2, 3, 8, 8] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    result = pipe(generator=generator, num_inference_steps=STEPS, output_type="np", **arguments).images
    return torch.as_tensor(result).permute(0, 3, 1, 2)


def begin(pipe: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The levels of the pipeline's run, and its first noise in EDM coordinates."""
    scheduler = pipe.scheduler
    flow = type(scheduler).__name__.startswith("FlowMatch")
    scheduler.set_timesteps(**({"sigmas": FINITE} if flow else {"num_inference_steps": STEPS}))
    levels = torch.tensor(levels_of(scheduler), dtype=torch.float64)
    if flow:
        return levels, noise.double() * (1 + levels[0])
    scale = scheduler.init_noise_sigma if hasattr(scheduler, "sigmas") else (1 + levels[0] ** 2).sqrt()
    return levels, noise.double() * scale


def ours(pipe: Any, prompts: list[Any], scale: float, seed: int = 0) -> Tensor:
    """Pictures by Euler's method from the same noise: a picture a prompt, guided away from none."""
    noise = torch.randn((2, *latent_shape(pipe)), generator=torch.Generator().manual_seed(seed))
    levels, x = begin(pipe, noise)
    finals = []
    for k, prompt in enumerate(prompts):
        under, none = denoiser_from(pipe, prompt), denoiser_from(pipe)

        def guided(x: Tensor, sigma: Tensor, cond: Any = None, under: Any = under, none: Any = none) -> Tensor:
            return torch.lerp(none(x, sigma), under(x, sigma), scale)

        *_, state = euler(guided, x[k : k + 1], levels)
        finals.append(state.x.float())
    return (decode(pipe, torch.cat(finals)) / 2 + 0.5).clamp(0, 1)


@everyone
def test_our_loop_is_the_stock_pipeline(name) -> None:
    """With guidance, and so under the prompts and under none; the VAE's scaling and shift are the pipeline's."""
    make, arguments, prompts = CASES[name]
    pipe = make()
    guided = {} if name in ("ddpm", "ddim") else {"guidance_scale": 3.0}
    if name in ("ddpm", "ddim"):
        pipe = quiet(diffusers.DDIMPipeline(pipe.unet, pipe.scheduler)) if name == "ddpm" else pipe
    expected = stock(pipe, arguments | guided)
    found = ours(pipe, prompts, 3.0)
    assert relative_error(found - found.mean(), expected - expected.mean()) < 2e-4
    other = ours(pipe, prompts[::-1], 3.0)
    assert name in ("ddpm", "ddim") or relative_error(other, expected) > 1e-3


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "dit"])
def test_two_prompts_are_one_call_of_the_network(name) -> None:
    make, _, prompts = CASES[name]
    pipe = make()
    target = product([denoiser_from(pipe, prompt) for prompt in prompts], [0.6, 0.6])
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.tensor([20.0, 5.0, 1.0, 0.3, 0.0])
    x, weights = start_particles(target, latent_shape(pipe), 20.0, 3, groups=2, generator=generator)
    corrector = Corrector(form="trace", probes=1)
    with Calls(pipe) as calls:
        *_, state = feynman_kac(target, x, sigmas, None, generator, groups=2, log_weights=weights, corrector=corrector)
    assert len(calls) == 4
    assert all(len(call) == 12 for call in calls)
    pictures = decode(pipe, draw(state, 2, generator))
    assert pictures.shape == (4, 3, 8, 8)
    assert bool(pictures.isfinite().all())


def test_guidance_and_annealing_of_prompts_and_of_two_pipelines() -> None:
    one, two = CASES["sd"][0](), CASES["dit"][0]()
    first = denoiser_from(one, "a red fox")
    assert denoiser_from(one, "green hill").denoiser is first.denoiser
    assert denoiser_from(two, 3).denoiser is not first.denoiser
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.tensor([20.0, 5.0, 1.0, 0.0])
    for target in (
        geometric_average(denoiser_from(one), first, 2.0),
        annealed(first, 1.5),
        product([first, denoiser_from(two, 3)]),
    ):
        x, weights = start_particles(target, latent_shape(one), 20.0, 4, generator=generator)
        *_, state = feynman_kac(target, x, sigmas, None, generator, log_weights=weights)
        assert bool(state.x.isfinite().all())


def test_the_shared_denoiser_follows_the_pipeline() -> None:
    pipe = stable_diffusion()
    first = denoiser_from(pipe, "a red fox")
    assert denoiser_from(pipe).denoiser is first.denoiser
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    assert denoiser_from(pipe, "a red fox").denoiser is not first.denoiser


def test_no_prompt_is_the_empty_one_and_the_null_label() -> None:
    x, sigma = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor(2.0)
    for name, null in (("sd", ""), ("sd3", ""), ("dit", 1000)):
        pipe = CASES[name][0]()
        expected = denoiser_from(pipe)(x, sigma)
        assert torch.equal(denoiser_from(pipe, null)(x, sigma), expected)
        assert not torch.equal(denoiser_from(pipe, CASES[name][2][0])(x, sigma), expected)
    # SDXL guides away from zeros, unless it is told to do so from the embedding of no words
    pipe = CASES["sdxl"][0]()
    assert bool((prompted(pipe).cond["encoder_hidden_states"] == 0).all())
    words = pipe.encode_prompt("a red fox", negative_prompt="", device="cpu")[1]
    assert torch.equal(prompted(pipe, "").cond["encoder_hidden_states"], words)
    assert bool((words != 0).any())
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert bool((prompted(pipe).cond["encoder_hidden_states"] != 0).any())


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_embeddings_instead_of_words(name) -> None:
    pipe = MAKERS[name]()
    flow = name == "StableDiffusion3Pipeline"
    kind = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.EulerDiscreteScheduler
    pipe.scheduler = kind()
    given = {key: ARGUMENTS[name][key] for key in ("prompt_embeds", "pooled_prompt_embeds")}
    expected = stock(pipe, given | {"guidance_scale": 1.0} | ({"sigmas": FINITE} if flow else {}))
    rows = [{key: value[k : k + 1] for key, value in given.items()} for k in range(2)]
    noise = torch.randn((2, *latent_shape(pipe)), generator=torch.Generator().manual_seed(0))
    levels, x = begin(pipe, noise)
    finals = [list(euler(denoiser_from(pipe, row), x[k : k + 1], levels))[-1].x for k, row in enumerate(rows)]
    found = (decode(pipe, torch.cat(finals).float()) / 2 + 0.5).clamp(0, 1)
    assert relative_error(found - found.mean(), expected - expected.mean()) < 2e-4


def test_a_class_conditional_unet() -> None:
    network = unet(torch.float32, classes=10)
    pipe = quiet(DDPMPipeline(network, DDPMScheduler()))
    x, sigma = torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor(2.0)
    expected = denoiser_from(network, DDPMScheduler())(x, sigma, torch.tensor([4, 4, 4]))
    assert torch.equal(denoiser_from(pipe, 4)(x, sigma), expected)
    assert torch.equal(decode(pipe, x), x)
    for wrong in (None, 10, -1, "four", True):
        with pytest.raises(ValueError, match=r"accepted are labels 0 .. 9 .there is no label for none."):
            denoiser_from(pipe, wrong)


def test_sizes() -> None:
    pipe = CASES["sdxl"][0]()
    assert latent_shape(pipe) == (4, 8, 8)
    assert latent_shape(pipe, 16, 24) == (4, 16, 24)
    ids = prompted(pipe, WORDS[0], height=16, width=24).cond["added_cond_kwargs"]["time_ids"]
    assert ids.tolist() == [[16, 24, 0, 0, 16, 24]]
    assert latent_shape(CASES["dit"][0]()) == (4, 8, 8)
    assert latent_shape(ddpm(), 8, 8) == (3, 8, 8)
    with pytest.raises(ValueError, match="16, None; DDPMPipeline makes pictures of 8 x 8 only"):
        latent_shape(ddpm(), 16)
    with pytest.raises(ValueError, match="height, width: 9, 8; accepted are multiples of 2"):
        latent_shape(stable_diffusion_3(), 9)


def test_decoding_in_half_precision_and_with_moments() -> None:
    pipe = CASES["sdxl"][0]()
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    plain = decode(pipe, x)
    pipe.vae.to(torch.float16)  # force_upcast is the VAE's default
    assert relative_error(decode(pipe, x), plain) < 5e-3
    assert pipe.vae.dtype == torch.float16
    pipe.vae.to(torch.float32)
    pipe.vae.register_to_config(latents_mean=[1.0, 0.0, 0.0, 0.0], latents_std=[2.0, 1.0, 1.0, 1.0])
    moved = x * torch.tensor([2.0, 1, 1, 1])[:, None, None] + 0.5 * torch.tensor([1.0, 0, 0, 0])[:, None, None]
    pictures = decode(pipe, x)
    pipe.vae.register_to_config(latents_mean=None, latents_std=None)
    assert relative_error(decode(pipe, moved), pictures) < 2e-3  # the weights were rounded to half precision together


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="ConsistencyModelPipeline is not supported; supported are DDIMPipeline"):
        denoiser_from(ConsistencyModelPipeline(unet(torch.float32), CMStochasticIterativeScheduler()))
    with pytest.raises(ValueError, match="FluxPipeline has no text_encoder; give prompt_embeds and pooled_prompt_emb"):
        denoiser_from(flux(), "a red fox")
    with pytest.raises(ValueError, match="this DDIMPipeline has no condition; accepted is None"):
        denoiser_from(ddim(), "a red fox")
    with pytest.raises(ValueError, match="StableDiffusionPipeline has prompts in words"):
        denoiser_from(stable_diffusion(), 7)
    with pytest.raises(ValueError, match=r"'white shark'; this DiTPipeline has classes; accepted are labels 0 .. 1000"):
        denoiser_from(dit(), "white shark")
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has no text_encoder; give prompt_embeds and pool"):
        denoiser_from(stable_diffusion_xl(), "a red fox")
    with pytest.raises(ValueError, match=r"prompt_embeds.: \[2, 3, 16\].*each of one row"):
        denoiser_from(stable_diffusion_xl(), embeddings("prompt_embeds", pooled=("pooled_prompt_embeds",)))
    with pytest.raises(ValueError, match="prompt: is given twice"):
        denoiser_from(stable_diffusion(), "a", prompt="a")
    with pytest.raises(ValueError, match="scheduler: a network needs one"):
        denoiser_from(unet(), None)
    pipe = stable_diffusion()
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        denoiser_from(pipe, "a red fox")
