import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tools.frechet import frechet_distance
from tools.metrics import class_entropy, precision_recall
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


def rotation(d: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def nuclear(x: Tensor, y: Tensor) -> float:
    """The distance of two sets by the singular values of their centred rows: exact whatever the ranks."""
    a, b = ((r - r.mean(0)) / math.sqrt(len(r) - 1) for r in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


# Fréchet distance


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


# Precision and recall


def brute(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """The definition, in float64 and with loops."""

    def share(points: Tensor, manifold: Tensor) -> float:
        radii = [sorted(float((p - q).norm()) for j, q in enumerate(manifold) if j != i)[k - 1]
                 for i, p in enumerate(manifold)]  # fmt: skip
        inside = [any(float((p - q).norm()) <= r for q, r in zip(manifold, radii, strict=True)) for p in points]
        return sum(inside) / len(points)

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize(("offset", "k"), [(0.0, 3), (1000.0, 3), (0.0, 1)])
def test_precision_and_recall_are_the_definition(offset: float, k: int) -> None:
    real, fake = normal(60, 3) + offset, 0.7 * normal(45, 3, seed=1) + 0.8 + offset
    result = precision_recall(real, fake, k=k)
    assert (result.precision, result.recall) == pytest.approx(brute(real, fake, k), abs=1e-12)
    assert 0.1 < result.precision < 0.95  # not at an end, where a wrong radius would not show
    assert 0.1 < result.recall < 0.95


def test_precision_and_recall_do_not_depend_on_the_blocks(monkeypatch) -> None:
    real, fake = normal(300, 8), 1.3 * normal(250, 8, seed=1)
    whole = precision_recall(real, fake)
    monkeypatch.setattr("tools.metrics.DISTANCE_BLOCK", 64)
    assert precision_recall(real, fake) == whole
    swapped = precision_recall(fake, real)
    assert (swapped.recall, swapped.precision) == (whole.precision, whole.recall)


def test_precision_and_recall_by_hand() -> None:
    """On a line, k = 1. Real balls: 0 and 1 of radius 1, 10 of radius 9. Fake balls: 1.5 and 1.8 of .3, 30 of 28.2."""
    real, fake = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[1.5], [1.8], [30.0]])
    result = precision_recall(real, fake, k=1)
    assert result.precision == pytest.approx(2 / 3)  # 30 is 20 away from 10
    assert result.recall == pytest.approx(1 / 3)  # 10 alone: the ball of 30 ends at 1.8


def test_precision_and_recall_of_the_extremes() -> None:
    x = normal(50, 4)
    assert precision_recall(x, x) == precision_recall(x, x.flip(0))
    assert (precision_recall(x, x).precision, precision_recall(x, x).recall) == (1, 1)
    apart = precision_recall(x, x + 1000)
    assert (apart.precision, apart.recall) == (0, 0)
    collapsed = precision_recall(x, x[:1] + 1e-3 * normal(50, 4, seed=1))
    assert collapsed.precision == 1
    assert collapsed.recall < 0.1


def test_precision_and_recall_name_what_they_cannot_use() -> None:
    x, bad = normal(10, 2), normal(10, 2)
    bad[[2, 5], 1] = float("nan")
    for real, fake, k, message in (
        (x, normal(10, 3), 3, r"fake: shape \[10, 3\]"),
        (x[0], x, 3, r"real: shape \[2\]"),
        (bad, x, 3, "real: 2 of 10 rows"),
        (x, bad, 3, "fake: 2 of 10 rows"),
        (x, x[:3], 3, "k: 3 neighbours, of 10 real and 3 fake"),
        (x, x, 0, "k: 0 neighbours"),
    ):
        with pytest.raises(ValueError, match=message):
            precision_recall(real, fake, k)


# Class entropy


def test_class_entropy_is_that_of_the_histogram() -> None:
    assert class_entropy(torch.arange(40) % 10, 10) == pytest.approx(1, abs=1e-15)
    assert class_entropy(torch.full((7,), 3), 10) == 0
    assert class_entropy(torch.tensor([0, 0, 1, 1]), 4) == pytest.approx(0.5)
    assert class_entropy(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(2 - 0.75 * math.log2(3))


def test_class_entropy_names_what_it_cannot_use() -> None:
    for labels, n_classes, message in (
        ([0, 4], 4, "0 to 4 are not all in 0 to 3"),
        ([-1, 2], 4, "-1 to 2 are not all"),
        ([], 4, r"labels: shape \[0\]"),
        ([0], 1, "n_classes: 1"),
    ):
        with pytest.raises(ValueError, match=message):
            class_entropy(torch.tensor(labels, dtype=torch.int64), n_classes)
