"""The adapter and the solvers against diffusers' own schedulers, stepped by their own code on tiny real networks."""

import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from samplers import ancestral, denoiser_from, dpmpp_2m, euler, heun, karras_sigmas, sample
from samplers.adapters import EDM, FlowMatching, VariancePreserving, coordinates_of
from tests.samplers.networks import conditional_unet, dit, unet
from tests.truth import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what diffusers does with numpy
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stock_states(scheduler: Any, network: Callable[..., Any], x: Tensor, **step: Any) -> list[Tensor]:
    """A pipeline's loop: the scheduler's own states, [x after every step]."""
    states = []
    for t in scheduler.timesteps:
        inner = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(inner, t, return_dict=False)[0], t, x, **step).prev_sample
        states.append(x)
    return states


def worst(ours: list[Tensor], stock: list[Tensor]) -> float:
    errors = [relative_error(a, b) for a, b in zip(ours, stock, strict=True)]
    return float(torch.tensor(errors).max())  # unlike max(), keeps a NaN


def levels(scheduler: Any, timesteps: Tensor) -> Tensor:
    """The noise levels of integer timesteps in float64, then 0."""
    a = scheduler.alphas_cumprod.double()[timesteps.long()]
    return torch.cat([((1 - a) / a).sqrt(), torch.zeros(1, dtype=torch.float64)])


