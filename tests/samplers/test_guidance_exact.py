"""Corrected guidance in stock pipelines whose networks know their mixtures: the law at the end is the product's own."""

import math
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from samplers.diagnosis import diagnose
from samplers.feynman_kac import draw, feynman_kac
from samplers.guidance import factors, feynman_kac_guidance
from samplers.particles import Resampling
from samplers.targets import geometric_average
from samplers.weighted_path import Corrector
from tests.samplers.guided_mixtures import GRID, MIXTURES, average, distance, pipeline, run
from tests.some import some

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what diffusers does with numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SDE: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}
ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
V: dict[str, Any] = {"prediction_type": "v_prediction"}

# the pipeline, the scheduler, its settings, arguments of the call
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "euler-ancestral": ("sd", "EulerAncestralDiscrete", {}, {}),
    "euler-ancestral-v": ("sd", "EulerAncestralDiscrete", V, {}),
    "ddpm": ("sd", "DDPM", {"clip_sample": False}, {}),
    "ddpm-sample": ("sd", "DDPM", {"clip_sample": False, "prediction_type": "sample"}, {}),
    "ddim": ("sd", "DDIM", {"clip_sample": False}, {"eta": 1.0}),
    "ddim-half": ("sd", "DDIM", {"clip_sample": False}, {"eta": 0.5}),
    "ddim-zero-snr": ("sd", "DDIM", {"clip_sample": False} | V | ZERO_SNR, {"eta": 1.0}),
    "sde-dpmsolver": ("sd", "DPMSolverMultistep", SDE, {}),
    "sde-dpmsolver-flow": ("sd3", "DPMSolverMultistep", SDE | FLOW, {}),
    "dit-ddpm": ("dit", "DDPM", {"clip_sample": False}, {}),
}
SCALE, STEPS, K = 2.5, 50, 2048


def make(name: str) -> tuple[Any, dict[str, Any]]:
    kind, scheduler, settings, more = CASES[name]
    return pipeline(kind, getattr(diffusers, f"{scheduler}Scheduler")(**settings)), more


def distances(samples: Tensor, scale: float = SCALE) -> Tensor:
    """W2 of every prompt's particles from the exact product, [prompts]."""
    return torch.tensor([distance(x, average(prompt, scale)) for x, prompt in zip(samples, (1, 2), strict=True)])


@pytest.mark.parametrize("name", some(CASES, ("euler-ancestral", "ddim-zero-snr", "dit-ddpm")))
def test_the_law_is_nearer_to_the_product_by_a_factor(name) -> None:
    """Two seeds of two prompts; that of as many exact samples is about 0.1."""
    pipe, more = make(name)
    found: list[tuple[float, float]] = []
    for seed in (0, 1):
        plain = run(pipe, [1, 2], K, scale=SCALE, steps=STEPS, seed=seed, **more)
        resampler = torch.Generator().manual_seed(seed)
        with feynman_kac_guidance(pipe, K, resampling=Resampling(), generator=resampler) as guidance:
            corrected = run(pipe, [1, 2], K, scale=SCALE, steps=STEPS, seed=seed, **more)
        assert guidance.scale == SCALE
        found.append((float(distances(plain).mean()), float(distances(corrected).mean())))
    naive, exact = torch.tensor(found).mean(0).tolist()
    assert naive > 0.45
    assert exact < 0.6 * naive


def above(x: Tensor) -> Tensor:
    """What is estimated, [..., 2] of samples [...]: a mode's share and the mean."""
    return torch.stack([(x > 0).double(), x.double()], -1)


@pytest.mark.parametrize("name", some(["euler-ancestral", "dit-ddpm"]))
def test_resampling_before_the_move_does_not_change_the_law(name) -> None:
    """Against weights alone, in which nothing is ever resampled: every estimate within four standard errors."""
    pipe, more = make(name)
    estimates: dict[str, list[Tensor]] = {"resampled": [], "weighted": []}
    evidences: dict[str, list[Tensor]] = {"resampled": [], "weighted": []}
    for seed in range(8):
        for kind, settings in (("resampled", Resampling(threshold=1.0)), ("weighted", Resampling(threshold=0.0))):
            guidance = feynman_kac_guidance(
                pipe,
                512,
                resampling=settings,
                equal_weights=kind == "resampled",
                generator=torch.Generator().manual_seed(seed),
            )
            with guidance:
                x = run(pipe, [1, 2], 512, scale=SCALE, steps=20, seed=seed, **more)
            assert guidance.particles is not None
            weights = guidance.particles.weights.probabilities
            assert bool((guidance.particles.weights.ess > 511).all()) == (kind == "resampled")
            estimates[kind].append((weights[..., None] * above(x)).sum(1))
            evidences[kind].append(guidance.particles.log_evidence.exp())
    for found in (estimates, evidences):
        first, second = (torch.stack(found[kind]) for kind in ("resampled", "weighted"))
        error = ((first.var(0) + second.var(0)) / 8).sqrt()
        assert bool(((first.mean(0) - second.mean(0)).abs() < 4 * error).all())
        assert bool((error < 0.05 * first.mean(0).abs().clamp_min(1)).all())


