"""All pairwise numbers against their definitions, written with loops or whole matrices in float64."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tools import gram
from tools.jackknife import BLOCKS, Estimate, block_of, jackknife
from tools.neighbours import NAMES, Neighbours
from tools.pairwise import KNOWN, density_coverage, kernel_distance, pairwise, precision_recall

exactly = partial(pairwise, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def unit_gaussian(x: Tensor, y: Tensor) -> Tensor:
    x, y = (rows / rows.norm(dim=1, keepdim=True) for rows in (x, y))
    return torch.exp(-torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * 10**2))


def u_statistic(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    m, n = len(x), len(y)
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - xx.trace()) / (m * (m - 1)) + (yy.sum() - yy.trace()) / (n * (n - 1))
    return float(within - 2 * xy.mean())


def v_statistic(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    return float(kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())


def deleted_one_error(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    def without(rows: Tensor, k: int) -> Tensor:
        return torch.cat([rows[:k], rows[k + 1 :]])

    variance = 0.0
    for values in ([u_statistic(kernel, without(x, k), y) for k in range(len(x))],
                   [u_statistic(kernel, x, without(y, k)) for k in range(len(y))]):  # fmt: skip
        variance += (len(values) - 1) * float(np.var(values))
    return math.sqrt(variance)


def shares(real: Tensor, fake: Tensor, k_manifold: int = 3, k_density: int = 5) -> dict[str, float]:
    """The definitions, from whole matrices of differences."""

    def distances(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")

    def radii(x: Tensor, k: int) -> Tensor:
        return (distances(x, x) + torch.diag(torch.full((len(x),), math.inf))).sort(dim=1).values[:, k - 1]

    between = distances(real, fake)
    in_density_ball = between < radii(real, k_density)[:, None]
    return {
        "precision": float((between <= radii(real, k_manifold)[:, None]).any(dim=0).double().mean()),
        "recall": float((between <= radii(fake, k_manifold)[None]).any(dim=1).double().mean()),
        "density": float(in_density_ball.sum()) / (k_density * len(fake)),
        "coverage": float(in_density_ball.any(dim=1).double().mean()),
    }


def clusters(distance: float, seed: int) -> Tensor:
    """Two of 150 rows each, so that squares are distance^2 larger than what neighbours are apart."""
    rows = normal(300, 32, seed=seed)
    rows[150:] += distance
    return rows


REAL, FAKE = normal(130, 6) + 0.4, 0.9 * normal(95, 6, seed=1) + 1.1
BLOCK = block_of(range(len(FAKE)))


def agree(estimate: Estimate | None, value: float, leave_one_out: list[float], rel: float = 1e-10) -> None:
    assert estimate is not None
    assert estimate.leave_one_out is not None
    assert estimate.value == pytest.approx(value, rel=rel)
    assert estimate.leave_one_out == pytest.approx(leave_one_out, rel=rel)


# The definitions


def test_the_kernel_distance_is_the_u_statistic_and_its_errors_are_counted_again() -> None:
    distance = exactly(REAL, FAKE, asked=["kd"]).kernel_distance
    agree(distance, u_statistic(cubic, REAL, FAKE), [u_statistic(cubic, REAL, FAKE[b != BLOCK]) for b in range(BLOCKS)])
    assert distance.standard_error == pytest.approx(deleted_one_error(cubic, REAL, FAKE), rel=1e-9)
    half = 1.96 * distance.standard_error
    assert distance.interval == pytest.approx((distance.value - half, distance.value + half), rel=1e-12)


def test_the_published_mmd_is_the_v_statistic_and_the_debiased_the_u_statistic() -> None:
    mmd = exactly(REAL, FAKE, asked=["clip-mmd"]).mmd
    left = [1000 * v_statistic(unit_gaussian, REAL, FAKE[b != BLOCK]) for b in range(BLOCKS)]
    agree(mmd, 1000 * v_statistic(unit_gaussian, REAL, FAKE), left)
    assert mmd.debiased == pytest.approx(1000 * u_statistic(unit_gaussian, REAL, FAKE), rel=1e-10)
    assert mmd.standard_error == pytest.approx(1000 * deleted_one_error(unit_gaussian, REAL, FAKE), rel=1e-8)


@pytest.mark.parametrize("name", ["precision", "recall", "density", "coverage"])
@pytest.mark.parametrize(("k_manifold", "k_density"), [(3, 5), (1, 1), (5, 4)])
def test_shares_and_their_leave_one_out_values_are_the_definitions(name: str, k_manifold: int, k_density: int) -> None:
    found = getattr(exactly(REAL, FAKE, k_manifold=k_manifold, k_density=k_density), name)
    left = [shares(REAL, FAKE[b != BLOCK], k_manifold, k_density)[name] for b in range(BLOCKS)]
    agree(found, shares(REAL, FAKE, k_manifold, k_density)[name], left, rel=1e-12)
    assert len(set(found.leave_one_out)) > 2
    assert 0.1 < found.value < 0.95  # not at an end, where a wrong radius would not show
    assert found.standard_error == pytest.approx(jackknife(found.value, left).standard_error, rel=1e-12)


def test_precision_and_recall_by_hand() -> None:
    """On a line, k = 1. Real balls: 0 and 1 of radius 1, 10 of radius 9. Fake balls: 1.5 and 1.8 of .3, 30 of 28.2."""
    real, fake = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[1.5], [1.8], [30.0]])
    result = precision_recall(real, fake, k=1)
    assert result.precision == pytest.approx(2 / 3)  # 30 is 20 away from 10
    assert result.recall == pytest.approx(1 / 3)  # 10 alone: the ball of 30 ends at 1.8
    assert density_coverage(real, fake, k=1).density == pytest.approx(4 / 3)  # 1.5 and 1.8 are in the balls of 1 and 10
    assert density_coverage(real, fake, k=1).coverage == pytest.approx(2 / 3)


def test_the_boundary_belongs_to_the_manifold_and_not_to_the_ball_of_density() -> None:
    real, fake = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[-2.0], [-2.0], [-2.0]])
    assert precision_recall(real, fake, k=1).precision == 1
    assert density_coverage(real, fake, k=1).density == 0
    assert density_coverage(real, fake, k=1).coverage == 0


# Laws


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(6, 40), st.integers(6, 40), st.sampled_from([2, 7, 512]))
def test_any_sizes_and_any_tiles(seed: int, d: int, m: int, n: int, size: int) -> None:
    real, fake = normal(m, d, seed=seed) + 1, 1.2 * normal(n, d, seed=seed + 1) + 1.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "CPU_TILE", size)
        found = exactly(real, fake, asked=KNOWN)
    assert found.kernel_distance.value == pytest.approx(u_statistic(cubic, real, fake), rel=1e-9, abs=1e-11)
    assert found.mmd.debiased == pytest.approx(1000 * u_statistic(unit_gaussian, real, fake), rel=1e-9, abs=1e-9)
    for name, value in shares(real, fake).items():
        assert getattr(found, name).value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("distance", [0.0, 1e4])
def test_nothing_depends_on_what_else_is_asked(distance: float) -> None:
    real, fake = clusters(distance, seed=0), 0.95 * clusters(distance, seed=1)
    together = pairwise(real, fake, asked=KNOWN)
    for name, field in zip(
        KNOWN, ["kernel_distance", "precision", "recall", "density", "coverage", "mmd"], strict=True
    ):
        alone = pairwise(real, fake, asked=[name])
        assert getattr(alone, field) == getattr(together, field)
        assert [f for f, estimate in vars(alone).items() if estimate is not None] == [field]


def test_the_order_of_the_rows_is_nothing_but_rounding() -> None:
    order = torch.randperm(len(FAKE), generator=torch.Generator().manual_seed(3))
    one, other = exactly(REAL, FAKE, asked=KNOWN), exactly(REAL.flip(0), FAKE[order], asked=KNOWN, blocks=BLOCK[order])
    for name in vars(one):
        assert getattr(one, name).value == pytest.approx(getattr(other, name).value, rel=1e-12)
        assert getattr(one, name).leave_one_out == pytest.approx(getattr(other, name).leave_one_out, rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4])
def test_float32_is_as_good_as_float64_however_far_from_zero(offset: float) -> None:
    real, fake = normal(700, 40) + offset, 1.05 * normal(600, 40, seed=1) + offset
    single, double = pairwise(real, fake, asked=KNOWN), exactly(real, fake, asked=KNOWN)
    for name in vars(single):
        a, b = getattr(single, name), getattr(double, name)
        if name in ("kernel_distance", "mmd"):
            assert a.value == pytest.approx(b.value, abs=2e-4 * b.standard_error), name
            assert a.standard_error == pytest.approx(b.standard_error, rel=1e-4), name
        else:
            assert a.value == pytest.approx(b.value, abs=1e-6), name
            assert 0 < a.value < 1, name


@pytest.mark.parametrize("distance", [1e2, 1e3, 1e4, 1e5])
def test_clusters_that_are_far_apart_are_as_clusters_that_are_near(distance: float) -> None:
    """Where float32 would hold all rows of a cluster for equal: precision 1, coverage 0."""
    real, fake = clusters(distance, seed=0), clusters(distance, seed=1)
    found = pairwise(real, fake, asked=KNOWN)
    for name, value in shares(real, fake).items():
        assert getattr(found, name).value == pytest.approx(value, rel=1e-12), name
        assert getattr(found, name) == getattr(exactly(real, fake, asked=[name]), name)
        assert 0.2 < value < 1.5
    truth = 1000 * u_statistic(unit_gaussian, real, fake)
    assert found.mmd.debiased == pytest.approx(truth, abs=1e-4 * found.mmd.standard_error)


def test_float64_is_for_the_shares_that_need_it() -> None:
    def unresolved(real: Tensor, fake: Tensor) -> list[str]:
        pair = gram.prepare(real, fake, None, torch.float32, torch.device("cpu"))
        visitor = Neighbours(pair, NAMES, 3, 5)
        gram.visit(pair, [visitor])
        return visitor.unresolved()

    real, fake = normal(300, 32), normal(300, 32, seed=1)
    copied = real.clone()
    copied[:4] = real[0]  # three neighbours are at distance 0, the fifth is not
    assert unresolved(real + 1e4, fake + 1e4) == []
    assert unresolved(real, 1e-3 * fake + 1) == ["recall"]
    assert unresolved(copied, fake) == ["precision"]
    assert set(unresolved(clusters(1e4, seed=0), clusters(1e4, seed=1))) == set(NAMES)


def test_autocast_of_the_program_changes_nothing() -> None:
    expected = pairwise(REAL, FAKE, asked=KNOWN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pairwise(REAL, FAKE, asked=KNOWN) == expected


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_do_not_feel_the_scale(scale: float, dtype: torch.dtype) -> None:
    names = ["precision", "recall", "density", "coverage"]
    assert pairwise(REAL * scale, FAKE * scale, asked=names, dtype=dtype) == pairwise(REAL, FAKE, asked=names)


def test_a_kernel_that_overflows_is_an_error() -> None:
    with pytest.raises(ValueError, match="kd: not finite"):
        kernel_distance(REAL * 1e30, FAKE * 1e30)
    with pytest.raises(ValueError, match="kd: not finite"):
        exactly(REAL * 1e110, FAKE * 1e110, asked=["kd"])
    with pytest.raises(ValueError, match="too large"):
        pairwise(torch.full((20, 3), 1.7e308, dtype=torch.float64), FAKE[:20, :3].contiguous())
    large = exactly(REAL * 1e20, FAKE * 1e20, asked=["kd"]).kernel_distance
    assert large.value == pytest.approx(u_statistic(cubic, REAL * 1e20, FAKE * 1e20), rel=1e-10)


# Sets that are not in general position


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 0.1, 1e5])
def test_equal_rows_are_at_distance_zero(offset: float, dtype: torch.dtype) -> None:
    """Three copies of every row: all radii of two neighbours are zero, and who is in a ball is a question of bits."""
    x = (normal(50, 300) + offset).repeat(3, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    same = pairwise(x, x[order], k_manifold=2, k_density=2, dtype=dtype)
    assert (same.precision.value, same.recall.value, same.density.value, same.coverage.value) == (1, 1, 0, 0)
    apart = pairwise(x, (x + normal(150, 300, seed=2))[order], k_manifold=2, k_density=2, dtype=dtype)
    assert (apart.precision.value, apart.density.value, apart.coverage.value) == (0, 0, 0)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0])
def test_a_set_of_one_point(value: float) -> None:
    x = torch.full((60, 5), value)
    same = pairwise(x, x)
    assert (same.precision.value, same.recall.value, same.density.value, same.coverage.value) == (1, 1, 0, 0)
    assert same.kernel_distance.value == pytest.approx(0, abs=1e-12)
    assert same.precision.standard_error == 0


def test_the_extremes() -> None:
    x = normal(50, 4)
    same = pairwise(x, x.flip(0))
    assert (same.precision.value, same.recall.value, same.coverage.value) == (1, 1, 1)
    assert same.kernel_distance.value < 0  # unbiased: every row has its copy on the other side
    apart = pairwise(x, x + 1000)
    assert (apart.precision.value, apart.recall.value, apart.density.value, apart.coverage.value) == (0, 0, 0, 0)
    collapsed = precision_recall(x, x[:1] + 1e-3 * normal(50, 4, seed=1))
    assert collapsed.precision == 1
    assert collapsed.recall < 0.1


def test_few_rows_have_values_and_no_errors() -> None:
    small = exactly(REAL[:4], FAKE[:6], asked=KNOWN, k_density=2)
    assert small.kernel_distance.value == pytest.approx(u_statistic(cubic, REAL[:4], FAKE[:6]), rel=1e-10)
    assert small.kernel_distance.standard_error > 0  # of single rows
    for estimate in vars(small).values():
        assert estimate.leave_one_out is None
    assert small.recall.standard_error is None
    assert exactly(REAL[:2], FAKE[:2], asked=["kd"]).kernel_distance.standard_error is None

    # Ten rows: a block is one row, and without it three neighbours are still there; nine neighbours are not.
    assert exactly(REAL, FAKE[:10], asked=["recall"]).recall.standard_error is not None
    assert exactly(REAL, FAKE[:10], asked=["recall"], k_manifold=9).recall.standard_error is None


def test_other_dtypes_are_read_and_gradients_left_alone() -> None:
    whole = (10 * REAL).round(), (10 * FAKE).round()
    expected = exactly(*whole, asked=KNOWN)
    for dtype in (torch.int32, torch.float16, torch.float32):
        assert exactly(*(x.to(dtype) for x in whole), asked=KNOWN) == expected
    needing = whole[0].clone().requires_grad_()
    assert exactly(needing, whole[1], asked=KNOWN) == expected


def precision() -> tuple[str, str]:
    """Of float32 products on either kind of device."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        return (torch.get_float32_matmul_precision(),) * 2
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


