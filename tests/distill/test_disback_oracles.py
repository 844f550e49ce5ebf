"""DisBack against closed forms: the pull of a bridge, its ratio, and a ratio from scores alone."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distill import DIVERGENCES, Fixed, OneStep, Trainer, train
from distill.discriminator import log_ratio
from distill.optim import Update
from distill.targets import Backtracking, ScoreInterpolation
from distill.weights import RatioWeight
from samplers import GaussianMixture
from tests.distill.test_discriminator import LEVELS, P, Q, correlation_and_slope, trained_heads
from tests.distill.test_trainer import (
    START,
    Affine,
    Exact,
    ExactFake,
    assert_agree,
    divergence_gradient,
    exact_weight,
    frozen,
    gradients,
    unweighted,
)
from tests.truth import chain_log_ratio, relative_error
from tools.bench_toys import BatchShare

GRID = torch.linspace(-60, 60, 60_001, dtype=torch.float64)


def mixture(weights: list[float], means: list[float], variances: list[float]) -> GaussianMixture:
    """On a line."""
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (weights, means, variances)]
    return GaussianMixture(tensors[0], tensors[1][:, None], tensors[2])


FIRST = mixture([1.0], [1.4], [0.8])  # the law of the first student, which the last node knows exactly
TEACHER = mixture([0.35, 0.65], [-1.2, 0.9], [0.1, 0.3])


class Bridge(ScoreInterpolation):
    """The interpolation of exact scores, with the density whose score it is: p_N^(1 - f) p_0^f / Z at each level."""

    def __init__(self, fraction: float, start: GaussianMixture = FIRST, end: GaussianMixture = TEACHER) -> None:
        super().__init__(start, end)
        self.ends, self.fraction = (start, end), fraction
        self.move(fraction)

    def log_density(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        level = sigma if isinstance(sigma, float) else float(sigma.flatten()[0])
        return (
            self._unnormalised(x, level) - torch.trapezoid(self._unnormalised(GRID[:, None], level).exp(), GRID).log()
        )

    def _unnormalised(self, x: Tensor, sigma: float) -> Tensor:
        return torch.lerp(*(end.log_density(x, sigma) for end in self.ends), self.fraction)


FRACTIONS = pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])


@FRACTIONS
def test_an_interpolation_of_scores_is_the_score_of_the_geometric_bridge(fraction: float) -> None:
    bridge, sigma = Bridge(fraction), torch.tensor(0.6, dtype=torch.float64)
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)[:, None].requires_grad_()
    (expected,) = torch.autograd.grad(bridge.log_density(x, sigma).sum(), x)
    assert relative_error((bridge(x.detach(), sigma) - x.detach()) / sigma**2, expected) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse-kl", "jensen-shannon", "forward-kl"])
@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_the_gradient_on_the_way_is_that_of_the_divergence_to_the_bridge(name: str, fraction: float) -> None:
    """With the bridge's own ratio, for every divergence; with the real data's ratio it is the gradient of nothing."""
    student, bridge, sigma = Affine(-1.2, 1.7), Bridge(fraction), 1.2
    options = {"ratio_weight": exact_weight(name), "weighting": unweighted}
    mean, error = gradients(student, bridge, sigma, adversary=Exact(bridge, student), **options)  # type: ignore[arg-type]
    expected = sigma**2 * divergence_gradient(DIVERGENCES[name], student, bridge, sigma)  # type: ignore[arg-type]
    assert_agree(mean, error, expected)
    if name != "reverse-kl":
        wrong, error = gradients(student, bridge, sigma, adversary=Exact(TEACHER, student), **options)  # type: ignore[arg-type]
        assert bool(((wrong - expected).abs() > 5 * error).any())


def divergence_to(bridge: Bridge, student: Affine, sigma: float) -> float:
    """KL(q || bridge) at a noise level, by quadrature."""
    log_q = student.law().log_density(GRID[:, None], sigma)
    kept = log_q > -300
    log_p = bridge.log_density(GRID[:, None], sigma)
    return float(torch.trapezoid((log_q.exp() * (log_q - log_p))[kept], GRID[kept]))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_steps_towards_a_point_of_the_path_bring_the_student_nearer_to_it(fraction: float) -> None:
    """KL to it falls in every ten steps, with exact scores of both."""
    student, bridge, sigma = Affine(1.4, 0.8**0.5), Bridge(fraction), 0.7
    trainer = trainer_towards(student, Fixed(bridge), sigma)
    values = [divergence_to(bridge, student, sigma)]
    for n, _ in enumerate(train(trainer, 40), start=1):
        if n % 10 == 0:
            values.append(divergence_to(bridge, student, sigma))
    assert all(after < before for before, after in pairwise(values)), values
    assert values[-1] < 0.5 * values[0]


def trainer_towards(student: Affine, target: Fixed | Backtracking, sigma: float) -> Trainer:
    """One noise level, plain gradient steps."""
    fake = ExactFake(student)
    return Trainer(
        OneStep(student, START),
        fake,
        target,
        Update(torch.optim.SGD(student.parameters()), lambda step: 0.1),
        frozen(fake),
        student_level=lambda u: torch.full_like(u, sigma),
        fake_level=lambda u: torch.full_like(u, sigma),
        share=BatchShare(0, 4096),  # type: ignore[arg-type]
        shape=(1,),
        weighting=unweighted,
    )


def test_a_walk_ends_where_the_teacher_alone_leads() -> None:
    """From the first student the walk and the teacher alone find the same law; the walk's gap is smaller at first."""
    sigma, found, gaps = 0.7, [], []
    for walks in (True, False):
        student = Affine(1.4, 0.8**0.5)
        target = Backtracking(ScoreInterpolation(FIRST, TEACHER), TEACHER, 30) if walks else Fixed(TEACHER)
        metrics = list(train(trainer_towards(student, target, sigma), 150))
        gaps.append([float(m["gap"]) for m in metrics])
        found.append(torch.stack([student.shift.detach(), student.scale.detach().abs()]))
        assert target.final
    assert gaps[0][0] < 0.01 * gaps[1][0]
    assert max(gaps[0]) < max(gaps[1])
    assert relative_error(found[0], found[1]) < 0.05


