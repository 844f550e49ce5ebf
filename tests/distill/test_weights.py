"""The weights of a batch against a plain computation in numpy, and the laws that they obey."""

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.divergences import DIVERGENCES, alpha
from distill.weights import RatioWeight, weight_statistics
from samplers.schedules import karras_sigma
from tests.truth import relative_error

FORWARD, SHANNON = DIVERGENCES["forward-kl"], DIVERGENCES["jensen-shannon"]
LOW, HIGH = 0.002, 80.0


def batch(n: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Log-ratios that rise with the noise level, some of them outside the clip, and levels uniform in the index."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    log_ratio = 3 * torch.randn(n, generator=generator, dtype=torch.float64) + 4 * (0.5 - u)
    return log_ratio.to(dtype), karras_sigma(u, LOW, HIGH)


def plain(
    log_ratio: Tensor,
    sigma: Tensor,
    h: Callable[[np.ndarray], np.ndarray],
    clip: tuple[float, float] = (0.1, 20.0),
    means: np.ndarray | None = None,
    decay: float = 0.0,
) -> np.ndarray:
    """Both stages, one sample and one bin at a time; `means` is changed in place."""
    means = np.ones(10) if means is None else means
    root_low, root_high = LOW ** (1 / 7), HIGH ** (1 / 7)
    r = np.array([min(max(math.exp(min(max(v, -10), 10)), clip[0]), clip[1]) for v in log_ratio.tolist()])
    u = [(root_high - s ** (1 / 7)) / (root_high - root_low) for s in sigma.tolist()]
    bins = np.array([min(max(int(v * len(means)), 0), len(means) - 1) for v in u])
    for k in set(bins):
        means[k] = (1 - decay) * r[bins == k].mean() + decay * means[k]
    weights = h(r / means[bins])
    return weights / weights.mean()


def close(actual: Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    """The means are float32, whatever the batch."""
    assert relative_error(actual, torch.as_tensor(expected)) < tolerance


H = {"forward-kl": lambda r: r, "jensen-shannon": lambda r: r / (1 + r), "neyman": lambda r: 2 / r}


@pytest.mark.parametrize("name", H)
@pytest.mark.parametrize("clip", [(0.1, 20.0), (0.5, 2.0), (1e-6, 1e6)])
def test_both_stages_are_those_of_a_plain_computation(name: str, clip: tuple[float, float]) -> None:
    log_ratio, sigma = batch()
    h = RatioWeight(DIVERGENCES[name], clip)(log_ratio, sigma)
    close(h, plain(log_ratio, sigma, H[name], clip), 3e-6)


def test_stage_one_makes_the_mean_ratio_of_every_level_one_and_stage_two_that_of_the_batch() -> None:
    log_ratio, sigma = batch(400)
    h = RatioWeight(FORWARD, bins=5)(log_ratio, sigma)
    u = (HIGH ** (1 / 7) - sigma ** (1 / 7)) / (HIGH ** (1 / 7) - LOW ** (1 / 7))
    for k in range(5):
        inside = (u >= k / 5) & (u < (k + 1) / 5)
        assert int(inside.sum()) > 50
        assert float(h[inside].mean()) == pytest.approx(1, abs=1e-6)
    other = RatioWeight(SHANNON, bins=5)(log_ratio, sigma)
    assert float(other.mean()) == pytest.approx(1, abs=1e-6)
    assert abs(float(other[u < 0.2].mean()) - 1) > 1e-3  # stage 1 acts on r, not on h


def test_without_normalisation_the_weight_is_h_of_the_clipped_ratio() -> None:
    log_ratio = torch.tensor([-50.0, -1.0, 0.0, 1.0, 2.9, 50.0], dtype=torch.float64)
    weight = RatioWeight(FORWARD, normalise=False)
    expected = [0.1, math.exp(-1), 1, math.e, math.exp(2.9), 20]
    assert weight(log_ratio, torch.ones(6)).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(weight.means, torch.ones(10))
    wide = RatioWeight(FORWARD, (1e-9, 1e9), normalise=False)(log_ratio, torch.ones(6))
    assert wide[[0, -1]].log().tolist() == pytest.approx([-10, 10])


def test_bins_are_equal_in_the_index_of_the_karras_grid() -> None:
    """Bins of equal width in sigma hold 64 % of the samples in the first, and give other weights."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    sigma = karras_sigma(u, LOW, HIGH)
    weight = RatioWeight(FORWARD, (1e-4, 1e4), bins=10)
    weight(10 * u - 5, sigma)
    expected = torch.stack([(10 * part - 5).exp().mean() for part in u.split(100)])
    close(weight.means, expected)

    wrong = (sigma / HIGH * 10).long().clamp(0, 9).bincount(minlength=10)
    assert int(wrong[0]) == pytest.approx(640, abs=5)
    uniform = RatioWeight(FORWARD, bins=10, index=lambda s: s / HIGH)
    log_ratio, sigma = batch()
    assert relative_error(uniform(log_ratio, sigma), RatioWeight(FORWARD)(log_ratio, sigma)) > 0.05


def test_levels_at_and_beyond_the_ends_of_the_grid_fall_into_the_outer_bins() -> None:
    weight = RatioWeight(FORWARD, (1e-3, 1e3), bins=4)
    weight(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([100.0, 80.0, 0.002, 0.001]))
    expected = [(math.exp(1) + math.exp(2)) / 2, 1, 1, (math.exp(3) + math.exp(4)) / 2]
    assert weight.means.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_means_run_over_the_batches(decay: float) -> None:
    weight, means = RatioWeight(SHANNON, decay=decay), np.ones(10)
    for seed in range(5):
        log_ratio, sigma = batch(16, seed)
        h = weight(log_ratio, sigma)
        close(h, plain(log_ratio, sigma, H["jensen-shannon"], means=means, decay=decay), 3e-6)
        close(weight.means, means)


def test_an_empty_bin_keeps_its_mean() -> None:
    weight = RatioWeight(FORWARD, bins=2, decay=0.5)
    low, high = torch.full((3,), 0.01), torch.full((3,), 50.0)
    weight(torch.full((3,), 1.0), high)
    assert weight.means.tolist() == pytest.approx([0.5 + 0.5 * math.e, 1.0])
    weight(torch.full((3,), 2.0), low)
    assert weight.means.tolist() == pytest.approx([0.5 + 0.5 * math.e, 0.5 + 0.5 * math.exp(2)])


def test_the_means_are_all_of_the_state_and_a_copy_goes_on_bit_for_bit() -> None:
    first, second = RatioWeight(FORWARD, decay=0.9), RatioWeight(FORWARD, decay=0.9)
    for seed in range(3):
        first(*batch(32, seed))
    state = first.state_dict()
    assert list(state) == ["means"]
    second.load_state_dict(state)
    assert torch.equal(first(*batch(32, 7)), second(*batch(32, 7)))
    assert torch.equal(first.means, second.means)
    assert not torch.equal(first.means, torch.ones(10))


class Sum:
    """The sum over two threads that stand for two processes, each of which waits for the other."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._parts: dict[int, Tensor] = {}

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def total(tensor: Tensor) -> Tensor:
            self._parts[rank] = tensor
            self._barrier.wait()
            result = self._parts[0] + self._parts[1]
            self._barrier.wait()
            return result

        return total


@pytest.mark.parametrize("rows", [32, 50])
def test_two_processes_weight_their_halves_as_one_process_weights_the_batch(rows: int) -> None:
    joint, total, found = RatioWeight(SHANNON, decay=0.5), Sum(), {}
    parts = [slice(None, rows), slice(rows, None)]
    weights = [RatioWeight(SHANNON, decay=0.5, total=total.of(rank)) for rank in range(2)]

    def work(rank: int) -> None:
        found[rank] = [weights[rank](*(t[parts[rank]] for t in batch(64, seed))) for seed in range(3)]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        close(torch.cat([found[0][seed], found[1][seed]]), joint(*batch(64, seed)))
    alone = RatioWeight(SHANNON, decay=0.5)
    assert relative_error(alone(*(t[:rows] for t in batch(64, 0))), found[0][0]) > 1e-3
    assert torch.equal(weights[0].means, weights[1].means)
    close(weights[0].means, joint.means)


@pytest.mark.parametrize("divergence", [DIVERGENCES["reverse-kl"], alpha(0)], ids=lambda d: d.name)
def test_a_constant_divergence_weights_nothing_and_asks_no_other_process(divergence: Any) -> None:
    asked = []
    weight = RatioWeight(divergence, total=lambda t: asked.append(t) or t)
    log_ratio, sigma = batch()
    assert torch.equal(weight(log_ratio, sigma), torch.ones_like(log_ratio))
    assert not asked
    assert torch.equal(weight.means, torch.ones(10))


def test_weights_have_no_graph() -> None:
    for normalise in (True, False):
        for divergence in (FORWARD, DIVERGENCES["reverse-kl"]):
            log_ratio, sigma = batch()
            assert not RatioWeight(divergence, normalise=normalise)(log_ratio.requires_grad_(), sigma).requires_grad


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_precision_is_float32_or_better(given: torch.dtype, kept: torch.dtype) -> None:
    log_ratio, sigma = batch(dtype=given)
    h = RatioWeight(SHANNON)(log_ratio, sigma)
    assert h.dtype == kept
    close(h, plain(log_ratio.double(), sigma, H["jensen-shannon"]), 3e-6)
    exact = RatioWeight(FORWARD, normalise=False)(log_ratio, sigma)
    assert relative_error(exact, log_ratio.to(kept).exp().clamp(0.1, 20)) < 1e-6


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "reverse-kl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_absurd_estimates_still_give_finite_weights(name: str, dtype: torch.dtype) -> None:
    log_ratio = torch.tensor([-math.inf, -1e4, -1.0, 0.0, 1.0, 1e4, math.inf], dtype=dtype)
    for clip in ((0.1, 20.0), (1e-30, 1e30)):
        h = RatioWeight(DIVERGENCES[name], clip)(log_ratio, torch.full((7,), 1.0))
        assert bool(h.isfinite().all())
        assert bool((h > 0).all())
        assert float(h.mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_an_estimate_that_is_not_a_number_is_not_hidden(normalise: bool) -> None:
    log_ratio, sigma = batch(6)
    log_ratio[2] = math.nan
    h = RatioWeight(FORWARD, normalise=normalise)(log_ratio, sigma)
    assert bool(h[2].isnan())
    assert bool(h.isnan().all()) == normalise  # one mean for all of them
    assert not bool(h.isnan()[[0, 1, 3, 4, 5]].any()) or normalise


@pytest.mark.parametrize("clip", [(0.0, 20.0), (-1.0, 1.0), (2.0, 1.0), (1.0, 1.0), (math.nan, 1.0), (0.1, math.nan)])
def test_bounds_that_are_none_are_refused(clip: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="clip: "):
        RatioWeight(FORWARD, clip)


def test_statistics_of_weights() -> None:
    """Of k equal weights among n the effective share is k / n; of 1 .. n it is 3 (n + 1) / (2 (2 n + 1))."""
    found = weight_statistics(torch.tensor([0.0, 3.0, 3.0, 0.0, 3.0, 0.0, 0.0, 0.0]))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"weight_mean": 9 / 8, "weight_max": 3, "weight_ess": 3 / 8}
    )
    assert all(value.shape == () for value in found.values())
    found = weight_statistics(torch.arange(1.0, 11.0, dtype=torch.float64))
    assert float(found["weight_ess"]) == pytest.approx(3 * 11 / (2 * 21))