def vp(sigmas: Tensor) -> list[Tensor]:
    return list((1 + sigmas**2).sqrt())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("tables", "bound"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_euler_is_ddim_and_ancestral_is_ddim_with_eta(prediction, tables, bound, eta) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    denoiser, sigmas = denoiser_from(unet(), scheduler), levels(scheduler, scheduler.timesteps)
    if tables == "float64":  # its step computes in the precision of its tables, float32 as it comes
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    x, scale = sigmas[0] * noise(), vp(sigmas)
    stock = stock_states(scheduler, denoiser.network, x / scale[0], eta=eta, generator=torch.Generator().manual_seed(7))
    expected = [x * s for x, s in zip(stock, scale[1:], strict=True)]
    ours = [s.x for s in ancestral(denoiser, x, sigmas, generator=torch.Generator().manual_seed(7), eta=eta)]
    assert worst(ours, expected) < bound
    if eta == 0:
        assert worst([s.x for s in euler(denoiser, x, sigmas)], expected) < bound


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_euler_is_euler_discrete(prediction, schedule) -> None:
    scheduler = EulerDiscreteScheduler(prediction_type=prediction, beta_schedule=schedule)
    scheduler.set_timesteps(10)  # 10 points from 0 to 999 are whole timesteps
    denoiser, sigmas = denoiser_from(unet(), scheduler), levels(scheduler, scheduler.timesteps)
    sigmas, x = sigmas[1:], sigmas[1] * noise()  # squaredcos begins at sigma = 20,000: see the test below
    scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[1:], scheduler.sigmas[1:]
    ours = [s.x for s in euler(denoiser, x, sigmas)]
    assert worst(ours, stock_states(scheduler, denoiser.network, x)) < 1e-6  # its step casts the state to float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_between_timesteps_euler_is_euler_discrete_on_a_grid_of_sigmas(prediction) -> None:
    scheduler = EulerDiscreteScheduler(prediction_type=prediction)
    sigmas = karras_sigmas(12, 0.03, 80.0)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    denoiser, x = denoiser_from(unet(), scheduler), 80 * noise()
    fractional = denoiser.coordinates(sigmas[:-1]).timestep
    assert float((fractional - scheduler.timesteps).abs().max()) < 2e-4  # float32: 1e-7 in log sigma, .005 a timestep
    assert float((fractional - fractional.round()).abs().max()) > 0.2
    assert worst([s.x for s in euler(denoiser, x, sigmas)], stock_states(scheduler, denoiser.network, x)) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ancestral_is_euler_ancestral(prediction) -> None:
    scheduler = EulerAncestralDiscreteScheduler(prediction_type=prediction)
    scheduler.set_timesteps(10)
    denoiser, sigmas = denoiser_from(unet(), scheduler), levels(scheduler, scheduler.timesteps)
    x = sigmas[0] * noise()
    stock = stock_states(scheduler, denoiser.network, x, generator=torch.Generator().manual_seed(7))
    ours = [s.x for s in ancestral(denoiser, x, sigmas, generator=torch.Generator().manual_seed(7))]
    assert worst(ours, stock) < 1e-6  # its step casts the state to float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("tables", "bound"), [("float32", 2e-6), ("float64", 1e-12)])
def test_heun_is_heun_discrete(prediction, tables, bound) -> None:
    scheduler = HeunDiscreteScheduler(prediction_type=prediction)
    scheduler.set_timesteps(10)
    timesteps = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1::2]])
    denoiser, sigmas = denoiser_from(unet(), scheduler), levels(scheduler, timesteps)
    if tables == "float64":
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    x = sigmas[0] * noise()
    stock = stock_states(scheduler, denoiser.network, x)
    ours = [s.x for s in heun(denoiser, x, sigmas)]
    assert worst(ours, stock[1::2] + stock[-1:]) < bound


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_dpmpp_2m_is_dpm_solver_multistep(prediction, spacing) -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type=prediction, timestep_spacing=spacing)
    scheduler.set_timesteps(9)
    denoiser, sigmas = denoiser_from(unet(), scheduler), levels(scheduler, scheduler.timesteps)
    x, scale = sigmas[0] * noise(), vp(sigmas)
    stock = stock_states(scheduler, denoiser.network, x / scale[0])
    expected = [x * s for x, s in zip(stock, scale[1:], strict=True)]
    ours = [s.x for s in dpmpp_2m(denoiser, x, sigmas)]
    assert worst(ours, expected) < 1e-6  # its step casts the state to float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("cls", "solver"), [(EDMEulerScheduler, euler), (EDMDPMSolverMultistepScheduler, dpmpp_2m)], ids=["euler", "dpmpp"]
)
def test_edm_schedulers(cls, solver, prediction) -> None:
    scheduler = cls(prediction_type=prediction, sigma_data=0.6, sigma_max=40.0)
    scheduler.set_timesteps(18)
    denoiser = denoiser_from(unet(), scheduler)
    x, sigmas = 40 * noise(), karras_sigmas(18, 0.002, 40.0)
    assert (denoiser.sigma_min, denoiser.sigma_max, denoiser.sigma_data) == (0.002, 40.0, 0.6)
    ours = [s.x for s in solver(denoiser, x, sigmas)]
    assert worst(ours, stock_states(scheduler, denoiser.network, x)) < 1e-5  # float32 states, sigmas and c_noise


def test_euler_discrete_with_continuous_timesteps_is_edm() -> None:
    """Stable Video Diffusion's scheduler feeds ln(sigma) / 4; read as timesteps it would be quietly wrong."""
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
    )
    scheduler.set_timesteps(12)
    denoiser, x = denoiser_from(unet(), scheduler), 700 * noise()
    assert (denoiser.sigma_min, denoiser.sigma_max) == (0.002, 700.0)
    ours = [s.x for s in euler(denoiser, x, karras_sigmas(12, 0.002, 700.0))]
    assert worst(ours, stock_states(scheduler, denoiser.network, x)) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_flow_match_euler(shift) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[0.98, 0.9, 0.7, 0.5, 0.3, 0.1])
    t = scheduler.sigmas.double()
    sigmas, scale = t / (1 - t), list(1 / (1 - t))
    denoiser, x = denoiser_from(unet(), scheduler), sigmas[0] * noise()
    stock = stock_states(scheduler, denoiser.network, x / scale[0])
    expected = [x * s for x, s in zip(stock, scale[1:], strict=True)]
    assert worst([s.x for s in euler(denoiser, x, sigmas)], expected) < 1e-5  # float32 at 1 - t = 0.007


