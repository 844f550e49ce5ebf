"""The mismatch of scores: the empirical law against mixtures, and Gaussians against their closed forms."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.mismatch import empirical_denoiser, score_mismatch
from distill.noise import MISMATCH
from distill.student import OneStep
from distill.teacher import Prompted
from distill.toy import AffineStudent
from samplers import GaussianMixture, SampleNoise
from tests.truth import Counted, relative_error


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(samples: Tensor) -> GaussianMixture:
    return GaussianMixture(torch.ones(len(samples)), samples, torch.zeros(len(samples)))


@pytest.mark.parametrize("sigma", [1e-3, 0.05, 0.5, 5.0, 100.0])
def test_the_empirical_denoiser_is_that_of_a_mixture_of_points(sigma: float) -> None:
    samples = normal(30, 3)
    x = samples[:7] + sigma * normal(7, 3, seed=1)
    found = empirical_denoiser(samples, x, sigma)
    assert relative_error(found, points(samples)(x, torch.tensor(sigma, dtype=torch.float64))) < 1e-8


@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_with_labels_the_law_is_that_of_the_samples_with_its_label(sigma: float) -> None:
    samples, labels, of = normal(30, 1, 2, 2), torch.arange(30) % 3, torch.tensor([2, 0, 0, 1])
    x = normal(4, 1, 2, 2, seed=1)
    found = empirical_denoiser(samples, x, sigma, labels, of)
    assert found.shape == x.shape
    for row, label in enumerate(of):
        alone = points(samples[labels == label].flatten(1))(x[row].flatten()[None], torch.tensor(sigma))
        assert relative_error(found[row].flatten(), alone[0]) < 1e-8
    assert relative_error(found, empirical_denoiser(samples, x, sigma)) > 0.01


def test_the_empirical_denoiser_is_exact_in_single_precision() -> None:
    """Far from the origin, where float32 distances would have lost every digit."""
    samples = normal(50, 4) + 1000
    x = samples[:9] + 0.1 * normal(9, 4, seed=1)
    exact = empirical_denoiser(samples, x, 0.1)
    found = empirical_denoiser(samples.float(), x.float(), 0.1)
    assert found.dtype == torch.float32
    assert float((found.double() - exact).abs().max()) < 0.02


# Students whose law is Gaussian


MEAN, SCALE = 0.8, 0.5


def student(dim: int = 2) -> tuple[OneStep, AffineStudent]:
    network = AffineStudent(dim, SCALE)
    with torch.no_grad():
        network.shift.fill_(MEAN)
    return OneStep(network, 2.5), network


def gaussian(mean: float, scale: float, dim: int = 2) -> GaussianMixture:
    return GaussianMixture(torch.ones(1), torch.full((1, dim), mean), torch.tensor([scale**2]))


def found(denoisers: dict[str, Any], sigmas: list[float], dim: int = 2, **options: Any) -> dict[str, list[float]]:
    noise = SampleNoise(0, range(4096), MISMATCH)
    return score_mismatch(denoisers, student(dim)[0], sigmas, noise, (dim,), **options)


def test_the_mismatch_of_the_exact_score_is_that_of_finitely_many_samples() -> None:
    """Falling with the noise level: the law of 4096 points is the Gaussian's as soon as their noise overlaps."""
    values = found({"exact": gaussian(MEAN, SCALE)}, [0.03, 0.1, 0.3, 1.0, 3.0])["exact"]
    assert all(a > b for a, b in pairwise(values[:4])), values
    assert values[2] < 0.1
    assert max(values[3:]) < 0.02


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_the_mismatch_of_a_shifted_gaussian_is_in_closed_form(sigma: float) -> None:
    """The scores differ by shift / (s^2 + sigma^2) everywhere; |s_q| is |n| / sqrt(s^2 + sigma^2), n normal.

    Judged by 512 points: E |n|, sqrt(pi / 2) in the plane, has the relative standard error of a Rayleigh law's mean.
    """
    shift, total = 0.7, math.sqrt(SCALE**2 + sigma**2)
    expected = shift * math.sqrt(2) / total / math.sqrt(math.pi / 2)
    value = found({"shifted": gaussian(MEAN + shift, SCALE)}, [sigma])["shifted"][0]
    error = math.sqrt(4 / math.pi - 1) / math.sqrt(512)
    assert value == pytest.approx(expected, rel=5 * error)


def test_the_mismatch_of_a_wider_gaussian_is_in_closed_form() -> None:
    """Both scores point to the same mean: their lengths' relative difference is that of the variances."""
    sigma, wider = 1.0, 1.3
    expected = 1 - (SCALE**2 + sigma**2) / (wider**2 + sigma**2)
    value = found({"wider": gaussian(MEAN, wider)}, [sigma])["wider"][0]
    assert value == pytest.approx(expected, rel=0.02)


def test_a_denoiser_that_says_nothing_has_mismatch_one() -> None:
    values = found({"nothing": lambda x, sigma, cond=None: x}, [0.1, 1.0])["nothing"]
    assert values == pytest.approx([1.0, 1.0])


def test_denoisers_are_judged_side_by_side_at_the_same_points_in_parts() -> None:
    counted = {"a": Counted(gaussian(MEAN, SCALE)), "b": Counted(gaussian(0.0, 1.0))}
    together = found(dict(counted), [0.5, 1.0], rows=200)
    assert [c.batches for c in counted.values()] == [[200, 200, 112] * 2] * 2
    for name, denoiser in counted.items():
        assert found({name: denoiser.denoiser}, [0.5, 1.0])[name] == pytest.approx(together[name], rel=1e-5)


def test_conditions_go_with_their_rows() -> None:
    """A student whose mean is its label: the exact score of each label fits, that of another label does not."""

    def by_label(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return 3 * cond[:, None] + 0.5 * x / sigma

    def exact(right: bool) -> Any:
        def denoise(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            mean = 3.0 * (cond if right else 1 - cond)[:, None]
            variance = sigma[:, None].to(x) ** 2
            return mean + 0.25 / (0.25 + variance) * (x - mean)

        return denoise

    noise = SampleNoise(0, range(4096), MISMATCH)
    values = score_mismatch(
        {"right": exact(True), "wrong": exact(False)}, OneStep(by_label, 2.5), [0.5], noise, (1,),
        conditions=lambda noise, device: noise.integers(2), rows=100,
    )  # fmt: skip
    assert values["right"][0] < 0.1
    assert values["wrong"][0] > 2


def test_a_measurement_repeats_itself_and_leaves_no_graph() -> None:
    network = student()[1]
    noises = [SampleNoise(4, range(100), MISMATCH) for _ in range(2)]
    one, other = (score_mismatch({"a": gaussian(0.0, 1.0)}, OneStep(network, 2.5), [0.5], n, (2,)) for n in noises)
    assert one == other
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.gpu
def test_the_numbers_of_prompts_may_be_on_the_cpu() -> None:
    """As a batch of prompts has them, beside embeddings on the device."""

    def conditions(noise: SampleNoise, device: Any) -> Prompted:
        cond = Prompted(mean=noise.integers(2, device))
        cond.numbers = cond["mean"].cpu()
        return cond

    def denoise(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return 3.0 * cond["mean"][:, None] + 0.5 * x / sigma.reshape(-1, 1)

    student, noise = OneStep(AffineStudent(2, SCALE).to("cuda"), 2.5), SampleNoise(0, range(600), MISMATCH)
    values = score_mismatch({"any": denoise}, student, [1.0], noise, (2,), conditions, "cuda")["any"]
    assert math.isfinite(values[0])
