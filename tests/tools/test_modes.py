"""Mode scores: of exact samples, and of samples that are wrong by as much as a closed form says."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import ncx2
from torch import Tensor

from distill import toy
from samplers import GaussianMixture
from tools.modes import mode_score, sliced_wasserstein

N = 20_000
TAIL = math.exp(-8)  # of a sample in the plane: farther than 4 standard deviations from its mode


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def far_apart() -> GaussianMixture:
    """Three modes of different widths in the plane, so far apart that no sample is ever nearest to a wrong one."""
    means = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]])
    return GaussianMixture(torch.tensor([0.2, 0.3, 0.5]), means, torch.tensor([0.01, 0.04, 1.0]))


def placed(mixture: GaussianMixture, scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> Tensor:
    """Samples whose distance to their mode is scaled, and shifted along the first axis by so many deviations."""
    component = torch.multinomial(mixture.log_weights.exp(), N, replacement=True, generator=generator(seed))
    eps = scale * torch.randn(N, mixture.dim, generator=generator(seed + 1))
    eps[:, 0] += shift
    return mixture.place(component, eps)


def assert_sampled_kl(kl: float, expected: float, modes: int, slope: float = 0.0) -> None:
    """2 N KL of shares of `modes` modes is chi-square to first order; slope: the deviation of the log-ratio."""
    bias, error = (modes - 1) / (2 * N), math.sqrt((modes - 1) / 2) / N + slope / math.sqrt(N)
    assert abs(kl - expected - bias) < 5 * error, (kl, expected, error)


@pytest.mark.slow
@pytest.mark.parametrize("make", [toy.ring, toy.grid, far_apart])
def test_exact_samples_score_as_exact(make) -> None:
    mixture = make()
    score = mode_score(mixture.sample(N, generator=generator(7)), mixture)
    k = len(mixture.means)
    assert score.covered == k
    assert_sampled_kl(score.kl, 0.0, k)
    assert abs(score.near - (1 - TAIL)) < 5 * math.sqrt(TAIL / N)
    square = 1 - 8 * TAIL / (1 - TAIL)  # E[R^2 | R < 4] / 2 for R^2 / 2 ~ Exp(1)
    assert abs(score.spread**2 - square) < 5 / math.sqrt(N)

    pairs = [[mixture.sample(N, generator=generator(s + o)) for o in (100, 200)] for s in range(4)]
    floor = np.mean([sliced_wasserstein(a, b, generator(0)) for a, b in pairs])
    assert 0.2 * floor < score.wasserstein < 3 * floor
    if make is not far_apart:  # there the chance of a mode's share costs more: a sample travels 30
        size = toy.standard_deviation(mixture)
        assert score.wasserstein < 0.04 * size  # "its floor is about 0.02 times the mixture's size"


def test_a_line_is_scored_too() -> None:
    mixture = toy.two_modes()
    score = mode_score(mixture.sample(N, generator=generator(3)), mixture)
    assert score.covered == 2
    assert_sampled_kl(score.kl, 0.0, 2)
    assert score.near > 0.9995  # within 4 deviations of one or the other: all but 6e-5
    assert abs(score.spread - 1) < 5 / math.sqrt(2 * N) + 0.001


def test_a_dropped_mode_costs_its_share() -> None:
    mixture, seven = toy.ring(), toy.ring()
    seven = GaussianMixture(torch.ones(7), seven.means[1:], torch.full((7,), 0.04))
    score = mode_score(seven.sample(N, generator=generator()), mixture)
    assert score.covered == 7
    assert_sampled_kl(score.kl, math.log(8 / 7), 7)
    assert abs(score.near - (1 - TAIL)) < 5 * math.sqrt(TAIL / N)
    assert score.wasserstein > 5 * mode_score(mixture.sample(N, generator=generator()), mixture).wasserstein

    line = toy.two_modes()
    right = line.place(torch.ones(N, dtype=torch.long), torch.randn(N, 1, generator=generator()))
    dropped = mode_score(right, line)
    assert dropped.covered == 1
    assert dropped.kl == pytest.approx(-math.log(0.7), abs=1e-3)  # a tail of 3e-5 is nearer to the other mode
    # 0.3 of the mass travels 4, but not all of it: 2-Wasserstein of N(2, .) to the mixture on a line is monotone.
    assert dropped.wasserstein == pytest.approx(exact_distance_on_a_line(), rel=0.03)


def exact_distance_on_a_line() -> float:
    """W2 of N(2, 1/4) to the two modes, by quantiles: 20,001 bisections."""
    from scipy.stats import norm

    u = (np.arange(20_000) + 0.5) / 20_000
    grid = np.linspace(-6, 6, 400_001)
    cdf = 0.3 * norm.cdf(grid, -2, 0.5) + 0.7 * norm.cdf(grid, 2, 0.5)
    return float(np.sqrt(np.mean((np.interp(u, cdf, grid) - norm.ppf(u, 2, 0.5)) ** 2)))


def test_wrong_shares_cost_their_divergence() -> None:
    mixture = toy.two_modes()
    even = mixture.place(torch.arange(N) % 2, 0.1 * torch.randn(N, 1, generator=generator()))
    score = mode_score(even, mixture)
    assert score.covered == 2
    assert score.kl == pytest.approx(0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7), rel=1e-6)


def test_collapsed_modes_have_no_spread() -> None:
    mixture = toy.ring()
    points = mode_score(mixture.means.repeat(100, 1), mixture)
    assert (points.covered, points.near) == (8, 1.0)
    assert (points.kl, points.spread) == pytest.approx((0, 0), abs=1e-6)
    one = mode_score(mixture.means[:1].repeat(N, 1), mixture)
    assert (one.covered, one.near) == (1, 1.0)
    assert (one.kl, one.spread) == pytest.approx((math.log(8), 0), abs=1e-6)
    # A point at mu: E|x - mu|^2 / d of the mixture around it is the squared distance of every projection, meaned.
    expected = math.sqrt(2.04 + 4 / 2)
    assert one.wasserstein == pytest.approx(expected, rel=5 * 0.5 / math.sqrt(100))
    half = mode_score(placed(far_apart(), scale=0.5), far_apart())
    assert abs(half.spread - 0.5) < 5 * 0.5 / math.sqrt(4 * N)


def test_wide_modes_lose_samples_by_their_own_width() -> None:
    """Twice as wide: R^2 / 2 ~ 4 Exp(1), cut at 8. The modes differ in width a hundredfold in variance."""
    mixture = far_apart()
    score = mode_score(placed(mixture, scale=2.0), mixture)
    inside = 1 - math.exp(-2)
    assert abs(score.near - inside) < 5 * math.sqrt(inside * (1 - inside) / N)
    square = 4 * (1 - 2 * math.exp(-2) / inside)
    assert abs(score.spread**2 - square) < 5 * 4 / math.sqrt(N)
    assert score.covered == 3


def test_a_shifted_set_moves_every_number() -> None:
    """By two deviations of each mode: the squared distance to it is non-central chi-square."""
    mixture = far_apart()
    score = mode_score(placed(mixture, shift=2.0), mixture)
    law = ncx2(2, 4.0)
    inside = law.cdf(16)
    assert abs(score.near - inside) < 5 * math.sqrt(inside * (1 - inside) / N)
    square = law.expect(lb=0, ub=16, conditional=True) / 2
    assert abs(score.spread**2 - square) < 5 * float(law.std()) / 2 / math.sqrt(N)
    assert_sampled_kl(score.kl, 0.0, 3)

    ring, shift = toy.ring(), torch.tensor([3.0, 4.0])
    moved = mode_score(ring.sample(N, generator=generator(5)) + shift, ring)
    assert moved.wasserstein == pytest.approx(5 / math.sqrt(2), rel=5 * math.sqrt(0.5) / 2 / math.sqrt(100))
    assert moved.near < 0.5


def test_a_mode_counts_from_a_quarter_of_its_due_and_of_near_samples_only() -> None:
    mixture = GaussianMixture(torch.ones(2), torch.tensor([[-10.0], [10.0]]), torch.ones(2))
    for left, covered in ((124, 1), (125, 2), (126, 2)):  # due are 500 of 1000
        samples = torch.cat([torch.full((left, 1), -10.0), torch.full((1000 - left, 1), 10.0)])
        assert mode_score(samples, mixture).covered == covered, left
    away = torch.cat([torch.full((500, 1), -14.1), torch.full((500, 1), 13.9)])
    score = mode_score(away, mixture)
    assert (score.covered, score.near) == (1, 0.5)
    assert score.kl == pytest.approx(0, abs=1e-7)
    assert score.spread == pytest.approx(3.9, rel=1e-6)  # of the near ones


def test_a_score_repeats_and_its_reference_follows_the_seed() -> None:
    mixture = toy.ring()
    samples = mixture.sample(500, generator=generator(9))
    assert mode_score(samples, mixture, 1) == mode_score(samples, mixture, 1)
    assert mode_score(samples, mixture, 1).wasserstein != mode_score(samples, mixture, 2).wasserstein
    assert mode_score(samples.half(), mixture).covered == 8


@pytest.mark.parametrize(
    "samples", [torch.zeros(5, 3), torch.zeros(5), torch.zeros(5, 2, 1), torch.tensor([[0.0, math.nan]])]
)
def test_samples_that_cannot_be_judged(samples: Tensor) -> None:
    with pytest.raises(ValueError, match=r"samples: shape .* needed are finite rows \[N, 2\]"):
        mode_score(samples, toy.ring())


def assigned(a: Tensor, b: Tensor) -> float:
    """The squared 2-Wasserstein distance of two sets of as many points, as an assignment problem."""
    cost = torch.cdist(a.double(), b.double()).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].mean())


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_sliced_wasserstein_is_the_optimal_assignment_of_projections(dim: int) -> None:
    a, b = (torch.randn(40, dim, generator=generator(s)) * (s + 1) for s in (1, 2))
    directions = torch.randn(6, dim, generator=generator(3))
    directions /= directions.norm(dim=1, keepdim=True)
    expected = np.mean([assigned((a @ d)[:, None], (b @ d)[:, None]) for d in directions])
    assert sliced_wasserstein(a, b, generator(3), slices=6) == pytest.approx(math.sqrt(expected), rel=1e-5)
    if dim == 1:
        assert sliced_wasserstein(a, b) == pytest.approx(math.sqrt(assigned(a, b)), rel=1e-6)


@pytest.mark.slow
def test_sliced_wasserstein_of_two_gaussians() -> None:
    """|m|^2 / d + (s - t)^2, squared, for N(0, s^2) and N(m, t^2); a pure shift on a line is its length, exactly."""
    d, n, slices, s, t = 3, N, 300, 1.0, 1.5
    m = torch.tensor([1.0, -2.0, 0.5])
    a, b = s * torch.randn(n, d, generator=generator(1)), m + t * torch.randn(n, d, generator=generator(2))
    square = float(m.square().sum())
    expected = square / d + (s - t) ** 2
    # var (m theta)^2 on the sphere is |m|^4 (3 / (d (d + 2)) - 1 / d^2)
    error = square * math.sqrt((3 / (d * (d + 2)) - 1 / d**2) / slices) + 4 * math.sqrt(expected) * t / math.sqrt(n)
    assert abs(sliced_wasserstein(a, b, generator(3), slices=slices) ** 2 - expected) < 5 * error
    line = torch.randn(100, 1, generator=generator(4))
    assert sliced_wasserstein(line, line.flip(0) + 3.25) == pytest.approx(3.25, rel=1e-6)
    assert sliced_wasserstein(a, a.flip(0)) == 0.0
    assert sliced_wasserstein(a, b, generator(5)) == pytest.approx(sliced_wasserstein(b, a, generator(5)), rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [((5, 2), (4, 2)), ((5, 2), (5, 3)), ((5,), (5,))])
def test_sets_that_cannot_be_compared(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needed are two sets of as many rows"):
        sliced_wasserstein(torch.zeros(a), torch.zeros(b))
