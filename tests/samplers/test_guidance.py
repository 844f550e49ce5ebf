"""Corrected guidance in tiny stock pipelines of random weights: what is changed, undone, refused, and kept apart."""

import copy
import inspect
import re
import subprocess
import sys
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from samplers.guidance import feynman_kac_guidance
from samplers.noise import SampleNoise
from samplers.particles import Resampling
from samplers.pipelines import teleport
from samplers.resampling import multinomial
from tests.samplers.tiny_pipelines import ARGUMENTS, MAKERS, Calls, fitting, flux, left, pictures, stable_diffusion

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what diffusers does with numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:guidance acts"),
]
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "StableDiffusionPipeline": ("EulerAncestralDiscrete", {}),
    "StableDiffusionXLPipeline": ("DDPM", {"clip_sample": False}),
    "StableDiffusion3Pipeline": ("DPMSolverMultistep", SDE | FLOW),
    "DiTPipeline": ("DDPM", {"clip_sample": False}),
    "PixArtAlphaPipeline": ("EulerAncestralDiscrete", {}),
    "PixArtSigmaPipeline": ("DPMSolverMultistep", SDE),
}
STRONG = 100.0  # the tiny networks' predictions hardly depend on their conditions
everyone = pytest.mark.parametrize("name", list(CASES))


def make(name: str) -> Any:
    pipe = MAKERS[name]()
    scheduler, settings = CASES[name]
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler")(**settings)
    return pipe


def grouped(name: str, particles: int, groups: int = 2) -> dict[str, Any]:
    """The arguments for groups of particles: the first prompts of `ARGUMENTS`."""
    arguments = {key: v[:groups] if hasattr(v, "__len__") else v for key, v in ARGUMENTS[name].items()}
    if name == "DiTPipeline":
        return {"class_labels": [label for label in arguments["class_labels"] for _ in range(particles)]}
    if name == "StableDiffusionPipeline":
        return arguments | {"num_images_per_prompt": particles}
    if name == "StableDiffusion3Pipeline":  # repeats words, not embeddings
        return {key: v.repeat_interleave(particles, 0) for key, v in arguments.items()}
    return arguments | {"num_images_per_prompt": particles}


def made(pipe: Any, particles: int, *, steps: int = 8, seed: int = 0, groups: int = 2, **more: Any) -> Tensor:
    """Pictures [groups particles, 3, 8, 8]."""
    arguments = grouped(type(pipe).__name__, particles, groups) | {"num_inference_steps": steps} | more
    torch.manual_seed(seed)
    result = pipe(generator=torch.Generator().manual_seed(seed), output_type="pt", **arguments).images
    return result if isinstance(result, Tensor) else torch.as_tensor(result).permute(0, 3, 1, 2)


# What is changed, and what is not


@everyone
def test_one_particle_is_the_stock_pipeline_bit_for_bit(name) -> None:
    pipe = make(name)
    fresh = left(pipe)
    stock, state = made(pipe, 1), torch.get_rng_state()
    used = left(pipe)
    with feynman_kac_guidance(pipe, 1) as guidance:
        assert torch.equal(made(pipe, 1), stock)
        assert torch.equal(torch.get_rng_state(), state)
    assert left(pipe) == used
    assert left(pipe)[0] == fresh[0]
    assert guidance.scale is not None
    assert guidance.scale > 1


