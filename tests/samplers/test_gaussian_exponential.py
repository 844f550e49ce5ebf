"""The solver that is exact for a Gaussian: closed forms, its order on mixtures, and what it is for."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import (
    Gaussian,
    GaussianMixture,
    Guided,
    choose_sigma_skip,
    dpmpp_2m,
    euler,
    exponential_sigmas,
    gaussian_exponential,
    heun,
    karras_sigmas,
    nfe,
    sample,
    teleported,
)
from tests.samplers.mixtures import Labelled, mixture_and_gaussian
from tests.truth import Counted, order, relative_error

D = 8
orders = pytest.mark.parametrize("order_", [1, 2])
mixture = cache(mixture_and_gaussian)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, d: int = D, seed: int = 1) -> Tensor:
    return torch.randn((n, d), generator=seeded(seed), dtype=torch.float64)


def gaussian(rank: int = D, rest: float = 0.3, n_classes: int | None = None) -> Gaussian:
    components = torch.linalg.qr(torch.randn((D, D), generator=seeded(0), dtype=torch.float64))[0][:rank]
    variances = 4.0 / torch.arange(1, rank + 1, dtype=torch.float64) ** 2
    mean = noise(n_classes or 1)
    return Gaussian(mean if n_classes else mean[0], components, variances, rest, n_classes=n_classes)


def solver(law: Gaussian, order_: int = 2) -> Any:
    return partial(gaussian_exponential, gaussian=law, order=order_)


def between(n: int, high: float, low: float) -> Tensor:
    """n steps, evenly spaced in log sigma, without one to 0."""
    return exponential_sigmas(n + 1, low, high)[:-1]


@orders
@pytest.mark.parametrize("n_classes", [None, 3])
@pytest.mark.parametrize(("rank", "rest"), [(D, 0.0), (3, 0.3), (3, 0.0), (0, 0.3)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_it_is_exact_for_its_own_gaussian_in_any_number_of_steps(order_, rank, rest, n_classes, steps) -> None:
    law, cond = gaussian(rank, rest, n_classes), None if n_classes is None else torch.tensor([0, 2, 1, 2])
    x = 40 * noise(4)
    for low in (3.0, 0.01):
        moved = sample(solver(law, order_), law, x, between(steps, 40.0, low), cond)
        assert relative_error(moved, law.transport(x, 40.0, low, cond)) < 1e-12
    to_zero = sample(solver(law, order_), law, x, karras_sigmas(steps, 0.002, 40.0), cond)
    last = float(karras_sigmas(steps, 0.002, 40.0)[-2])
    assert relative_error(to_zero, law(law.transport(x, 40.0, last, cond), last, cond)) < 1e-10


@pytest.mark.parametrize("sigmas", [karras_sigmas(7), karras_sigmas(7)[:-1]], ids=["to 0", "above"])
def test_of_a_gaussian_without_variance_it_is_ddim(sigmas) -> None:
    """At order 1, with a mean that is not 0 and cancels."""
    denoiser, _ = mixture(D, 4)
    point = Gaussian(noise(1)[0], torch.zeros(0, D).double(), torch.zeros(0).double(), 0.0)
    x = 80 * noise(16)
    ours, theirs = (sample(s, denoiser, x, sigmas) for s in (solver(point, 1), euler))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_step_with_no_residual_is_the_jump() -> None:
    law, sigmas = gaussian(3), torch.tensor([80.0, 8.4], dtype=torch.float64)
    x = 80 * noise(4)
    (state,) = solver(law)(law, x, sigmas)
    torch.testing.assert_close(state.x, law.transport(x, 80.0, 8.4), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rotated", [False, True])
@orders
def test_measured_order_of_convergence(order_, rotated) -> None:
    """In equal steps of log sigma, where the clamp of the extrapolation is not to bind."""
    denoiser, law = mixture(32, 6, rotated=rotated)
    x, steps = 20 * noise(8, 32), [32, 64, 128]
    exact = sample(heun, denoiser, x, between(1024, 20.0, 0.1))
    errors = [
        float((sample(solver(law, order_), denoiser, x, between(n, 20.0, 0.1)) - exact).square().mean().sqrt())
        for n in steps
    ]
    assert order(steps, errors) == pytest.approx(order_, abs=0.1)


@orders
def test_a_constant_residual_is_integrated_exactly_in_any_number_of_steps(order_) -> None:
    """d(c / phi) = delta d(eta): the denoiser D_N + delta is that of another mean, a Gaussian but for the gains."""
    law, delta = gaussian(3), noise(1, seed=5)

    def shifted(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return law(x, sigma) + delta

    x = 10 * noise(4)
    fine = sample(heun, shifted, x, between(2000, 10.0, 0.5))
    for steps in (1, 2, 7):
        assert relative_error(sample(solver(law, order_), shifted, x, between(steps, 10.0, 0.5)), fine) < 1e-6


def test_a_residual_that_is_linear_in_eta_is_extrapolated_exactly_where_steps_do_not_grow() -> None:
    """The variance of every direction alike, so that there is one eta; the first step is of order 1."""
    law = gaussian(0, 0.3)

    def eta(sigma: Tensor) -> Tensor:
        return law.exponential(sigma, noise(1))[1][1]

    def linear(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return law(x, sigma) + 2 - 3 * eta(sigma)

    etas = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)  # steps .3, .3, .2
    root = 0.3**0.5
    sigmas = root / (root * etas).sinh()
    x = noise(4)
    *_, last = solver(law)(linear, x, sigmas)
    phi = (0.3 + sigmas**2).sqrt()
    first = (2 - 3 * etas[0]) * (etas[1] - etas[0])
    others = 2 * (etas[3] - etas[1]) - 1.5 * (etas[3] ** 2 - etas[1] ** 2)
    expected = law.mean + phi[3] * ((x - law.mean) / phi[0] + first + others)
    assert relative_error(last.x, expected) < 1e-12


def test_the_extrapolation_is_no_longer_than_the_step_before() -> None:
    """A step of eta ten times as long as the one before it extrapolates by half of that one, not by five."""
    law, values = gaussian(0, 0.3), iter([torch.tensor(1.0), torch.tensor(3.0)])

    def jumping(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return law(x, sigma) + next(values)

    etas, root = torch.tensor([0.1, 0.15, 0.65], dtype=torch.float64), 0.3**0.5
    sigmas = root / (root * etas).sinh()
    x = noise(4)
    *_, last = solver(law)(jumping, x, sigmas)
    phi = (0.3 + sigmas**2).sqrt()
    expected = law.mean + phi[2] * ((x - law.mean) / phi[0] + 1.0 * 0.05 + (3.0 + 0.5 * 2.0) * 0.5)
    assert relative_error(last.x, expected) < 1e-12


@orders
def test_a_float32_trajectory_is_the_float64_one(order_) -> None:
    denoiser, law = mixture(32, 6)
    x = (80 * noise(16, 32)).float()
    single, double = (
        sample(solver(law, order_), denoiser, x.to(dtype), karras_sigmas(12))
        for dtype in (torch.float32, torch.float64)
    )
    assert single.dtype == torch.float32
    assert relative_error(single, double) < 1e-5


@orders
def test_it_is_a_solver_as_the_others_are(order_) -> None:
    denoiser, law = mixture(32, 6)
    sigmas, x = karras_sigmas(6), 80 * noise(3, 32)
    before, counted = x.clone(), Counted(denoiser)
    states = list(solver(law, order_)(counted, x, sigmas))
    assert [state.step for state in states] == list(range(6))
    assert torch.equal(torch.stack([state.sigma for state in states]), sigmas[1:])
    assert torch.equal(states[-1].x, states[-1].denoised)
    assert counted.batches == [3] * 6
    assert nfe(solver(law, order_), sigmas, (32,)) == 6
    assert torch.equal(x, before)
    alone = sample(solver(law, order_), denoiser, x[1:2], sigmas)
    torch.testing.assert_close(alone, states[-1].x[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [0, 3, 1.5])
def test_another_order_raises(bad) -> None:
    with pytest.raises(ValueError, match=r"order: .* accepted are 1 and 2"):
        list(gaussian_exponential(gaussian(), noise(2), karras_sigmas(3), gaussian=gaussian(), order=bad))


def test_samples_of_another_shape_than_the_gaussian_s_raise() -> None:
    with pytest.raises(ValueError, match="Gaussian is of"):
        list(solver(gaussian())(lambda x, sigma, cond=None: x, noise(2, 5), karras_sigmas(3)))


def test_guided_with_class_labels_it_converges_to_the_guided_flow() -> None:
    law = Labelled(32, 4, 3)
    guided, labels = Guided(law, 1.5, torch.tensor(-1)), torch.arange(6) % 3
    x = 10 * noise(6, 32)
    exact = sample(heun, guided, x, between(512, 10.0, 0.1), labels)
    errors = [
        relative_error(sample(solver(law.gaussian), guided, x, between(n, 10.0, 0.1), labels), exact) for n in (40, 80)
    ]
    assert errors[1] < 0.35 * errors[0] < 0.02


def distances(rotated: bool) -> Iterator[tuple[float, float]]:
    """(median, rms over pixels and trajectories) to the exact flow: teleported at 8 evaluations, dpmpp_2m at 16."""
    denoiser, law = mixture(rotated=rotated)
    counted = Counted(denoiser)
    x = 80 * noise(64, 96)
    exact = sample(heun, denoiser, x, karras_sigmas(128))
    skip = choose_sigma_skip(denoiser, law, count=128, generator=seeded(2))
    below = karras_sigmas(8, 0.002, skip.sigma_skip)
    start = torch.cat([torch.tensor([80.0], dtype=torch.float64), below])
    for run, sigmas, evaluations in ((teleported(solver(law), law, skip), start, 8), (dpmpp_2m, karras_sigmas(16), 16)):
        counted.batches = []
        x0 = sample(run, counted, x, sigmas)
        assert len(counted.batches) == evaluations
        errors = (x0 - exact).square().mean(1).sqrt()
        yield float(errors.median()), float(errors.square().mean().sqrt())


@pytest.mark.parametrize("rotated", [False, True])
def test_teleported_at_8_evaluations_it_is_as_near_the_exact_flow_as_dpmpp_2m_at_16(rotated) -> None:
    ours, theirs = distances(rotated)
    assert ours[0] < theirs[0]
    assert ours[1] < theirs[1]


def test_the_exact_denoiser_of_a_mixture_of_one_needs_one_step() -> None:
    """And a Gaussian of other moments than the data's still converges, for what it lacks is in the residual."""
    one = GaussianMixture(torch.ones(1), noise(1), 0.3 * torch.ones(1, D).double())
    x = 80 * noise(4)
    exact = Gaussian(noise(1)[0], torch.zeros(0, D).double(), torch.zeros(0).double(), 0.3).transport(x, 80.0, 0.01)
    wrong = sample(solver(gaussian(3)), one, x, between(400, 80.0, 0.01))
    assert relative_error(wrong, exact) < 1e-3
