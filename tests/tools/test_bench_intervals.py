import math

import numpy as np
import pytest
import torch

from tools.bench_intervals import (
    BAR,
    Law,
    coverage,
    difference_coverage,
    frechet_coverage,
    interval_table,
    laws,
    true_frechet,
    true_kernel_distance,
)
from tools.conformance_cases import transported
from tools.frechet import frechet_distance
from tools.jackknife import Estimate
from tools.statistics import FeatureStatistics


def one_dimension(mean: float, deviation: float) -> Law:
    return Law(torch.tensor([mean], dtype=torch.float64), torch.tensor([[deviation]], dtype=torch.float64))


def test_the_frechet_truth_is_that_of_the_moments() -> None:
    reference, law = laws(8)
    sides = [FeatureStatistics.of_moments(side.mean.numpy(), side.covariance.numpy()) for side in (reference, law)]
    assert true_frechet(reference, law) == pytest.approx(frechet_distance(*sides).value, rel=1e-12)
    transport = torch.linalg.solve(reference.root.T, law.root.T).T.numpy()  # T root = root of the law
    problem = transported(reference.covariance.numpy(), (transport + transport.T) / 2)
    assert problem.truth is not None
    assert true_frechet(reference, law) == pytest.approx(problem.truth - 1 + float(law.mean @ law.mean), rel=1e-10)


def test_the_kernel_truth_is_a_quadrature() -> None:
    """In one dimension, by Gauss and Hermite's rule, which is exact for polynomials: 8 points for degree 6."""
    points, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()

    def mean_kernel(m1: float, s1: float, m2: float, s2: float) -> float:
        kernel = ((m1 + s1 * points)[:, None] * (m2 + s2 * points) + 1) ** 3
        return float(weights @ kernel @ weights)

    a, b = (0.4, 1.3), (-0.7, 0.6)
    exact = mean_kernel(*a, *a) + mean_kernel(*b, *b) - 2 * mean_kernel(*a, *b)
    assert true_kernel_distance(one_dimension(*a), one_dimension(*b)) == pytest.approx(exact, rel=1e-12)


def test_the_kernel_truth_does_not_depend_on_the_axes() -> None:
    """Two independent laws of one dimension, rotated: every contraction has to follow."""
    a, b = laws(3)
    b = Law(b.mean * 5, b.root)
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).double()).Q
    turned = [Law(q @ side.mean, q @ side.root) for side in (a, b)]
    assert true_kernel_distance(*turned) == pytest.approx(true_kernel_distance(a, b), rel=1e-12)
    draws, others = a.draw(400_000, 0) / math.sqrt(3), b.draw(400_000, 1) / math.sqrt(3)
    kernels = ((draws[::2] * draws[1::2]).sum(1), (others[::2] * others[1::2]).sum(1), (draws * others).sum(1))
    x, y, xy = (((u + 1) ** 3) for u in kernels)
    error = math.sqrt(float(x.var() / len(x) + y.var() / len(y) + 4 * xy.var() / len(xy)))
    assert abs(float(x.mean() + y.mean() - 2 * xy.mean()) - true_kernel_distance(a, b)) < 5 * error


def test_draws_have_the_moments_that_are_said() -> None:
    _, law = laws(4)
    for tails, kurtosis in ((False, 3), (True, 9)):
        law = Law(law.mean, law.root, tails)
        rows = law.draw(200_000, seed=0)
        torch.testing.assert_close(rows.mean(0), law.mean, atol=0.02, rtol=0)
        torch.testing.assert_close(rows.T.cov(), law.covariance, atol=0.05, rtol=0)
        standard = (rows[:, 0] - rows[:, 0].mean()) / rows[:, 0].std()
        assert abs(float((standard**4).mean()) - kurtosis) < (0.1 if kurtosis == 3 else 3)
    assert torch.equal(law.draw(50, seed=3), law.draw(50, seed=3))


def test_coverage_by_hand() -> None:
    estimates = [
        Estimate(3.0, 1.0, 2.0, (1.0, 3.0)),
        Estimate(1.0, 2.0, 0.0, (-1.0, 1.0), warning="few"),
        Estimate(4.0, 3.0, None, (2.0, 5.0)),
        Estimate(2.0, 2.0, 2.0, (2.5, 3.0)),
    ]
    found = coverage(2.0, estimates)
    assert (found.truth, found.covered, found.warned) == (2, 0.5, 0.25)
    assert (found.plain_bias, found.bias, found.error) == (0.5, 0.0, 2.0)
    assert found.plain_rmse == pytest.approx(math.sqrt(6 / 4))
    assert found.rmse == pytest.approx(math.sqrt(8 / 4))


@pytest.mark.parametrize("d", [16, pytest.param(48, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ratio", [8, 16])
def test_intervals_cover_and_the_warning_appears_below(d: int, ratio: int) -> None:
    """200 repetitions: 92 to 98 %. What bias remains is below four of its standard errors and a fifth of what was."""
    reference, law = laws(d)
    found = frechet_coverage(reference, law, ratio * d, repetitions=200)
    assert BAR[0] <= found.covered <= BAR[1]
    assert found.warned == 0
    assert abs(found.bias) < min(4 * found.rmse / math.sqrt(200), found.plain_bias / 5)
    assert found.error == pytest.approx(found.rmse, rel=0.25)  # ten blocks, 200 times: 5 % of noise, and the tails
    assert frechet_coverage(reference, law, 8 * d - 1, repetitions=1).warned == 1


def test_pairing_takes_off_what_both_share() -> None:
    reference, a = laws(12)
    b = laws(12, change=0.35)[1]
    paired, apart = difference_coverage(reference, a, b, 200, repetitions=60)
    assert 0.85 <= paired.covered <= 1  # 95 % of 60: 3.6 standard errors of 2.8 %
    assert apart.covered == 1
    assert paired.error < apart.error / 3
    assert paired.rmse == apart.rmse


def test_the_table_is_of_what_was_measured() -> None:
    table = interval_table(dim=6, repetitions=4)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert all(len(row) == len(rows[0]) for row in rows)
    assert [(row[1], row[2]) for row in rows[2:8]] == [
        (d, n) for d, r in (("6", "4 8 16 32"), ("12", "4 8")) for n in r.split()
    ]
    by_name = {name: [row for row in rows[2:] if row[0] == name] for name in {row[0] for row in rows[2:]}}
    assert [row[9] for row in by_name["Fréchet"]] == ["100%", "0%", "0%", "0%", "100%", "0%"]
    assert [bool(row[11]) for row in by_name["Fréchet"]] == [False, True, True, True, False, True]
    assert len(by_name["kernel distance"]) == 2
    reference, law = laws(6)
    assert by_name["Fréchet"][0][3] == f"{true_frechet(reference, law):.3g}"
    assert by_name["kernel distance"][0][3] == f"{true_kernel_distance(reference, law):.3g}"