@everyone
def test_particles_are_resampled_and_everything_is_undone(name) -> None:
    pipe = make(name)
    fresh = left(pipe)
    guidance = feynman_kac_guidance(pipe, 4, resampling=Resampling(threshold=1.0))
    assert left(pipe) == fresh
    with guidance:
        first = made(pipe, 4, guidance_scale=STRONG)
    assert left(pipe) == fresh
    stock, state = made(pipe, 4, guidance_scale=STRONG), torch.get_rng_state()
    with Calls(pipe) as calls, guidance:
        again = made(pipe, 4, guidance_scale=STRONG)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again, first)
    assert not torch.equal(again, stock)
    assert torch.equal(made(pipe, 4, guidance_scale=STRONG), stock)
    assert len(calls) == 8

    particles = guidance.particles
    assert particles is not None
    assert particles.roots.shape == (2, 4)
    assert float(particles.weights.ess.min()) == pytest.approx(4)
    assert any(bool(s.particles.resampled.any()) for s in guidance.states)
    assert all(len(images.flatten(1).unique(dim=0)) == 4 for images in first.chunk(2))  # clones have separated
    assert re.fullmatch(
        r"guidance [\d.]+ corrected, 2 x 4 particles: resampled [\d.]+ times in 8 steps, ESS at least [\d.]+, "
        r"\d of 4 ancestors left, equal weights",
        str(guidance),
    )


