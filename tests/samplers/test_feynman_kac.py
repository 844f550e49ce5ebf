"""Feynman-Kac correctors without chance: exact Gaussians, published formulas, what a state holds, what is refused."""

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import (
    Conditioned,
    Corrector,
    Denoiser,
    FeynmanKacState,
    Gaussian,
    GaussianMixture,
    Resampling,
    SampleNoise,
    Target,
    ancestral,
    annealed,
    draw,
    exponential_sigmas,
    feynman_kac,
    geometric_average,
    karras_sigmas,
    product,
    reward_tilted,
    start_particles,
)
from samplers.resampling import LogWeights
from samplers.solvers import Generator
from samplers.weighted_path import WeightedPath
from tests.samplers.feynman_kac_cases import (
    FIRST,
    HIGH,
    KEPT,
    LOW,
    PLAIN,
    SCORE,
    SECOND,
    TRACE,
    deviations,
    estimates,
    falling,
    gaussian,
    log_normaliser,
    mixture,
    quadrature,
    run,
    seeded,
    standard_error,
)
from tests.truth import Counted, order

# The exact Gaussian case.


@pytest.mark.parametrize("proposal", ["multistep", "ancestral", "euler_maruyama"])
@pytest.mark.parametrize("probes", [None, 1])
@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_the_particles_of_an_annealed_gaussian_have_equal_weights(beta: float, probes, proposal) -> None:
    target = annealed(gaussian(1), beta)
    corrector = replace(TRACE, proposal=proposal, probes=probes)
    state = run(target, corrector, steps=30, groups=3, k=20)
    spread = state.log_weights - state.log_weights.mean(1, keepdim=True)
    assert float(spread.abs().max()) < 1e-10
    assert state.unique_ancestors.tolist() == [20] * 3
    assert float((state.log_weights[0] - state.log_weights[1]).abs().max()) < 1e-10 if probes is None else True


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "expected"), [("left", 1.0), ("trapezoid", 2.0)])
@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_the_log_evidence_of_an_annealed_gaussian_converges_with_the_rules_order(rule, expected, beta) -> None:
    model, steps, errors = gaussian(2), [40, 80, 160, 320], []
    truth = log_normaliser(beta, model.variances + LOW**2)
    for n in steps:
        x, log_weights = start_particles(
            annealed(model, beta), (3,), HIGH, 2, gaussians=model, generator=seeded(0), dtype=torch.float64
        )
        corrector = Corrector(form="trace", proposal="ancestral", rule=rule, probes=None)
        sigmas = exponential_sigmas(n + 1, LOW, HIGH)[:-1]
        *_, state = feynman_kac(
            annealed(model, beta), x, sigmas, generator=seeded(1), log_weights=log_weights, corrector=corrector
        )
        errors.append(abs(float(state.log_evidence) - truth))
    assert abs(order(steps, errors) - expected) < 0.15
    assert errors[-1] < (0.4 if rule == "left" else 0.005)


def test_a_product_of_gaussians_of_one_covariance_has_equal_weights_and_its_log_evidence() -> None:
    """log of the integral of N(a, C) N(b, C) is log N(a - b; 0, 2 C)."""
    a = gaussian(3)
    b = Gaussian(a.mean + torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64), a.components, a.variances, 0.0)
    target = product([a, b])
    state = run(target, TRACE, steps=400, groups=1, k=20)
    assert float((state.log_weights - state.log_weights.mean()).abs().max()) < 1e-10
    doubled = Gaussian(a.mean, a.components, 2 * (a.variances + LOW**2), 0.0)
    assert float(state.log_evidence) == pytest.approx(float(doubled.log_density(b.mean[None])), abs=0.005)


def test_a_product_of_gaussians_of_other_covariances_has_its_log_evidence_and_moments() -> None:
    wide, narrow = mixture([1.0], [0.0], [1.5]), mixture([1.0], [2.0], [0.6])
    for exponents in ((1.0, 1.0), (-0.4, 1.2)):
        target = product([wide, narrow], exponents)
        state = run(target, TRACE, steps=120)
        assert max(deviations(state, quadrature(target, LOW))) < 4
        assert standard_error(state.log_evidence) < 0.02


