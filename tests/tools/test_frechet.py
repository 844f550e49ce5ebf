import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tools.frechet import estimate_of_parts, frechet_distance, frechet_estimate
from tools.jackknife import BLOCKS, block_of
from tools.statistics import FeatureStatistics


def of(rows: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(rows.shape[1])
    statistics.update(rows)
    return statistics


def given_moments(mean: Tensor, covariance: Tensor, tmp_path) -> FeatureStatistics:
    np.savez(tmp_path / "moments.npz", mu=mean.numpy(), sigma=covariance.numpy())
    return FeatureStatistics.load(tmp_path / "moments.npz")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(d: int) -> FeatureStatistics:
    """The law N(0, I), exactly."""
    return FeatureStatistics.of_moments(np.zeros(d), np.eye(d))


def rotation(d: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def nuclear(x: Tensor, y: Tensor) -> float:
    """The distance of two sets by the singular values of their centred rows: exact whatever the ranks."""
    a, b = ((r - r.mean(0)) / math.sqrt(len(r) - 1) for r in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def test_frechet_of_commuting_covariances(tmp_path) -> None:
    q = rotation(6)
    s1, s2 = torch.tensor([9.0, 4, 1, 1, 0.25, 0]).double(), torch.tensor([1.0, 4, 16, 0, 0.25, 4]).double()
    a = given_moments(torch.zeros(6).double(), q @ s1.diag() @ q.T, tmp_path)
    b = given_moments(torch.full((6,), 2.0).double(), q @ s2.diag() @ q.T, tmp_path)
    distance = frechet_distance(a, b)
    assert distance.mean_term == 24
    assert distance.trace_term == pytest.approx(float((s1.sqrt() - s2.sqrt()).square().sum()), rel=1e-7)  # singular
    assert distance.value == distance.mean_term + distance.trace_term


def test_frechet_in_one_dimension() -> None:
    x, y = 3 * normal(50, 1), normal(70, 1, seed=1) + 4
    exact = float((x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2)
    assert frechet_distance(of(x), of(y)).value == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("decades", [2, 16])
def test_frechet_of_a_truth_by_construction(decades: int, tmp_path) -> None:
    """S2 = T S1 T with T positive definite: (S1 S2)^1/2 has the trace of S1 T, however badly S1 is conditioned."""
    d = 40
    q = rotation(d)
    s1 = q @ torch.logspace(0, -decades, d, dtype=torch.float64).diag() @ q.T
    root = normal(d, d, seed=3) / math.sqrt(d)
    t = root @ root.T + torch.eye(d)
    s1 = (s1 + s1.T) / 2
    s2 = t @ s1 @ t
    s2 = (s2 + s2.T) / 2
    zero = torch.zeros(d).double()
    exact = float(s1.trace() + s2.trace() - 2 * (s1 @ t).trace())
    a, b = given_moments(zero, s1, tmp_path), given_moments(zero, s2, tmp_path)
    assert frechet_distance(a, b).value == pytest.approx(exact, rel=1e-11)
    assert frechet_distance(b, a).value == pytest.approx(exact, rel=1e-11)


def test_frechet_agrees_with_scipys_sqrtm_where_that_works() -> None:
    a, b = of(normal(400, 24)), of(normal(300, 24, seed=1) * 1.5 + 0.1)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    exact = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root.trace())
    assert frechet_distance(a, b).value == pytest.approx(exact, rel=1e-11)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 30), st.integers(2, 30))
def test_frechet_laws(seed: int, d: int, n: int, m: int) -> None:
    """Symmetric, not negative, blind to rotation, and of degree two; for all ranks."""
    x, y = normal(n, d, seed=seed), 2 * normal(m, d, seed=seed + 1) + 0.5
    value = frechet_distance(of(x), of(y)).value
    assert value == pytest.approx(nuclear(x, y), rel=1e-7)
    assert value >= 0
    q = rotation(d, seed)
    assert frechet_distance(of(y), of(x)).value == pytest.approx(value, rel=1e-7)
    assert frechet_distance(of(x @ q), of(y @ q)).value == pytest.approx(value, rel=1e-7)
    assert frechet_distance(of(8 * x), of(8 * y)).value == pytest.approx(64 * value, rel=1e-13)


NASTY = {
    "rank 1 both": (normal(40, 1) @ normal(1, 8, seed=1), normal(40, 1, seed=2) @ normal(1, 8, seed=3)),
    "rank 1 one": (normal(40, 1) @ normal(1, 8, seed=1), normal(40, 8, seed=2)),
    "N < d both": (normal(12, 30), normal(9, 30, seed=1) + 1),
    "N < d one": (normal(12, 30), normal(200, 30, seed=1)),
    "N = 2": (normal(2, 5), normal(2, 5, seed=1)),
    "d = 1": (normal(5, 1), normal(4, 1, seed=1)),
    "a constant feature": (torch.cat([normal(50, 4), torch.full((50, 1), 7.0).double()], 1), normal(50, 5, seed=1)),
    "constant against not": (torch.full((50, 5), 7.0).double(), normal(50, 5, seed=1)),
    "scales mixed": (normal(50, 3) * torch.tensor([1e-9, 1, 1e9]), normal(60, 3, seed=1)),
}


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("scale", [1.0, 1e-100, 1e80])
def test_frechet_of_nasty_sets(name: str, scale: float) -> None:
    x, y = NASTY[name]
    exact = nuclear(x, y)
    for one, other in ((x, y), (y, x)):
        value = frechet_distance(of(one * scale), of(other * scale)).value
        assert value / scale**2 == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", NASTY)
def test_identical_sets_are_at_distance_exactly_zero(name: str) -> None:
    for rows in NASTY[name]:
        assert frechet_distance(of(rows), of(rows)).value == 0


def test_nearly_identical_sets_are_not_below_zero() -> None:
    x = normal(30, 20)
    for seed in range(20):
        value = frechet_distance(of(x), of(x + 1e-12 * normal(30, 20, seed=seed))).value
        assert 0 <= value < 1e-6


def test_both_sets_constant() -> None:
    assert frechet_distance(of(torch.zeros(3, 2)), of(torch.ones(3, 2))).value == 2


def test_frechet_of_float32_statistics(tmp_path) -> None:
    x, y = normal(15, 30), normal(12, 30, seed=1)  # rank-deficient, so float32 makes eigenvalues of both signs
    a, b = (given_moments(s.mean.float(), s.covariance.float(), tmp_path) for s in (of(x), of(y)))
    assert frechet_distance(a, b).value == pytest.approx(nuclear(x, y), rel=2e-3)
    assert frechet_distance(a, a).value == 0


def test_frechet_names_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="dim: statistics of 2 and of 3"):
        frechet_distance(of(torch.zeros(3, 2)), of(torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="1 rows have no covariance"):
        frechet_distance(of(torch.zeros(1, 2)), of(torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="too large for float64"):
        frechet_distance(of(torch.tensor([[1e200], [-1e200]], dtype=torch.float64)), of(torch.zeros(3, 1)))
    with pytest.raises(ValueError, match="too large for float64"):  # equal rows: only the means overflow
        frechet_distance(of(torch.full((3, 1), 1e200, dtype=torch.float64)), of(torch.zeros(3, 1)))


def test_frechet_of_two_extractors_is_refused_naming_both() -> None:
    rows = normal(9, 3)
    a, b = FeatureStatistics(3, "inception|clean"), FeatureStatistics(3, "inception|tf1")
    for statistics in (a, b):
        statistics.update(rows)
    with pytest.raises(ValueError, match=r"extractor: statistics of inception\|clean and of inception\|tf1"):
        frechet_distance(a, b)
    assert frechet_distance(a, of(rows)).value == 0  # a file that does not say is taken at its word


def test_a_matrix_with_a_negative_eigenvalue_is_refused() -> None:
    bad = FeatureStatistics.of_moments(np.zeros(6), np.eye(6) - 0.5)  # its least eigenvalue is -2
    for one, other in ((bad, of(normal(20, 6))), (of(normal(20, 6)), bad)):
        with pytest.raises(ValueError, match="sigma: not a covariance"):
            frechet_distance(one, other)


# Estimates


def test_an_estimate_is_eleven_distances() -> None:
    features, known = normal(203, 6) * 1.3, of(normal(500, 6, seed=1))
    estimate = frechet_estimate(features, known)
    blocks = block_of(range(203))
    assert estimate.value == pytest.approx(frechet_distance(of(features), known).value, rel=1e-12)
    assert estimate.leave_one_out is not None
    assert estimate.leave_one_out == pytest.approx(
        [frechet_distance(of(features[blocks != b]), known).value for b in range(BLOCKS)], rel=1e-12
    )
    assert len(set(estimate.leave_one_out)) == BLOCKS


def test_an_estimate_does_not_depend_on_the_order_within_blocks_nor_on_their_numbers() -> None:
    features, known = normal(200, 4) * 1.3, of(normal(500, 4, seed=1))
    estimate = frechet_estimate(features, known)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    moved = frechet_estimate(features[order], known, (block_of(range(200))[order] + 3) % BLOCKS)
    assert (moved.value, moved.standard_error, moved.debiased) == pytest.approx(
        (estimate.value, estimate.standard_error, estimate.debiased), rel=1e-10
    )


def test_an_estimate_of_parts_is_that_of_their_rows() -> None:
    features, known, blocks = normal(160, 4), of(normal(300, 4, seed=1)), block_of(range(160))
    found = estimate_of_parts([of(features[blocks == b]) for b in range(BLOCKS)], known)
    assert found == frechet_estimate(features, known, blocks)


@pytest.mark.parametrize(("scale", "shift", "most"), [(1.0, 0.0, 1.7), (1.4, 0.3, 1.3)])
def test_errors_and_bias_against_the_truth(scale: float, shift: float, most: float) -> None:
    """Samples of N(shift, scale^2 I), d = 4, N = 8 d, whose distance to N(0, I) is d (shift^2 + (scale - 1)^2).

    Means within four standard errors of 120 repetitions, of the standard deviation 3 / sqrt(240) = 20 %. The jackknife
    may overstate it: by 10 %, and by 40 % at distance 0, where the leading term of the error vanishes.
    """
    d, n, times = 4, 32, 120
    truth = d * (shift**2 + (scale - 1) ** 2)
    found = [frechet_estimate(scale * normal(n, d, seed=seed) + shift, reference(d)) for seed in range(times)]
    plain, debiased, errors = (
        np.array([getattr(e, name) for e in found]) for name in ("value", "debiased", "standard_error")
    )
    deviation = debiased.std(ddof=1)
    assert abs(debiased.mean() - truth) < 4 * deviation / times**0.5
    assert plain.mean() - truth > 10 * deviation / times**0.5
    assert 0.8 < np.sqrt((errors**2).mean()) / deviation < most


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say() -> None:
    """95 % of 400 intervals at N = 8 d, within three standard errors (.033)."""
    d, n, times, truth = 16, 128, 400, 16 * (0.3**2 + 0.4**2)
    covered = 0
    for seed in range(times):
        interval = frechet_estimate(1.4 * normal(n, d, seed=seed) + 0.3, reference(d)).interval
        assert interval is not None
        covered += interval[0] < truth < interval[1]
    assert abs(covered / times - 0.95) < 3 * (0.95 * 0.05 / times) ** 0.5


@pytest.mark.parametrize(
    ("n", "warning"),
    [
        (2, "2 samples are too few for an error (20 or more)"),
        (19, "19 samples are too few for an error (20 or more)"),
        (20, "20 samples of 3 features: with fewer than 8 a feature the interval is too narrow"),
        (23, "23 samples of 3 features: with fewer than 8 a feature the interval is too narrow"),
        (24, None),
    ],
)
def test_too_few_samples_are_warned_of(n: int, warning: str | None) -> None:
    estimate = frechet_estimate(normal(n, 3), reference(3))
    assert estimate.warning == warning
    assert estimate.value == frechet_distance(of(normal(n, 3)), reference(3)).value or n >= 20
    assert (estimate.interval is None) == (estimate.standard_error is None) == (estimate.debiased is None) == (n < 20)


def test_a_reference_without_its_count_has_estimates(tmp_path) -> None:
    known, features = of(normal(90, 3, seed=1)), normal(60, 3)
    unnamed = given_moments(known.mean, known.covariance, tmp_path)
    assert frechet_estimate(features, unnamed).value == pytest.approx(
        frechet_estimate(features, known).value, rel=1e-12
    )


def test_estimates_name_what_they_cannot_use() -> None:
    bad = normal(40, 3)
    bad[[3, 7], 1] = float("nan")
    for features, blocks, message in (
        (bad, None, "2 of 40 rows have NaN"),
        (bad[:19], None, "2 of 19 rows have NaN"),
        (normal(40, 4), None, r"\[40, 4\] is not \[N, 3\]"),
        (normal(1, 3), None, "1 rows have no covariance"),
        (normal(40, 3), block_of(range(39)), r"blocks: \[39\]"),
    ):
        with pytest.raises(ValueError, match=message):
            frechet_estimate(features, reference(3), blocks)
