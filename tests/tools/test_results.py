"""Results as files, and what two of them say of each other."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tools.digest import digest_json
from tools.frechet import frechet_estimate
from tools.jackknife import BLOCKS, Estimate, jackknife
from tools.results import VERSION, Result, Spread, compare, read_results
from tools.statistics import FeatureStatistics

FULL = jackknife(0.1 + 0.2, [math.pi / k for k in range(1, BLOCKS + 1)], "few")


def result(values: dict[str, dict[str, Estimate]] | None = None, name: str = "a", **facts: Any) -> Result:
    """Of two metrics in two feature spaces, unless said otherwise; facts say what the key is of."""
    values = values or {"digits": {"fd": FULL, "vendi": Estimate(3.5)}, "pixels": {"fd": Estimate(1e-300)}}
    decided: dict[str, Any] = {
        "pairing": {"which": {"seed": 0}, "of": None},
        "extractors": {space: f"{space}|f32" for space in values},
        "references": {space: {"stream": "s", "n": 9} for space in values},
    }
    manifest = {"reference": "digits"}
    inputs = {"source": "runs/a", "axes": {}, "facts": {}, "manifest": manifest}
    axes = {"sampler": "heun", "steps": 18, "teleport": None, "draw": 0}
    return Result(name, axes, 100, 35, values, decided | facts, inputs, {"command": "distill-fid", "seconds": 0.1})


def written(folder: Path, **changes: Any) -> Path:
    """A result's file whose fields are other ones than were written."""
    file = folder / "r.json"
    result().save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


# Files


def test_a_result_is_read_as_it_was_written_to_the_bit(tmp_path: Path) -> None:
    kept = result(name='größer | "als"')
    kept.save(tmp_path / "r.json")
    assert Result.load(tmp_path / "r.json") == kept
    content = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (content["key"], content["version"]) == (kept.key, VERSION)
    assert kept.key == digest_json(kept.facts)[:32]
    assert content["values"]["digits"]["fd"] == json.loads(json.dumps(asdict(FULL)))
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_the_key_is_of_the_facts_only() -> None:
    kept = result()
    assert replace(kept, name="b", values={}, provenance={}, n=1, inputs={}).key == kept.key
    assert result(more=1).key != kept.key


def test_a_title_has_the_axes_that_were_set() -> None:
    assert result().title == "a (sampler heun, steps 18, draw 0)"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_written(bad: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        result({"digits": {"fd": Estimate(bad)}}).save(tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def estimate(**changes: Any) -> dict[str, Any]:
    return {"values": {"digits": {"fd": asdict(FULL) | changes}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": result(seed=7).facts}, "is not what was written: it was changed by hand"),
        ({"key": "0" * 32}, "is not what was written: it was changed by hand"),
        (estimate(value=1.0), "is not what was written: it was changed by hand"),
        ({"inputs": {}}, "is not what was written: it was changed by hand"),
        ({"version": VERSION + 1}, f"is of version {VERSION + 1}, not {VERSION}; its numbers do not compare"),
        ({"n": "many"}, r"not a result of distill-fid \(n: Input should be a valid integer"),
        ({"axes": None}, r"not a result of distill-fid \(axes: Input should be a valid dictionary"),
        ({"values": {"digits": {"fd": 3.0}}}, r"not a result of distill-fid \(values.digits.fd: "),
        (estimate(value="low"), r"values.digits.fd.value: Input should be a valid number"),
        (estimate(value=None), r"values.digits.fd.value: Input should be a valid number"),
        (estimate(interval=[1.0]), r"values.digits.fd.interval"),
        (estimate(value=float("nan")), "not a result of distill-fid .*NaN is no number"),
        (estimate(standard_error=float("inf")), "not a result of distill-fid .*Infinity is no number"),
    ],
)
def test_a_file_that_was_changed_by_hand_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        Result.load(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["key", "version", "values", "facts", "name", "inputs"])
def test_a_file_that_lacks_a_field_is_named(field: str, tmp_path: Path) -> None:
    file = written(tmp_path)
    content = json.loads(file.read_text())
    del content[field]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"r\.json is not a result of distill-fid \(.*{field}"):
        Result.load(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b"\xff\x00", b'{"entries": []}', None])
