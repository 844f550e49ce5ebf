import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from tools.jackknife import BLOCKS, Estimate, block_of, jackknife, of_blocks


def normal(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n)


# Blocks


@given(st.integers(0, 10**12), st.integers(1, 300))
def test_blocks_of_consecutive_numbers_are_of_equal_size(first: int, n: int) -> None:
    first -= first % BLOCKS
    sizes = torch.bincount(block_of(range(first, first + n)), minlength=BLOCKS)
    assert len(sizes) == BLOCKS
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == n


@given(st.lists(st.integers(0, 2000), max_size=60))
@pytest.mark.slow
def test_a_block_is_a_function_of_the_number_only(numbers: list[int]) -> None:
    known = block_of(range(2001))
    found = block_of(numbers)
    assert found.dtype == torch.int64
    assert found.tolist() == [known[k] for k in numbers]
    assert torch.equal(block_of(torch.tensor(numbers, dtype=torch.int64)), found)


@pytest.mark.parametrize("period", [2, 5, 10, 20, 100])
def test_labels_that_take_turns_are_in_all_blocks_alike(period: int) -> None:
    """What a plain k mod 10 would make a class of its own. chi^2 of independence, within five of its deviations."""
    n = 20_000
    blocks, labels = block_of(range(n)), torch.arange(n) % period
    counts = torch.zeros(period, BLOCKS).index_put_((labels, blocks), torch.ones(n), accumulate=True)
    expected = n / period / BLOCKS
    freedom = (period - 1) * (BLOCKS - 1)
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - freedom) < 5 * (2 * freedom) ** 0.5


def test_labels_that_are_sorted_are_in_all_blocks_alike() -> None:
    blocks = block_of(range(1000))
    for label in range(10):
        assert torch.equal(torch.bincount(blocks[100 * label : 100 * (label + 1)]), torch.full((BLOCKS,), 10))


def test_blocks_are_those_of_every_release() -> None:
    """Results that are paired were made months apart: the first twenty, as written here once."""
    assert block_of(range(20)).tolist() == [
        0, 7, 8, 6, 9, 5, 1, 3, 2, 4, 9, 4, 2, 1, 0, 7, 8, 5, 3, 6,
    ]  # fmt: skip


@pytest.mark.parametrize("indices", [[-1, 2], [[1, 2]]])
def test_numbers_of_no_sample_are_refused(indices: list) -> None:
    with pytest.raises(ValueError, match="indices: "):
        block_of(indices)


# The jackknife


def test_the_jackknife_is_its_formulas() -> None:
    left = normal(BLOCKS, 0)
    estimate = jackknife(0.3, left.tolist(), "why")
    pseudo = BLOCKS * 0.3 - (BLOCKS - 1) * left  # the bias and the error are the mean and the error of pseudovalues
    error = pseudo.std(ddof=1) / BLOCKS**0.5
    assert estimate.value == 0.3
    assert estimate.debiased == pytest.approx(pseudo.mean(), rel=1e-14)
    assert estimate.standard_error == pytest.approx(error, rel=1e-14)
    assert estimate.interval == pytest.approx(t.interval(0.95, BLOCKS - 1, pseudo.mean(), error), rel=1e-13)
    assert (estimate.leave_one_out, estimate.warning) == (tuple(left.tolist()), "why")


def left_out(rows: np.ndarray, blocks: np.ndarray, statistic) -> list[float]:
    return [float(statistic(rows[blocks != b])) for b in range(BLOCKS)]


def test_the_error_of_a_mean_is_the_textbooks_and_it_has_no_bias() -> None:
    rows, blocks = normal(4000, 1), block_of(range(4000)).numpy()
    estimate = jackknife(rows.mean(), left_out(rows, blocks, np.mean))
    means = np.array([rows[blocks == b].mean() for b in range(BLOCKS)])
    assert estimate.standard_error == pytest.approx(means.std(ddof=1) / BLOCKS**0.5, rel=1e-12)
    assert estimate.debiased == pytest.approx(rows.mean(), abs=1e-15)


def test_a_bias_that_falls_as_one_over_n_is_taken_off() -> None:
    """The variance divided by N, of which the debiased value is exactly that divided by N - 1, for blocks of one."""
    rows = normal(BLOCKS, 2)
    estimate = jackknife(rows.var(), left_out(rows, np.arange(BLOCKS), np.var))
    assert estimate.debiased == pytest.approx(rows.var(ddof=1), rel=1e-13)
    assert abs(estimate.value - rows.var(ddof=1)) > 0.05


def test_intervals_cover_as_often_as_they_say() -> None:
    """The square of a mean: 95 % of 1000 intervals, within five standard errors (.034)."""
    covered = 0
    blocks = block_of(range(100)).numpy()
    for seed in range(1000):
        rows = normal(100, seed) + 5
        estimate = jackknife(rows.mean() ** 2, left_out(rows, blocks, lambda r: r.mean() ** 2))
        assert estimate.interval is not None
        covered += estimate.interval[0] < 25 < estimate.interval[1]
    assert abs(covered / 1000 - 0.95) < 5 * (0.95 * 0.05 / 1000) ** 0.5


def test_values_that_do_not_differ_have_no_error() -> None:
    assert jackknife(2.0, [2.0] * BLOCKS) == Estimate(2.0, 0.0, 2.0, (2.0, 2.0), (2.0,) * BLOCKS)


@pytest.mark.parametrize("left", [[1.0] * 9, [1.0] * 11, [1.0] * 9 + [float("nan")], [float("inf")] * 10, []])
def test_too_few_values_and_such_that_are_none_are_refused(left: list[float]) -> None:
    with pytest.raises(ValueError, match="needed are 10 finite values"):
        jackknife(1.0, left)


def test_a_value_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="beside nan"):
        jackknife(float("nan"), [1.0] * 10)


# Blocks that are given


def test_blocks_are_those_of_the_row_numbers_unless_given() -> None:
    assert torch.equal(of_blocks(None, 25), block_of(range(25)))
    own = torch.arange(20) % 10
    assert of_blocks(own, 20) is own


@pytest.mark.parametrize(
    ("blocks", "n", "message"),
    [
        (torch.arange(20) % 10, 21, r"blocks: \[20\] of torch.int64; needed are \[21\]"),
        (torch.arange(20) % 10.0, 20, "of torch.float32; needed"),
        (torch.arange(20) % 11, 20, "0 to 10; accepted are 0 to 9"),
        (torch.arange(20) % 10 - 1, 20, "-1 to 8; accepted"),
        (torch.arange(20) % 9, 20, "20 do not fill 10 blocks"),
        (None, 9, "9 do not fill 10 blocks"),
        (None, 0, "0 do not fill 10 blocks"),
    ],
)
def test_blocks_that_are_none_are_refused(blocks: torch.Tensor | None, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_blocks(blocks, n)