# Against the formulas, step by step, and targets that need no correction.


@pytest.mark.parametrize("form", ["score", "trace"])
@pytest.mark.parametrize("zeta", [0.8, 1.5])
def test_log_weights_are_the_papers_sum_over_an_euler_maruyama_path(form, zeta: float) -> None:
    """Both forms written with scores, as published, on the same noise; the trace form up to what all share."""
    generator = seeded(4)
    models = [
        GaussianMixture(*(torch.rand(s, generator=generator, dtype=torch.float64) for s in ((2,), (2, 2), (2, 2))))
        for _ in range(3)
    ]
    exponents, steps, n = [-0.5, 1.5, 0.7], 12, 6
    total = sum(exponents)
    start = 3 * torch.randn((n, 2), generator=generator, dtype=torch.float64)
    sigmas = karras_sigmas(steps, 0.3, 3.0)[:-1]
    corrector = Corrector(form=form, zeta=zeta, proposal="euler_maruyama", rule="left", probes=None, resampling=KEPT)
    states = list(feynman_kac(product(models, exponents), start, sigmas, generator=seeded(5), corrector=corrector))
    x, log_weights, noise = start, torch.zeros(n, dtype=torch.float64), seeded(5)
    for state, sigma, sigma_next in zip(states, sigmas, sigmas[1:], strict=False):
        v, dv = float(sigma) ** 2, float(sigma) ** 2 - float(sigma_next) ** 2

        def joint(y: Tensor, sigma: Tensor = sigma, v: float = v) -> Tensor:
            return sum(b * (d(y[None], sigma)[0] - y) / v for b, d in zip(exponents, models, strict=True))

        joined = torch.stack([joint(row) for row in x])
        squares = sum(b * ((d(x, sigma) - x) / v).square().sum(1) for b, d in zip(exponents, models, strict=True))
        if form == "score":
            drift, gain = 0.5 * (1 + zeta**2), 0.5 * (joined.square().sum(1) - squares)
        else:
            divergence = torch.stack([torch.autograd.functional.jacobian(joint, row).trace() for row in x])
            drift = 0.5 * (zeta**2 + 1 / total)
            gain = 0.5 * (1 / total - 1) * divergence + joined.square().sum(1) / (2 * total) - 0.5 * squares
        log_weights = log_weights + dv * gain
        x = x + drift * dv * joined + zeta * math.sqrt(dv) * torch.randn(x.shape, generator=noise, dtype=x.dtype)
        torch.testing.assert_close(state.x, x, rtol=1e-10, atol=1e-10)
        ours, theirs = state.log_weights[0], log_weights
        if form == "trace":
            ours, theirs = ours - ours.mean(), theirs - theirs.mean()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert float(log_weights.std()) > 0.04


@pytest.mark.parametrize(
    "target",
    [product([FIRST, SECOND], [1.0, 0.0]), geometric_average(SECOND, FIRST, 1.0), product([FIRST])],
    ids=["exponents 1, 0", "guidance 1", "itself"],
)
def test_what_is_one_model_has_no_weights_and_is_ancestral_sampling(target: Target) -> None:
    x, sigmas = HIGH * torch.randn((50, 1), generator=seeded(6), dtype=torch.float64), karras_sigmas(20, LOW, HIGH)
    plain = list(ancestral(FIRST, x, sigmas, generator=seeded(7)))
    for form in ("score", "trace", None):
        corrected = list(feynman_kac(target, x, sigmas, generator=seeded(7), corrector=replace(PLAIN, form=form)))
        assert len(corrected) == len(plain) == 20
        for ours, theirs in zip(corrected, plain, strict=True):
            assert torch.equal(ours.log_weights, torch.zeros((1, 50), dtype=torch.float64))
            torch.testing.assert_close(ours.x, theirs.x, rtol=1e-10, atol=1e-10)
            assert torch.equal(ours.sigma, theirs.sigma)


# What a state holds.


