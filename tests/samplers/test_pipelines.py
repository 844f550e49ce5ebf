"""Teleportation in tiny stock pipelines of random weights: what runs, what is reported, what is left behind."""

import json
import subprocess
import sys
import warnings
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from samplers.gaussian import Gaussian
from samplers.pipelines import teleport, vae_facts
from samplers.skip import Skip
from tests.samplers.tiny_pipelines import (
    ARGUMENTS,
    MAKERS,
    Calls,
    closed_form,
    dit,
    fitting,
    flux,
    gaussian,
    left,
    network,
    pictures,
    stable_diffusion,
    vae,
)
from tests.some import some
from tests.truth import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what diffusers does with numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:guidance acts"),
]

FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
OTHERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "DDPMPipeline": [
        ("DDIM", {}),
        ("DPMSolverMultistep", {}),
        ("FlowMatchEulerDiscrete", {}),
        ("LCM", {}),
    ],
    "DDIMPipeline": [],
    "DiTPipeline": [
        ("DDPM", {}),
        ("DPMSolverMultistep", {"solver_order": 3}),
        ("DPMSolverSinglestep", {}),
        ("DEISMultistep", {}),
        ("PNDM", {"skip_prk_steps": True}),
        ("UniPCMultistep", {}),
    ],
    "StableDiffusionPipeline": [
        ("DDIM", {}),
        ("DDPM", {}),
        ("DEISMultistep", {}),
        ("DPMSolverMultistep", {"use_karras_sigmas": True}),
        ("DPMSolverSinglestep", {}),
        ("EDMDPMSolverMultistep", {}),
        ("EDMEuler", {}),
        ("EulerAncestralDiscrete", {}),
        ("EulerDiscrete", {"timestep_spacing": "leading"}),
        ("HeunDiscrete", {}),
        ("KDPM2AncestralDiscrete", {}),
        ("KDPM2Discrete", {}),
        ("LCM", {}),
        ("LMSDiscrete", {}),
        ("PNDM", {}),
        ("SASolver", {}),
        ("TCD", {}),
        ("UniPCMultistep", {}),
    ],
    "StableDiffusionXLPipeline": [("EulerDiscrete", {}), ("HeunDiscrete", {}), ("UniPCMultistep", {})],
    "StableDiffusion3Pipeline": [("FlowMatchHeunDiscrete", {}), ("DPMSolverMultistep", FLOW), ("UniPCMultistep", FLOW)],
    "FluxPipeline": [("FlowMatchEulerDiscrete", {"use_dynamic_shifting": False})],
    "PixArtAlphaPipeline": [("EulerDiscrete", {}), ("DDIM", {})],
    "PixArtSigmaPipeline": [],
}
CASES = [(name, case) for name in MAKERS for case in (None, *OTHERS[name])]
SKIP = 5.0


def make(name: str, case: tuple[str, dict[str, Any]] | None) -> Any:
    pipe = MAKERS[name]()
    if case is not None:
        pipe.scheduler = getattr(diffusers, f"{case[0]}Scheduler")(**case[1])
    return pipe


@pytest.mark.parametrize(
    ("name", "case"), some(CASES, 12, ids=lambda case: f"{case[0]}-{case[1][0] if case[1] else 'stock'}")
)
def test_fewer_calls_as_reported_and_nothing_left_behind(name, case) -> None:
    pipe = make(name, case)
    fresh = left(pipe)
    jump = teleport(pipe, fitting(pipe), SKIP)
    with jump:
        pictures(pipe)
    assert left(pipe) == fresh  # though no run had given the scheduler its own attributes yet

    with Calls(pipe) as stock:
        before = pictures(pipe)
    state = left(pipe)
    with Calls(pipe) as made, jump:
        assert isinstance(pipe.scheduler, fresh[0])
        during = pictures(pipe)
    with Calls(pipe) as after_calls:
        after = pictures(pipe)
    assert left(pipe) == state
    assert torch.equal(before, after)
    assert len(after_calls) == len(stock)

    run = jump.run
    assert run is not None
    assert run.skipped > 0
    assert run.steps == 12
    assert (run.nfe_before, run.nfe, run.network_calls) == (len(stock), len(made), len(made))
    assert len(made) < len(stock)
    assert run.sigma_from > run.sigma_to >= SKIP * (1 - 1e-6)
    assert during.isfinite().all()
    assert not torch.equal(before, during)
    assert run.guidance == (name not in ("DDPMPipeline", "DDIMPipeline", "FluxPipeline"))
    assert f"{len(stock)} -> {len(made)} NFE" in str(jump)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("DDPMPipeline",)])
