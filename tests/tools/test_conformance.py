import os
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.distill.command import fresh
from tools.conformance import Implementation, answer, check, conformance_table, implementation_of, judge
from tools.conformance_cases import CASES, Array, Problem, distance_of, moments_of, normal, transported
from tools.frechet import frechet_distance
from tools.statistics import FeatureStatistics

HERE = "tests.tools.test_conformance"


def ours(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    return frechet_distance(FeatureStatistics.of_moments(mu1, sigma1), FeatureStatistics.of_moments(mu2, sigma2)).value


def of_features(x: Array, y: Array) -> float:
    function = implementation_of("ours").features
    assert function is not None
    return function(x, y)


def rational(sigma: list[list[int]], t: list[list[int]]) -> tuple[Array, Array, Fraction]:
    """S1, T S1 T and tr S1 + tr S2 - 2 tr S1 T of integers: no rounding anywhere."""
    n = range(len(t))
    product = [[sum(t[i][j] * sigma[j][k] for j in n) for k in n] for i in n]
    other = [[sum(product[i][j] * t[j][k] for j in n) for k in n] for i in n]
    truth = sum(sigma[i][i] + other[i][i] - 2 * product[i][i] for i in n)
    return np.array(sigma, float), np.array(other, float), Fraction(truth)


# What the cases are judged by


def test_the_references_agree_with_integers() -> None:
    """distance_of and transported, against a covariance of known integer factors and an exact product."""
    factor = np.array([[3, 1, -2, -2], [1, -4, 1, 2], [0, 2, -3, 1]])  # [d, N], rows sum to 0
    t = [[4, 1, 0], [1, 3, -1], [0, -1, 5]]
    sigma = factor @ factor.T
    s1, s2, truth = rational(sigma.tolist(), t)
    x = factor.T.astype(float)
    assert distance_of(x, x @ np.array(t, float)) == pytest.approx(float(truth / 3), rel=1e-14)
    problem = transported(s1, np.array(t, float))
    assert problem.truth == pytest.approx(float(1 + truth), rel=1e-14)
    assert problem.moments is not None
    np.testing.assert_array_equal(problem.moments[3], s2)
    assert ours(*problem.moments) == pytest.approx(problem.truth, rel=1e-13)


def test_moments_are_numpys() -> None:
    x, y = normal(20, 4), normal(9, 4, seed=1) + 5
    for mean, sigma, rows in zip(moments_of(x, y)[::2], moments_of(x, y)[1::2], (x, y), strict=True):
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-13)
        np.testing.assert_allclose(sigma, np.cov(rows.T), rtol=1e-12)


def test_every_truth_with_features_is_that_of_the_singular_values() -> None:
    """The closed forms of the table (ranks, shifts, doublings) against one formula that knows nothing of them."""
    seen = 0
    for name, make in CASES.items():
        problem = make()
        assert problem.relative <= 1e-6 or "float32" in name
        if problem.truth is not None and problem.features is not None:
            scale = 2.0 ** float(np.floor(np.log2(np.abs(problem.features[1]).max())))
            exact = distance_of(*(np.asarray(f, np.float64) / scale for f in problem.features)) * scale * scale
            assert exact == pytest.approx(problem.truth, rel=1e-8, abs=1e-8 * scale**2 * (problem.truth == 0)), name
            seen += 1
    assert seen > 40


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        (2.0, "ok"),
        (2 + 1e-10, "ok"),
        (torch.tensor(2.0), "ok"),
        (2 + 1e-9, "wrong"),
        (-2.0, "negative"),
        (float("nan"), "not a number"),
        (float("inf"), "not a number"),
        (2 + 0j, "not a number"),
        (np.array([2.0]), "not a number"),
    ],
)
def test_what_is_right(value: Any, verdict: str) -> None:
    assert judge(Problem(2.0), value)[0] == verdict
    assert judge(Problem(None), 2.0)[0] == "accepted"


def test_next_to_nothing_below_zero_is_negative() -> None:
    assert judge(Problem(0.0, absolute=1e-12), -1e-16)[0] == "negative"
    assert judge(Problem(0.0, absolute=1e-12), 1e-13) == ("ok", 1e-13, 1e-13)


# Ours, and theirs in processes


