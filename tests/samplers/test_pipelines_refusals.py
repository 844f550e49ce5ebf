"""What cannot be teleported is refused by name and reason, and is left as it was."""

import re
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)

from samplers.gaussian import Bound, Gaussian
from samplers.pipelines import teleport, vae_facts
from samplers.teleport_checks import PIPELINES
from samplers.teleport_scheduler import SCHEDULERS
from tests.samplers.test_adapters import constructed
from tests.samplers.tiny_pipelines import (
    MAKERS,
    ddpm,
    dit,
    fitting,
    flux,
    gaussian,
    pictures,
    quiet,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what diffusers does with numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:guidance acts"),
]
SKIP = 5.0


def everything(pipe: Any) -> dict[str, Any]:
    """All that an attachment could change."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    return {
        "class": type(pipe.scheduler),
        "scheduler": dict(vars(pipe.scheduler)),
        "network": set(vars(model)),
        "forward": model.forward,
        "pipe": dict(vars(pipe)),
    }


def refused(pipe: Any, given: Gaussian, sigma_skip: Any, message: str, **more: Any) -> None:
    before = everything(pipe)
    with pytest.raises(ValueError, match=message):
        teleport(pipe, given, sigma_skip, **more)
    after = everything(pipe)
    assert all(before[key] == after[key] for key in ("class", "network", "forward"))
    assert all(before[key].keys() == after[key].keys() for key in ("scheduler", "pipe"))
    assert all(before[key][name] is after[key][name] for key in ("scheduler", "pipe") for name in before[key])


def rebuilt(cls: type, pipe: Any) -> Any:
    parts = {key: value for key, value in pipe.components.items() if key != "image_encoder"}
    return quiet(cls(**parts, requires_safety_checker=False))


@pytest.mark.parametrize("cls", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_pipelines_that_start_from_a_picture(cls) -> None:
    pipe = rebuilt(cls, stable_diffusion())
    refused(pipe, fitting(pipe), SKIP, f"{cls.__name__} starts from a picture")


def test_a_pipeline_of_another_kind_is_told_the_list() -> None:
    pipe = ConsistencyModelPipeline(ddpm().unet, diffusers.CMStochasticIterativeScheduler())
    refused(pipe, fitting(pipe), SKIP, "ConsistencyModelPipeline is not supported; supported are DDIMPipeline, DDPM")


def test_a_subclass_of_a_supported_pipeline_is_supported() -> None:
    class Mine(type(ddpm())):  # type: ignore[misc]
        pass

    pipe = quiet(Mine(ddpm().unet, DDIMScheduler()))
    with teleport(pipe, fitting(ddpm()), SKIP) as jump:
        pipe(num_inference_steps=12, output_type="pt")
    assert jump.run is not None
    assert jump.run.skipped == 4


@pytest.mark.parametrize(
    "name",
    sorted(n for n in dir(diffusers.schedulers) if n.endswith("Scheduler") and n not in SCHEDULERS),
)
def test_every_other_scheduler_that_diffusers_exports_is_refused_by_name(name) -> None:
    pipe = ddpm()
    pipe.scheduler = constructed(name)
    refused(pipe, fitting(pipe), SKIP, f"{name} is not supported; supported are DDIMParallelScheduler")


@pytest.mark.parametrize(
    ("make", "scheduler", "message"),
    [
        (ddpm, lambda: EulerDiscreteScheduler(), "EulerDiscreteScheduler has states on the path 've'.*DDPMPipeline"),
        (dit, lambda: HeunDiscreteScheduler(), "HeunDiscreteScheduler.*'ve'.*DiTPipeline"),
        (stable_diffusion_3, lambda: DPMSolverMultistepScheduler(), "Multistep.*'vp'.*StableDiffusion3Pipeline"),
        (flux, lambda: DDIMScheduler(), "DDIMScheduler.*'vp'.*FluxPipeline"),
        (stable_diffusion, lambda: IPNDMScheduler(), "IPNDMScheduler is not supported"),
        (stable_diffusion_3, lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (
            stable_diffusion_3,
            lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True),
            "DPMSolverMultistepScheduler has use_flow_sigmas, but prediction_type 'epsilon'",
        ),
    ],
)
def test_schedulers_that_do_not_go_with_the_pipeline(make, scheduler, message) -> None:
    pipe = make()
    pipe.scheduler = scheduler()
    refused(pipe, fitting(pipe), SKIP, message)


def odd(*shape: int, facts: dict[str, Any] | None = None, classes: int | None = None) -> Gaussian:
    dim = shape[0] * shape[1] * shape[2]
    mean = torch.zeros((classes, *shape) if classes else shape)
    return Gaussian(mean, torch.eye(1, dim), torch.ones(1), 0.5, n_classes=classes, facts=facts)


@pytest.mark.parametrize("name", list(MAKERS))
def test_another_shape_is_refused_with_both(name) -> None:
    pipe = MAKERS[name]()
    facts = fitting(pipe).facts
    of_prompts = PIPELINES[name].conditions == "prompts"  # whose size is the call's
    has = r"channels \[6\]; those of .* are \[4\]" if of_prompts else r"\[6, 8, 8\]; those of .* are \[[34], 8, 8\]"
    refused(pipe, odd(6, 8, 8, facts=facts), SKIP, has)
    if not of_prompts:
        refused(pipe, odd(3, 8, 16, facts=facts), SKIP, r"\[3, 8, 16\]; those of .* are \[[34], 8, 8\]")


def test_pixels_of_another_range_are_refused_by_what_was_fitted() -> None:
    pipe = ddpm()
    unit = torch.rand((400, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    for scaled, told in (
        (unit, r"numbers in \[.*e-0\d, (1|0.99\d*)\]"),
        (255 * unit - 100, r"numbers in \[-99.9\d*, 15"),
    ):
        refused(pipe, Gaussian.fit([scaled]), SKIP, told + r".*; DDPMPipeline's pixels are in \[-1, 1\]")
    teleport(pipe, Gaussian.fit([2 * unit - 1]), SKIP)


def test_a_file_s_name_is_no_gaussian() -> None:
    refused(ddpm(), "stats.safetensors", SKIP, "is a str; needed is a Gaussian")


def test_a_scheduler_that_is_replaced_while_the_pipeline_jumps_is_refused() -> None:
    pipe = stable_diffusion()
    jump = teleport(pipe, fitting(pipe), SKIP).attach()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="scheduler: was replaced while the pipeline jumps"):
        pictures(pipe)
    jump.detach()
    pictures(pipe)


def test_a_vae_whose_weights_are_offloaded_is_refused() -> None:
    from accelerate import cpu_offload

    pipe = stable_diffusion()
    own = fitting(pipe)
    cpu_offload(pipe.vae)
    refused(pipe, own, SKIP, "vae: the weights of this AutoencoderKL are offloaded")


def test_pixels_and_latents_do_not_mix() -> None:
    pixels, latents = ddpm(), stable_diffusion()
    refused(latents, gaussian(), SKIP, "fitted to pixels.*StableDiffusionPipeline samples latents")
    refused(pixels, gaussian(3, facts=fitting(latents).facts), SKIP, "fitted to latents.*DDPMPipeline samples pixels")
    refused(pixels, gaussian(3, facts={"range": [0, 1]}), SKIP, r"fitted to pixels in \[0, 1\].*\[-1, 1\]")
    for facts in ({"range": [-1.0, 1.0]}, {"range": None}, {}):
        teleport(pixels, gaussian(3, facts=facts), SKIP)


@pytest.mark.parametrize(
    ("name", "value"), [("latents_std", [1.0] * 4), ("scaling_factor", 0.18215), ("shift_factor", None)]
)
def test_latents_of_another_vae_are_refused_with_both(name, value) -> None:
    pipe = stable_diffusion()
    facts = {"vae": vae_facts(pipe.vae) | {name: value}}
    message = f"{name} {re.escape(str(value))}; that of .* has {vae_facts(pipe.vae)[name]}"
    refused(pipe, gaussian(facts=facts), SKIP, message)


def test_a_vae_with_other_weights_is_refused_with_both_hashes() -> None:
    pipe = stable_diffusion()
    facts = {"vae": vae_facts(pipe.vae) | {"sha256": {"float32": "0" * 64}}}
    own = vae_facts(pipe.vae)["sha256"]["float32"][:12]
    refused(pipe, gaussian(facts=facts), SKIP, rf"SHA-256 000000000000 \(float32\); that of .* has {own} \(float32\)")
    half = pipe.to(torch.float16)
    refused(half, gaussian(facts=facts), SKIP, r"0 \(float32\); that of .* has \w{12} \(float16\)")


def test_other_classes_are_refused_with_both() -> None:
    pipe = dit()
    facts = fitting(pipe).facts
    refused(pipe, odd(4, 8, 8, facts=facts, classes=10), SKIP, "10 classes; DiTPipeline has 1000 classes")
    for maker in (ddpm, stable_diffusion, flux):
        pipe = maker()
        shape = (3, 8, 8) if maker is ddpm else (4, 8, 8)
        given = odd(*shape, facts=fitting(pipe).facts, classes=10)
        refused(pipe, given, SKIP, "10 classes; .*Pipeline has no class labels")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "8.4", True])
def test_a_sigma_skip_that_is_no_noise_level(value) -> None:
    pipe = ddpm()
    refused(pipe, fitting(pipe), value, "sigma_skip: .*positive number")


def test_a_sigma_skip_that_is_not_given_needs_a_bound_within_the_tolerance() -> None:
    pipe = ddpm()
    refused(pipe, fitting(pipe, bound=None), None, "no bound; give a number, the certificate of choose_sigma_skip")
    refused(pipe, fitting(pipe, bound=Bound((20.0, 10.0), (0.1, 0.3))), None, "smallest bound is 0.1 nats")
    refused(pipe, fitting(pipe), None, "0.001 nats is met at no noise level", tolerance=0.001)
    refused(pipe, fitting(pipe), SKIP, "mode, tolerance: 'sde', 0.05", mode="sde")


def test_two_attachments_at_once() -> None:
    pipe = stable_diffusion()
    shared = rebuilt(type(pipe), pipe)
    waiting = teleport(pipe, fitting(pipe), SKIP)
    with teleport(pipe, fitting(pipe), SKIP) as jump:
        for other in (pipe, shared):
            refused(other, fitting(other), SKIP, "StableDiffusionPipeline is already attached")
        with pytest.raises(ValueError, match="already attached"):
            waiting.attach()
        with pytest.raises(ValueError, match="already attached"):
            jump.attach()
        pictures(pipe)
        assert jump.run is not None
        assert jump.run.skipped
    assert "_diffusers_hook" not in vars(pipe.unet)


def test_a_scheduler_that_was_changed_since_is_looked_at_again() -> None:
    pipe = ddpm()
    jump = teleport(pipe, fitting(pipe), SKIP)
    pipe.scheduler = EulerDiscreteScheduler()
    before = everything(pipe)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has states on the path 've'"):
        jump.attach()
    assert everything(pipe)["network"] == before["network"]
    assert everything(pipe)["class"] is before["class"]


# What only the call tells


def undone(pipe: Any, call: Callable[[], Any], message: str) -> None:
    """The call raises, and the pipeline is as good as new."""
    stock, before = pictures(pipe), everything(pipe)
    with teleport(pipe, fitting(pipe), SKIP), pytest.raises(ValueError, match=message):
        call()
    after = everything(pipe)
    assert all(before[key] == after[key] for key in ("class", "network", "forward"))
    assert torch.equal(pictures(pipe), stock)


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux])
def test_another_size_at_the_call_is_refused_with_both(make) -> None:
    pipe = make()
    message = r"the latents are \[4, 16, 16\]; the Gaussian is of \[4, 8, 8\]"
    undone(pipe, lambda: pictures(pipe, height=16, width=16), message)


def test_a_run_that_starts_in_the_middle() -> None:
    pipe = stable_diffusion()
    shared = rebuilt(StableDiffusionImg2ImgPipeline, pipe)  # with the same scheduler and network

    def call() -> None:
        shared("a fox", image=torch.zeros(1, 3, 8, 8), strength=0.6, num_inference_steps=12, output_type="pt")

    for scheduler in (pipe.scheduler, DPMSolverMultistepScheduler(), DDIMScheduler()):
        pipe.scheduler = shared.scheduler = scheduler
        undone(pipe, call, "begin_index: the run starts at timestep")


def test_a_loop_of_ones_own_that_begins_elsewhere() -> None:
    pipe = stable_diffusion_xl()
    with teleport(pipe, fitting(pipe), SKIP):
        pipe.scheduler.set_timesteps(12)
        pipe.scheduler.set_begin_index(2)
        x = torch.zeros(1, 4, 8, 8)
        with pytest.raises(ValueError, match="begin_index 2"):
            pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x)


def test_a_run_that_ends_above_the_landing() -> None:
    pipe = stable_diffusion_xl()
    undone(pipe, lambda: pictures(pipe, denoising_end=0.1), "denoising_end: 0.1 ends the run at timestep 900")
    with teleport(pipe, fitting(pipe), SKIP) as jump:
        pictures(pipe, denoising_end=0.8)
    assert jump.run is not None
    assert jump.run.nfe < jump.run.nfe_before < 12


def test_guidance_that_counts_steps() -> None:
    pipe = stable_diffusion_3()
    undone(pipe, lambda: pictures(pipe, skip_guidance_layers=[0]), "skip_guidance_layers")