def test_the_noise_and_the_random_numbers_are_those_of_the_stock_run(name) -> None:
    """All of these are deterministic after their first noise: both runs leave the generator in the same state."""
    pipe, generators = MAKERS[name](), [torch.Generator().manual_seed(3) for _ in range(2)]
    arguments = ARGUMENTS[name] | {"num_inference_steps": 12, "output_type": "pt"}
    inputs: list[Tensor] = []
    handle = network(pipe).register_forward_hook(
        lambda _, args, kwargs, __: inputs.append((args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )
    pipe(generator=generators[0], **arguments)
    stock = inputs[0]
    inputs.clear()
    with teleport(pipe, fitting(pipe), SKIP):
        pipe(generator=generators[1], **arguments)
    handle.remove()
    assert torch.equal(inputs[0], stock)  # the call that is not made: the network's outer hooks do see it
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("name", list(MAKERS))
def test_saved_files_are_the_stock_files(name, tmp_path) -> None:
    pipe = MAKERS[name]()
    pictures(pipe)  # a tokenizer saves how it was used last
    pipe.save_pretrained(tmp_path / "before")
    with teleport(pipe, fitting(pipe), SKIP):
        pictures(pipe)
        pipe.save_pretrained(tmp_path / "during")
    contents = [
        {str(p.relative_to(tmp_path / when)): p.read_bytes() for p in (tmp_path / when).rglob("*") if p.is_file()}
        for when in ("before", "during")
    ]
    assert contents[0] == contents[1]
    assert "scheduler/scheduler_config.json" in contents[0]


_LOAD = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "samplers":
            raise ImportError("samplers is blocked")
sys.meta_path.insert(0, Blocked())
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
print(type(pipe).__name__, type(pipe.scheduler).__name__, type(pipe.scheduler).__module__)
"""


@pytest.mark.slow
def test_a_saved_pipeline_loads_where_this_library_is_not(tmp_path) -> None:
    pipe = stable_diffusion()
    with teleport(pipe, fitting(pipe), SKIP):
        pictures(pipe)
        pipe.save_pretrained(tmp_path)
    result = subprocess.run([sys.executable, "-c", _LOAD, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [
        "StableDiffusionPipeline",
        "PNDMScheduler",
        "diffusers.schedulers.scheduling_pndm",
    ]


def test_importing_it_does_not_load_diffusers() -> None:
    program = "import sys, samplers.pipelines; print('diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# What the jump goes to


@pytest.mark.parametrize("scale", [4.0, 1.0], ids=["guided", "alone"])
@pytest.mark.parametrize("classes", [1000, None], ids=["classes", "pooled"])
def test_dit_jumps_to_the_class_of_every_sample(scale, classes) -> None:
    pipe = dit()
    target, labels = fitting(pipe, classes=classes), torch.tensor([7, 300])
    jump = teleport(pipe, target, SKIP)
    with Calls(pipe) as made, jump:
        pictures(pipe, guidance_scale=scale)
    run = jump.run
    assert run is not None
    assert run.guidance == (scale > 1)
    assert len(made[0]) == (4 if scale > 1 else 2)

    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    levels = [(1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5) for sigma in (run.sigma_from, run.sigma_to)]
    for k, label in enumerate(labels):
        mean = target.mean[label] if classes else target.mean
        alone = Gaussian(mean, target.components, target.variances, target.rest)
        expected = closed_form(alone, noise[k : k + 1], *levels)
        for row in range(k, len(made[0]), 2):
            assert relative_error(made[0][row : row + 1], expected) < 1e-5
    assert ("guidance below" in str(jump)) == (scale > 1)
    assert ("nats over all classes" in str(jump)) == (classes is None)


def test_a_label_without_a_mean_raises() -> None:
    pipe = dit()
    with teleport(pipe, fitting(pipe, classes=1000), SKIP), pytest.raises(ValueError, match="label 1000"):
        pictures(pipe, class_labels=[1000, 3], guidance_scale=1.0)


def test_flux_tokens_are_unpacked_around_the_jump() -> None:
    pipe = flux()
    decoder = {"vae": vae_facts(pipe.vae)}
    square = gaussian(facts=decoder)
    wide = Gaussian(square.mean.reshape(4, 4, 16), square.components, square.variances, square.rest, facts=decoder)
    with Calls(pipe) as made, teleport(pipe, wide, SKIP) as jump:
        pictures(pipe, height=4, width=16)
        with pytest.raises(ValueError, match=r"\[4, 8, 8\]; the Gaussian is of \[4, 4, 16\]"):
            pictures(pipe, height=8, width=8)  # as many tokens
    run = jump.run
    assert run is not None
    noise = torch.randn((2, 4, 4, 16), generator=torch.Generator().manual_seed(0)).double()
    t = run.sigma_to / (1 + run.sigma_to)
    expected = closed_form(wide, noise, (0.0, 1.0), (1 - t, t))
    assert relative_error(FluxPipeline._unpack_latents(made[0], 4, 16, 1), expected) < 1e-5
    assert run.sigma_from == float("inf")


def test_flux_with_two_calls_a_prediction_and_with_an_embedded_scale() -> None:
    pipe = flux()
    negative = {
        "negative_prompt_embeds": torch.zeros(2, 3, 16),
        "negative_pooled_prompt_embeds": torch.zeros(2, 16),
        "true_cfg_scale": 3.0,
    }
    with Calls(pipe) as made, teleport(pipe, fitting(pipe), SKIP) as jump:
        pictures(pipe, **negative)
    assert jump.run is not None
    assert (jump.run.network_calls, jump.run.nfe, jump.run.guidance) == (len(made), len(made) // 2, True)
    pipe = flux(guidance=True)
    with teleport(pipe, fitting(pipe), SKIP) as jump:
        pictures(pipe)
    assert jump.run is not None
    assert jump.run.guidance


@pytest.mark.parametrize("name", ["DEISMultistep", "UniPCMultistep", "EulerDiscrete", "PNDM"])
def test_a_network_in_bfloat16_is_given_bfloat16(name) -> None:
    single, half = (stable_diffusion() for _ in range(2))
    results = []
    for pipe in (single, half.to(torch.bfloat16)):
        pipe.scheduler = getattr(diffusers, f"{name}Scheduler")()
        with Calls(pipe) as made, teleport(pipe, fitting(pipe), SKIP):
            pictures(pipe)
        assert {x.dtype for x in made} == {pipe.unet.dtype}
        results.append(made[0])
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    assert 1e-4 < relative_error(results[1], results[0]) < 0.02 + relative_error(noise.bfloat16(), noise)


# What is told


def test_the_line_and_the_certificates() -> None:
    pipe = MAKERS["DDPMPipeline"]()
    pipe.scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    skip = Skip(
        sigma_skip=8.0,
        sigma_max=80.0,
        kl=0.041,
        kl_error=0.006,
        tolerance=0.05,
        direction="model",
        network_error=None,
        prior_kl=0.0,
        count=256,
        shape=(3, 8, 8),
        sigmas=(8.0,),
        kls=(0.041,),
        errors=(0.006,),
    )
    a = pipe.scheduler.alphas_cumprod[torch.tensor([999 - round(1000 / 12 * k) for k in range(12)])]
    levels = ((1 - a) / a).sqrt().tolist()
    above = {sigma: sum(level >= sigma for level in levels) - 1 for sigma in (5.0, 1.9, 8.0)}
    expected = {
        None: "skipped {} of 12 steps, sigma 157 -> {:.3g}, KL <= 0.04 nats, 12 -> {} NFE",
        1.9: "skipped {} of 12 steps, sigma 157 -> {:.3g}, KL <= 0.2 nats, 12 -> {} NFE",
        skip: "skipped {} of 12 steps, sigma 157 -> {:.3g}, KL 0.041 +- 0.006 nats, 12 -> {} NFE",
    }
    for (chosen, line), k in zip(expected.items(), above.values(), strict=True):
        jump = teleport(pipe, fitting(pipe), chosen)
        assert str(jump).startswith("no run yet")
        with jump:
            pictures(pipe)
        assert str(jump) == line.format(k, levels[k], 12 - k)
    with teleport(pipe, fitting(pipe), 1e9) as jump:
        pictures(pipe)
    assert str(jump) == "skipped 0 of 12 steps: none from sigma 157 ends at or above 1e+09, 12 NFE"
    with teleport(pipe, fitting(pipe, bound=None), 8.0) as jump:
        pictures(pipe)
    assert "nats" not in str(jump)


def test_a_run_that_skips_nothing_is_the_stock_run() -> None:
    pipe = MAKERS["StableDiffusionXLPipeline"]()
    stock = pictures(pipe)
    with teleport(pipe, fitting(pipe), 1e9) as jump:
        assert torch.equal(pictures(pipe), stock)
    assert jump.run is not None
    assert (jump.run.skipped, jump.run.nfe, jump.run.network_calls, jump.run.kl) == (0, 12, 12, 0)


def test_guidance_is_warned_of_once() -> None:
    pipe = stable_diffusion()
    with warnings.catch_warnings(record=True) as caught, teleport(pipe, fitting(pipe), SKIP):
        warnings.simplefilter("always")
        pictures(pipe)
        pictures(pipe)
    assert [w.category for w in caught if "guidance" in str(w.message)] == [UserWarning]
    with warnings.catch_warnings(record=True) as caught, teleport(pipe, fitting(pipe), SKIP):
        warnings.simplefilter("always")
        pictures(pipe, guidance_scale=1.0)
    assert not [w for w in caught if "guidance" in str(w.message)]


def test_vae_facts_tell_one_vae_from_another() -> None:
    first, second = vae_facts(vae()), vae_facts(vae())
    assert first == second
    assert first.keys() == {"class", "sha256", "scaling_factor", "shift_factor", "latents_mean", "latents_std"}
    assert (first["class"], first["scaling_factor"], first["shift_factor"]) == ("AutoencoderKL", 0.5, 0.1)
    other = vae()
    with torch.no_grad():
        next(other.parameters()).flatten()[0] += 1e-6
    assert not first["sha256"].keys() - vae_facts(other)["sha256"].keys()
    assert vae_facts(other)["sha256"]["float32"] != first["sha256"]["float32"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_pipeline_in_half_precision_takes_the_gaussian_of_its_vae_in_single(dtype) -> None:
    """As JSON gives the facts back; and the hash of a half is that which single precision foretold."""
    pipe = stable_diffusion()
    facts = json.loads(json.dumps({"vae": vae_facts(pipe.vae)}))
    half = vae_facts(pipe.to(dtype).vae)["sha256"]
    assert half == {str(dtype).removeprefix("torch."): facts["vae"]["sha256"][str(dtype).removeprefix("torch.")]}
    teleport(pipe, gaussian(facts=facts), SKIP)