def test_ours_passes_every_case() -> None:
    outcomes = [answer(implementation_of("ours"), case) for case in CASES]
    failed = [(o.case, o.verdict, o.value, o.note) for o in outcomes if o.passed is not True]
    assert not failed
    refused = [o for o in outcomes if o.verdict == "refused"]
    assert len(refused) > 15
    assert all(o.note.startswith("ValueError: ") and len(o.note) > 25 for o in refused), [o.note for o in refused]


@pytest.mark.slow
def test_ours_passes_every_case_in_processes() -> None:
    outcomes = check("ours")
    assert [o.case for o in outcomes] == list(CASES)
    assert all(o.passed for o in outcomes)


@pytest.mark.parametrize("name", ["clean-fid", "torchmetrics"])
def test_theirs_agrees_with_the_same_truths(name: str) -> None:
    theirs = implementation_of(name)
    cases = ["shifted by 3", "mirrored", "N = d + 1", "commuting", "well conditioned, d = 128", "Cauchy rows"]
    outcomes = [answer(theirs, case) for case in cases]
    assert all(o.error is not None and o.error < 1e-12 for o in outcomes), outcomes
    assert [answer(theirs, case).verdict for case in ("N = 2", "scale 1e-100")] == ["wrong", "wrong"]


@pytest.mark.slow
def test_one_nan_hangs_clean_fid_and_ends_torchmetrics() -> None:
    (hung,) = check("clean-fid", ["one NaN of 128 features"], time_limit=3)
    assert (hung.verdict, hung.passed) == ("hung", False)
    assert not check("torchmetrics", ["one NaN of 128 features"], time_limit=3)[0].passed


def hangs(x: Array, y: Array) -> float:
    while True:
        time.sleep(1)


def dies(x: Array, y: Array) -> float:
    os.kill(os.getpid(), 11)
    return 0.0


def leaves(x: Array, y: Array) -> float:
    os._exit(3)


def never_mind(x: Array, y: Array) -> float:
    return 6.0 if x.shape == (3, 6) else float("nan")


def mean_only(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array, eps: float = 1e-6) -> float:
    if not np.isfinite(mu2).all():
        raise KeyError("no")
    return float(((mu1 - mu2) ** 2).sum())


def of_three(x: Array, y: Array, z: Array) -> float:
    return 0.0


@pytest.mark.slow
def test_what_goes_wrong_elsewhere_is_told_apart() -> None:
    begin = time.monotonic()
    assert [o.verdict for o in check(f"{HERE}:hangs", ["d = 1"], time_limit=0.5)] == ["hung"]
    assert time.monotonic() - begin < 60
    (killed,) = check(f"{HERE}:dies", ["d = 1"])
    assert (killed.verdict, killed.note) == ("crashed", "SIGSEGV")
    (left,) = check(f"{HERE}:leaves", ["d = 1"])
    assert (left.verdict, left.note) == ("crashed", "exit 3")
    some = check(f"{HERE}:never_mind", ["constant sets", "d = 1", "one NaN", "commuting"])
    assert [o.verdict for o in some] == ["ok", "not a number", "not a number", "not asked"]
    assert [o.passed for o in some] == [True, False, False, None]
    other = check(
        Implementation(moments=mean_only), ["shifted by 3", "d = 1", "only NaN", "NaN in mu", "identical sets"]
    )
    assert [o.verdict for o in other] == ["ok", "wrong", "not a number", "refused", "ok"]
    assert other[3].note == "KeyError: 'no'"

    table = conformance_table({"a": some[:3], "b": other[:3]})
    assert table.splitlines()[2] == "| constant sets | ok (0e+00) | ok (0e+00) |"
    assert table.splitlines()[-1] == "| passed | 1 of 3 | 1 of 3 |"


