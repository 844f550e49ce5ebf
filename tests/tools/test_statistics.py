import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.statistics import BLOCK, FeatureStatistics


def of(rows: torch.Tensor, *cuts: int) -> FeatureStatistics:
    statistics = FeatureStatistics(rows.shape[1])
    for batch in torch.tensor_split(rows, sorted(cuts)):
        statistics.update(batch)
    return statistics


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3 * BLOCK + 77, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 3


def same_bits(a: FeatureStatistics, b: FeatureStatistics) -> bool:
    return a.count == b.count and torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance)


def test_mean_and_covariance_are_numpys(rows: torch.Tensor) -> None:
    for n in (2, 3, BLOCK - 1, BLOCK, BLOCK + 1, len(rows)):
        statistics = of(rows[:n])
        exact = rows[:n].double().numpy()
        assert statistics.count == n
        np.testing.assert_allclose(statistics.mean, exact.mean(0), rtol=1e-13)
        np.testing.assert_allclose(statistics.covariance, np.cov(exact.T), rtol=1e-11, atol=1e-13)
        assert torch.equal(statistics.covariance, statistics.covariance.T)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3 * BLOCK + 77), max_size=8))
def test_cuts_into_batches_do_not_change_a_bit(rows: torch.Tensor, cuts: list[int]) -> None:
    assert same_bits(of(rows, *cuts), of(rows))


def test_reading_in_between_does_not_change_a_bit(rows: torch.Tensor) -> None:
    statistics = FeatureStatistics(7)
    for batch in rows.split(100):
        statistics.update(batch)
        _ = statistics.mean, statistics.count
    assert same_bits(statistics, of(rows))


