"""Students' steps against the stock pipelines' own calls: the same network, the same noise, every family."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from einops import rearrange
from torch import Tensor

from distill.stock import Steps, student_steps
from samplers import NetworkDenoiser
from samplers.adapters import coordinates_of
from samplers.prompts import condition
from tests.distill.tiny import unet
from tests.samplers import tiny_pipelines

TOLERANCE = 1e-4  # of the largest value


def pixels(scheduler: Any, n_classes: int | None = None) -> Any:
    return tiny_pipelines.quiet(ConsistencyModelPipeline(unet(n_classes), scheduler))


def zero_terminal() -> Any:
    return DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False)


def odd_euler() -> Any:
    return EulerDiscreteScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", beta_schedule="scaled_linear"
    )


def with_guidance_embedding() -> Any:
    return tiny_pipelines.flux(guidance=True)


PIXELS: dict[str, Callable[[], Any]] = {
    "consistency": lambda: CMStochasticIterativeScheduler(sigma_data=0.7, sigma_min=0.01, sigma_max=30.0, s_noise=0.9),
    "edm": lambda: EDMEulerScheduler(sigma_data=0.7),
    "edm-v": lambda: EDMDPMSolverMultistepScheduler(sigma_data=1.0, prediction_type="v_prediction"),
    "ddpm": lambda: DDPMScheduler(),
    "ddpm-v": lambda: DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "ddpm-sample": lambda: DDPMScheduler(prediction_type="sample", beta_schedule="sigmoid"),
    "zero-terminal": zero_terminal,
    "euler-linear-zero-terminal": lambda: EulerDiscreteScheduler(rescale_betas_zero_snr=True),
    "euler-zero-terminal": odd_euler,
}
LATENTS: dict[str, Callable[[], Any]] = {
    name: make for name, make in tiny_pipelines.MAKERS.items() if name not in ("DDPMPipeline", "DDIMPipeline")
} | {"flux-guidance": with_guidance_embedding}


GLOBAL = ("DiTPipeline", "FluxPipeline", "StableDiffusion3Pipeline")  # do not give the generator to their scheduler


def unpacked(tokens: Tensor) -> Tensor:
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=4, p=2, q=2)


def network_of(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def steps_of(pipe: Any, sigma_init: float | None, steps: int) -> Steps:
    coordinates, name = coordinates_of(pipe.scheduler), type(pipe).__name__
    return student_steps(pipe.scheduler, coordinates, name, sigma_init, steps, network_of(pipe).config)


@torch.no_grad()
def ours(denoiser: Any, steps: Steps, z: Tensor, noises: list[Tensor], cond: Any) -> Tensor:
    x = steps.start * z
    for k, sigma in enumerate(steps.sigmas):
        x = denoiser(x, torch.tensor(sigma, dtype=torch.float64), cond)
        if k + 1 < len(steps):
            x = x + steps.noises[k] * noises[k]
    return x


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(("name", "sigma_init", "n"), [
    *((name, None, 1) for name in PIXELS),
    *((name, 5.0, 1) for name in PIXELS),
    *((name, None, 3) for name in PIXELS if not name.startswith("edm")),
    *((name, 5.0, 4) for name in PIXELS if not name.startswith("edm")),
])  # fmt: skip
def test_pixels(name: str, sigma_init: float | None, n: int) -> None:
    n_classes = None if sigma_init is None else 10
    pipe = pixels(PIXELS[name](), n_classes)
    steps, denoiser = steps_of(pipe, sigma_init, n), NetworkDenoiser(pipe.unet, coordinates_of(pipe.scheduler))
    labels = None if n_classes is None else torch.tensor([3, 8])
    generator = torch.Generator().manual_seed(1)
    z, *noises = (torch.randn((2, 1, 8, 8), generator=generator) for _ in range(n))
    expected = ours(denoiser, steps, z, noises, labels)

    kept: list[Tensor] = []
    stock = tiny_pipelines.quiet(ConsistencyModelPipeline(pipe.unet, steps.scheduler))
    stock(
        2,
        labels,
        generator=torch.Generator().manual_seed(1),
        callback=lambda *state: kept.append(state[2]),
        **steps.call,
    )
    assert len(kept) == n
    assert_equal(kept[-1], expected)
    if sigma_init is not None:
        assert steps.sigmas[0] == pytest.approx(sigma_init, rel=0.02)  # the nearest of a thousand timesteps


@pytest.mark.parametrize(("sigma_init", "n"), [(None, 1), (5.0, 3), pytest.param(None, 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LATENTS)
def test_latents(name: str, sigma_init: float | None, n: int) -> None:
    pipe = LATENTS[name]()
    steps, network = steps_of(pipe, sigma_init, n), network_of(pipe)
    denoiser = NetworkDenoiser(network, coordinates_of(pipe.scheduler))
    arguments = {
        key: value
        for key, value in tiny_pipelines.ARGUMENTS[type(pipe).__name__].items()
        if not (key.startswith("negative") and isinstance(value, Tensor))
    }
    is_dit, is_flux = type(pipe).__name__ == "DiTPipeline", type(pipe).__name__ == "FluxPipeline"
    if is_dit:
        cond: Any = torch.tensor(arguments["class_labels"])
    else:
        if "prompt" in arguments:
            embedded = {"prompt_embeds": pipe.encode_prompt(arguments["prompt"], "cpu", 1, False)[0]}
        else:
            embedded = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        cond = condition(pipe, embedded)

    first = torch.Generator().manual_seed(1)
    z = torch.randn((2, 4, 8, 8), generator=first)
    later = torch.Generator().manual_seed(2) if type(pipe).__name__ in GLOBAL else first
    noises = [torch.randn((2, 4, 8, 8), generator=later) for _ in range(1, n)]
    if is_flux:  # whose loop draws noise of packed latents
        noises = [unpacked(noise.reshape(2, 16, 16)) for noise in noises]
    expected = ours(denoiser, steps, z, noises, cond)

    pipe.scheduler = steps.scheduler
    torch.manual_seed(2)
    drawn = {"generator": torch.Generator().manual_seed(1), "output_type": "pt" if is_dit else "latent"}
    final = pipe(**(arguments | steps.call | drawn)).images
    if is_dit:
        with torch.no_grad():
            expected = (pipe.vae.decode(expected / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        assert ((expected > 0) & (expected < 1)).float().mean() > 0.5
    assert_equal(unpacked(final) if is_flux else final, expected)


@pytest.mark.parametrize("name", PIXELS)
def test_scheduler_survives_its_file(name: str, tmp_path: Path) -> None:
    pipe = pixels(PIXELS[name]())
    for n in (1,) if name.startswith("edm") else (1, 3):
        steps = steps_of(pipe, 5.0, n)
        steps.scheduler.save_pretrained(tmp_path / str(n))
        read = type(steps.scheduler).from_pretrained(tmp_path / str(n))
        for each in (steps.scheduler, read):
            each.set_timesteps(n)
        assert torch.equal(read.timesteps, steps.scheduler.timesteps)
        for table in ("sigmas", "alphas_cumprod"):
            if hasattr(read, table):
                assert torch.equal(getattr(read, table), getattr(steps.scheduler, table))


def test_levels() -> None:
    """Closed forms: even timesteps of a discrete network, even shifted times of a flow, from where pipelines start."""
    discrete = steps_of(tiny_pipelines.dit(), None, 4)
    table = coordinates_of(tiny_pipelines.dit().scheduler)
    assert discrete.sigmas == tuple(table.sigma(torch.tensor([999.0, 749, 499, 249])).tolist())  # type: ignore[attr-defined]
    assert discrete.start == pytest.approx((1 + discrete.sigmas[0] ** 2) ** 0.5)

    assert discrete.scheduler.get_scalings_for_boundary_condition_discrete(1)[0] < 1e-6  # at the lowest that may be

    flow = steps_of(tiny_pipelines.stable_diffusion_3(), None, 4)  # shift 3: t = 1, 9/10, 3/4, 1/2
    assert flow.sigmas == pytest.approx((1e8, 9, 3, 1))
    assert flow.call["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    assert flow.noises == flow.sigmas[1:]

    # Flux's shift is e^1.15 for pictures of 1024 x 1024, its own size; at flow time 1/2 before it, sigma is the shift.
    assert steps_of(tiny_pipelines.flux(), None, 2).sigmas[1] == pytest.approx(math.exp(1.15))

    last = steps_of(pixels(zero_terminal()), None, 1)
    assert len(last.scheduler.alphas_cumprod) == 999  # without the one that is 0
    last.scheduler.set_timesteps(1)
    assert last.scheduler.timesteps.tolist() == [998]


def test_the_stock_scheduler_refuses_more_steps_than_the_student_has() -> None:
    pipe = tiny_pipelines.stable_diffusion()
    pipe.scheduler = steps_of(pipe, None, 4).scheduler
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipe(prompt="a red fox", num_inference_steps=50)


@pytest.mark.parametrize(
    ("scheduler", "sigma_init", "n", "words"),
    [
        (PIXELS["edm"], None, 2, "student.steps: 2; a EDMEulerScheduler does not add noise"),
        (PIXELS["ddpm"], 1e4, 1, r"student.sigma_init: 10000.0 is outside the teacher's range \[0.0100013, 157.4"),
        (PIXELS["ddpm"], 0.0101, 1, "timestep 0 of the teacher"),
        (PIXELS["ddpm"], None, 501, "student.steps: 501; student.sigma_init = 157.407 is timestep 999"),
        (PIXELS["consistency"], None, 41, "student.steps: 41; the scheduler has 40 levels"),
        (FlowMatchEulerDiscreteScheduler, None, 1, "scheduler: FlowMatchEulerDiscreteScheduler, of flow time"),
        (PIXELS["consistency"], None, 0, "student.steps: 0; accepted are numbers from 1"),
    ],
)
def test_refusals(scheduler: Callable[[], Any], sigma_init: float | None, n: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        steps_of(pixels(scheduler()), sigma_init, n)


def test_flow_time_has_no_pipeline_of_classes() -> None:
    pipe = tiny_pipelines.dit()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="a DiTPipeline does not sample by it"):
        steps_of(pipe, None, 1)


@pytest.mark.parametrize(
    ("size", "words"), [([8, 16], r"sample_size: \[8, 16\]; .* makes squares only"), (None, "sample_size: null")]
)
def test_pixels_need_the_side_of_a_square(size: Any, words: str) -> None:
    pipe = pixels(PIXELS["ddpm"]())
    pipe.unet.register_to_config(sample_size=size)
    with pytest.raises(ValueError, match=words):
        steps_of(pipe, None, 1)
    pipe.unet.register_to_config(sample_size=[8, 8])
    assert len(steps_of(pipe, None, 1)) == 1


def test_continuous_euler_is_refused() -> None:
    scheduler = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="no stock scheduler takes the steps"):
        steps_of(pixels(scheduler), None, 1)