@pytest.mark.parametrize("corrector", [SCORE, PLAIN, replace(SCORE, rule=None, churn=5.0)])
def test_a_states_prediction_is_the_targets_at_its_particles_and_level(corrector: Corrector) -> None:
    target, sigmas = geometric_average(FIRST, SECOND, 3.0), karras_sigmas(8, LOW, HIGH)
    x, log_weights = HIGH * torch.randn((12, 1), generator=seeded(29), dtype=torch.float64), torch.rand((3, 4))
    given = x.clone(), log_weights.clone()
    states = list(
        feynman_kac(target, x, sigmas, generator=seeded(0), groups=3, log_weights=log_weights, corrector=corrector)
    )
    assert torch.equal(x, given[0])
    assert torch.equal(log_weights, given[1])
    for state, sigma in zip(states, sigmas[1:], strict=True):
        assert float(state.sigma) >= float(sigma)
        if not corrector.churn:
            assert torch.equal(state.sigma, sigma)
        expected = 3 * SECOND(state.x, state.sigma) - 2 * FIRST(state.x, state.sigma)
        torch.testing.assert_close(state.denoised, expected)
    assert [state.step for state in states] == list(range(8))
    assert float(states[-1].sigma) == 0
    assert torch.equal(states[-1].x, states[-1].denoised)
    torch.testing.assert_close(states[-1].x, states[-2].denoised[_places(states[-1])])  # the last step is to it


def _places(state: FeynmanKacState) -> Tensor:
    groups, k = state.ancestors.shape
    return (state.ancestors + k * torch.arange(groups)[:, None]).flatten()


def test_the_first_log_weights_are_kept() -> None:
    target, first = geometric_average(FIRST, SECOND, 2.0), torch.randn((2, 6), generator=seeded(30)).double()
    x, corrector = (
        HIGH * torch.randn((12, 1), generator=seeded(31), dtype=torch.float64),
        replace(SCORE, resampling=KEPT),
    )
    ends = [
        list(feynman_kac(target, x, SIGMAS, generator=seeded(0), groups=2, log_weights=w, corrector=corrector))[-1]
        for w in (None, first, first.flatten())
    ]
    torch.testing.assert_close(ends[1].log_weights, ends[0].log_weights + first)
    assert torch.equal(ends[1].log_weights, ends[2].log_weights)


# What must not matter.