def test_a_file_that_is_none_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.json is not a result of distill-fid") as error:
        Result.load(file)
    assert "\n" not in str(error.value)


# Many files


def test_results_are_read_from_files_folders_and_batches(tmp_path: Path) -> None:
    kept = [result(seed=k) for k in range(4)]
    (tmp_path / "batch" / "results").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    places = [tmp_path / "batch" / "results" / "0.json", tmp_path / "batch" / "results" / "1.json",
              tmp_path / "plain" / "2.json", tmp_path / "3.json"]  # fmt: skip
    for one, place in zip(kept, places, strict=True):
        one.save(place)
    (tmp_path / "batch" / "hashes.json").write_text("{}")
    assert read_results([tmp_path / "batch", tmp_path / "plain", tmp_path / "3.json"]) == kept
    assert read_results([tmp_path / "3.json", tmp_path / "batch"]) == [kept[3], *kept[:2]]


def test_equal_results_of_one_key_count_once(tmp_path: Path) -> None:
    for name in ("x.json", "y.json"):
        replace(result(), provenance={"seconds": name}).save(tmp_path / name)
    assert len(read_results([tmp_path, tmp_path / "x.json"])) == 1


def test_two_results_of_one_key_that_differ_are_refused_naming_both_files(tmp_path: Path) -> None:
    other = {space: dict(metrics) for space, metrics in result().values.items()}
    other["pixels"]["fd"] = Estimate(math.nextafter(1e-300, 1))  # by the last bit
    result().save(tmp_path / "x.json")
    replace(result(), values=other).save(tmp_path / "y.json")
    with pytest.raises(ValueError, match=rf"x\.json and \S+y\.json have one key, {result().key}, and other values"):
        read_results([tmp_path])


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for folder in (tmp_path, tmp_path / "results"):
        with pytest.raises(ValueError, match=f"result: {folder} has no results"):
            read_results([folder])


# Differences


def judged(noise: np.ndarray, scale: float, known: FeatureStatistics, **facts: Any) -> Result:
    rows = torch.from_numpy(scale * noise + 0.3)
    return replace(result({"noise": {"fd": frechet_estimate(rows, known)}}, **facts), n=len(rows))


def test_the_interval_of_a_difference_covers_and_pairing_makes_it_narrow() -> None:
    """Two generators of N(.3, scale^2 I), d = 3, from the same noise or from another: the truth is known.

    Of 60 repetitions the paired interval covers 95 % within three standard errors (.084); the other at least as often,
    less those. Their centres are the truth within four standard errors. Pairing divides the error by more than two.
    """
    d, n, times = 3, 48, 60
    known = FeatureStatistics.of_moments(np.zeros(d), np.eye(d))
    truth = d * (0.5**2 - 0.4**2)
    covered, centres, errors = np.zeros(2), np.zeros((2, times)), np.zeros((2, times))
    for k in range(times):
        noise, other = np.random.default_rng(k).standard_normal((2, n, d))
        a = judged(noise, 1.4, known, seed=1)
        apart = {"pairing": {"which": {"seed": 1}, "of": None}}
        for row, b in enumerate((judged(noise, 1.5, known, seed=2), judged(other, 1.5, known, **apart))):
            (difference,) = compare(a, b)
            assert difference.paired == (row == 0)
            assert difference.interval is not None
            assert difference.standard_error is not None
            covered[row] += difference.interval[0] < truth < difference.interval[1]
            centres[row, k], errors[row, k] = difference.difference, difference.standard_error
    allowed = 3 * (0.95 * 0.05 / times) ** 0.5
    assert abs(covered[0] / times - 0.95) < allowed
    assert covered[1] / times > 0.95 - allowed
    assert (np.abs(centres.mean(1) - truth) < 4 * centres.std(1) / times**0.5).all()
    assert 2 * errors[0].mean() < errors[1].mean()
    assert errors.mean(1) == pytest.approx(centres.std(1), rel=0.3)