def test_bad_questions_are_refused() -> None:
    for against, message in (
        ("clean_fid", "against: 'clean_fid' is not there"),
        (f"{HERE}:nothing", "accepted are ours, clean-fid, torchmetrics or package.module:function"),
        ("no.such.module:f", "against: 'no.such.module:f' is not there"),
        (f"{HERE}:of_three", "takes 3 arguments; needed are 2"),
        (Implementation(features=lambda x, y: 0.0), "no other process can import"),
    ):
        with pytest.raises(ValueError, match=message):
            check(against, ["d = 1"])
    with pytest.raises(ValueError, match="cases: 'd = 2' is not one of identical sets, "):
        check("ours", ["d = 2"])
    with pytest.raises(ValueError, match="time_limit: 0 "):
        check("ours", ["d = 1"], time_limit=0)
    with pytest.raises(ValueError, match="neither"):
        Implementation()


@pytest.mark.slow
def test_the_command_prints_a_table(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("def fid(mu1, sigma1, mu2, sigma2):\n    return 2.0\n")
    command = ("-m", "tools.conformance", "--case", "d = 1, N = 2", "N = 2", "--against")
    root = os.getcwd()
    result = fresh(*command, "ours", "mine:fid", cwd=tmp_path, timeout=120, PYTHONPATH=root)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "| case | ours | mine:fid |"
    assert result.stdout.splitlines()[-2:] == ["| passed | 2 of 2 | 0 of 2 |", ""]
    assert fresh(*command, "mine:fid", cwd=tmp_path, timeout=120, PYTHONPATH=root).returncode == 1
    unknown = fresh(*command, "yours:fid", cwd=tmp_path, timeout=120, PYTHONPATH=root)
    assert unknown.returncode == 2
    assert unknown.stderr.splitlines()[-1].startswith("tools.conformance: error: against: 'yours:fid' is not there")


# Laws, of any input


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(-6, 6))
def test_integers_give_the_exact_rational(seed: int, d: int, power: int) -> None:
    """S2 = T S1 T of integers, with T positive definite: an exact truth, to 1e-10 as demanded."""
    rng = np.random.Generator(np.random.Philox(seed))
    factor = rng.integers(-9, 10, (d, rng.integers(1, 2 * d + 1)))
    root = rng.integers(-3, 4, (d, d))
    s1, s2, truth = rational((factor @ factor.T).tolist(), (root @ root.T + np.eye(d, dtype=int)).tolist())
    assume(truth > 0)
    scale, zero = 4.0**power, np.zeros(d)
    for pair in ((s1, s2), (s2, s1)):
        value = ours(zero, pair[0] * scale, zero, pair[1] * scale)
        assert value == pytest.approx(float(truth) * scale, rel=1e-10)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_finite_rows_have_a_distance(data: st.DataObject) -> None:
    """Whatever hypothesis thinks of: equal rows, zeros, one large value, N = 2. Real, not negative, symmetric, and that
    of the singular values within 1e-7 of the traces: what rounding of a singular covariance costs."""
    d = data.draw(st.integers(1, 4))
    numbers = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-30])
    rows = st.lists(st.lists(numbers, min_size=d, max_size=d), min_size=2, max_size=7)
    x, y = (np.array(data.draw(rows)) for _ in range(2))
    value, traces = of_features(x, y), float(sum(np.square(r - r.mean(0)).sum() / (len(r) - 1) for r in (x, y)))
    assert value >= 0
    assert value == pytest.approx(distance_of(x, y), rel=1e-10, abs=1e-7 * traces)
    assert of_features(y, x) == pytest.approx(value, rel=1e-10, abs=1e-7 * traces)
    assert of_features(x, x.copy()) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 20), st.integers(2, 20), st.integers(2, 20))
def test_its_root_is_a_metric(seed: int, d: int, n: int, m: int, k: int) -> None:
    """The triangle inequality of the 2-Wasserstein distance, through a third set of any rank."""
    x, y, z = normal(n, d, seed=seed), 2 * normal(m, d, seed=seed + 1) + 1, normal(k, d, seed=seed + 2) - 0.5
    direct, first, second = (of_features(*pair) ** 0.5 for pair in ((x, z), (x, y), (y, z)))
    assert direct <= first + second + 1e-7


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(2, 20),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_one_bad_value_anywhere_is_refused(seed: int, d: int, n: int, bad: float) -> None:
    x, y = normal(n, d, seed=seed), normal(n, d, seed=seed + 1)
    x[seed % n, seed % d] = bad
    for pair in ((x, y), (y, x)):
        with pytest.raises(ValueError, match=f"1 of {n} rows"):
            of_features(*pair)