def test_dpmpp_2m_is_dpm_solver_multistep_on_a_flow_network() -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(9)
    scheduler.sigmas[0] = 0.99  # 0.999 in float32 lies above sigma = 999
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000  # it truncates them to whole numbers, and sigmas it does not
    t = scheduler.sigmas.double()
    sigmas, scale = t / (1 - t), list(1 / (1 - t))
    denoiser = denoiser_from(unet(), scheduler)
    x = sigmas[0] * noise()
    stock = stock_states(scheduler, denoiser.network, x / scale[0])
    expected = [x * s for x, s in zip(stock, scale[1:], strict=True)]
    assert worst([s.x for s in dpmpp_2m(denoiser, x, sigmas)], expected) < 1e-5  # float32 at 1 - t = 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_conditional_unet(dtype) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    denoiser, sigmas = denoiser_from(unet(dtype, classes=10), scheduler), levels(scheduler, scheduler.timesteps)
    x, labels, scale = (sigmas[0] * noise()).to(dtype), torch.tensor([3, 8]), vp(sigmas)
    states = stock_states(scheduler, lambda z, t, **kw: denoiser.network(z, t, labels, **kw), x / scale[0].to(dtype))
    ours = sample(euler, denoiser, x, sigmas, labels)
    assert relative_error(ours, states[-1]) < (2e-5 if dtype == torch.float32 else 1e-6)
    assert relative_error(sample(euler, denoiser, x, sigmas, {"class_labels": labels}), ours) == 0
    assert relative_error(sample(euler, denoiser, x, sigmas, labels.flip(0)), ours) > 1e-3


def test_a_dit_with_learned_variance_is_read_from_its_first_half() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    denoiser, sigmas = denoiser_from(dit(), scheduler), levels(scheduler, scheduler.timesteps)
    x, labels, scale = sigmas[0] * noise(2, 4, 8, 8), torch.tensor([3, 8]), vp(sigmas)

    def mean(z: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
        output = denoiser.network(z, timestep=t.expand(2), class_labels=labels, return_dict=return_dict)[0]
        assert output.shape == (2, 8, 8, 8)
        return (output[:, :4],)

    states = stock_states(scheduler, mean, x / scale[0])
    assert relative_error(sample(euler, denoiser, x, sigmas, labels), states[-1]) < 1e-6


def test_a_conditional_unet_takes_its_prompt_in_a_dict() -> None:
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    scheduler.set_timesteps(5)
    denoiser, sigmas = denoiser_from(conditional_unet(), scheduler), levels(scheduler, scheduler.timesteps)
    x, prompt, scale = sigmas[0] * noise(2, 4, 8, 8), noise(2, 6, 16), vp(sigmas)
    states = stock_states(scheduler, lambda z, t, **kw: denoiser.network(z, t, prompt, **kw), x / scale[0])
    ours = sample(euler, denoiser, x, sigmas, {"encoder_hidden_states": prompt})
    assert relative_error(ours, states[-1]) < 1e-6
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        sample(euler, denoiser, x, sigmas)


@pytest.mark.parametrize("classes", [None, 10])
def test_one_call_is_a_one_step_consistency_pipeline(classes) -> None:
    pipeline = ConsistencyModelPipeline(
        unet(torch.float32, classes), CMStochasticIterativeScheduler(clip_denoised=False)
    )
    pipeline.set_progress_bar_config(disable=True)
    states: list[Tensor] = []
    pipeline(
        batch_size=2,
        class_labels=None if classes is None else [1, 7],
        generator=torch.Generator().manual_seed(3),
        callback=lambda i, t, latents: states.append(latents),
    )
    x = 80 * torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    denoiser = denoiser_from(pipeline.unet, pipeline.scheduler)
    cond = None if classes is None else torch.tensor([1, 7])
    ours = denoiser(x, torch.tensor(80.0), cond)
    assert len(states) == 1
    assert relative_error(ours, states[0]) < 1e-5
    assert relative_error(sample(euler, denoiser, x, torch.tensor([80.0, 0.0]), cond), states[0]) < 1e-5
    low = torch.tensor(0.002)  # the boundary condition of a consistency model
    torch.testing.assert_close(denoiser(x, low, cond), x, rtol=1e-6, atol=1e-6)


# Every scheduler that diffusers exports: those that are understood, and all others, which must be refused by name.

UNDERSTOOD = {
    "CMStochasticIterativeScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "FlowMatchEulerDiscreteScheduler": FlowMatching,
    "FlowMatchHeunDiscreteScheduler": FlowMatching,
    "FlowMatchLCMScheduler": FlowMatching,
    "DDIMParallelScheduler": VariancePreserving,
    "DDIMScheduler": VariancePreserving,
    "DDPMParallelScheduler": VariancePreserving,
    "DDPMScheduler": VariancePreserving,
    "DEISMultistepScheduler": VariancePreserving,
    "DPMSolverMultistepScheduler": VariancePreserving,
    "DPMSolverSDEScheduler": VariancePreserving,
    "DPMSolverSinglestepScheduler": VariancePreserving,
    "EulerAncestralDiscreteScheduler": VariancePreserving,
    "EulerDiscreteScheduler": VariancePreserving,
    "HeunDiscreteScheduler": VariancePreserving,
    "KDPM2AncestralDiscreteScheduler": VariancePreserving,
    "KDPM2DiscreteScheduler": VariancePreserving,
    "LCMScheduler": VariancePreserving,
    "LMSDiscreteScheduler": VariancePreserving,
    "PNDMScheduler": VariancePreserving,
    "SASolverScheduler": VariancePreserving,
    "TCDScheduler": VariancePreserving,
    "UniPCMultistepScheduler": VariancePreserving,
}
EXPORTED = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))


