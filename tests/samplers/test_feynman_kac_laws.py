"""Laws of Feynman-Kac correctors by quadrature in one dimension: powers, guidance, churn, rewards.

A statistical test runs independent groups: an estimate is the groups' mean, its standard error their spread over root
groups, and the tolerance is so many of it. Each also bounds the standard error, or sees that the uncorrected fails.
"""

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import (
    Corrector,
    Denoiser,
    Target,
    annealed,
    feynman_kac,
    geometric_average,
    karras_sigmas,
    product,
    reward_tilted,
)
from samplers.weighted_path import WeightedPath
from tests.samplers.feynman_kac_cases import (
    BELOW_HALF,
    FIRST,
    HIGH,
    KEPT,
    LOW,
    NEVER,
    SCORE,
    SECOND,
    TRACE,
    deviations,
    estimates,
    falling,
    gaussian,
    log_normaliser,
    quadrature,
    run,
    seeded,
    standard_error,
)
from tests.truth import order


@pytest.mark.slow
@pytest.mark.parametrize("zeta", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(
    ("target", "corrector"),
    [(geometric_average(FIRST, SECOND, 0.5), SCORE), (annealed(FIRST, 2.0), TRACE)],
    ids=["average", "square"],
)
def test_the_answer_does_not_depend_on_zeta(target: Target, corrector: Corrector, zeta: float) -> None:
    truth = quadrature(target, LOW)
    state = run(target, replace(corrector, zeta=zeta), steps=240)
    found = estimates(state)
    assert max(deviations(state, truth)) < 4
    assert standard_error(found.mean) < 0.06
    assert standard_error(found.square) < 0.09


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "corrector", "largest"),
    [
        (geometric_average(FIRST, SECOND, 0.5), SCORE, 0.01),
        (geometric_average(FIRST, SECOND, 2.0), SCORE, 0.05),
        (product([FIRST, SECOND]), TRACE, 0.02),
        (annealed(FIRST, 0.5), SCORE, 0.03),
        (annealed(FIRST, 0.5), TRACE, 0.02),
        (annealed(FIRST, 2.0), TRACE, 0.02),
    ],
    ids=["average", "guidance 2", "product", "flatter, score", "flatter, trace", "sharper"],
)
def test_log_evidence_and_moments_against_quadrature(target: Target, corrector: Corrector, largest: float) -> None:
    truth = quadrature(target, LOW)
    state = run(target, corrector, steps=240, seed=1)
    assert max(deviations(state, truth)) < 3.5
    assert standard_error(state.log_evidence) < largest
    naive = run(target, replace(corrector, resampling=NEVER), steps=240, seed=1)
    assert max(deviations(naive, truth, evidence=False)) > 4.5


class Unsigned(WeightedPath):
    """A corrector that forgets what climbing costs."""

    def step(self, x: Tensor, found: Any, sigma: float, sigma_next: float, *rest: bool) -> Any:
        moved, raised, after, increments, rewards = super().step(x, found, sigma, sigma_next, *rest)
        return moved, raised, after, increments + (raised**2 - sigma_next**2) * after.rate, rewards


@pytest.mark.slow
def test_churn_gives_the_same_answer_and_would_not_without_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step climbs half of what it descends. Moments; the log-evidence has the left rule's error."""
    target, corrector = geometric_average(FIRST, SECOND, 2.0), replace(SCORE, rule=None, churn=5.0)
    truth = quadrature(target, LOW)
    state = run(target, corrector, steps=240, seed=2)
    assert float(state.sigma) == pytest.approx(LOW)  # the last step does not climb
    assert max(deviations(state, truth, evidence=False)) < 4
    assert abs(float(estimates(state).log_z.mean()) - truth.log_z) < 0.15
    monkeypatch.setattr(import_module("samplers.feynman_kac"), "WeightedPath", Unsigned)
    unsigned = run(target, corrector, steps=240, seed=2)
    assert max(deviations(unsigned, truth, evidence=False)) > 8
    assert abs(float(estimates(unsigned).log_z.mean()) - truth.log_z) > 0.5


@pytest.mark.slow
def test_the_log_evidence_under_churn_converges_with_the_steps() -> None:
    """Of a Gaussian, where every particle has the same weight: of order 1 while the churn in all stays the same."""
    model, steps, errors = gaussian(2), [40, 80, 160, 320], []
    for n in steps:
        target, corrector = annealed(model, 2.0), Corrector(form="trace", rule="left", probes=None, churn=4.0)
        state = run(target, corrector, steps=n, groups=1, k=2)
        assert float(state.log_weights.std()) < 1e-10
        errors.append(abs(float(state.log_evidence) - log_normaliser(2.0, model.variances + LOW**2)))
    assert order(steps, errors) > 0.8


class Forgetful(Target):
    """Exponents that vary, and a corrector that does not know it."""

    varies = False


@pytest.mark.slow
@pytest.mark.parametrize("corrector", [SCORE, replace(TRACE, zeta=1.0), replace(TRACE, zeta=1.3)])
def test_guidance_that_varies_has_the_answer_of_the_last_level_and_not_without_log_ratios(corrector) -> None:
    target = geometric_average(FIRST, SECOND, lambda sigma: 1.0 + 1.5 / (1 + sigma**2))
    truth = quadrature(target, LOW)
    state = run(target, corrector, steps=400, seed=3)
    assert max(deviations(state, truth)) < 4
    forgetful = Forgetful(target.denoisers, target.exponents)
    assert max(deviations(run(forgetful, replace(corrector, zeta=1.0), seed=3), truth)) > 8


