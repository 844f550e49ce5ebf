"""The exact optimum of every divergence, and that the trainer ends there; the learned ratio's own benchmark."""

import math
from pathlib import Path

import pytest

from distill import toy
from tests.some import some
from tools.bench_optimum import (
    SHOWN,
    draw_optima,
    exact_optimum,
    learned_ratio,
    optimum_table,
    ratio_table,
    trained_optimum,
)

SEEKING = ("reverse-kl", "softened-reverse-kl", "neyman")


def test_the_minimiser_of_the_forward_kl_has_the_moments_of_the_target() -> None:
    m, s = exact_optimum(SHOWN["forward-kl"], toy.two_modes())
    assert m == pytest.approx(0.3 * -2 + 0.7 * 2, abs=1e-4)
    assert s == pytest.approx(math.sqrt(0.25 + 16 * 0.3 * 0.7), abs=1e-4)


def test_divergences_seek_one_mode_or_cover_both() -> None:
    """From the same start: one takes the larger mode, the other lies across both."""
    for name, divergence in SHOWN.items():
        m, s = exact_optimum(divergence, toy.two_modes())
        if name in SEEKING:
            assert abs(m - 2) < 0.05, name
            assert s < 0.6, name
        else:
            assert 0.7 < m < 0.9, name
            assert s > 1.6, name


@pytest.mark.parametrize("name", some(SHOWN, ("jensen-shannon",)))
def test_the_trainer_with_the_exact_ratio_ends_at_the_optimum(name: str) -> None:
    """Within 0.05; the optima of mode-seeking and mode-covering divergences are more than 1 apart."""
    exact = exact_optimum(SHOWN[name], toy.two_modes())
    found = trained_optimum(SHOWN[name], learned=False)
    assert found == pytest.approx(exact, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse-kl", "jensen-shannon", "forward-kl"])
def test_with_a_learned_ratio_and_score_it_ends_near(name: str) -> None:
    """Within 0.15."""
    exact = exact_optimum(SHOWN[name], toy.two_modes())
    assert trained_optimum(SHOWN[name], learned=True) == pytest.approx(exact, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("features", ["teacher", "fake"])
def test_a_learned_ratio_is_close_and_calibrated(features: str) -> None:
    """At every noise level but the highest, where the two laws are nearly one, the logit is ln r up to its noise."""
    for sigma, correlation, slope in learned_ratio(features):
        if sigma <= 1:
            assert correlation > 0.85, (sigma, correlation)
            assert 0.7 < slope < 1.3, (sigma, slope)


def test_the_table_and_the_picture_say_what_was_found(tmp_path: Path) -> None:
    rows = [("reverse-kl", [2.0, 0.5], [2.01, 0.5], [[1.9, 0.5], [2.1, 0.7]])]
    assert "| reverse-kl | 2.000, 0.500 | 2.010, 0.500 | 2.000, 0.600 | 0.200 |" in optimum_table(rows)
    draw_optima(rows, tmp_path / "optimum.png")
    assert (tmp_path / "optimum.png").read_bytes()[:4] == b"\x89PNG"


def test_the_ratio_s_table_has_mean_and_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {0: [(0.1, 0.9, 1.0)] * 4, 1: [(0.1, 0.7, 1.4)] * 4}
    monkeypatch.setattr("tools.bench_optimum.learned_ratio", lambda features, seed: made[seed])
    table = ratio_table((0, 1))
    assert "0.800 (worst 0.700), 1.20 (1.00 .. 1.40)" in table
