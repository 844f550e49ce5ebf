"""The Vendi score against its definition with the whole kernel matrix, and where it is known."""

import math
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tools.jackknife import BLOCKS, block_of, jackknife
from tools.vendi import vendi_score

ORDERS = [0.0, 0.3, 1.0, 2.0, 30.0, math.inf]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(x: Tensor, q: float, kernel: str) -> float:
    """Of K / n, n x n, or over its trace."""
    if kernel == "cosine":
        x = x / x.norm(dim=1, keepdim=True)
    shares = scipy.linalg.eigvalsh((x @ x.T).numpy())
    shares = np.sort(shares / shares.sum())[-min(x.shape) :]
    if q == 0:
        return float(np.linalg.matrix_rank(x.numpy()))
    if q == 1:
        return math.exp(-float(np.sum(shares * np.log(shares))))
    if q == math.inf:
        return 1 / float(shares[-1])
    return float(np.sum(shares**q)) ** (1 / (1 - q))


@pytest.mark.parametrize("kernel", ["cosine", "linear"])
@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("shape", [(90, 7), (40, 60), (25, 25)])
def test_it_and_its_leave_one_out_values_are_the_definition(shape: tuple[int, int], q: float, kernel: str) -> None:
    x = normal(*shape) * torch.linspace(0.2, 2, shape[1]) + 0.3
    found = vendi_score(x, q, kernel)
    left = [definition(x[block_of(range(len(x))) != b], q, kernel) for b in range(BLOCKS)]
    assert found.value == pytest.approx(definition(x, q, kernel), rel=1e-10)
    assert found.leave_one_out == pytest.approx(left, rel=1e-9)
    assert found.standard_error == pytest.approx(jackknife(found.value, left).standard_error, rel=1e-6, abs=1e-9)
    assert vendi_score(x, q, kernel, errors=False).value == pytest.approx(found.value, rel=1e-12)


@pytest.mark.parametrize("q", ORDERS)
@pytest.mark.parametrize("copies", [1, 7])
def test_orthogonal_rows_are_counted_and_their_copies_are_not(q: float, copies: int) -> None:
    x = 3 * torch.eye(12).repeat(copies, 1)
    assert vendi_score(x, q).value == pytest.approx(12, rel=1e-12)
    assert vendi_score(x, q, "linear").value == pytest.approx(12, rel=1e-12)


@pytest.mark.parametrize("q", ORDERS)
def test_equal_rows_are_one(q: float) -> None:
    for x in (
        normal(1, 5),
        normal(1, 5).repeat(40, 1),
        normal(1, 50).repeat(40, 1),
        torch.full((20, 1), 1e-150, dtype=torch.float64),
    ):
        assert vendi_score(x, q).value == pytest.approx(1, rel=1e-12)


def test_orders_by_hand() -> None:
    """Two orthogonal kinds, three of one and one of the other: eigenvalues 3/4 and 1/4."""
    x = torch.tensor([[1.0, 0], [5, 0], [0.1, 0], [0, -2]])
    for q, value in ((0, 2), (1, 4 / 3**0.75), (2, 16 / 10), (math.inf, 4 / 3)):
        assert vendi_score(x, q).value == pytest.approx(value, rel=1e-14)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30))
def test_laws(seed: int, n: int, d: int) -> None:
    """From 1 to the rank, falling in q, the same for any lengths of the rows and after rotations."""
    x = normal(n, d, seed=seed)
    values = [vendi_score(x, q, errors=False).value for q in [0, 0.5, 1 - 1e-9, 1, 1 + 1e-9, 1.4, 1.6, 100, math.inf]]
    assert values == pytest.approx(sorted(values, reverse=True), rel=1e-8)
    assert 1 - 1e-12 <= values[-1] <= values[0] <= min(n, d)
    turned = (x * normal(n, 1, seed=seed + 1)) @ torch.linalg.qr(normal(d, d, seed=seed + 2)).Q
    assert vendi_score(turned, 1.0, errors=False).value == pytest.approx(values[3], rel=1e-8)


def test_orders_near_one_and_large_orders_go_to_their_limits() -> None:
    x = normal(60, 8) + 0.5
    near = [vendi_score(x, 1 + step, errors=False).value for step in (-1e-12, 1e-12, -1e-6, 1e-6)]
    assert near == pytest.approx([vendi_score(x).value] * 4, rel=1e-5)
    assert near[:2] == pytest.approx([vendi_score(x).value] * 2, rel=1e-11)
    limit = vendi_score(x, math.inf)
    for q in (1e6, 1e300, 1e308, sys.float_info.max):
        assert vendi_score(x, q).value == pytest.approx(limit.value, rel=1e-4)
        assert vendi_score(x, q).leave_one_out == pytest.approx(limit.leave_one_out, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e150, 1e300])
@pytest.mark.parametrize("kernel", ["cosine", "linear"])
def test_scales_do_not_matter(scale: float, kernel: str) -> None:
    x = normal(40, 6)
    assert vendi_score(x * scale, 1.0, kernel).value == pytest.approx(vendi_score(x, 1.0, kernel).value, rel=1e-12)


def test_dtypes_and_few_rows() -> None:
    x = (10 * normal(9, 4)).round()
    few = vendi_score(x)
    assert few.standard_error is None
    for dtype in (torch.int32, torch.float16, torch.float32):
        assert vendi_score(x.to(dtype)) == few


def test_a_block_without_which_nothing_is_left_has_no_errors() -> None:
    x = torch.zeros(20, 3)
    x[0, 1] = 2
    assert vendi_score(x, 1.0, "linear").value == 1
    assert vendi_score(x, 1.0, "linear").standard_error is None


def test_errors_are_the_spread_of_draws() -> None:
    """60 draws know their spread to 9 %."""
    scales = torch.linspace(0.1, 2, 10)
    found = [vendi_score(normal(200, 10, seed=r) * scales) for r in range(60)]
    spread = float(torch.tensor([estimate.value for estimate in found]).std())
    variance = float(torch.tensor([estimate.standard_error**2 for estimate in found]).mean())
    assert math.sqrt(variance) / spread == pytest.approx(1, rel=0.3)


def test_it_names_what_it_cannot_use() -> None:
    x, bad, zero = normal(12, 3), normal(12, 3), normal(12, 3)
    bad[[1, 4]] = float("nan")
    zero[[3, 7]] = 0
    for features, options, message in (
        (bad, {}, "features: 2 of 12 rows have NaN or infinite values: rows 1, 4"),
        (zero, {}, "features: 2 of 12 rows are zero and have no direction: rows 3, 7"),
        (torch.zeros(4, 3), {"kernel": "linear"}, "features: all 4 rows are zero"),
        (x[0], {}, r"features: shape \[3\]"),
        (x[:0], {}, "features: 0 rows"),
        (x, {"q": -0.1}, "q: -0.1"),
        (x, {"q": math.nan}, "q: nan"),
        (x, {"kernel": "rbf"}, "kernel: 'rbf'"),
        (x, {"blocks": torch.zeros(12, dtype=torch.int64)}, "10 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            vendi_score(features, **options)
    assert vendi_score(zero, kernel="linear").value > 1
