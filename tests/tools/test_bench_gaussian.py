"""The tables of the Gaussian at small sizes, made by the code that makes the large ones."""

import math
import re

import pytest
import torch

from samplers.moments import Moments
from tools.bench_gaussian import _alone, _memory, cut, fit, fit_table, images, jump_table, rank_table, stream


def rows(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_images_fall_as_one_over_f_and_are_brighter_and_stronger_where_they_are_said_to_be() -> None:
    x = images(400, 32, 3, torch.Generator().manual_seed(0))
    assert x.shape == (400, 3, 32, 32)
    assert float(x.std()) == pytest.approx(0.5, abs=0.1)
    power = torch.fft.rfft2(x - x.mean(0)).abs().square().mean((0, 1))
    slope = math.log(float(power[0, 12] / power[0, 3])) / math.log(4)
    assert slope == pytest.approx(-2, abs=0.4)  # of the power; the contrast blurs it
    contrast = x.std(0).mean(0)
    assert float(contrast[16, 16] / contrast[0, 0]) > 2
    assert float(x.mean((0, 1))[-1].mean() - x.mean((0, 1))[0].mean()) == pytest.approx(0.4, abs=0.2)
    assert [len(batch) for batch in stream(70, 8, 3)] == [64, 6]


def _fill(mebibytes: int) -> int:
    base = _memory("VmRSS")
    torch.ones(mebibytes * 2**18)
    return _memory("VmHWM") - base  # freed by now


@pytest.mark.slow
def test_the_peak_is_what_was_resident_at_once_though_it_is_gone() -> None:
    peak = _alone(_fill, 100)
    assert 100 * 2**20 <= peak < 110 * 2**20


@pytest.mark.slow
def test_the_fits_are_measured_each_in_a_process_of_its_own() -> None:
    table = fit_table(size=8, count=200, rank=16, large=12, few=70)
    assert [row[:3] for row in rows(table)] == [
        ["incremental", "192", "200"],
        ["full", "192", "200"],
        ["incremental", "576", "70"],
    ]
    assert re.search(r"time [\d.]+, at most 0\.05: (yes|no); memory [\d.]+, at most 3: (yes|no)\.", table)


@pytest.mark.slow
def test_the_full_way_can_be_left_out() -> None:
    table = fit_table(size=8, count=100, rank=16, large=8, few=70, full=False)
    assert [row[0] for row in rows(table)] == ["incremental"] * 2
    assert "time" not in table


def test_the_fit_that_is_measured_sees_every_image() -> None:
    cost = fit("incremental", 8, 3, 100, 4)
    assert len(cost.seconds) == 2
    assert all(second > 0 for second in cost.seconds)


def test_a_jump_and_a_network_take_turns() -> None:
    table = jump_table(size=16, batch=4, rank=8, repetitions=2)
    assert [row[0] for row in rows(table)] == ["jump, rank 8", "forward pass of the UNet (32, 64)"]
    assert all(float(row[1]) > 0 for row in rows(table))
    assert re.search(r"jump [\d.]+, at most 0\.02", table)


def test_errors_fall_with_the_rank_and_the_rest_is_better_than_nothing() -> None:
    table = {row[0]: [float(cell) for cell in row[1:]] for row in rows(rank_table(8, 600, (48, 16), 16))}
    more, less, bare, single = (
        table[name]
        for name in (
            "exact, 48, and rest",
            "exact, 16, and rest",
            "exact, 48, nothing else",
            "incremental, 48, and rest",
        )
    )
    assert all(a < b for a, b in zip(more, less, strict=True))
    assert all(a < b for a, b in zip(more, bare, strict=True))
    assert single == pytest.approx(more, rel=0.05)
    assert more == sorted(more)  # sigma falls


def test_a_cut_keeps_the_trace() -> None:
    moments = Moments((3, 4, 4))
    moments.update(images(200, 4, 3, torch.Generator().manual_seed(0)))
    whole = moments.gaussian(48)
    few = cut(whole, 5)
    assert float(few.variances.sum()) + 43 * few.rest == pytest.approx(float(whole.variances.sum()), rel=1e-12)
    assert cut(whole, 5, 0.0).rest == 0