# The bridge's ratio


@FRACTIONS
@pytest.mark.parametrize("sigma", [0.3, 1.5])
def test_two_ratios_interpolated_and_normalised_are_that_of_the_bridge(fraction: float, sigma: float) -> None:
    """E_q r = 1 finds the constant: by quadrature, and by the weight's own means over samples."""
    bridge, student = Bridge(fraction), mixture([1.0], [0.4], [1.5])

    def both(x: Tensor) -> Tensor:
        """ln of start and teacher over the student, as two exact discriminators say."""
        return torch.lerp(*(p.log_density(x, sigma) - student.log_density(x, sigma) for p in bridge.ends), fraction)

    log_q = student.log_density(GRID[:, None], sigma)
    near = log_q > -200
    ln_z = torch.trapezoid((log_q + both(GRID[:, None]))[near].exp(), GRID[near]).log()
    exact = bridge.log_density(GRID[:, None], sigma) - log_q
    assert relative_error((both(GRID[:, None]) - ln_z)[near], exact[near]) < 1e-9
    assert abs(float(ln_z)) > 0.01

    x = student.sample(20_000, sigma, torch.Generator().manual_seed(0))
    weight = RatioWeight(DIVERGENCES["forward-kl"], clip=(1e-9, 1e9), bins=1, free=True)
    found = weight(both(x), torch.full((len(x),), sigma))
    r = (bridge.log_density(x, sigma) - student.log_density(x, sigma)).exp()
    error = float(r.std() / r.mean()) / math.sqrt(len(r))
    uncut = (r > 1e-8) & (r < 1e8)
    assert float((found / r).log()[uncut].abs().max()) < 5 * error