def test_the_weights_are_those_of_our_own_loop() -> None:
    """The same proposals from the same levels by `feynman_kac`: the evidence, within four standard errors."""
    k, steps = 4096, 30
    pipe = pipeline("sd", diffusers.EulerAncestralDiscreteScheduler())
    unresampled = Resampling(threshold=0.0)
    with feynman_kac_guidance(pipe, k, resampling=unresampled, rule="left", equal_weights=False) as guidance:
        run(pipe, [1], k, scale=SCALE, steps=steps, seed=3)
    corrector = Corrector(form="score", zeta=1.0, proposal="ancestral", rule="left", resampling=unresampled)
    levels, first = pipe.scheduler.sigmas.double(), pipe.scheduler.init_noise_sigma
    x = float(first) * torch.randn((k, 1), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    target = geometric_average(MIXTURES[0], MIXTURES[1], SCALE)
    *_, state = feynman_kac(target, x, levels, None, torch.Generator().manual_seed(5), corrector=corrector)

    assert guidance.particles is not None
    logs = [guidance.particles.weights.values[0], state.log_weights[0]]
    relative = [float(log.exp().std() / log.exp().mean() / k**0.5) for log in logs]
    difference = float(logs[0].exp().mean().log() - logs[1].exp().mean().log())
    assert abs(difference) < 4 * math.hypot(*relative)
    assert math.hypot(*relative) < 0.03


def test_without_guidance_there_is_nothing_to_weigh() -> None:
    for name in ("euler-ancestral", "dit-ddpm"):
        pipe, more = make(name)
        with feynman_kac_guidance(pipe, 2048) as guidance:
            x = run(pipe, [1, 2], 2048, scale=1.0, steps=100, seed=0, **more)
        assert guidance.particles is not None
        assert bool((guidance.particles.weights.values == 0).all())
        assert float(distances(x, 1.0).mean()) < 0.15
        assert str(guidance).startswith("no guidance to correct")


def test_the_states_are_diagnosed_and_drawn_from() -> None:
    pipe, more = make("dit-ddpm")
    with feynman_kac_guidance(pipe, 256, resampling=Resampling(), equal_weights=False) as guidance:
        x = run(pipe, [1, 2], 256, scale=SCALE, steps=20, seed=0, **more)
    diagnosis = diagnose(guidance.states)
    assert diagnosis.ess.shape == (21, 2)
    assert float(diagnosis.sigma[0]) > 90
    assert float(diagnosis.sigma[-1]) == 0
    assert bool((diagnosis.sigma.diff() < 0).all())
    last = guidance.states[-1]
    assert torch.equal(last.x.flatten(), x.flatten())
    assert "images are weighted" in str(guidance)

    drawn = draw(last, 20000, torch.Generator().manual_seed(0)).reshape(2, 20000)
    expected = (last.particles.weights.probabilities[..., None] * above(x)).sum(1)
    error = above(drawn).std(1) / 20000**0.5
    assert bool(((above(drawn).mean(1) - expected).abs() < 4 * error).all())


@pytest.mark.parametrize("rule", ["left", "trapezoid"])
def test_the_factors_integrate_what_they_say(rule) -> None:
    """Of a disagreement |D_c - D_u|^2 = v exp(-(log sigma)^2), and of v times that: small at the grid's ends."""
    order, errors = (1, []) if rule == "left" else (2, [])
    for n in (40, 80, 160):
        levels = torch.linspace(math.log(80), math.log(0.05), n + 1, dtype=torch.float64).exp()
        f, v = torch.tensor(factors([*levels.tolist(), 0.0], rule), dtype=torch.float64), levels.square()
        bump = (-(levels.log() ** 2)).exp()
        known = math.sqrt(math.pi) * 2  # of exp(-(log sigma)^2) d log v
        errors.append((float((f * v * bump).sum()) / known - 1, float((f * v * bump * v).sum()) / known / math.e - 1))
        assert f[-1] == 0
    for coarse, fine in pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            assert abs(b) < (0.1 if rule == "left" else 1e-2)
            assert abs(b) < 1e-4 or 0.8 < math.log2(abs(a / b)) / order < 1.2


def test_over_wide_steps_each_rule_is_what_it_says() -> None:
    wide = [math.inf, 50.0, 1.0, 0.5, 0.0]
    left, trapezoid = factors(wide, "left"), factors(wide, "trapezoid")
    assert left == pytest.approx([0, (1 - 1 / 2500) / 2500, 0.75, 0])
    # from infinity: 1 / v, the integral of dv / v^2; then cut; the last weight is taken at its beginning
    assert trapezoid == pytest.approx([0, (1 + 1 - 1 / 2500) / 2500, (1 - 1 / 2500) + 0.75, 0])
    near = factors([1.0, 0.9, 0.8, 0.0], "trapezoid")
    assert near == pytest.approx([math.log(1 / 0.9), (math.log(1 / 0.9) + 1 - 0.64 / 0.81) / 0.81, 0.0], rel=1e-12)


def test_the_average_on_the_grid_is_a_law() -> None:
    assert float(average(1, SCALE)[-1]) == pytest.approx(1)
    density = MIXTURES[1].log_density(GRID[:, None]).exp()
    assert torch.allclose(average(1, 1.0), density.cumsum(0) / density.sum(), atol=1e-12)
