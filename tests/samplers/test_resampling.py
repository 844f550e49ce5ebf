"""Resampling schemes: their expectations, their bounds, their variances, and what rounding must not do to them."""

import math

import pytest
import torch
from torch import Tensor

from samplers import RESAMPLERS, SampleNoise, ess
from samplers.resampling import LogWeights, Resampler

every_scheme = pytest.mark.parametrize("scheme", RESAMPLERS.values(), ids=RESAMPLERS)
LARGEST = 1 - 2**-53  # of the uniform numbers


class Constant(SampleNoise):
    """So many streams whose uniform numbers are all the one given."""

    def __init__(self, count: int, number: float) -> None:
        super().__init__(0, range(count))
        self.number = number

    def uniform(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.full((len(self),), self.number, dtype=torch.float64, device=device)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(ancestors: Tensor) -> Tensor:
    return torch.zeros_like(ancestors).scatter_add(1, ancestors, torch.ones_like(ancestors))


def repeated(scheme: Resampler, log_weights: Tensor, times: int, generator: torch.Generator) -> Tensor:
    """The counts of one group's particles, resampled so many times, [times, K]."""
    return counts(scheme(log_weights.repeat(times, 1), generator)).double()


def random_weights(k: int, spread: float, seed: int, groups: int = 1) -> Tensor:
    return spread * torch.randn((groups, k), generator=seeded(seed), dtype=torch.float64)


def bounds(name: str, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The fewest and the most copies; expected: K w. To rounding, a whole number is one."""
    low, high = (expected + 1e-9).floor(), (expected - 1e-9).ceil()
    most = torch.full_like(expected, expected.shape[1])
    return {
        "systematic": (low, high),
        "ssp": (low, high),
        "stratified": ((expected - 2 + 1e-9).ceil().clamp_min(0), (expected + 2 - 1e-9).floor()),
        "residual": (low, most),
        "multinomial": (torch.zeros_like(low), most),
    }[name]


@every_scheme
@pytest.mark.parametrize(("k", "spread"), [(2, 1.0), (7, 0.3), (16, 2.0)])
def test_expected_copies_are_k_times_the_weight(scheme: Resampler, k: int, spread: float) -> None:
    log_weights, times = random_weights(k, spread, k), 20_000
    copies = repeated(scheme, log_weights, times, seeded(1))
    expected = k * log_weights.softmax(-1)[0]
    error = (copies.mean(0) - expected).abs()
    assert bool((error <= 4.5 * copies.std(0) / math.sqrt(times) + 1e-12).all())


@every_scheme
def test_a_permutation_of_the_particles_permutes_their_expected_copies(scheme: Resampler) -> None:
    log_weights, order, times = random_weights(9, 1.5, 3), torch.randperm(9, generator=seeded(4)), 20_000
    straight = repeated(scheme, log_weights, times, seeded(5))
    permuted = repeated(scheme, log_weights[:, order], times, seeded(6))
    error = (straight.mean(0)[order] - permuted.mean(0)).abs()
    spread = (straight.var(0)[order] + permuted.var(0)).sqrt() / math.sqrt(times)
    assert bool((error <= 4.5 * spread + 1e-12).all())


@pytest.mark.parametrize("name", RESAMPLERS)
def test_random_sweep_copies_lie_within_the_schemes_bounds_and_ancestors_rise(name: str) -> None:
    sizes = [1, 2, 3, 5, 8, 31, 64, 257]
    for case in range(60):
        k, generator = sizes[case % len(sizes)], seeded(100 + case)
        spread = 10 ** (4 * float(torch.rand((), generator=generator)) - 2)  # equal to one-sided
        log_weights = spread * torch.randn((5, k), generator=generator, dtype=torch.float64) + 1e3 * (case - 30)
        ancestors = RESAMPLERS[name](log_weights, generator)
        assert ancestors.dtype == torch.int64
        assert ancestors.shape == (5, k)
        assert int(ancestors.min()) >= 0
        assert int(ancestors.max()) < k
        assert bool((ancestors.diff(dim=1) >= 0).all())
        low, high = bounds(name, k * log_weights.softmax(-1))
        copies = counts(ancestors)
        assert bool((copies >= low).all()), (case, k, spread)
        assert bool((copies <= high).all()), (case, k, spread)


@pytest.mark.parametrize("u", [0.0, LARGEST, 0.5])
@pytest.mark.parametrize("name", ["systematic", "stratified", "residual", "ssp"])
@pytest.mark.parametrize("k", [1, 2, 3, 6, 10, 49, 1000])
def test_equal_weights_copy_every_particle_once_whatever_the_numbers_are(name: str, k: int, u: float) -> None:
    for level in (0.0, -745.3):
        ancestors = RESAMPLERS[name](torch.full((2, k), level, dtype=torch.float64), Constant(2 * k, u))
        assert torch.equal(ancestors, torch.arange(k).expand(2, k))


@pytest.mark.parametrize("u", [0.0, LARGEST, 0.3])
@pytest.mark.parametrize("name", ["systematic", "residual", "ssp"])
def test_weights_of_whole_copies_are_copied_exactly_so_often(name: str, u: float) -> None:
    """Weights k / K: with no fraction left there is nothing to draw."""
    for seed, k in enumerate([3, 7, 10, 30, 100, 1000]):
        whole = counts(torch.randint(k, (4, k), generator=seeded(seed)))
        log_weights = torch.where(whole > 0, (whole.double() / k).clamp_min(1e-300).log(), -800.0)
        ancestors = RESAMPLERS[name](log_weights, Constant(4 * k, u))
        assert torch.equal(counts(ancestors), whole)


@every_scheme
@pytest.mark.parametrize("u", [0.0, LARGEST])
def test_a_particle_of_weight_zero_is_never_chosen(scheme: Resampler, u: float) -> None:
    log_weights = random_weights(12, 1.0, 7, groups=6)
    gone = torch.rand((6, 12), generator=seeded(8)) < 0.5
    gone[0], gone[1] = False, True
    gone[0, 0] = gone[0, 11] = True  # first and last
    gone[1, 5] = False  # all but one
    log_weights[gone] = -800.0
    assert bool((log_weights.softmax(-1)[gone] == 0).all())
    for generator in (Constant(72, u), seeded(9)):
        assert not bool((counts(scheme(log_weights, generator)) * gone).any())


@every_scheme
@pytest.mark.parametrize("k", [1, 2, 33, 500])
def test_all_the_mass_on_the_first_or_the_last_particle(scheme: Resampler, k: int) -> None:
    for place in (0, k - 1):
        log_weights = torch.full((1, k), -800.0, dtype=torch.float64)
        log_weights[0, place] = 0.0
        for u in (0.0, 0.4, LARGEST):
            assert bool((scheme(log_weights, Constant(k, u)) == place).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", RESAMPLERS)
def test_4096_particles_have_the_bounds_of_their_scheme(name: str) -> None:
    equal = torch.full((1, 4096), -3.0, dtype=torch.float64)
    if name != "multinomial":
        assert torch.equal(RESAMPLERS[name](equal, Constant(4096, LARGEST))[0], torch.arange(4096))
    log_weights = random_weights(4096, 1.5, 11)
    low, high = bounds(name, 4096 * log_weights.softmax(-1))
    for generator in (seeded(1), Constant(4096, 0.0), Constant(4096, LARGEST)):
        copies = counts(RESAMPLERS[name](log_weights, generator))
        assert int(copies.sum()) == 4096
        assert bool((copies >= low).all())
        assert bool((copies <= high).all())


@every_scheme
def test_groups_are_the_runs_that_they_are_alone_bit_for_bit(scheme: Resampler) -> None:
    log_weights = random_weights(20, 1.5, 12, groups=4)
    together = scheme(log_weights, SampleNoise(3, range(80)))
    for group in range(4):
        alone = scheme(log_weights[group : group + 1], SampleNoise(3, range(20 * group, 20 * group + 20)))
        assert torch.equal(together[group], alone[0])


@every_scheme
def test_a_groups_ancestors_do_not_depend_on_the_other_groups_weights(scheme: Resampler) -> None:
    log_weights = random_weights(20, 1.5, 13, groups=3)
    other = log_weights.clone()
    other[::2] = random_weights(20, 3.0, 14, groups=2)
    assert torch.equal(scheme(log_weights, seeded(1))[1], scheme(other, seeded(1))[1])


@every_scheme
def test_the_same_generator_repeats_and_another_does_not(scheme: Resampler) -> None:
    log_weights = random_weights(64, 1.0, 15, groups=4)
    assert torch.equal(scheme(log_weights, seeded(1)), scheme(log_weights, seeded(1)))
    assert not torch.equal(scheme(log_weights, seeded(1)), scheme(log_weights, seeded(2)))
    assert torch.equal(scheme(log_weights + 55.0, seeded(1)), scheme(log_weights, seeded(1)))  # unnormalised


def test_variances_of_the_copies_are_the_known_ones_and_in_their_order() -> None:
    """f (1 - f) of a fraction f for systematic and SSP, f (1 - f / m) with m left for residual, K w (1 - w)."""
    log_weights, times = random_weights(10, 1.0, 16), 40_000
    expected = 10 * log_weights.softmax(-1)[0]
    f = expected - expected.floor()
    known = {
        "systematic": f * (1 - f),
        "ssp": f * (1 - f),
        "residual": f * (1 - f / f.sum()),
        "multinomial": expected * (1 - expected / 10),
    }
    total = {}
    for name, scheme in RESAMPLERS.items():
        variance = repeated(scheme, log_weights, times, seeded(17)).var(0)
        total[name] = float(variance.sum())
        if name in known:
            torch.testing.assert_close(variance, known[name], rtol=0.05, atol=0.005)
    assert max(total["systematic"], total["ssp"]) < 0.9 * total["residual"]
    assert total["residual"] < 0.9 * total["multinomial"]
    assert total["systematic"] < total["stratified"] < total["multinomial"]


def test_copies_by_ssp_are_negatively_correlated_and_independent_draws_by_multinomial_are_so() -> None:
    log_weights, times = random_weights(6, 0.5, 18), 40_000
    copies = repeated(RESAMPLERS["ssp"], log_weights, times, seeded(19))
    off = ~torch.eye(6, dtype=torch.bool)
    assert float(copies.T.cov()[off].max()) < 5 * 0.25 / math.sqrt(times)  # 5 standard errors of two coins

    w = log_weights.softmax(-1)[0]
    covariance = repeated(RESAMPLERS["multinomial"], log_weights, times, seeded(20)).T.cov()
    torch.testing.assert_close(covariance, 6 * (w.diag() - w[:, None] * w), rtol=0, atol=0.05)


@every_scheme
def test_schemes_refuse_what_are_no_log_weights_of_groups(scheme: Resampler) -> None:
    for wrong in (torch.zeros(4), torch.zeros((0, 4)), torch.zeros((4, 0)), torch.zeros((1, 2, 3))):
        with pytest.raises(ValueError, match=r"log_weights: have shape"):
            scheme(wrong.double(), seeded(0))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"log_weights: 2 are not finite"):
            scheme(torch.tensor([[0.0, bad, bad]]), seeded(0))
    with pytest.raises(ValueError, match=r"generator: has 5 sample streams for 6 particles"):
        scheme(torch.zeros((2, 3)), SampleNoise(0, range(5)))


def test_ess_is_k_for_equal_weights_1_for_one_particle_and_the_formula_between() -> None:
    log_weights = torch.tensor([[7.0, 7.0, 7.0, 7.0], [0.0, -900.0, -900.0, -900.0]], dtype=torch.float64)
    torch.testing.assert_close(ess(log_weights), torch.tensor([4.0, 1.0]).double(), rtol=1e-14, atol=0)
    w = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 2.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(ess(w.log() - 1000), w.sum(1) ** 2 / (w**2).sum(1), rtol=1e-11, atol=0)


def test_log_weights_know_their_entropy_mean_and_probabilities() -> None:
    w = torch.tensor([[0.1, 0.2, 0.3, 0.4], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    weights = LogWeights(w.log())
    p = w / w.sum(1, keepdim=True)
    torch.testing.assert_close(weights.probabilities, p)
    torch.testing.assert_close(weights.log_mean, w.mean(1).log())
    torch.testing.assert_close(weights.entropy, -(p * p.log()).sum(1))
    assert float(weights.entropy[1]) == pytest.approx(math.log(4), rel=1e-14)
    lone = LogWeights(torch.tensor([[0.0, -2000.0]], dtype=torch.float64))
    assert float(lone.entropy) == 0
    assert float(lone.log_mean) == pytest.approx(-math.log(2))
    assert torch.equal(LogWeights.equal(2, 5).values, torch.zeros((2, 5), dtype=torch.float64))


def test_log_weights_are_replaced_and_never_changed() -> None:
    values = random_weights(4, 1.0, 20, groups=2)
    before, weights = values.clone(), LogWeights(values)
    first = weights.ess
    more = weights + torch.arange(8.0).reshape(2, 4)  # float32
    assert torch.equal(weights.values, before)
    assert torch.equal(more.values, before + torch.arange(8.0).reshape(2, 4).double())
    assert more.values.dtype == torch.float64
    assert torch.equal(weights.ess, first)
    assert not torch.allclose(more.ess, first)  # what is remembered of one is not taken for the other's
    with pytest.raises(AttributeError):
        weights.values = values  # type: ignore[misc]


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros((2, 0)), torch.zeros((2, 3), dtype=torch.int64)])
def test_log_weights_refuse_what_is_not_a_matrix_of_floats(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"log_weights: have shape"):
        LogWeights(wrong)
