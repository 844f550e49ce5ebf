"""Exact targets: powers of mixtures against sums on grids, and distances that are known."""

import math

import pytest
import torch

from samplers import GaussianMixture, annealed, product, reward_tilted
from tools.bench_particles import DEFAULT, NAIVE, Figure, lines, planes, run, weights_of
from tools.exact_targets import mixture_power, mode_error, on_grid, sliced_wasserstein, wasserstein_to_grid

VARIANCES = torch.tensor([0.3, 0.6, 0.4], dtype=torch.float64)
MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[-2.0], [0.5], [2.0]], dtype=torch.float64), VARIANCES
)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_a_power_of_a_mixture_is_the_grids(power: int) -> None:
    exact, log_z = mixture_power(MIXTURE, VARIANCES, power)
    grid = on_grid(annealed(MIXTURE, float(power)), 9.0, 4000)
    assert log_z == pytest.approx(grid.log_normaliser, abs=1e-9)
    density = exact.log_density(grid.points).exp() * 2 * grid.half
    torch.testing.assert_close(density, grid.probabilities, rtol=1e-8, atol=1e-12)


def test_a_grid_has_the_normaliser_of_gaussians_and_of_tilts() -> None:
    first = GaussianMixture(torch.ones(1), torch.zeros((1, 2), dtype=torch.float64), torch.ones(1).double())
    second = GaussianMixture(torch.ones(1), torch.ones((1, 2), dtype=torch.float64), torch.tensor([3.0]).double())
    grid = on_grid(product([first, second]), 8.0, 300, 2)  # int N(x; 0, 1) N(x; 1, 3) = N(0; 1, 4) for each coordinate
    assert grid.log_normaliser == pytest.approx(2 * (-0.5 * math.log(2 * math.pi * 4) - 1 / 8), abs=1e-6)
    tilted = on_grid(reward_tilted(first, lambda x: x[:, 0]), 9.0, 300, 2)
    assert tilted.log_normaliser == pytest.approx(0.5, abs=1e-6)
    assert tilted.expectation(tilted.points[:, 0]) == pytest.approx(1.0, abs=1e-6)
    drawn = tilted.sample(20_000, torch.Generator().manual_seed(0))
    assert drawn.mean(0).tolist() == pytest.approx([1.0, 0.0], abs=4 / 20_000**0.5)


def test_distances_of_shifted_points() -> None:
    grid = on_grid(annealed(MIXTURE, 1.0), 9.0, 20_000)
    x = grid.sample(20_000, torch.Generator().manual_seed(1))
    equal = torch.ones(len(x), dtype=torch.float64)
    assert wasserstein_to_grid(x, equal, grid) < 0.05
    assert wasserstein_to_grid(x + 0.5, equal, grid) == pytest.approx(0.5, abs=0.05)
    double = torch.cat([x, x + 9])
    half = torch.cat([equal, torch.zeros_like(equal)])  # points without weight do not count
    assert wasserstein_to_grid(double, half, grid) == pytest.approx(wasserstein_to_grid(x, equal, grid), abs=1e-3)
    plane = torch.randn((500, 2), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.ones(500, dtype=torch.float64)
    assert sliced_wasserstein(plane, weights, plane) < 1e-9
    shifted = sliced_wasserstein(plane + torch.tensor([0.6, 0.8]), weights, plane)
    assert shifted == pytest.approx(0.5**0.5, rel=0.1)  # the mean square of a unit vector's projection is 1 / 2


def test_the_error_of_the_modes_shares() -> None:
    x = torch.tensor([[-2.0], [-1.9], [0.4], [2.2]])
    assert mode_error(x, torch.tensor([0.25, 0.25, 0.3, 0.2]), MIXTURE) < 1e-6
    assert mode_error(x, torch.tensor([1.0, 0.0, 0.0, 0.0]), MIXTURE) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*lines(), *planes()])
@pytest.mark.parametrize("steps", [50, 100, 200])
def test_without_options_no_target_is_worse_than_naive_score_scaling(name: str, steps: int) -> None:
    law = {**lines(), **planes()}[name]
    errors = {}
    for corrector in (NAIVE, DEFAULT):
        runs = [run(law.target, law.dim, corrector, steps, 384, seed) for seed in range(5)]
        errors[corrector is DEFAULT] = Figure([law.distance(d.last.x, weights_of(d, corrector)) for d in runs])
    naive, default = errors[False], errors[True]
    assert default.mean < naive.mean + 2 * math.hypot(naive.error, default.error)