@pytest.mark.parametrize("distance", [2.0, 8.0, 16.0])
def test_the_constant_of_a_bridge_is_found_before_its_ratio_is_bounded(distance: float) -> None:
    """Student and start N(0, 1), teacher N(distance, 1), halfway: ln r of the two heads is below -100 for nearly all,
    and a bound on it would leave nothing of the weights."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double()
    heads = 0.5 * (distance * x - distance**2 / 2)  # (ln p / q + ln p_start / q) / 2, p_start = q
    exact = (0.5 * distance * x - distance**2 / 8).exp()  # N(distance / 2, 1) over N(0, 1): E_q r = 1
    weight, sigma = RatioWeight(DIVERGENCES["forward-kl"], bins=1, free=True), torch.ones(len(x))
    found = weight(heads, sigma)
    r = (exact / exact.mean()).clamp(0.1, 20)
    assert relative_error(found, r / r.mean()) < 1e-4
    assert float(found.std()) > 1
    assert float(RatioWeight(DIVERGENCES["forward-kl"], bins=1)(heads - 100, sigma).std()) < 1e-6  # as it was


def test_a_free_ratio_needs_its_constant() -> None:
    with pytest.raises(ValueError, match="normalise: False; a ratio that is free up to a constant needs it"):
        RatioWeight(DIVERGENCES["forward-kl"], normalise=False, free=True)


START_LAW = GaussianMixture(torch.ones(1), torch.tensor([[1.5]]), torch.tensor([0.6]))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["teacher", "fake"])
def test_trained_heads_of_a_bridge_know_its_ratio_all_the_way(place: str) -> None:
    """Against the exact ratio; at the teacher, also against the one from scores alone."""
    adversary, network = trained_heads(place, 0, start=START_LAW)
    assert adversary.bridges
    target = Backtracking(ScoreInterpolation(START_LAW, network), network, 9)
    generator = torch.Generator().manual_seed(1)
    for n in range(0, 10, 3):
        target.begin(n)
        for sigma in LEVELS:
            x = torch.cat([m.sample(1000, sigma, generator) for m in (START_LAW, P, Q)])
            level = torch.full((len(x),), sigma)
            logits = adversary.compare(network, target, x, level, None, adversarial=False).logits
            assert logits is not None
            ratios = [p.log_density(x, sigma) - Q.log_density(x, sigma) for p in (START_LAW, P)]
            correlation, slope = correlation_and_slope(
                log_ratio(logits), torch.lerp(ratios[0], ratios[1], target.fraction)
            )
            assert correlation > 0.8, (n, sigma)
            assert 0.6 < slope < 1.4, (n, sigma)
    assert target.final
    chain = chain_log_ratio(P, Q, x, torch.logspace(math.log10(LEVELS[-1]), 1, 17), 16, generator)
    assert correlation_and_slope(log_ratio(logits), chain)[0] > 0.8


# A ratio from scores alone


def plane(seed: int, modes: int, variance: float) -> GaussianMixture:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(modes, 2, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.ones(modes), means, torch.full((modes,), variance, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_the_ratio_from_scores_alone_is_that_of_two_mixtures(sigma: float) -> None:
    """With 16 levels and 4 chains nearly, at points of either; with four times as many of both a quarter as wrong."""
    p, q, generator = plane(0, 8, 0.05), plane(1, 5, 0.2), torch.Generator().manual_seed(2)
    x = torch.cat([m.sample(500, sigma, generator) for m in (p, q)])
    exact, errors = p.log_density(x, sigma) - q.log_density(x, sigma), []
    for levels, chains in ((16, 4), (64, 16)):
        sigmas = torch.logspace(math.log10(sigma), math.log10(5), levels + 1, dtype=torch.float64)
        found = chain_log_ratio(p, q, x, sigmas, chains, generator)
        assert correlation_and_slope(found, exact)[0] > 0.98
        errors.append(float((found - exact).square().mean().sqrt() / exact.std()))
        assert abs(float((found - exact).mean())) < 0.1
    assert errors[0] < 0.35
    assert errors[1] < 0.3 * errors[0]


def test_the_ratio_of_a_law_to_itself_is_one() -> None:
    p, generator = plane(0, 8, 0.02), torch.Generator().manual_seed(2)
    found = chain_log_ratio(p, p, p.sample(5, 0.1, generator), torch.tensor([0.1, 1.0, 5.0]), 2, generator)
    assert found.tolist() == [0.0] * 5