def test_merge_order_does_not_change_a_bit_and_grouping_only_rounding(rows: torch.Tensor) -> None:
    parts = rows.split(600)
    ab, ba = of(parts[0]), of(parts[1])
    ab.merge(of(parts[1]))
    ba.merge(of(parts[0]))
    assert same_bits(ab, ba)

    ab.merge(of(parts[2]))
    assert ab.count == len(rows)
    torch.testing.assert_close(ab.mean, of(rows).mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(ab.covariance, of(rows).covariance, rtol=1e-12, atol=1e-13)


def test_merge_leaves_the_other_as_it_was_and_takes_rows_afterwards(rows: torch.Tensor) -> None:
    left, right = of(rows[:700]), of(rows[700:900])
    left.merge(right)
    assert same_bits(right, of(rows[700:900]))
    left.update(rows[900:])
    torch.testing.assert_close(left.covariance, of(rows).covariance, rtol=1e-12, atol=1e-13)


def test_merging_with_nothing_is_nothing(rows: torch.Tensor) -> None:
    whole, empty = of(rows), FeatureStatistics(7)
    whole.merge(FeatureStatistics(7))
    empty.merge(of(rows))
    assert same_bits(whole, of(rows))
    assert same_bits(empty, of(rows))


@pytest.mark.parametrize("offset", [1e5, -1e8])
def test_a_large_offset_costs_no_digits_that_matter(offset: float) -> None:
    # Powers of two, so that offset + row is exact and every error seen is one of the sums.
    rows = torch.randint(-64, 64, (2000, 5), generator=torch.Generator().manual_seed(1)).double() / 64
    torch.testing.assert_close(of(rows + offset).covariance, of(rows).covariance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_any_real_dtype_is_summed_in_float64(dtype: torch.dtype) -> None:
    rows = (100 * torch.randn(1500, 3, generator=torch.Generator().manual_seed(2))).to(dtype)
    assert of(rows).mean.dtype == of(rows).covariance.dtype == torch.float64
    assert same_bits(of(rows), of(rows.double()))


def test_save_and_load_give_back_the_same_bits(rows: torch.Tensor, tmp_path) -> None:
    statistics = of(rows)
    statistics.save(tmp_path / "s.npz")
    loaded = FeatureStatistics.load(tmp_path / "s.npz")
    assert same_bits(loaded, statistics)

    with np.load(tmp_path / "s.npz") as file:
        assert sorted(file.files) == ["mu", "n", "sigma"]
        np.testing.assert_allclose(file["sigma"], np.cov(rows.double().numpy().T), rtol=1e-11, atol=1e-13)
    loaded.update(rows[:10])
    torch.testing.assert_close(loaded.mean, of(torch.cat([rows, rows[:10]])).mean)


def test_a_file_without_n_is_read_but_not_added_to(rows: torch.Tensor, tmp_path) -> None:
    sigma = np.cov(rows.numpy().T).astype(np.float32)
    np.savez(tmp_path / "edm.npz", mu=rows.numpy().mean(0), sigma=sigma)
    loaded = FeatureStatistics.load(tmp_path / "edm.npz")
    assert (loaded.count, loaded.dim) == (None, 7)
    np.testing.assert_array_equal(loaded.covariance, sigma)
    for add in (lambda: loaded.update(rows), lambda: loaded.merge(of(rows)), lambda: of(rows).merge(loaded)):
        with pytest.raises(ValueError, match="without n"):
            add()

    loaded.save(tmp_path / "again.npz")
    assert FeatureStatistics.load(tmp_path / "again.npz").count is None


def test_a_failed_save_leaves_the_old_file_and_no_other(rows: torch.Tensor, tmp_path, monkeypatch) -> None:
    of(rows).save(tmp_path / "s.npz")
    before = (tmp_path / "s.npz").read_bytes()

    def half(file, **arrays) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="disk full"):
        of(rows[:9]).save(tmp_path / "s.npz")
    assert (tmp_path / "s.npz").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_are_counted_and_none_is_added(rows: torch.Tensor, bad: float) -> None:
    statistics = of(rows)
    broken = rows[:20].clone()
    broken[3, 1] = broken[3, 2] = broken[8, 0] = bad
    with pytest.raises(ValueError, match="2 of 20 rows have NaN or infinite"):
        statistics.update(broken)
    assert same_bits(statistics, of(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 4), r"\[3, 4\] is not \[N, 7\]"),
        (torch.zeros(7), r"\[7\] is not \[N, 7\]"),
        (torch.zeros(1, 7, dtype=torch.complex64), "not real"),
    ],
)
def test_other_shapes_and_complex_rows_raise(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureStatistics(7).update(rows)


def test_too_few_rows_and_other_dims_raise() -> None:
    with pytest.raises(ValueError, match="dim: 0"):
        FeatureStatistics(0)
    with pytest.raises(ValueError, match="0 rows have no mean"):
        _ = FeatureStatistics(2).mean
    with pytest.raises(ValueError, match="1 rows have no covariance"):
        _ = of(torch.zeros(1, 2)).covariance
    with pytest.raises(ValueError, match="cannot merge statistics of 3 features into 2"):
        FeatureStatistics(2).merge(FeatureStatistics(3))
    with pytest.raises(ValueError, match="too large for float64"):
        _ = of(torch.tensor([[1e200], [-1e200]], dtype=torch.float64)).covariance


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2)}, "not an .npz with mu and sigma"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"mu \(2,\) and sigma \(3, 3\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"not \[d\] and \[d, d\]"),
        ({"mu": np.zeros(2), "sigma": np.diag([1, np.nan])}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])}, "not a covariance"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "not a covariance"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "n": 1}, "n = 1"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "not an .npz with mu and sigma"),
    ],
)
def test_files_that_are_no_statistics_raise(arrays: dict, message: str, tmp_path) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        FeatureStatistics.load(tmp_path / "s.npz")
    assert str(tmp_path / "s.npz") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"not a zip at all", None])
def test_files_that_cannot_be_read_raise(content: bytes | None, tmp_path) -> None:
    if content is not None:
        (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(ValueError, match="with mu and sigma"):
        FeatureStatistics.load(tmp_path / "s.npz")


def test_a_bare_array_is_no_statistics(tmp_path) -> None:
    np.save(tmp_path / "s.npy", np.eye(2))
    with pytest.raises(ValueError, match="with mu and sigma"):
        FeatureStatistics.load(tmp_path / "s.npy")