class Hidden:
    """A denoiser without a density, as networks are."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.denoiser(x, sigma, cond)


@pytest.mark.slow
def test_guidance_that_varies_needs_no_densities() -> None:
    """log q begins as that of the noise, far above the data, where the scale is still 1."""
    target = geometric_average(Hidden(FIRST), Hidden(SECOND), lambda sigma: 1.0 + 1.5 / (1 + sigma**2))
    state = run(target, SCORE, steps=400, high=40.0, seed=7)
    truth = quadrature(geometric_average(FIRST, SECOND, 1.0 + 1.5 / (1 + LOW**2)), LOW)
    assert max(deviations(state, truth, evidence=False)) < 4
    alone = quadrature(product([SECOND]), LOW)
    assert max(deviations(state, alone, evidence=False)) > 6


@pytest.mark.slow
def test_powers_that_vary_have_the_answer_of_the_last_level() -> None:
    target = annealed(FIRST, lambda sigma: 1.0 + 1.0 / (1 + sigma))
    state = run(target, TRACE, steps=240, seed=4)
    assert max(deviations(state, quadrature(target, LOW))) < 4
    assert standard_error(state.log_evidence) < 0.03


def quadratic(x: Tensor) -> Tensor:
    return -0.5 * (x[:, 0] - 1.0) ** 2


def bent(x: Tensor) -> Tensor:
    return (2 * x[:, 0]).sin() + 0.5 * x[:, 0].abs()


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("scale", [1.5, falling], ids=["constant", "of sigma"])
@pytest.mark.parametrize("reward", [quadratic, bent])
def test_rewards_tilt_the_target_whether_or_not_they_steer(reward, scale, gradient: bool) -> None:
    target = reward_tilted(FIRST, reward, scale, gradient=gradient)
    truth = quadrature(target, 0.0, lambda x: 1.5 * reward(x))
    state = run(target, SCORE, low=0.02, to_zero=True, seed=5)
    assert max(deviations(state, truth)) < 4
    alone = quadrature(product([FIRST]), 0.0)
    assert max(deviations(state, alone, evidence=False)) > 6


def test_rewards_are_not_clamped() -> None:
    """The tilt of a reward is met though nothing else may change a weight."""
    target = reward_tilted(FIRST, quadratic, 1.5)
    truth = quadrature(target, 0.0, lambda x: 1.5 * quadratic(x))
    state = run(target, replace(SCORE, resampling=replace(BELOW_HALF, clamp=1e-6)), low=0.02, to_zero=True, seed=5)
    assert max(deviations(state, truth)) < 4
    assert float(state.particles.clipped.max()) == 0


@pytest.mark.slow
def test_a_reward_on_guidance_and_on_a_power() -> None:
    for base, corrector in ((geometric_average(FIRST, SECOND, 2.0), SCORE), (annealed(FIRST, 2.0), TRACE)):
        target = reward_tilted(base, quadratic, falling, gradient=True)
        state = run(target, corrector, low=0.02, to_zero=True, seed=6, steps=200)
        truth = quadrature(target, 0.02, lambda x: 1.5 * quadratic(x))  # without an increment in the last step
        assert max(deviations(state, truth)) < 4


def test_the_rewards_of_a_run_sum_to_the_reward_of_its_samples() -> None:
    target = reward_tilted(FIRST, bent, lambda sigma: 1.5 / (1 + sigma))
    x = HIGH * torch.randn((40, 1), generator=seeded(8), dtype=torch.float64)
    for window in (KEPT, replace(KEPT, active=(0.2, 3.0))):
        corrector = replace(SCORE, resampling=window)
        *_, state = feynman_kac(target, x, karras_sigmas(15, LOW, HIGH), generator=seeded(9), corrector=corrector)
        assert float(state.sigma) == 0
        torch.testing.assert_close(state.log_weights[0], 1.5 * bent(state.x), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_power_that_falls_to_1_with_churn() -> None:
    """The climb's noise is by the exponents at the level that it reaches, where they may sum to 1."""
    target = annealed(FIRST, lambda sigma: 2.0 if sigma > 0.5 else 1.0)
    corrector = Corrector(form="trace", probes=None, churn=4.0, resampling=BELOW_HALF)
    assert max(deviations(run(target, corrector, steps=240, seed=8), quadrature(target, LOW), evidence=False)) < 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [geometric_average(SECOND, FIRST, 2.0), annealed(FIRST, 2.0)], ids=["guided", "cold"]
)
def test_without_options_the_answer_is_nearer_than_without_weights(target: Target) -> None:
    """The corrector that a user gets, which for guidance clamps: not exact, but nearer than what it corrects."""
    truth = quadrature(target, LOW)
    errors = []
    for corrector in (Corrector(), Corrector(form="score", zeta=1.0, resampling=NEVER)):
        found = estimates(run(target, corrector, steps=100, seed=9))
        errors.append(abs(float(found.mean.mean()) - truth.mean) + abs(float(found.square.mean()) - truth.square))
    assert errors[0] < 0.5 * errors[1]