def test_a_difference_is_b_minus_a_and_changes_its_sign_with_them() -> None:
    a, b = (
        result({"s": {"fd": FULL, "vendi": Estimate(3.5)}}),
        result({"s": {"fd": Estimate(1.0), "vendi": Estimate(4)}}),
    )
    there, back = compare(a, b), compare(b, a)
    assert [(d.extractor, d.metric, d.a, d.b, d.difference) for d in there] == [
        ("s", "fd", FULL.value, 1.0, 1.0 - FULL.value), ("s", "vendi", 3.5, 4, 0.5),
    ]  # fmt: skip
    assert [d.difference for d in back] == [-d.difference for d in there]
    assert all(d.interval is None and not d.paired for d in there)  # nothing is known of their errors


def test_the_same_result_differs_by_nothing() -> None:
    (difference,) = compare(result({"s": {"fd": FULL}}), result({"s": {"fd": FULL}}))
    assert (difference.difference, difference.standard_error, difference.interval) == (0, 0, (0, 0))
    assert difference.paired


def test_a_metric_that_is_not_debiased_is_compared_by_its_values() -> None:
    """The jackknife's error of their difference, around the difference of what the table shows."""
    rng = np.random.default_rng(0)
    left = rng.standard_normal((2, BLOCKS))
    ours, theirs = (
        replace(jackknife(value, row.tolist()), debiased=None) for value, row in zip((1.0, 3.0), left, strict=True)
    )
    (found,) = compare(result({"s": {"vendi": ours}}), result({"s": {"vendi": theirs}}))
    assert found.difference == 2
    assert found.interval is not None
    assert sum(found.interval) / 2 == pytest.approx(2)
    assert found.standard_error == pytest.approx(jackknife(2.0, (left[1] - left[0]).tolist()).standard_error)


def test_without_pairs_the_errors_are_added_in_squares() -> None:
    ours, theirs = Estimate(1.0, 0.3, debiased=0.9), Estimate(2.0, 0.4, debiased=2.1)
    (found,) = compare(result({"s": {"fd": ours}}), result({"s": {"fd": theirs}}))
    assert found.difference == pytest.approx(1.2)
    assert found.standard_error == pytest.approx(0.5)
    assert found.interval == pytest.approx((1.2 - 2.1009 * 0.5, 1.2 + 2.1009 * 0.5), abs=1e-4)  # t of 18 degrees


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, n=99), r"n: a \(.*\) has 100 samples, b \(.*\) 99; the biases of unequal"),
        (lambda r: replace(r, values={"other": {}}), r"features: \['digits', 'pixels'\] and \['other'\]; needed"),
        (lambda r: replace(r, values={"digits": {"kd": FULL}}), r"metrics: a \(.*\) and b \(.*\) have none in common"),
        (lambda r: replace(r, facts=r.facts | {"extractors": {"digits": "u8", "pixels": "pixels|f32"}}),
         r"extractors: digits: digits\|f32 and u8 do not compare"),
        (lambda r: replace(r, facts=r.facts | {"references": {"digits": {"n": 8}, "pixels": {"n": 8}}}),
         "references: digits: .* and {'n': 8} do not compare"),
    ],
)  # fmt: skip
def test_what_does_not_compare_is_refused_naming_both(change: Callable[[Result], Result], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(result(), change(result(name="b")))


# Draws


def test_the_spread_of_draws_is_their_sample_deviation_and_of_one_its_own_error() -> None:
    draws = [Estimate(value, 9.0, value - 1) for value in (1.0, 2.0, 6.0)]
    assert Spread.of(draws) == Spread(3.0, math.sqrt(7), 3)
    assert Spread.of(draws, debiased=True) == Spread(2.0, math.sqrt(7), 3)
    assert Spread.of(draws[:1]) == Spread(1.0, 9.0, 1)
    assert Spread.of([Estimate(1.0)]) == Spread(1.0, None, 1)