@everyone
def test_the_scale_is_the_one_that_was_asked_for(name) -> None:
    pipe = make(name)
    for scale in (1.3, 7.5, 40.0, 10 / 3):
        with feynman_kac_guidance(pipe, 2) as guidance:
            made(pipe, 2, steps=3, guidance_scale=scale)
        assert guidance.scale == scale or (scale == 10 / 3 and guidance.scale == pytest.approx(scale, rel=1e-6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_networks_in_half_precision(dtype) -> None:
    for name in ("StableDiffusionPipeline", "DiTPipeline"):
        pipe = make(name).to(dtype)
        with feynman_kac_guidance(pipe, 2) as guidance:
            made(pipe, 2, steps=3)
        assert guidance.scale == (7.5 if name == "StableDiffusionPipeline" else 4.0)


def test_the_latents_are_permuted_as_the_ancestors_say() -> None:
    """What is stepped are the samples of the ancestors, with their predictions: those of copies are equal."""
    pipe = make("StableDiffusionPipeline")
    stock = type(pipe.scheduler).step
    steps: list[tuple[Tensor, Tensor, Tensor]] = []

    class Watched(type(pipe.scheduler)):  # type: ignore[misc]
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, **more: Any) -> Any:
            result = stock(self, model_output, timestep, sample, generator, **more)
            steps.append((model_output, sample, result[0]))
            return result

    Watched.__name__ = "EulerAncestralDiscreteScheduler"
    pipe.scheduler = Watched.from_config(pipe.scheduler.config)
    settings = Resampling(multinomial, threshold=1.0)
    with feynman_kac_guidance(pipe, 4, resampling=settings) as guidance:
        made(pipe, 4, guidance_scale=STRONG)
    first = torch.arange(2)[:, None] * 4
    moved = 0
    for k in range(1, 8):
        rows = (first + guidance.states[k + 1].particles.ancestors).flatten()
        output, sample, _ = steps[k]
        assert torch.equal(sample, steps[k - 1][2][rows])
        for copies in rows.unique():
            same = output[rows == copies]
            assert torch.equal(same, same[:1].expand_as(same))
        moved += int((rows != torch.arange(8)).sum())
    assert moved > 0


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DiTPipeline"])
def test_groups_never_mix(name) -> None:
    """The first prompt's weights do not depend on what the second is; with a stream a sample, it is the run alone."""
    pipe = make(name)
    settings = Resampling(threshold=1.0)
    generators = [torch.Generator().manual_seed(k) for k in range(6)]

    def once(groups: int) -> tuple[Tensor, Any]:
        for k, generator in enumerate(generators):
            generator.manual_seed(k)
        noise = SampleNoise(0, range(3 * groups))
        with feynman_kac_guidance(pipe, 3, resampling=settings, generator=noise) as guidance:
            more = {} if name == "DiTPipeline" else {"generator": generators[: 3 * groups]}
            arguments = grouped(name, 3, groups) | {"num_inference_steps": 6, "output_type": "pt"} | more
            torch.manual_seed(0)
            images = pipe(**arguments).images
        return torch.as_tensor(images), guidance.particles

    both, alone = once(2), once(1)
    roots = both[1].roots
    assert bool(((roots >= 0) & (roots < 3)).all())
    if name == "StableDiffusionPipeline":  # DiT's scheduler draws for the whole batch
        torch.testing.assert_close(both[0][:3], alone[0])
        torch.testing.assert_close(both[1].log_evidence[:1], alone[1].log_evidence)
        assert torch.equal(both[1].roots[:1], alone[1].roots)


def test_weights_are_left_where_they_are_asked_for() -> None:
    pipe = make("StableDiffusionPipeline")
    with feynman_kac_guidance(pipe, 4, resampling=Resampling(threshold=0.0), equal_weights=False) as guidance:
        weighted = made(pipe, 4)
    assert torch.equal(weighted, made(pipe, 4))  # nothing was resampled: the stock run
    assert guidance.particles is not None
    assert float(guidance.particles.weights.ess.max()) < 4 - 1e-6
    assert "images are weighted" in str(guidance)
    with feynman_kac_guidance(pipe, 4, resampling=Resampling(threshold=0.0)) as guidance:
        made(pipe, 4)
    assert guidance.particles is not None
    assert float(guidance.particles.weights.ess.min()) == pytest.approx(4, abs=1e-9)
    assert [bool(s.particles.resampled.all()) for s in guidance.states] == [False] * 7 + [True, False]  # the last noise


def test_what_was_clamped_is_told() -> None:
    """Without options: a weight of one image is cut, and the line says how much."""
    pipe = make("StableDiffusionPipeline")
    with feynman_kac_guidance(pipe, 4) as guidance:
        made(pipe, 4, guidance_scale=400.0)
    assert re.search(r"at most \d+% of the weight clamped, equal weights$", str(guidance))
    assert max(float(s.particles.clipped.max()) for s in guidance.states) > 0.1
    first = guidance.states[0].particles.weights.values
    assert float((first - first.mean(1, keepdim=True)).abs().max()) < 2.0  # nats, of 1 about the increments' mean


def test_inactive_levels_are_the_stock_run() -> None:
    pipe = make("StableDiffusionPipeline")
    with feynman_kac_guidance(pipe, 4, resampling=Resampling(active=(1e6, 1e7))) as guidance:
        assert torch.equal(made(pipe, 4), made(pipe, 4))
    assert guidance.particles is not None
    assert bool((guidance.particles.weights.values == 0).all())


@pytest.mark.parametrize("first", ["offload", "attach"])
def test_offloading_stays_in_place(first) -> None:
    pipe = make("StableDiffusionPipeline")
    guidance = feynman_kac_guidance(pipe, 4, resampling=Resampling(threshold=1.0))
    with guidance:
        expected = made(pipe, 4)
    stock, state = made(pipe, 4), left(pipe)
    if first == "attach":
        guidance.attach()
    pipe.enable_model_cpu_offload(device="cpu")
    if first == "offload":
        guidance.attach()
    for _ in range(2):
        assert torch.equal(made(pipe, 4), expected)
    guidance.detach()
    guidance.detach()
    assert torch.equal(made(pipe, 4), stock)
    pipe.remove_all_hooks()
    vars(pipe.unet).pop("forward")
    assert left(pipe)[:-1] == state[:-1]


def test_an_exception_undoes_too_and_the_next_run_is_right() -> None:
    pipe = make("StableDiffusionPipeline")
    guidance = feynman_kac_guidance(pipe, 4)
    with guidance:
        expected = made(pipe, 4)
    state = left(pipe)

    def fail(*_: Any) -> dict[str, Any]:
        raise KeyError("from the callback")

    guidance.attach()
    with pytest.raises(KeyError, match="callback"):
        made(pipe, 4, callback_on_step_end=fail)
    assert torch.equal(made(pipe, 4), expected)
    guidance.detach()
    assert left(pipe) == state


def test_saved_files_signatures_and_copies_are_the_stock_ones(tmp_path) -> None:
    pipe = make("StableDiffusionPipeline")
    made(pipe, 2)  # a tokenizer saves how it was used last
    names = ("set_timesteps", "step")
    stock = [inspect.signature(getattr(pipe.scheduler, name)) for name in names]
    pipe.save_pretrained(tmp_path / "before")
    with feynman_kac_guidance(pipe, 2) as guidance:
        assert [inspect.signature(getattr(pipe.scheduler, name)) for name in names] == stock
        made(pipe, 2)
        pipe.save_pretrained(tmp_path / "during")
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(5)
        assert len(guidance.states) == 9  # nothing began anew
    contents = [
        {str(p.relative_to(tmp_path / when)): p.read_bytes() for p in (tmp_path / when).rglob("*") if p.is_file()}
        for when in ("before", "during")
    ]
    assert contents[0] == contents[1]


def test_importing_it_does_not_load_diffusers() -> None:
    program = "import sys, samplers.guidance; print('diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# Refusals: before anything is changed


def refused(pipe: Any, message: str, **more: Any) -> None:
    before = left(pipe)
    with pytest.raises(ValueError, match=message):
        feynman_kac_guidance(pipe, 4, **more)
    assert left(pipe) == before


def test_pipelines_that_do_not_guide_by_two_predictions() -> None:
    refused(MAKERS["DDPMPipeline"](), "DDPMPipeline has no guidance; supported are DiTPipeline")
    refused(flux(guidance=True), "FluxPipeline feeds the guidance scale to its network")
    pipe = stable_diffusion()
    parts = {key: value for key, value in pipe.components.items() if key != "image_encoder"}
    other = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline is not supported; supported are DiT"):
        feynman_kac_guidance(other, 4)
    pipe = make("StableDiffusionPipeline")
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    refused(pipe, "time_cond_proj_dim: .*distilled guidance")


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        ("DDIM", {}, "clip_sample: True in DDIMScheduler"),
        ("DDPM", {"clip_sample": False, "thresholding": True}, "thresholding: True in DDPMScheduler"),
        ("DDPM", {"clip_sample": False, "variance_type": "fixed_large"}, "variance_type: 'fixed_large'"),
        ("DDPM", {"clip_sample": False, "variance_type": "learned_range"}, "variance_type: 'learned_range'"),
        ("DEISMultistep", {}, "DEISMultistepScheduler remembers steps"),
        ("DPMSolverMultistep", {}, r"algorithm_type: 'dpmsolver\+\+'"),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, "solver_order: 2 .*accepted is 1"),
        ("DPMSolverSinglestep", {}, "DPMSolverSinglestepScheduler remembers steps"),
        ("EDMEuler", {}, "EDMEulerScheduler is deterministic, or .s_churn."),
        ("EulerDiscrete", {}, "EulerDiscreteScheduler is deterministic, or .s_churn. adds noise after"),
        ("HeunDiscrete", {}, "HeunDiscreteScheduler has steps of second order"),
        ("KDPM2AncestralDiscrete", {}, "KDPM2AncestralDiscreteScheduler has steps of second order"),
        ("LCM", {}, "LCMScheduler draws fresh noise"),
        ("LMSDiscrete", {}, "LMSDiscreteScheduler remembers steps"),
        ("PNDM", {}, "PNDMScheduler remembers steps"),
        ("SASolver", {}, "SASolverScheduler remembers steps"),
        ("TCD", {}, "TCDScheduler draws fresh noise"),
        ("UniPCMultistep", {}, "UniPCMultistepScheduler remembers steps"),
        ("IPNDM", {}, "IPNDMScheduler is not supported"),
        ("FlowMatchEulerDiscrete", {}, "FlowMatchEulerDiscreteScheduler is deterministic"),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, "stochastic_sampling draws fresh noise"),
        ("DPMSolverMultistep", SDE | {"use_flow_sigmas": True}, "use_flow_sigmas, but prediction_type 'epsilon'"),
    ],
)
def test_schedulers_that_cannot_be_right_are_refused_by_name(scheduler, settings, message) -> None:
    pipe = stable_diffusion()
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler")(**settings)
    refused(pipe, message)