REQUIRED: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 1},
    "VQDiffusionScheduler": {"num_vec_classes": 10},
}


def constructed(name: str, **options: Any) -> Any:
    try:
        return getattr(diffusers.schedulers, name)(**options | REQUIRED.get(name, {}))
    except (TypeError, ImportError, AttributeError) as error:  # the last two: it needs a package that is not here
        pytest.skip(f"{name} has no defaults here: {str(error).strip().splitlines()[0]}")


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_scheduler_is_understood_or_refused_by_name(name) -> None:
    scheduler = constructed(name)
    if name not in UNDERSTOOD:
        with pytest.raises(ValueError, match=name):
            coordinates_of(scheduler)
        return
    denoiser = denoiser_from(unet(torch.float32), scheduler)
    assert type(denoiser.coordinates) is UNDERSTOOD[name]
    assert 0 < denoiser.sigma_min < denoiser.sigma_max < math.inf
    x = denoiser.sigma_max * noise().float()
    for solver in (euler, heun):
        sigmas = karras_sigmas(4, max(denoiser.sigma_min, 1e-3), denoiser.sigma_max)
        assert sample(solver, denoiser, x, sigmas).isfinite().all()


@pytest.mark.parametrize("name", sorted(UNDERSTOOD))
def test_its_own_way_to_add_noise_and_scale_is_what_the_network_is_fed(name) -> None:
    """add_noise, then scale_model_input, against inner(sigma) (x0 + sigma eps), at whole training timesteps."""
    scheduler, x0, eps = constructed(name), noise(seed=1), noise(seed=2)
    coordinates = coordinates_of(scheduler)
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps[[4, 8]]:
        timestep = t.double()
        if isinstance(coordinates, VariancePreserving):
            sigma = coordinates.sigma(timestep)
        elif isinstance(coordinates, FlowMatching):
            sigma = timestep / (1000 - timestep)
        else:
            sigma = (timestep * (4 / 1000 if name.startswith("CM") else 4)).exp()
        mix = getattr(scheduler, "scale_noise", None) if isinstance(coordinates, FlowMatching) else None
        noisy = mix(x0, t[None], eps) if mix else scheduler.add_noise(x0, eps, t[None])
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = None  # what a fresh loop would find
        fed = scheduler.scale_model_input(noisy, t) if hasattr(scheduler, "scale_model_input") else noisy
        found = coordinates(sigma)
        assert relative_error(found.inner * (x0 + sigma * eps), fed) < 2e-6  # float32 tables
        assert float(found.timestep) == pytest.approx(float(t), abs=1e-6)


