"""Particles and when they are resampled: what resampling must leave as it is, and what is counted."""

import math

import pytest
import torch
from torch import Tensor

from samplers import RESAMPLERS, Resampling, SampleNoise
from samplers.particles import Particles
from samplers.resampling import LogWeights

every_scheme = pytest.mark.parametrize("scheme", RESAMPLERS.values(), ids=RESAMPLERS)
ALWAYS = Resampling(threshold=1.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def increments(groups: int, k: int, seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(groups * k, generator=seeded(seed), dtype=torch.float64)


def weighed(groups: int, k: int, seed: int, spread: float = 1.0) -> Particles:
    start = Particles.begin(LogWeights.equal(groups, k), 10.0)
    return start.weigh(increments(groups, k, seed, spread), ALWAYS, 10.0)


def test_fresh_particles_are_their_own_ancestors() -> None:
    fresh = Particles.begin(LogWeights.equal(2, 5), 10.0)
    places = torch.arange(5).expand(2, 5)
    assert torch.equal(fresh.ancestors, places)
    assert torch.equal(fresh.roots, places)
    assert fresh.unique_ancestors.tolist() == [5, 5]
    assert fresh.log_evidence.tolist() == [0, 0]
    assert not bool(fresh.resampled.any())


@every_scheme
def test_resampling_leaves_the_log_evidence_and_makes_weights_equal(scheme) -> None:
    particles = weighed(3, 16, 1)
    before = particles.log_evidence
    torch.testing.assert_close(before, increments(3, 16, 1).reshape(3, 16).exp().mean(1).log())
    after, index = particles.resample(Resampling(scheme, threshold=1.0), seeded(2), 1.0)
    torch.testing.assert_close(after.log_evidence, before, rtol=1e-14, atol=1e-14)
    assert torch.equal(after.weights.values, torch.zeros((3, 16), dtype=torch.float64))
    assert bool(after.resampled.all())
    assert index is not None
    assert torch.equal(index.reshape(3, 16), after.ancestors + 16 * torch.arange(3)[:, None])


def test_log_evidence_is_the_product_of_the_means_between_resamplings() -> None:
    particles, expected = Particles.begin(LogWeights.equal(2, 8), 9.0), torch.zeros(2, dtype=torch.float64)
    for seed in range(5):
        particles = particles.weigh(increments(2, 8, seed), ALWAYS, 1.0)
        expected = expected + increments(2, 8, seed).reshape(2, 8).exp().mean(1).log()
        particles, _ = particles.resample(ALWAYS, seeded(seed), 1.0)
    torch.testing.assert_close(particles.log_evidence, expected)


def test_the_mean_weight_is_unbiased_whether_or_not_particles_are_resampled() -> None:
    """Of two increments, the second a function of where the particle is: E exp(a_i + b_i), 1000 groups."""
    k, groups = 4, 4000
    first, second = increments(1, k, 3), increments(1, k, 4)
    truth = float((first + second).exp().mean())
    place = torch.arange(k).repeat(groups)
    for resampling in (ALWAYS, Resampling(threshold=0.8), Resampling(threshold=0.0)):
        particles = Particles.begin(LogWeights.equal(groups, k), 9.0).weigh(first.repeat(groups), resampling, 1.0)
        particles, index = particles.resample(resampling, seeded(5), 1.0)
        now = place if index is None else place[index]
        evidence = particles.weigh(second[now], resampling, 1.0).log_evidence.exp()
        error = 4 * float(evidence.std()) / math.sqrt(groups) + 1e-12
        assert abs(float(evidence.mean()) - truth) < error
        assert error < 0.05 * truth


def test_roots_are_the_composition_of_the_ancestors() -> None:
    particles, composed = weighed(3, 12, 6), torch.arange(12).expand(3, 12)
    for seed in range(6):
        particles, index = particles.resample(ALWAYS, seeded(seed), 1.0)
        composed = composed.gather(1, particles.ancestors)
        assert torch.equal(particles.roots, composed)
        assert particles.unique_ancestors.tolist() == [len(set(row)) for row in composed.tolist()]
        assert index is not None
        particles = particles.weigh(increments(3, 12, 50 + seed), ALWAYS, 1.0)
    assert int(particles.unique_ancestors.max()) < 9


def test_threshold_0_never_resamples_and_draws_no_numbers() -> None:
    generator = seeded(7)
    state = generator.get_state()
    for spread in (0.0, 50.0):
        particles, index = weighed(2, 6, 8, spread).resample(Resampling(threshold=0.0), generator, 1.0)
        assert index is None
        assert torch.equal(particles.ancestors, torch.arange(6).expand(2, 6))
        assert not bool(particles.resampled.any())
    assert torch.equal(generator.get_state(), state)


def test_threshold_1_resamples_every_group_whose_weights_are_not_equal() -> None:
    change = increments(3, 6, 9).reshape(3, 6)
    change[1] = -2.5  # what all of a group share
    particles = Particles.begin(LogWeights.equal(3, 6), 9.0).weigh(change.flatten(), ALWAYS, 1.0)
    after, index = particles.resample(ALWAYS, seeded(10), 1.0)
    assert after.resampled.tolist() == [True, False, True]
    assert index is not None
    assert index[6:12].tolist() == list(range(6, 12))
    assert after.weights.values[1].tolist() == [-2.5] * 6  # what it has not been resampled by is kept
    torch.testing.assert_close(after.log_evidence, particles.log_evidence, rtol=1e-14, atol=1e-14)


def test_equal_weights_are_never_resampled_whatever_their_rounding() -> None:
    for k in range(2, 100):
        shared = increments(20, 1, k, 50.0)[:, None].expand(20, k)
        after, index = Particles.begin(LogWeights(shared.clone()), 9.0).resample(ALWAYS, seeded(0), 1.0)
        assert index is None
        assert not bool(after.resampled.any())


def test_groups_above_the_threshold_keep_their_particles_though_another_is_resampled() -> None:
    change = torch.cat([increments(1, 16, 1, 0.7), increments(1, 16, 2, 4.0), increments(1, 16, 3, 0.7)])
    particles = Particles.begin(LogWeights.equal(3, 16), 9.0).weigh(change, ALWAYS, 1.0)
    assert RESAMPLERS["systematic"](particles.weights.values, seeded(4))[0].tolist() != list(range(16))
    after, index = particles.resample(Resampling(threshold=0.5), seeded(4), 1.0)
    assert after.resampled.tolist() == [False, True, False]
    assert index is not None
    for group in (0, 2):
        assert after.ancestors[group].tolist() == after.roots[group].tolist() == list(range(16))
        assert index[16 * group : 16 * group + 16].tolist() == list(range(16 * group, 16 * group + 16))
        assert torch.equal(after.weights.values[group], particles.weights.values[group])
    torch.testing.assert_close(after.log_evidence, particles.log_evidence, rtol=1e-14, atol=1e-14)
    assert torch.equal(after.log_evidence[::2], particles.log_evidence[::2])


def test_a_group_is_resampled_below_its_share_of_particles_only() -> None:
    """Weights (3, 1, 1, 1): an effective sample size of 36 / 12 = 3 of 4."""
    particles = Particles.begin(LogWeights(torch.tensor([[3.0, 1, 1, 1]], dtype=torch.float64).log()), 9.0)
    assert float(particles.weights.ess) == pytest.approx(3.0, rel=1e-14)
    for threshold, resampled in ((0.74, False), (0.76, True)):
        after, index = particles.resample(Resampling(threshold=threshold), seeded(0), 1.0)
        assert bool(after.resampled[0]) is resampled
        assert (index is not None) is resampled


def test_numbers_are_drawn_whether_or_not_a_group_is_resampled() -> None:
    noise, other = SampleNoise(1, range(12)), SampleNoise(1, range(12))
    weighed(2, 6, 11, 0.01).resample(Resampling(threshold=0.5), noise, 1.0)
    weighed(2, 6, 11, 5.0).resample(Resampling(threshold=0.5), other, 1.0)
    assert torch.equal(noise.uniform(), other.uniform())


def test_particles_are_not_resampled_outside_the_active_levels() -> None:
    window = Resampling(threshold=1.0, active=(0.5, 2.0))
    assert [window.acts_at(sigma) for sigma in (0.4, 0.5, 1.0, 2.0, 2.1)] == [False, True, True, True, False]
    particles = weighed(1, 6, 12)
    for sigma in (0.4, 2.1):
        assert particles.resample(window, seeded(0), sigma)[1] is None
    assert particles.resample(window, seeded(0), 1.0)[1] is not None


def test_clamping_is_about_the_groups_mean_and_reports_the_weight_that_it_changed() -> None:
    """Increments (0, 0, 0, 8) of mean 2, clamped to 2 +- 3: (0, 0, 0, 5): the last has less than e^8 / (3 + e^8)."""
    clamp = Resampling(clamp=3.0)
    change = torch.tensor([0.0, 0, 0, 8, 1, -1, 1, -1], dtype=torch.float64)
    after = Particles.begin(LogWeights.equal(2, 4), 9.0).weigh(change, clamp, 1.0)
    torch.testing.assert_close(after.weights.values, torch.tensor([[0.0, 0, 0, 5], [1, -1, 1, -1]]).double())
    share = math.exp(8) / (3 + math.exp(8)) - math.exp(5) / (3 + math.exp(5))
    torch.testing.assert_close(after.clipped, torch.tensor([share, 0.0]).double())
    shifted = Particles.begin(LogWeights.equal(2, 4), 9.0).weigh(change + 100, clamp, 1.0)
    torch.testing.assert_close(shifted.weights.values, after.weights.values + 100)


def test_the_clipped_mass_is_by_the_weights_that_particles_have_and_is_of_the_last_step() -> None:
    clamp = Resampling(clamp=1.0)
    heavy = Particles.begin(LogWeights(torch.tensor([[5.0, 0, 0, 0]], dtype=torch.float64)), 9.0)
    after = heavy.weigh(torch.tensor([-3.0, 1, 1, 1]).double(), clamp, 1.0)
    torch.testing.assert_close(after.weights.values, torch.tensor([[4.0, 1, 1, 1]]).double())
    share = math.exp(4) / (math.exp(4) + 3 * math.e) - math.exp(2) / (math.exp(2) + 3 * math.e)  # 5 - 1, not 5 - 3
    torch.testing.assert_close(after.clipped, torch.tensor([share]).double())
    later = after.weigh(torch.tensor([0.1, 0, 0, 0]).double(), clamp, 1.0)
    assert later.clipped.tolist() == [0]
    assert later.weigh(torch.tensor([9.0, 0, 0, 0]).double(), Resampling(), 1.0).clipped.tolist() == [0]


def test_rewards_are_never_clamped_and_are_no_clipped_weight() -> None:
    clamp, start = Resampling(clamp=1.0), Particles.begin(LogWeights.equal(1, 4), 9.0)
    change, rewards = torch.tensor([2.0, 0, 0, -2]).double(), torch.tensor([0.0, 30, -30, 0]).double()
    after = start.weigh(change, clamp, 1.0, rewards)
    torch.testing.assert_close(after.weights.values, torch.tensor([[1.0, 30, -30, -1]]).double())
    share = (math.exp(2) + math.exp(-2)) / (math.exp(2) + math.exp(30) + math.exp(-30) + math.exp(-2))
    torch.testing.assert_close(after.clipped, torch.tensor([share]).double())
    free = start.weigh(change, Resampling(), 1.0, rewards)
    torch.testing.assert_close(free.weights.values, (change + rewards)[None])
    with pytest.raises(ValueError, match="1 of 4 are not finite at sigma 1"):
        start.weigh(change, clamp, 1.0, torch.tensor([0.0, math.inf, 0, 0]))


def test_single_particles_are_never_resampled_and_draw_no_numbers() -> None:
    generator = seeded(7)
    state = generator.get_state()
    after, index = weighed(5, 1, 8).resample(ALWAYS, generator, 1.0)
    assert index is None
    assert torch.equal(after.weights.values, weighed(5, 1, 8).weights.values)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_raised_with_the_level_and_their_number(bad: float) -> None:
    start = Particles.begin(LogWeights.equal(2, 4), 9.0)
    change = torch.zeros(8, dtype=torch.float64)
    change[2] = change[5] = bad
    for resampling in (Resampling(), Resampling(clamp=2.0)):
        with pytest.raises(ValueError, match=r"log_weights: 2 of 8 are not finite at sigma 0.125"):
            start.weigh(change, resampling, 0.125)
    with pytest.raises(ValueError, match=r"log_weights: 2 of 8 are not finite at sigma 80"):
        Particles.begin(LogWeights(change.reshape(2, 4)), 80.0)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"clamp": 0.0}, "clamp"),
        ({"clamp": math.nan}, "clamp"),
        ({"active": (2.0, 1.0)}, "active"),
        ({"active": (-1.0, 1.0)}, "active"),
        ({"active": (math.nan, 1.0)}, "active"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}: "):
        Resampling(**options)