def test_schedulers_that_do_not_go_with_the_pipeline() -> None:
    pipe = make("StableDiffusion3Pipeline")
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    refused(pipe, "DDPMScheduler has states on the path 'vp'")
    pipe = make("DiTPipeline")
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    refused(pipe, "DiTPipeline calls DDIM without eta")


def test_settings_that_cannot_be() -> None:
    pipe = make("StableDiffusionPipeline")
    for particles in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="particles: "):
            feynman_kac_guidance(pipe, particles)  # type: ignore[arg-type]
    refused(pipe, "rule: 'right'; accepted are left, trapezoid", rule="right")


def test_one_attachment_at_a_time() -> None:
    pipe = make("StableDiffusionPipeline")
    jump = teleport(pipe, fitting(pipe), 5.0)
    guidance = feynman_kac_guidance(pipe, 4)
    with guidance:
        for other in (jump, guidance):
            with pytest.raises(ValueError, match="already attached"):
                other.attach()
        refused(pipe, "already attached")
    with jump:
        with pytest.raises(ValueError, match="already attached"):
            guidance.attach()
        pictures(pipe)
    assert type(pipe.scheduler) is diffusers.EulerAncestralDiscreteScheduler


# Refusals that only a call can tell


def call_refused(pipe: Any, message: str, particles: int = 4, **more: Any) -> None:
    before = left(pipe)
    with pytest.raises(ValueError, match=message), feynman_kac_guidance(pipe, 4):
        made(pipe, particles, **more)
    assert left(pipe)[2:] == before[2:]
    assert left(pipe)[0] is before[0]


