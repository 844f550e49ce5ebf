import math

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from samplers import exponential_sigmas, flow_sigmas, karras_sigmas
from samplers.schedules import karras_index, karras_sigma, restarted
from tests.truth import relative_error

SCHEDULES = [karras_sigmas, exponential_sigmas, flow_sigmas]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_n_falling_levels_from_sigma_max_then_zero(schedule, n) -> None:
    sigmas = schedule(n, sigma_max=50.0)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (n + 1,)
    assert sigmas[0] == pytest.approx(50.0, rel=1e-12)
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())


def test_karras_grid_is_the_published_formula() -> None:
    n, rho = 18, 7
    expected = [(80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n)]
    torch.testing.assert_close(karras_sigmas(n)[:-1], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize(("low", "high"), [(0.002, 80.0), (0.02, 20.0)])
def test_the_index_of_a_level_is_its_position_in_the_karras_grid(rho, low, high) -> None:
    """The inverse both ways, beyond the ends too; and point i of n has index i / (n - 1)."""
    u = torch.linspace(-0.01, 1.0, 102, dtype=torch.float64)
    torch.testing.assert_close(karras_index(karras_sigma(u, low, high, rho), low, high, rho), u, rtol=0, atol=1e-12)
    sigma = torch.logspace(math.log10(low), math.log10(high), 50, dtype=torch.float64)
    again = karras_sigma(karras_index(sigma, low, high, rho), low, high, rho)
    torch.testing.assert_close(again, sigma, rtol=1e-12 * high / low, atol=0)
    grid = karras_index(karras_sigmas(18, low, high, rho)[:-1], low, high, rho)
    torch.testing.assert_close(grid, torch.linspace(0, 1, 18, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_index_falls_from_one_at_the_lowest_level_to_zero_at_the_highest() -> None:
    sigma = torch.tensor([0.002, 0.01, 2.5, 80.0])
    index = karras_index(sigma, 0.002, 80.0)
    assert index.dtype == torch.float32
    assert index[[0, 3]].tolist() == pytest.approx([1, 0], abs=1e-6)
    root = [s ** (1 / 7) for s in (0.002, 0.01, 2.5, 80.0)]
    assert index.tolist() == pytest.approx([(root[3] - r) / (root[3] - root[0]) for r in root], abs=1e-6)


def test_karras_grid_of_cifar10_has_the_published_levels() -> None:
    # Karras et al. 2022, 18 steps from 80 to 0.002; the levels at which the public code evaluates the network.
    published = torch.tensor([80.0, 57.586, 40.786, 28.375, 19.353, 12.910, 8.401, 5.315], dtype=torch.float64)
    torch.testing.assert_close(karras_sigmas(18)[:8], published, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("schedule", "name"), [(karras_sigmas, "karras"), (exponential_sigmas, "exponential")])
def test_grid_is_that_of_edm_euler(schedule, name) -> None:
    scheduler = EDMEulerScheduler(sigma_schedule=name)
    scheduler.set_timesteps(18)
    assert relative_error(schedule(18).log()[:-1], scheduler.sigmas.double().log()[:-1]) < 1e-6  # a float32 table


def test_exponential_levels_have_a_constant_ratio() -> None:
    sigmas = exponential_sigmas(5, 0.01, 100.0)
    torch.testing.assert_close(sigmas[1:-1] / sigmas[:-2], torch.full((4,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_levels_are_the_shifted_times_of_flow_match_euler(shift) -> None:
    sigmas = flow_sigmas(9, sigma_max=200.0, shift=shift)
    start = 200 / shift / (1 + 200 / shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[start * (1 - i / 9) for i in range(9)])  # the scheduler shifts what it is given
    assert relative_error(sigmas / (1 + sigmas), scheduler.sigmas) < 2e-7  # a float32 table


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bad", [{"n": 0}, {"n": 4, "sigma_max": 0.0}, {"n": 4, "sigma_max": math.inf}])
def test_a_bad_number_of_steps_or_range_raises(schedule, bad) -> None:
    with pytest.raises(ValueError, match="n:" if bad["n"] == 0 else "sigma_max"):
        schedule(**bad)


@pytest.mark.parametrize("schedule", [karras_sigmas, exponential_sigmas])
@pytest.mark.parametrize("sigma_min", [0.0, -1.0, 80.0, math.nan])
def test_a_bad_sigma_min_raises(schedule, sigma_min) -> None:
    with pytest.raises(ValueError, match="sigma_min"):
        schedule(4, sigma_min=sigma_min)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_bad_rho_or_shift_raises(value) -> None:
    with pytest.raises(ValueError, match="rho"):
        karras_sigmas(4, rho=value)
    with pytest.raises(ValueError, match="shift"):
        flow_sigmas(4, shift=value)


@pytest.mark.parametrize("sigma", [80.0, 79.0, 8.4, 0.5, 0.0021, 0.002])
@pytest.mark.parametrize("n", [2, 7, 18])
def test_a_restarted_karras_schedule_is_karras_s_own_from_there(n, sigma) -> None:
    for steps in (1, 3, 12):
        ours = restarted(karras_sigmas(n), sigma, steps)
        if sigma > 0.002:
            expected = karras_sigmas(steps, 0.002, sigma)
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=0)
        else:
            assert steps > 1 or ours.tolist() == [0.002, 0.0]
        assert ours[0] == sigma
    above = int((karras_sigmas(n)[:-1] > sigma * (1 + 1e-9)).sum())
    assert len(restarted(karras_sigmas(n), sigma)) == n + 1 - above


@pytest.mark.parametrize("k", [0, 1, 5, 16])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_restarted_at_one_of_its_levels_a_schedule_is_its_own_tail(schedule, k) -> None:
    sigmas = schedule(18)
    torch.testing.assert_close(restarted(sigmas, float(sigmas[k])), sigmas[k:], rtol=1e-11, atol=0)
    open_end = sigmas[:-1]
    torch.testing.assert_close(restarted(open_end, float(sigmas[k])), open_end[k:], rtol=1e-11, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [None, 2, 5, 40])
@pytest.mark.parametrize("ends", [True, False])
def test_a_restarted_schedule_falls_from_the_level_to_the_old_end(schedule, steps, ends) -> None:
    sigmas = schedule(18, sigma_max=80.0)
    sigmas = sigmas if ends else sigmas[:-1]
    for sigma in torch.logspace(math.log10(80.0), math.log10(float(sigmas[-2 - ends]) * 1.01), 23).double().tolist():
        ours = restarted(sigmas, min(sigma, 80.0), steps)
        assert ours.dtype == torch.float64
        assert ours[0] == min(sigma, 80.0)
        assert bool((ours.diff() < 0).all())
        assert ours[-1] == (0 if ends else sigmas[-1])
        assert ours[-1 - ends] == pytest.approx(float(sigmas[-1 - ends]), rel=1e-12)
        assert len(ours) == (steps + 1 if steps else int((sigmas <= sigma * (1 + 1e-9)).sum()))


@pytest.mark.parametrize(("schedule", "part"), [(exponential_sigmas, 0.02), (flow_sigmas, 0.4)])
def test_other_schedules_keep_their_spacing_nearly(schedule, part) -> None:
    """Between two of its levels: those of the same schedule made from there, to a part of the step, in log sigma."""
    for high, sigma in ((80.0, 60.0), (80.0, 9.0), (80.0, 2.0), (80.0, 0.5), (999.0, 60.0), (999.0, 2.0)):
        sigmas = schedule(18, sigma_max=high)
        ours = restarted(sigmas, sigma)[:-1].log()
        own = schedule(len(ours), sigma_max=sigma)[:-1].log()
        assert float(((ours - own)[1:] / own.diff()).abs().max()) < part


def test_a_schedule_of_one_step_restarts_as_one_step() -> None:
    one = torch.tensor([80.0, 0.0], dtype=torch.float64)
    assert restarted(one, 80.0).tolist() == [80.0, 0.0]
    with pytest.raises(ValueError, match=r"sigma: 8.4 is outside the schedule's levels \[80, 80\]"):
        restarted(one, 8.4)
    two = torch.tensor([80.0, 1.0], dtype=torch.float64)
    assert restarted(two, 8.4).tolist() == [8.4, 1.0]
    assert restarted(karras_sigmas(18), 0.002).tolist() == pytest.approx([0.002, 0.0])


@pytest.mark.parametrize("sigma", [80.1, 0.0019, 0.0, -1.0, math.nan, math.inf])
def test_a_level_outside_the_schedule_raises(sigma) -> None:
    with pytest.raises(ValueError, match="outside the schedule's levels"):
        restarted(karras_sigmas(18), sigma)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_restart_without_a_step_raises(steps) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        restarted(karras_sigmas(18), 8.4, steps)
    with pytest.raises(ValueError, match="at least 1"):
        restarted(karras_sigmas(18)[:-1], 0.002)


@pytest.mark.parametrize(
    "bad",
    [torch.tensor([1.0]), torch.tensor([1.0, 2.0]), torch.tensor([2.0, math.nan, 0.0]), torch.ones(2, 2)],
    ids=str,
)
def test_what_is_no_schedule_is_not_restarted(bad) -> None:
    with pytest.raises(ValueError, match="sigma"):
        restarted(bad, 1.5)