class Watch:
    """A visitor that notes which precision products have."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def within(self, points: gram.Points, i: gram.Tile, j: gram.Tile, tile: Tensor) -> None:
        self.seen.add(precision())

    def across(self, i: gram.Tile, j: gram.Tile, tile: Tensor) -> None:
        self.seen.add(precision())


def test_the_precision_of_products_is_ours_inside_and_the_programs_outside() -> None:
    before, watch = torch.get_float32_matmul_precision(), Watch()
    torch.set_float32_matmul_precision("medium")
    lax = precision()
    try:
        gram.visit(gram.prepare(REAL, FAKE, None, torch.float32, torch.device("cpu")), [watch])
        assert precision() == lax
    finally:
        torch.set_float32_matmul_precision(before)
    assert watch.seen in ({("ieee", "ieee")}, {("highest", "highest")})


# Statistics


@pytest.mark.slow
def test_the_kernel_distance_is_unbiased_and_its_interval_covers() -> None:
    """x ~ N(0, I), y ~ N(a, I): the distance of the laws is a polynomial; 200 draws."""
    d, n, repetitions = 5, 120, 200
    shift = 0.3
    # E (x.y/d + 1)^3 for x ~ N(mu, I), y ~ N(nu, I) with t = x.y/d: 1 + 3 E t + 3 E t^2 + E t^3.
    mean = torch.full((d,), shift, dtype=torch.float64)

    def expected(mu: Tensor, nu: Tensor) -> float:
        dot, squares = float(mu @ nu), float(mu @ mu + nu @ nu)
        third = dot**3 + 3 * dot * (squares + d) + 6 * dot
        return 1 + 3 * dot / d + 3 * (dot**2 + squares + d) / d**2 + third / d**3

    zero = torch.zeros(d, dtype=torch.float64)
    truth = expected(zero, zero) + expected(mean, mean) - 2 * expected(zero, mean)
    found = [
        exactly(normal(n, d, seed=2 * r), normal(n, d, seed=2 * r + 1) + shift, asked=["kd"]).kernel_distance
        for r in range(repetitions)
    ]
    values = torch.tensor([estimate.value for estimate in found])
    spread = float(values.std())
    assert float(values.mean()) == pytest.approx(truth, abs=4 * spread / math.sqrt(repetitions))
    assert float(torch.tensor([e.standard_error for e in found]).mean()) == pytest.approx(spread, rel=0.2)
    covered = sum(estimate.interval[0] <= truth <= estimate.interval[1] for estimate in found) / repetitions
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / repetitions))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ratio"), [("precision", 1), ("density", 1), ("coverage", 1.1), ("recall", 1.4)])
def test_errors_of_shares_are_the_spread_of_draws_of_the_fake_set(name: str, ratio: float) -> None:
    """Recall's is too large: a block that leaves moves the balls of the others. 60 draws know a spread to 9 %."""
    real = normal(300, 4, seed=7)
    found = [getattr(pairwise(real, 0.9 * normal(300, 4, seed=100 + r) + 0.5, asked=[name]), name) for r in range(60)]
    spread = float(torch.tensor([estimate.value for estimate in found]).std())
    variance = float(torch.tensor([estimate.standard_error**2 for estimate in found]).mean())
    assert math.sqrt(variance) / spread == pytest.approx(ratio, rel=0.25)