def stock_prediction(scheduler: Any, output: Tensor, t: Tensor, x: Tensor) -> Tensor | None:
    """What the scheduler itself makes of a network's output: its prediction of x0, where it shows one."""
    if hasattr(scheduler, "convert_model_output"):  # the DPM-Solver family
        scheduler._init_step_index(t)
        converted = scheduler.convert_model_output(output, sample=x)
        if type(scheduler).__name__ != "DEISMultistepScheduler":
            return converted
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index])
        return (x - sigma * converted) / alpha
    result = scheduler.step(output, t, x)
    return result.get("pred_original_sample", result.get("denoised"))


SHOWS_NO_X0 = ("CMStochasticIterativeScheduler", "PNDMScheduler", "TCDScheduler")
X0 = sorted(name for name in UNDERSTOOD if "FlowMatch" not in name and name not in SHOWS_NO_X0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", X0)
def test_its_own_prediction_of_x0_is_the_denoiser(name, prediction) -> None:
    if name.startswith("EDM") and prediction == "sample":
        with pytest.raises(ValueError, match=name):
            coordinates_of(constructed(name, prediction_type=prediction))
        return
    options = {"clip_sample": False} if "clip_sample" in constructed(name).config else {}
    scheduler = constructed(name, prediction_type=prediction, **options)
    denoiser, x0, eps = denoiser_from(unet(), scheduler), noise(seed=1), noise(seed=2)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[4]
    noisy = scheduler.add_noise(x0, eps, t[None])
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = None
    inner = scheduler.scale_model_input(noisy, t)
    output = denoiser.network(inner, t, return_dict=False)[0]
    try:
        expected = stock_prediction(scheduler, output, t, noisy)
    except (NotImplementedError, ValueError) as error:
        pytest.skip(f"{name} does not know {prediction}: {error}")
    assert expected is not None
    whole = denoiser.coordinates
    sigma = whole.sigma(t.double()) if isinstance(whole, VariancePreserving) else (4 * t.double()).exp()
    assert relative_error(denoiser(x0 + sigma * eps, sigma), expected) < 1e-5  # float32 tables


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        (name, p)
        for name in ("PNDMScheduler", "TCDScheduler")
        for p in PREDICTIONS
        if (name, p) != ("PNDMScheduler", "sample")
    ],
)
def test_a_single_step_of_schedulers_that_show_no_x0_is_an_euler_step(name, prediction) -> None:
    if name == "PNDMScheduler":  # ends in 0
        scheduler = constructed(name, prediction_type=prediction, set_alpha_to_one=True, skip_prk_steps=True)
        scheduler.set_timesteps(1)
        scheduler.timesteps, scheduler._timesteps = torch.tensor([999]), [999]
        end = 0.0
    else:  # ends in the first training level
        scheduler = constructed(name, prediction_type=prediction, original_inference_steps=1)
        scheduler.set_timesteps(1)
        end = coordinates_of(scheduler).sigma_min
    (t,) = scheduler.timesteps
    assert float(t) == 999
    denoiser, z = denoiser_from(unet(), scheduler), noise()
    sigmas = torch.tensor([denoiser.coordinates.sigma(t), end], dtype=torch.float64)
    (expected,) = stock_states(scheduler, denoiser.network, z)
    x, scale = vp(sigmas)[0] * z, vp(sigmas)
    bound = 2 * torch.finfo(torch.float32).eps * float(scale[0])  # float32 tables: 146 and less cancel to 1
    assert relative_error(sample(euler, denoiser, x, sigmas), scale[1] * expected) < bound


