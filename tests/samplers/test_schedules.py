import math

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from samplers import exponential_sigmas, flow_sigmas, karras_sigmas
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