# What it cannot use


def test_it_names_what_it_cannot_use() -> None:
    x, bad = normal(10, 2), normal(10, 2)
    bad[[2, 5], 1] = float("nan")
    infinite = normal(10, 2)
    infinite[:7, 0] = float("inf")
    zero = normal(10, 2)
    zero[4] = 0
    for real, fake, options, message in (
        (x, normal(10, 3), {}, r"fake: shape \[10, 3\] is not \[N, 2\]"),
        (x[0], x, {}, r"real: shape \[2\]"),
        (x[:, :0], x[:, :0], {}, r"real: shape \[10, 0\]"),
        (bad, x, {}, "real: 2 of 10 rows have NaN or infinite values: rows 2, 5"),
        (x, infinite, {}, r"fake: 7 of 10 .*: rows 0, 1, 2, 3, 4, \.\.\."),
        (x.to(torch.complex64), x, {}, "real: dtype torch.complex64"),
        (x, x[:1], {}, "fake: 1 rows"),
        (x[:3], x, {}, "k: precision of 3 neighbours among 3 real rows|k: .* of 5 neighbours among 3 real rows"),
        (x, x[:3], {"asked": ["recall"]}, "k: recall of 3 neighbours among 3 fake rows"),
        (x, x, {"k_manifold": 0}, "k: (precision|recall) of 0 neighbours"),
        (x, x, {"asked": ["kd", "kid"]}, "asked: .*kid"),
        (x, x, {"asked": []}, "asked: "),
        (x, x, {"asked": "kd"}, "asked: 'kd'"),
        (x, zero, {"asked": ["clip-mmd"]}, "fake: 1 of 10 rows are zero and have no direction: rows 4"),
        (x, x, {"dtype": torch.float16}, "dtype: torch.float16"),
        (x, x, {"dtype": torch.float64, "device": "mps"}, "device: mps has no float64"),
        (x, x, {"blocks": torch.zeros(10, dtype=torch.int64)}, "10 blocks"),
        (x, x, {"blocks": torch.arange(9)}, r"blocks: \[9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pairwise(real, fake, **options)
