"""Every supported scheduler in a stock pipeline whose network is exact for a Gaussian, so that all runs are known."""

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from samplers.gaussian import Gaussian
from samplers.pipelines import teleport
from samplers.teleport_scheduler import SCHEDULERS
from tests.samplers.tiny_pipelines import closed_form, exact, exact_arguments
from tests.truth import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what diffusers does with numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS, SKIP = 20, 5.0
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

DETERMINISTIC: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", {"clip_sample": False}),
    ("DDIM", {"clip_sample": False, "prediction_type": "v_prediction"} | ZERO_SNR),  # starts at sigma = infinity
    ("DDIMParallel", {"clip_sample": False}),
    ("DEISMultistep", {}),
    ("DEISMultistep", {"solver_order": 3}),
    ("DPMSolverMultistep", {}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("DPMSolverMultistep", {"solver_order": 3}),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistep", {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistep", {"prediction_type": "sample"}),
    ("DPMSolverMultistep", FLOW),
    ("DPMSolverSinglestep", {}),
    ("DPMSolverSinglestep", {"solver_order": 3}),
    ("EDMDPMSolverMultistep", {}),
    ("EDMDPMSolverMultistep", {"prediction_type": "v_prediction"}),
    ("EDMEuler", {}),
    ("EulerDiscrete", {}),
    ("EulerDiscrete", {"use_karras_sigmas": True}),
    ("EulerDiscrete", {"timestep_spacing": "leading"}),
    ("FlowMatchEulerDiscrete", {}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}),
    ("HeunDiscrete", {}),
    ("HeunDiscrete", {"use_karras_sigmas": True}),
    ("KDPM2Discrete", {}),
    ("LMSDiscrete", {}),
    ("LMSDiscrete", {"use_karras_sigmas": True, "prediction_type": "v_prediction"}),
    ("PNDM", {}),
    ("PNDM", {"skip_prk_steps": True}),
    ("PNDM", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
    ("SASolver", {"deterministic": True}),
    ("UniPCMultistep", {}),
    ("UniPCMultistep", {"solver_order": 3, "use_karras_sigmas": True}),
    ("UniPCMultistep", FLOW),
]
STOCHASTIC: list[tuple[str, dict[str, Any]]] = [
    ("DDPM", {"clip_sample": False}),
    ("DDPMParallel", {"clip_sample": False}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    ("EulerAncestralDiscrete", {}),
    ("KDPM2AncestralDiscrete", {}),
    ("SASolver", {}),
]
CONSISTENCY: list[tuple[str, dict[str, Any]]] = [("LCM", {"clip_sample": False}), ("TCD", {"clip_sample": False})]


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{value}" for value in case[1].values())])


cases = pytest.mark.parametrize("case", [*DETERMINISTIC, *STOCHASTIC, *CONSISTENCY], ids=name_of)


def make(case: tuple[str, dict[str, Any]]) -> Any:
    name, options = case
    options = {key: value for key, value in options.items() if key != "deterministic"}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    if "deterministic" in case[1]:
        scheduler.tau_func = lambda t: 0.0
    return scheduler


def states(pipe: Any, batch: int = 3, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """The latents after every step, and the random generator's state at these moments."""
    found: list[Tensor] = []
    random: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)

    def note(pipe: Any, i: int, t: Tensor, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append(kept["latents"].clone())
        random.append(generator.get_state())
        return {}

    pipe(num_inference_steps=STEPS, generator=generator, callback_on_step_end=note, **exact_arguments(pipe, batch))
    return found, random


def first_noise(batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What a pipeline draws first, and the generator's state after that."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 4, 8, 8), generator=generator, dtype=torch.float64), generator.get_state()


def mixing(pipe: Any) -> tuple[Any, Tensor, Tensor]:
    """A copy of the scheduler with its grid, and alpha and s of alpha x0 + s eps at its entries, by its own noising."""
    scheduler = copy.deepcopy(pipe.scheduler)  # the pipeline has changed its steps_offset
    scheduler.set_timesteps(STEPS)
    flow = hasattr(scheduler, "scale_noise")

    def noised(x0: float, eps: float, k: int) -> Tensor:
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = None  # which FlowMatchHeun would look at
        first, second = (torch.full((1,), v, dtype=torch.float64) for v in (x0, eps))
        t = scheduler.timesteps[k : k + 1]
        return scheduler.scale_noise(first, t, second) if flow else scheduler.add_noise(first, second, t)

    entries = range(len(scheduler.timesteps))
    alpha, s = (torch.cat([noised(x0, eps, k) for k in entries]) for x0, eps in ((1.0, 0.0), (0.0, 1.0)))
    return scheduler, alpha, s


def known(pipe: Any) -> Gaussian:
    network = getattr(pipe, "unet", None) or pipe.transformer
    assert network.gaussian is not None
    return network.gaussian


def test_every_supported_scheduler_is_a_case() -> None:
    assert {f"{name}Scheduler" for name, _ in (*DETERMINISTIC, *STOCHASTIC, *CONSISTENCY)} == set(SCHEDULERS)


@cases
def test_the_jump_lands_on_the_closed_form_at_the_last_entry_above_sigma_skip(case) -> None:
    pipe = exact(make(case))
    scheduler, alpha, s = mixing(pipe)
    everyones = torch.get_rng_state()
    with teleport(pipe, known(pipe), SKIP) as jump:
        found, random = states(pipe)
    assert torch.equal(torch.get_rng_state(), everyones)
    landing = len(scheduler.timesteps) - (len(found) - 1)
    assert landing > 1

    x, after_noise = first_noise()
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    expected = closed_form(known(pipe), x, (alpha[0], s[0]), (alpha[landing], s[landing]))
    assert relative_error(found[0], expected) < 1e-5
    assert torch.equal(random[0], after_noise)

    following = landing + (2 if scheduler.order == 2 else 1)
    if hasattr(scheduler, "order_list"):
        following = next(k for k in range(landing + 1, STEPS) if scheduler.order_list[k] == 1)
        assert scheduler.order_list[landing] == 1
    level = s / alpha
    assert level[landing] >= SKIP > level[following]
    run = jump.run
    assert run is not None
    assert run.sigma_to == pytest.approx(float(level[landing]), rel=1e-5)
    assert run.sigma_from == pytest.approx(float(level[0]), rel=1e-3 if level[0] > 1e3 else 1e-5)
    assert (run.nfe_before, run.nfe) == (len(scheduler.timesteps), len(scheduler.timesteps) - landing)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("case", DETERMINISTIC, ids=name_of)
def test_twenty_steps_are_as_near_to_the_flow_as_without_the_jump(case) -> None:
    """After each of the first four steps below the landing, and at the end: multistep solvers keep their order."""
    pipe = exact(make(case))
    gaussian = known(pipe)
    scheduler, alpha, s = mixing(pipe)
    whole, _ = states(pipe)
    with teleport(pipe, gaussian, SKIP):
        short, _ = states(pipe)
    x = first_noise()[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))

    landing, stride = len(whole) - (len(short) - 1), scheduler.order
    errors: tuple[list[float], list[float]] = ([], [])
    for k in range(landing + stride, landing + 4 * stride + 1, stride):
        expected = closed_form(gaussian, x, (alpha[0], s[0]), (alpha[k], s[k]))
        errors[0].append(distance(whole[k - 1], expected))
        errors[1].append(distance(short[k - landing], expected))
    assert max(errors[1]) < 1.1 * max(errors[0])

    last = float(scheduler.sigmas[-1]) if hasattr(scheduler, "sigmas") else 0.0  # some end in the first training level
    end = (1.0, 0.0) if last == 0 else ((1 + last**2) ** -0.5, last * (1 + last**2) ** -0.5)
    if case[1].get("use_flow_sigmas"):
        end = (1 - last, last)
    expected = closed_form(gaussian, x, (alpha[0], s[0]), end)
    assert distance(short[-1], expected) < 1.05 * distance(whole[-1], expected)
    assert distance(whole[-1], expected) < 0.05


def test_the_noise_of_skipped_steps_does_not_move_the_landing() -> None:
    """SA-Solver corrects a state by what it remembers of the step before, its noise included; here, it must not."""
    pipe = exact(make(("SASolver", {})))
    pipe.scheduler.tau_func = lambda t: float(t > 620)  # noise until the landing, none from there on
    scheduler, alpha, s = mixing(pipe)
    with teleport(pipe, known(pipe), SKIP):
        found, _ = states(pipe)
    landing = len(scheduler.timesteps) - (len(found) - 1)
    assert scheduler.timesteps[landing] < 620 < scheduler.timesteps[landing - 1]
    x = first_noise()[0]
    expected = closed_form(known(pipe), x, (alpha[0], s[0]), (alpha[landing + 1], s[landing + 1]))
    assert distance(found[1], expected) < 1e-3


@pytest.mark.parametrize("case", STOCHASTIC, ids=name_of)
def test_stochastic_samplers_keep_their_law(case) -> None:
    """The variances along the twelve directions are as near to the data's, within five standard errors."""
    batch = 2000
    pipe = exact(make(case))
    gaussian = known(pipe)
    whole, _ = states(pipe, batch, seed=1)
    with teleport(pipe, gaussian, SKIP):
        short, _ = states(pipe, batch, seed=2)
    errors = []
    for final in (whole[-1], short[-1]):
        coefficients = (final - gaussian.mean).flatten(1) @ gaussian.components.mT
        errors.append((coefficients.square().mean(0) / gaussian.variances).log().abs())
    assert bool((errors[1] < errors[0] + 5 * (2 / batch) ** 0.5 * 2**0.5).all())


@pytest.mark.parametrize(
    "case",
    [
        ("DDIM", {"clip_sample": False}),
        ("EulerDiscrete", {"timestep_spacing": "leading"}),
        ("EDMDPMSolverMultistep", {}),
        ("FlowMatchEulerDiscrete", {}),
    ],
    ids=name_of,
)
def test_marginal_mode_gives_the_drawn_noise_the_law_at_the_landing(case) -> None:
    pipe = exact(make(case))
    gaussian = known(pipe)
    scheduler, alpha, s = mixing(pipe)
    with teleport(pipe, gaussian, SKIP, mode="marginal"):
        found, _ = states(pipe)
    landing = len(scheduler.timesteps) - (len(found) - 1)
    expected = closed_form(gaussian, first_noise()[0], (0.0, 1.0), (alpha[landing], s[landing]))
    assert relative_error(found[0], expected) < 1e-5