def elementwise(mean: float, spread: float) -> Denoiser:
    """A denoiser whose every number is a function of one number alone, so that batches cannot change a bit."""

    def denoiser(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        v = sigma**2
        return mean + spread / (spread + v) * (x - mean) / (1 + 0.1 * (x - mean) ** 2 / (1 + v))

    return denoiser


def tilted_average(scale: Any = 2.0) -> Target:
    target = geometric_average(elementwise(0.0, 1.0), elementwise(1.0, 0.5), scale)
    return reward_tilted(target, lambda x: -((x[:, 0] - 1) ** 2), falling, gradient=True)


@pytest.mark.parametrize(
    ("target", "corrector"),
    [
        (tilted_average(), SCORE),
        (tilted_average(), replace(SCORE, rule="left", churn=0.3)),
        (tilted_average(lambda sigma: 1 + 1 / (1 + sigma)), SCORE),
        (annealed(elementwise(0.5, 1.0), 2.0), replace(TRACE, probes=2)),
        (product([elementwise(0.0, 1.0), elementwise(1.0, 0.5)]), replace(TRACE, probes=1)),
    ],
    ids=["guidance", "churn", "varying", "power", "product"],
)
def test_groups_are_the_runs_that_they_are_alone_bit_for_bit(target: Target, corrector: Corrector) -> None:
    groups, k, sigmas = 3, 16, karras_sigmas(12, LOW, HIGH)
    corrector = replace(corrector, resampling=Resampling(threshold=0.999))
    noise = SampleNoise(11, range(groups * k))
    x = HIGH * noise.normal((2,), torch.float64)
    together = list(feynman_kac(target, x, sigmas, generator=noise, groups=groups, corrector=corrector))
    assert sum(int(state.particles.resampled.sum()) for state in together) > groups  # it happened
    for group in range(groups):
        rows = slice(group * k, (group + 1) * k)
        own = SampleNoise(11, range(group * k, (group + 1) * k))
        start = HIGH * own.normal((2,), torch.float64)
        for whole, alone in zip(
            together, feynman_kac(target, start, sigmas, generator=own, corrector=corrector), strict=True
        ):
            assert torch.equal(whole.x[rows], alone.x)
            assert torch.equal(whole.denoised[rows], alone.denoised)
            assert torch.equal(whole.log_weights[group], alone.log_weights[0])
            assert torch.equal(whole.ancestors[group], alone.ancestors[0])
            assert torch.equal(whole.particles.roots[group], alone.particles.roots[0])
            assert torch.equal(whole.log_evidence[group], alone.log_evidence[0])


def test_a_single_particle_moves_as_without_weights() -> None:
    x, sigmas = HIGH * torch.randn((8, 1), generator=seeded(32), dtype=torch.float64), karras_sigmas(10, LOW, HIGH)
    target = geometric_average(FIRST, SECOND, 3.0)
    ends = [
        list(feynman_kac(target, x, sigmas, generator=seeded(33), groups=8, corrector=replace(SCORE, resampling=r)))[-1]
        for r in (Resampling(threshold=1.0), Resampling(threshold=1.0, clamp=0.5), KEPT)
    ]
    assert torch.equal(ends[0].x, ends[2].x)
    assert torch.equal(ends[1].x, ends[2].x)
    assert torch.equal(ends[0].log_weights, ends[2].log_weights)


def test_particles_in_another_order_are_the_same_particles() -> None:
    order_ = torch.randperm(24, generator=seeded(12))
    for corrector in (replace(SCORE, resampling=KEPT), replace(TRACE, resampling=KEPT)):
        target = tilted_average()
        ends = []
        for indices in (range(24), order_.tolist()):
            noise = SampleNoise(13, indices)
            x = HIGH * noise.normal((2,), torch.float64)
            *_, state = feynman_kac(target, x, karras_sigmas(10, LOW, HIGH), generator=noise, corrector=corrector)
            ends.append(state)
        assert torch.equal(ends[0].x[order_], ends[1].x)
        assert torch.equal(ends[0].log_weights[:, order_], ends[1].log_weights)


def test_the_same_generator_repeats_a_run() -> None:
    target = geometric_average(FIRST, SECOND, 3.0)
    first, again, other = (run(target, SCORE, steps=20, groups=2, k=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.log_weights, again.log_weights)
    assert not torch.isclose(first.x, other.x).any()


def test_one_evaluation_of_each_denoiser_a_step() -> None:
    first, second, x = Counted(FIRST), Counted(SECOND), HIGH * torch.ones((8, 1), dtype=torch.float64)
    target = reward_tilted(product([first, second]), lambda x: x[:, 0], 0.1, gradient=True)
    churned = replace(SCORE, rule=None, churn=0.2)
    for corrector in (SCORE, replace(TRACE, probes=3), PLAIN, churned):
        for sigmas, calls in ((karras_sigmas(7, LOW, HIGH), 7), (karras_sigmas(8, LOW, HIGH)[:-1], 8)):
            for counted in (first, second):
                counted.batches.clear()
            states = list(feynman_kac(target, x, sigmas, generator=seeded(0), corrector=corrector))
            assert len(states) == 7
            assert first.batches == second.batches == [8] * calls  # one more where the last level is above 0


def test_conditions_of_one_network_are_evaluated_together_in_a_run() -> None:
    def network(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        first = torch.stack([FIRST(x, sigma), SECOND(x, sigma)])
        return first[cond, torch.arange(len(x))]

    counted = Counted(network)
    together = geometric_average(Conditioned(counted, 0), Conditioned(counted, 1), 2.0)
    apart = geometric_average(FIRST, SECOND, 2.0)
    x, sigmas = HIGH * torch.randn((8, 1), generator=seeded(1), dtype=torch.float64), karras_sigmas(6, LOW, HIGH)
    ends = [list(feynman_kac(t, x, sigmas, generator=seeded(0), corrector=SCORE))[-1] for t in (together, apart)]
    torch.testing.assert_close(ends[0].x, ends[1].x)
    torch.testing.assert_close(ends[0].log_weights, ends[1].log_weights)
    assert counted.batches == [16] * 6


def test_outside_the_active_levels_the_uncorrected_sampler_runs() -> None:
    target, x = geometric_average(FIRST, SECOND, 3.0), torch.randn((60, 1), generator=seeded(14), dtype=torch.float64)
    sigmas = karras_sigmas(20, LOW, HIGH)
    window = Resampling(threshold=1.0, active=(0.3, 2.0))
    corrected = list(
        feynman_kac(target, HIGH * x, sigmas, generator=seeded(15), corrector=replace(SCORE, resampling=window))
    )
    plain = list(feynman_kac(target, HIGH * x, sigmas, generator=seeded(15), corrector=replace(SCORE, resampling=KEPT)))
    identity, before = torch.arange(60)[None], torch.zeros((1, 60), dtype=torch.float64)
    for state, free, sigma in zip(corrected, plain, sigmas.tolist(), strict=False):
        if sigma > 2:
            assert torch.equal(state.x, free.x)
        if not 0.3 <= sigma <= 2:
            assert torch.equal(state.ancestors, identity)
            assert torch.equal(state.log_weights, before)
        before = state.log_weights
    assert any(bool(state.particles.resampled.any()) for state in corrected)


def test_threshold_0_leaves_every_particle_in_its_place_and_collects_all_weights() -> None:
    state = run(geometric_average(FIRST, SECOND, 3.0), replace(SCORE, resampling=KEPT), steps=30, groups=2, k=50)
    assert torch.equal(state.ancestors, torch.arange(50).expand(2, 50))
    assert state.unique_ancestors.tolist() == [50, 50]
    assert bool((state.particles.collected == 0).all())
    torch.testing.assert_close(state.log_evidence, state.log_weights.logsumexp(1) - math.log(50))
    assert float(state.log_weights.std()) > 0.5


@pytest.mark.slow
def test_resampling_does_not_change_the_answer() -> None:
    target = geometric_average(FIRST, SECOND, 2.0)
    truth = quadrature(target, LOW)
    for threshold in (0.0, 1.0):
        state = run(target, replace(SCORE, resampling=Resampling(threshold=threshold)), seed=16, steps=240)
        assert max(deviations(state, truth)) < 4


@pytest.mark.slow
def test_one_probe_agrees_with_the_exact_trace() -> None:
    """In two dimensions, where a probe is not exact."""
    basis = torch.linalg.qr(torch.randn((2, 2, 2), generator=seeded(17), dtype=torch.float64)).Q
    covariances = basis @ torch.tensor([[1.5, 0.1], [0.8, 0.2]], dtype=torch.float64).diag_embed() @ basis.mT
    covariances = (covariances + covariances.mT) / 2
    means = torch.tensor([[-1.5, 0.0], [1.5, 1.0]], dtype=torch.float64)
    target = annealed(GaussianMixture(torch.tensor([0.6, 0.4]), means, covariances), 1.5)
    exact = run(target, TRACE, seed=18, steps=120)
    probed = run(target, replace(TRACE, probes=1), seed=19, steps=120)
    for ours, truth in zip(estimates(probed), estimates(exact), strict=True):
        error = math.hypot(standard_error(ours), standard_error(truth))
        assert abs(float(ours.mean() - truth.mean())) < 4 * error
        assert error < 0.08


def rates(target: Target, x: Tensor, probes: int | None, groups: int = 1, times: int = 1) -> Tensor:
    """So many evaluations of a path, [times, B]."""
    path = WeightedPath(target, replace(TRACE, probes=probes), None, seeded(21), groups)
    return torch.stack([path.evaluate(x, 0.5).rate for _ in range(times)])


def test_a_probe_is_unbiased_and_turns_of_them_are_the_exact_trace() -> None:
    """In d dimensions as many in a row as the next power of 2: at once, or in turns."""
    generator = seeded(20)
    means, factors = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3), (2, 3, 3)))
    target = annealed(GaussianMixture(torch.ones(2), means, factors @ factors.mT), 2.0)
    x = torch.randn((5, 3), generator=generator, dtype=torch.float64)
    exact = rates(target, x, None)[0]
    torch.testing.assert_close(rates(target, x, 4)[0], exact, rtol=1e-10, atol=1e-10)
    turns = rates(target, x, 1, times=8)
    torch.testing.assert_close(turns[:4].mean(0), exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turns[4:].mean(0), exact, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(turns[0], exact, rtol=0.01)
    groups = 2000
    for turn, rate in enumerate(rates(target, x.repeat(groups, 1), 1, groups=groups, times=4)):
        rate = rate.reshape(groups, 5)
        error = (rate.mean(0) - exact).abs()
        assert bool((error < 4.5 * rate.std(0) / math.sqrt(groups)).all()), turn


def test_the_particles_of_a_group_share_their_probes_and_groups_do_not() -> None:
    generator = seeded(22)
    basis = torch.linalg.qr(torch.randn((2, 2), generator=generator, dtype=torch.float64)).Q
    covariance = basis @ torch.tensor([1.5, 0.1], dtype=torch.float64).diag() @ basis.mT
    model = GaussianMixture(torch.ones(1), torch.zeros((1, 2)).double(), ((covariance + covariance.mT) / 2)[None])
    x = torch.randn((400, 2), generator=generator, dtype=torch.float64)
    rate = rates(annealed(model, 2.0), x, 1, groups=100)[0]
    assert float(rate.reshape(100, 4).std(1).max()) < 1e-12
    assert len(rate.reshape(100, 4)[:, 0].round(decimals=9).unique()) == 2  # of the signs, alike or not


def test_float32_agrees_with_float64() -> None:
    """Without noise the same path: the probability flow, weighted."""
    target = geometric_average(FIRST, SECOND, 2.0)
    x = HIGH * torch.randn((30, 1), generator=seeded(24), dtype=torch.float64)
    corrector = replace(SCORE, zeta=0.0, resampling=KEPT)
    ends = [
        list(feynman_kac(target, start, karras_sigmas(30, LOW, HIGH), corrector=corrector))[-1]
        for start in (x, x.float())
    ]
    assert ends[1].x.dtype == ends[1].denoised.dtype == torch.float32
    assert ends[1].log_weights.dtype == ends[1].log_evidence.dtype == torch.float64
    torch.testing.assert_close(ends[1].x.double(), ends[0].x, rtol=0, atol=1e-3)
    torch.testing.assert_close(ends[1].log_weights, ends[0].log_weights, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("corrector", [SCORE, TRACE])
def test_float32_has_the_answer(corrector: Corrector) -> None:
    target = geometric_average(FIRST, SECOND, 0.5) if corrector is SCORE else annealed(FIRST, 2.0)
    state = run(target, corrector, dtype=torch.float32, steps=240, seed=25)
    assert state.x.dtype == torch.float32
    assert max(deviations(state, quadrature(target, LOW))) < 4


# Draws.


def weighted_state(log_weights: Tensor) -> FeynmanKacState:
    groups, k = log_weights.shape
    x = torch.arange(groups * k, dtype=torch.float64)[:, None]
    *_, state = feynman_kac(product([elementwise(0.0, 1.0)]), x, torch.tensor([1.0, 0.5]), groups=groups)
    return replace(state, x=x, particles=replace(state.particles, weights=LogWeights(log_weights)))


def test_draws_are_by_the_weights_and_stay_in_their_group() -> None:
    n, log_weights = 20_000, torch.randn((3, 5), generator=seeded(26), dtype=torch.float64)
    log_weights[1, 4] = log_weights[2, 0] = -800.0
    drawn = draw(weighted_state(log_weights), n, seeded(27))
    assert drawn.shape == (3 * n, 1)
    for group, rows in enumerate(drawn[:, 0].long().reshape(3, n)):
        share = torch.bincount(rows - 5 * group, minlength=5) / n
        w = log_weights[group].softmax(0)
        assert len(share) == 5
        assert bool(((share - w).abs() <= 4.5 * (w * (1 - w) / n).sqrt()).all())


def test_draws_of_streams_are_those_of_the_group_alone() -> None:
    log_weights = torch.randn((3, 5), generator=seeded(28), dtype=torch.float64)
    together = draw(weighted_state(log_weights), 4, SampleNoise(1, range(15))).reshape(3, 4)
    for group in range(3):
        alone = draw(weighted_state(log_weights[group : group + 1]), 4, SampleNoise(1, range(5 * group, 5 * group + 5)))
        assert torch.equal(together[group] - 5 * group, alone[:, 0])
    for streams, n in ((14, 1), (15, 6)):
        with pytest.raises(ValueError, match="generator: has"):
            draw(weighted_state(log_weights), n, SampleNoise(1, range(streams)))


# Bad input.

X = torch.ones((6, 1), dtype=torch.float64)
SIGMAS = karras_sigmas(4, LOW, HIGH)


def refused(message: str, target: Target, *, x: Tensor = X, sigmas: Tensor = SIGMAS, **options: Any) -> None:
    generator: Generator = seeded(0)
    with pytest.raises(ValueError, match=message):
        next(feynman_kac(target, x, sigmas, generator=generator, **options))


def test_groups_weights_and_schedules_that_do_not_fit_are_refused() -> None:
    target = product([FIRST, SECOND])
    for groups in (4, 0, -1):
        refused(rf"groups: {groups} do not divide a batch of 6", target, groups=groups)
    refused("groups: 1", target, x=X[:0])
    refused(r"log_weights: have shape \[5\]; needed is \[2, 3\]", target, groups=2, log_weights=torch.zeros(5))
    refused(
        "log_weights: 1 of 6 are not finite at sigma 10", target, log_weights=torch.tensor([0.0, 0, 0, 0, 0, math.nan])
    )
    for wrong in ([1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [2.0, 1.0, -1.0], [math.inf, 1.0]):
        refused("sigmas: ", target, sigmas=torch.tensor(wrong))
    refused("x: is torch.float16", target, x=X.half())
    refused("rule: 'trapezoid'", target, corrector=replace(SCORE, churn=1.0))


def test_levels_outside_a_denoisers_range_are_refused() -> None:
    class Ranged:
        sigma_min, sigma_max = 0.1, 5.0

        def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return FIRST(x, sigma)

    refused("outside the denoiser's range", product([FIRST, Ranged()]))


def test_exponents_that_are_refused_at_a_level_are_refused_before_the_first_step() -> None:
    counted = Counted(FIRST)
    turning = annealed(counted, lambda sigma: 1.0 if sigma > 0.1 else -1.0)
    refused(r"exponents: \[-1.0\] at sigma 0.05", turning)
    assert counted.batches == []


def test_exponents_that_vary_need_zeta_1_or_a_trace() -> None:
    target = geometric_average(FIRST, SECOND, lambda sigma: 2.0 + sigma)
    refused(r"zeta: 2.0; .* need 1, or form 'trace'", target, corrector=replace(SCORE, zeta=2.0))
    next(feynman_kac(target, X, SIGMAS, generator=seeded(0), corrector=replace(TRACE, zeta=2.0)))


def test_a_trace_needs_derivatives_and_so_do_rewards_that_steer() -> None:
    def detached(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return FIRST(x.detach(), sigma)

    refused("form: 'trace' needs denoisers that can be differentiated", annealed(detached, 2.0), corrector=TRACE)
    next(feynman_kac(annealed(detached, 2.0), X, SIGMAS, generator=seeded(0), corrector=replace(SCORE, form="score")))
    flat = reward_tilted(FIRST, lambda x: x[:, 0].detach(), gradient=True)
    refused("reward: has no gradient", flat, corrector=SCORE)


def test_denoisers_and_rewards_that_give_no_numbers_are_raised_with_the_level() -> None:
    def broken(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return torch.where(sigma < 1, math.nan, FIRST(x, sigma))

    with pytest.raises(ValueError, match=r"log_weights: 6 of 6 are not finite at sigma 0\.\d+"):
        list(feynman_kac(product([broken, SECOND]), X, SIGMAS, generator=seeded(0), corrector=SCORE))
    refused("reward: is not finite for 6 of 6 samples at sigma 10", reward_tilted(FIRST, lambda x: x[:, 0] / 0))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"form": "laplacian"}, "form"),
        ({"proposal": "heun"}, "proposal"),
        ({"rule": "simpson"}, "rule"),
        ({"zeta": -1.0}, "zeta"),
        ({"zeta": math.inf}, "zeta"),
        ({"zeta": math.nan}, "zeta"),
        ({"probes": 0}, "probes"),
        ({"probes": 1.5}, "probes"),
        ({"churn": -0.1}, "churn"),
        ({"churn": math.nan}, "churn"),
    ],
)
def test_correctors_out_of_range_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: "):
        Corrector(**options)


def test_weights_without_a_finite_variance_are_warned_of_once_with_the_numbers() -> None:
    target = annealed(FIRST, 3.0)
    with pytest.warns(UserWarning, match=r"zeta: 0.577 with exponents of sum 3 .* 0.333 .* 1 - 1 / B = 0.667") as found:
        list(feynman_kac(target, X, SIGMAS, generator=seeded(0), corrector=replace(SCORE, zeta=3**-0.5)))
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (SCORE, replace(SCORE, zeta=0.82), TRACE, replace(TRACE, zeta=0.1)):
            next(feynman_kac(target, X, SIGMAS, generator=seeded(0), corrector=fine))
        flat = replace(SCORE, zeta=0.0)
        for narrow in (annealed(FIRST, 0.5), geometric_average(FIRST, SECOND, 3.0)):
            next(feynman_kac(narrow, X, SIGMAS, generator=seeded(0), corrector=flat))


def test_a_term_without_a_derivative_is_not_taken_for_zero() -> None:
    class Blind:
        @torch.no_grad()
        def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return SECOND(x, sigma)

    refused("form: 'trace' needs denoisers that can be differentiated, and number 1", product([FIRST, Blind()]))


def test_conditions_within_a_group_are_one() -> None:
    def network(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return FIRST(x, sigma)

    labels = torch.arange(len(X))
    refused("cond: differs within a group", geometric_average(FIRST, Conditioned(network, labels), 2.0))
    with pytest.raises(ValueError, match="cond: differs within a group"):
        next(feynman_kac(product([network]), X, SIGMAS, {"class_labels": labels}))


def test_a_denoiser_is_no_target_and_answers_have_the_particles_shape() -> None:
    with pytest.raises(ValueError, match="target: is a GaussianMixture; needed is a Target"):
        next(feynman_kac(FIRST, X, SIGMAS))  # type: ignore[arg-type]
    refused("denoisers: number 0 gave", product([lambda x, sigma, cond=None: FIRST(x, sigma)[:1]]))


def test_a_change_of_exponents_is_not_clamped() -> None:
    """A guidance interval: the whole change comes in one step, however many there are."""
    target = geometric_average(SECOND, FIRST, lambda sigma: 2.5 if sigma < 0.5 else 1.0)
    x = HIGH * torch.randn((200, 1), generator=seeded(3), dtype=torch.float64)
    runs = []
    for clamp in (None, 1e-6):
        corrector = replace(PLAIN, resampling=Resampling(threshold=0.0, clamp=clamp))
        runs.append(list(feynman_kac(target, x, SIGMAS, generator=seeded(4), corrector=corrector)))
    jump = next(i for i, state in enumerate(runs[0]) if float(state.sigma) < 0.5)
    gains = [states[jump].log_weights - states[jump - 1].log_weights for states in runs]
    assert float(gains[1].std()) > 0.2


def test_copies_that_no_noise_tells_apart_are_not_made() -> None:
    x = HIGH * torch.randn((60, 1), generator=seeded(5), dtype=torch.float64)
    sigmas = karras_sigmas(12, LOW, HIGH)
    always = Resampling(threshold=1.0)
    last = list(
        feynman_kac(annealed(FIRST, 2.0), x, sigmas, generator=seeded(6), corrector=replace(TRACE, resampling=always))
    )[-1]
    assert not bool(last.particles.resampled.any())
    still = replace(SCORE, zeta=0.0, resampling=always)
    states = list(feynman_kac(annealed(FIRST, 0.5), x, sigmas, generator=seeded(6), corrector=still))
    assert not any(bool(state.particles.resampled.any()) for state in states)