@pytest.mark.parametrize("name", [name for name in UNDERSTOOD if name.startswith("FlowMatch")])
def test_a_single_flow_step_to_zero_is_the_denoiser(name) -> None:
    scheduler = constructed(name)
    scheduler.set_timesteps(1)
    scheduler.sigmas, scheduler.timesteps = torch.tensor([0.8, 0.0]), torch.tensor([800.0])  # by default t = 1
    denoiser, z = denoiser_from(unet(), scheduler), noise()
    output = denoiser.network(z, scheduler.timesteps[0], return_dict=False)[0]
    expected = scheduler.step(output, scheduler.timesteps[0], z).prev_sample
    assert relative_error(denoiser(5 * z, torch.tensor(4.0, dtype=torch.float64)), expected) < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "SASolverScheduler",
    ],
)
def test_flow_prediction_is_read_as_flow_and_flow_sigmas_alone_are_refused(name) -> None:
    options = {"use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = constructed(name, prediction_type="flow_prediction", **options)
    denoiser, z = denoiser_from(unet(), scheduler), noise()
    assert isinstance(denoiser.coordinates, FlowMatching)
    scheduler.set_timesteps(10)
    t, flow_time = scheduler.timesteps[4], scheduler.sigmas[4].double()
    sigma = flow_time / (1 - flow_time)
    output = denoiser.network(z, flow_time * 1000, return_dict=False)[0]
    expected = stock_prediction(scheduler, output, t, z)
    assert expected is not None
    assert relative_error(denoiser((1 + sigma) * z, sigma), expected) < 1e-6
    with pytest.raises(ValueError, match=f"{name} has use_flow_sigmas"):
        coordinates_of(constructed(name, **options))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (DDPMScheduler(prediction_type="original"), "DDPMScheduler with prediction_type 'original'"),
        (UniPCMultistepScheduler(prediction_type="x0"), "UniPCMultistepScheduler"),
        (DDIMScheduler(trained_betas=[0.0, 0.1, 0.2]), "alphas_cumprod"),
        (DDIMScheduler(trained_betas=[0.1, 0.0, 0.2]), "alphas_cumprod"),
        (DDIMScheduler(trained_betas=[0.1]), "alphas_cumprod"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_options_that_are_not_understood_raise(scheduler, message) -> None:
    with pytest.raises(ValueError, match=message):
        coordinates_of(scheduler)


# Noise levels and timesteps


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_timesteps_are_whole_at_the_training_levels_and_monotone_between(schedule, zero_snr) -> None:
    scheduler = DDIMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    coordinates = coordinates_of(scheduler)
    whole = torch.arange(999 if zero_snr else 1000)
    sigmas = coordinates.sigma(whole)
    torch.testing.assert_close(sigmas, levels(scheduler, whole)[:-1], rtol=1e-12, atol=0)
    assert torch.equal(coordinates.timestep(sigmas).float(), whole.float())  # as a network is given them
    assert (coordinates.sigma_min, coordinates.sigma_max) == pytest.approx((float(sigmas[0]), float(sigmas[-1])))
    assert math.isfinite(coordinates.sigma_max)

    grid = torch.logspace(
        math.log10(coordinates.sigma_min), math.log10(coordinates.sigma_max), 5001, dtype=torch.float64
    )
    timesteps = coordinates.timestep(grid)
    assert bool((timesteps.diff() > 0).all())
    torch.testing.assert_close(coordinates.sigma(timesteps), grid, rtol=1e-9, atol=0)


@pytest.mark.parametrize("timestep", [-1.0, 999.5, math.nan])
def test_a_timestep_outside_training_has_no_sigma(timestep) -> None:
    with pytest.raises(ValueError, match="timestep"):
        coordinates_of(DDIMScheduler()).sigma(torch.tensor([3.0, timestep]))
    with pytest.raises(ValueError, match=r"\[0, 998\]"):
        coordinates_of(DDIMScheduler(rescale_betas_zero_snr=True)).sigma(torch.tensor(999.0))


def test_round_sigma_is_the_nearest_training_level() -> None:
    scheduler = DDIMScheduler()
    denoiser = denoiser_from(unet(), scheduler)
    trained = levels(scheduler, torch.arange(1000))[:-1]
    sigma = torch.logspace(-1.9, 2.1, 500, dtype=torch.float64)
    nearest = trained[(trained.log() - sigma.log()[:, None]).abs().argmin(1)]
    torch.testing.assert_close(denoiser.round_sigma(sigma), nearest, rtol=1e-9, atol=0)
    torch.testing.assert_close(denoiser.round_sigma(trained), trained, rtol=1e-9, atol=0)
    assert denoiser.round_sigma(sigma.float()).dtype == torch.float32
    for continuous in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()):
        assert torch.equal(denoiser_from(unet(), continuous).round_sigma(sigma), sigma)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(), EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()],
    ids=lambda s: type(s).__name__,
)
def test_the_range_is_closed_and_everything_outside_raises(scheduler) -> None:
    denoiser = denoiser_from(unet(torch.float32), scheduler)
    x = noise().float()
    for end in (denoiser.sigma_min, denoiser.sigma_max, denoiser.sigma_limit):
        assert denoiser(x, torch.tensor(end)).isfinite().all()  # as a float32, perhaps just outside
    for bad in (denoiser.sigma_min * 0.999, denoiser.sigma_limit * 1.001, 0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="range"):
            denoiser(x, torch.tensor([denoiser.sigma_max, bad]))
    with pytest.raises(ValueError, match="sigma"):
        denoiser(x, torch.ones(3))