def test_calls_that_cannot_be_right() -> None:
    pipe = make("StableDiffusionPipeline")
    call_refused(pipe, r"guidance_rescale: 0.7", guidance_rescale=0.7)
    call_refused(pipe, "guidance_scale: 0.5; StableDiffusionPipeline guides only above 1", guidance_scale=0.5)
    call_refused(pipe, r"guidance_scale: -1", guidance_scale=-1.0)
    call_refused(pipe, "do not divide the batch of 6; call .* num_images_per_prompt=4", particles=3)
    call_refused(pipe, "conditions are not groups of 4 equal ones", particles=2)
    call_refused(make("StableDiffusionXLPipeline"), "denoising_end: 0.8 ends the run among noise", denoising_end=0.8)
    call_refused(
        make("StableDiffusion3Pipeline"),
        "skip_guidance_layers",
        skip_guidance_layers=[0],
        skip_layer_guidance_stop=1.0,
    )
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    call_refused(pipe, "eta: 0 in DDIMScheduler; without noise copies never separate", eta=0.0)


def test_labels_that_are_not_groups() -> None:
    call_refused(make("DiTPipeline"), "conditions are not groups", class_labels=[7, 300] * 4)
    call_refused(make("DiTPipeline"), "do not divide the batch of 6", class_labels=[7] * 6)


def test_a_scale_that_changes_on_the_way() -> None:
    pipe = make("StableDiffusionPipeline")

    def change(pipe: Any, i: int, t: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 3.0
        return {}

    call_refused(pipe, "guidance_scale: went from 7.5 to 3 at step 1", callback_on_step_end=change)


def test_another_combination_of_the_predictions() -> None:
    """What is done to the predictions outside of the network, between them and the scheduler."""
    pipe = make("DiTPipeline")
    with feynman_kac_guidance(pipe, 4) as guidance:
        hooked = pipe.transformer.register_forward_hook(
            lambda _, __, out: type(out)(sample=out.sample + torch.randn(out.sample.shape))
        )
        with pytest.raises(ValueError, match="what reached the scheduler is not uncond"):
            made(pipe, 4)
        hooked.remove()
        assert guidance.states == []
        made(pipe, 4)


def test_a_scheduler_that_is_replaced_while_attached() -> None:
    pipe = make("StableDiffusionPipeline")
    with feynman_kac_guidance(pipe, 4):
        pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
        with pytest.raises(ValueError, match="scheduler: was replaced"):
            made(pipe, 4)