@pytest.mark.parametrize("cls", [DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_sigma_per_sample_equals_a_call_per_sample(cls) -> None:
    denoiser, x = denoiser_from(unet(), cls()), noise(3, 3, 8, 8)
    sigma = torch.tensor([0.05, 2.0, 70.0], dtype=torch.float64)
    together = denoiser(x, sigma)
    for k in range(3):
        for one in (sigma[k], sigma[k : k + 1]):
            torch.testing.assert_close(together[k : k + 1], denoiser(x[k : k + 1], one), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", [DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_network_in_bfloat16_keeps_the_state_in_float32(cls) -> None:
    scheduler = cls()
    half, single = denoiser_from(unet(torch.bfloat16), scheduler), denoiser_from(unet(torch.float32), scheduler)
    sigmas = karras_sigmas(6, 0.02, 80.0)
    x = 80 * noise().float()
    ours, reference = sample(euler, half, x, sigmas), sample(euler, single, x, sigmas)
    assert ours.dtype == torch.float32
    assert 1e-5 < relative_error(ours, reference) < 0.05
    assert not torch.equal(ours, ours.bfloat16().float())
    near = half(x, torch.tensor(0.02))  # D is close to x, which bfloat16 would round by 0.3 at |x| = 80
    assert relative_error(near - x, single(x, torch.tensor(0.02)) - x) < (0.05 if cls is DDIMScheduler else 0.2)
    with pytest.raises(ValueError, match="float32 or float64"):
        sample(euler, half, x.half(), sigmas)


def test_gradients_reach_the_network_and_the_input() -> None:
    denoiser = denoiser_from(unet().requires_grad_(True), DDIMScheduler())
    x = noise().requires_grad_()
    denoiser(x, torch.tensor(2.0)).square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in denoiser.parameters())
