import math
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from samplers import (
    SOLVERS,
    GaussianMixture,
    SampleNoise,
    ancestral,
    dpmpp_2m,
    euler,
    heun,
    karras_sigmas,
    nfe,
    sample,
)
from samplers.schedules import karras_sigma
from tests.truth import Counted, gaussian_transport, order, relative_error

MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
VARIANCE = torch.tensor([0.04, 1.0, 4.0], dtype=torch.float64)
GAUSSIAN = GaussianMixture(torch.ones(1), MEAN[None], VARIANCE[None])


def mixture(d: int = 2) -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn((4, d), generator=generator, dtype=torch.float64)
    root = torch.randn((4, d, d), generator=generator, dtype=torch.float64) / 2
    return GaussianMixture(torch.tensor([0.4, 0.3, 0.2, 0.1]), means, root @ root.mT + 0.3 * torch.eye(d).double())


def start(sigma: float, n: int = 16, d: int = 2) -> Tensor:
    return sigma * torch.randn((n, d), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def between(n: int, high: float, low: float) -> Tensor:
    """n steps between two positive levels, smooth in the step, as orders of convergence need."""
    return karras_sigmas(n + 1, low, high)[:-1]


def uneven(n: int, high: float, low: float) -> Tensor:
    """Long and short steps in turn: a multistep method keeps its order only if it weighs them rightly."""
    i = torch.arange(n + 1, dtype=torch.float64)
    return karras_sigma((i + 0.3 * (i % 2)) / n, low, high)  # n is even, so the ends stay


def down_to_zero(n: int, high: float, low: float) -> Tensor:
    """n steps to a positive level and one to 0, an Euler step whose own error is common to all n."""
    return karras_sigmas(n + 1, low, high)


@cache
def fine_solution(grid, high: float, low: float) -> Tensor:
    return sample(heun, mixture(), start(high), grid(2048, high, low))


@pytest.mark.parametrize(("solver", "expected"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
@pytest.mark.parametrize(
    ("grid", "high", "low"),
    [(between, 10.0, 0.5), (uneven, 10.0, 0.5), (between, 80.0, 0.002), (down_to_zero, 80.0, 0.002)],
)
def test_measured_order_of_convergence(solver, expected, grid, high, low) -> None:
    steps = [128, 256, 512] if solver is euler else [48, 96, 192]
    exact = fine_solution(grid, high, low)
    errors = [float((sample(solver, mixture(), start(high), grid(n, high, low)) - exact).abs().mean()) for n in steps]
    assert order(steps, errors) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("solver", "bound"), [(euler, 5e-3), (heun, 2e-5), (dpmpp_2m, 2e-5), (partial(ancestral, eta=0.0), 5e-3)]
)
@pytest.mark.parametrize("low", [0.5, 1e-3])
def test_solvers_converge_to_the_exact_transport_of_a_gaussian(solver, bound, low) -> None:
    x = MEAN + start(40.0, d=3)
    exact = gaussian_transport(x, MEAN, VARIANCE, 40.0, low)
    assert relative_error(sample(solver, GAUSSIAN, x, between(1000, 40.0, low)), exact) < bound


def test_dpmpp_2m_takes_the_prediction_in_the_middle_of_a_step_in_log_sigma() -> None:
    """Where D is linear in log sigma, extrapolating it to the middle is exact, however uneven the steps are."""

    def linear(x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
        return 2 + 3 * sigma.log().expand_as(x)

    sigmas = torch.tensor([9.0, 5.0, 4.5, 0.7, 0.5, 0.0], dtype=torch.float64)
    x = start(9.0)
    for state, sigma in zip(dpmpp_2m(linear, x, sigmas), sigmas, strict=False):
        middle = (sigma * state.sigma).sqrt() if 0 < state.step < 4 else sigma  # the ends are Euler steps
        x = torch.lerp(linear(x, middle), x, state.sigma / sigma)
        torch.testing.assert_close(state.x, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_steps_keep_the_law_of_a_point_and_shrink_to_it(eta) -> None:
    """For data at one point D is exact, so every step lands on N(point, sigma'^2), whatever eta."""
    point = GaussianMixture(torch.ones(1), MEAN[None], torch.zeros(1, dtype=torch.float64))
    generator, n = torch.Generator().manual_seed(4), 40_000
    x = MEAN + 10 * torch.randn((n, 3), generator=generator, dtype=torch.float64)
    sigmas = torch.tensor([10.0, 6.0, 1.0, 0.2, 0.0], dtype=torch.float64)
    for state in ancestral(point, x, sigmas, generator=generator, eta=eta):
        z = state.x - MEAN
        assert float(z.mean().abs()) <= 5 * float(state.sigma) / math.sqrt(3 * n)
        assert float((z.var() - state.sigma**2).abs()) <= 5 * math.sqrt(2 / (3 * n)) * float(state.sigma) ** 2
    assert torch.equal(state.x, MEAN.expand(n, 3))


def test_ancestral_sampling_draws_the_gaussian_it_is_given() -> None:
    n = 20_000
    generator = torch.Generator().manual_seed(5)
    x = MEAN + (VARIANCE + 80.0**2).sqrt() * torch.randn((n, 3), generator=generator, dtype=torch.float64)
    x0 = sample(ancestral, GAUSSIAN, x, karras_sigmas(400), generator=generator)
    assert bool(((x0.mean(0) - MEAN).abs() < 5 * (VARIANCE / n).sqrt()).all())
    # 400 steps leave a discretisation error of 1 % of the variance beside the sampling error.
    assert bool(((x0.var(0) / VARIANCE - 1).abs() < 5 * math.sqrt(2 / n) + 0.01).all())


def test_ancestral_without_noise_is_euler() -> None:
    x, sigmas = start(80.0, d=3), karras_sigmas(20)
    without = sample(partial(ancestral, eta=0.0), GAUSSIAN, x, sigmas)
    torch.testing.assert_close(without, sample(euler, GAUSSIAN, x, sigmas), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_an_eta_out_of_range_raises(eta) -> None:
    with pytest.raises(ValueError, match="eta"):
        list(ancestral(GAUSSIAN, start(1.0, d=3), torch.tensor([1.0, 0.0]), eta=eta))


def test_a_long_ancestral_step_in_float32_keeps_what_is_left_of_x() -> None:
    # sigma_down = sigma'^2 / sigma = 2.5e-3 here; sigma'^2 - sigma_up^2 would round to 0 or to 4 times as much.
    sigmas, x = torch.tensor([4000.0, 1.0]), torch.full((1, 3), 4000.0)
    ours = next(ancestral(lambda x, sigma, cond=None: torch.zeros_like(x), x, sigmas, generator=SampleNoise(0, [0]))).x
    noise = SampleNoise(0, [0]).normal((3,))
    torch.testing.assert_close(ours - noise * (1 - 1 / 4000**2) ** 0.5, torch.full((1, 3), 1 / 4000), rtol=0, atol=2e-7)
    eta = partial(ancestral, eta=0.9999)
    single, double = (
        next(eta(GAUSSIAN, x.to(dtype), sigmas, generator=SampleNoise(0, [0]))).x
        - 0.9999 * SampleNoise(0, [0]).normal((3,), dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert float((single.double() - double).abs().max()) < 1e-6


@pytest.mark.parametrize("n", [1, 2, 9])
def test_evaluations_are_counted_as_the_method_says(n) -> None:
    to_zero, above = karras_sigmas(n), karras_sigmas(n + 1)[:-1]
    for name, solver in SOLVERS.items():
        per_step = 2 if name == "heun" else 1
        assert nfe(solver, to_zero) == per_step * n - (per_step - 1)
        assert nfe(solver, above) == per_step * n
        counted = Counted(GAUSSIAN)
        sample(solver, counted, start(80.0, d=3), to_zero)
        assert counted.batches == [16] * nfe(solver, to_zero)


def test_counting_evaluations_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    nfe(ancestral, karras_sigmas(4))
    assert torch.equal(torch.rand(()), expected)


@pytest.mark.parametrize("name", SOLVERS)
def test_states_report_where_the_solver_stands(name) -> None:
    x, sigmas = start(80.0, d=3), karras_sigmas(6)
    seen: list[Tensor] = []

    def watching(x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
        assert cond == "a condition"
        seen.append(GAUSSIAN(x, sigma))
        return seen[-1]

    states = list(SOLVERS[name](watching, x, sigmas, "a condition", torch.Generator().manual_seed(0)))
    assert [state.step for state in states] == list(range(6))
    assert torch.equal(torch.stack([state.sigma for state in states]), sigmas[1:])
    begins = seen[::2] if name == "heun" else seen
    for state, begin in zip(states, begins, strict=True):
        assert torch.equal(state.denoised, begin)
    assert torch.equal(states[-1].x, states[-1].denoised)  # a step to 0 is an Euler step
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(sample(SOLVERS[name], watching, x, sigmas, "a condition", generator), states[-1].x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_is_lost_or_changed_on_the_way(name, dtype) -> None:
    """Finite to 0 and to above 0, in the state's dtype and shape, and the caller's x is left as it was."""
    x = (80 * torch.randn((4, 3, 1, 1), generator=torch.Generator().manual_seed(0))).to(dtype)
    before = x.clone()
    for sigmas in (karras_sigmas(12), karras_sigmas(12)[:-1], karras_sigmas(1), karras_sigmas(12).float()):
        for state in SOLVERS[name](GAUSSIAN, x, sigmas, generator=torch.Generator().manual_seed(0)):
            assert bool(state.x.isfinite().all())
            assert (state.x.dtype, state.x.shape) == (dtype, x.shape)
    assert torch.equal(x, before)


def test_a_float32_step_from_sigma_80_errs_by_the_rounding_of_the_prediction_not_of_the_state() -> None:
    x = start(80.0, n=256, d=3).float()
    for sigmas in (torch.tensor([80.0, 0.0]), torch.tensor([80.0, 0.002])):
        denoised = GAUSSIAN(x, sigmas[0])
        single = next(euler(GAUSSIAN, x, sigmas)).x
        double = denoised.double() + (sigmas[1].double() / 80) * (x.double() - denoised.double())
        derivative = x + (sigmas[1] - 80) * ((x - denoised) / 80)  # the form that the solver avoids
        error = float((single - double).abs().max())
        assert error < 4e-7  # half a unit in the last place of |D| <= 6, twice
        assert float((derivative - double).abs().max()) > 10 * error


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_a_float32_trajectory_is_the_float64_one(name) -> None:
    x = start(80.0, n=64, d=3).float()
    single, double = (
        sample(SOLVERS[name], GAUSSIAN, x.to(t), karras_sigmas(18)) for t in (torch.float32, torch.float64)
    )
    assert relative_error(single, double) < 1e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_is_the_same_alone_in_a_batch_and_in_another_order(name) -> None:
    x, sigmas = start(80.0, n=5), karras_sigmas(10)
    solver, denoiser = SOLVERS[name], mixture()
    batch = sample(solver, denoiser, x, sigmas, generator=SampleNoise(0, range(5)))
    alone = sample(solver, denoiser, x[3:4], sigmas, generator=SampleNoise(0, [3]))
    pair = sample(solver, denoiser, x[[4, 1]], sigmas, generator=SampleNoise(0, [4, 1]))
    torch.testing.assert_close(alone, batch[3:4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pair, batch[[4, 1]], rtol=1e-12, atol=1e-12)
    if name == "ancestral":
        assert not torch.isclose(batch, sample(solver, denoiser, x, sigmas, generator=SampleNoise(1, range(5)))).any()


def test_sampling_records_no_gradient_but_a_solver_does() -> None:
    x = start(2.0, d=3).requires_grad_()
    sigmas = torch.tensor([2.0, 1.0, 0.5])
    assert not sample(euler, GAUSSIAN, x, sigmas).requires_grad
    *_, last = euler(GAUSSIAN, x, sigmas)
    (gradient,) = torch.autograd.grad(last.x.sum(), x)
    slope = [(VARIANCE + b * a) / (VARIANCE + a * a) for a, b in ((2.0, 1.0), (1.0, 0.5))]
    torch.testing.assert_close(gradient, (slope[0] * slope[1]).expand_as(x))


class Ranged:
    sigma_min, sigma_max = 0.1, 10.0

    def __call__(self, x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
        return GAUSSIAN(x, sigma)


@pytest.mark.parametrize("levels", [[11.0, 1.0, 0.0], [10.0, 0.09, 0.0], [10.0, 0.09]])
def test_levels_outside_the_range_that_the_denoiser_publishes_raise(levels) -> None:
    with pytest.raises(ValueError, match=r"range \[0.1, 10\]"):
        sample(euler, Ranged(), start(10.0, d=3), torch.tensor(levels))


def test_levels_at_the_ends_of_the_range_are_accepted_in_float32() -> None:
    for dtype in (torch.float32, torch.float64):
        assert sample(heun, Ranged(), start(10.0, d=3), torch.tensor([10.0, 0.1, 0.0], dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "sigmas",
    [
        torch.tensor([1.0]),
        torch.tensor(1.0),
        torch.ones(2, 2),
        torch.tensor([1.0, 2.0, 0.0]),
        torch.tensor([2.0, 1.0, 1.0, 0.0]),
        torch.tensor([1.0, 0.0, 0.0]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([math.inf, 1.0]),
        torch.tensor([1.0, math.nan, 0.0]),
        torch.tensor([1.0, 1.0 - 1e-12, 0.0], dtype=torch.float64),  # one level in the state's float32
        torch.tensor([1.0, 1e-60, 1e-70], dtype=torch.float64),  # 0 in the state's float32, twice
    ],
    ids=str,
)
def test_bad_schedules_raise(name, sigmas) -> None:
    with pytest.raises(ValueError, match="sigmas"):
        sample(SOLVERS[name], GAUSSIAN, torch.ones(2, 3), sigmas)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_state_below_float32_raises(name, dtype) -> None:
    with pytest.raises(ValueError, match="float32 or float64"):
        sample(SOLVERS[name], GAUSSIAN, torch.ones((2, 3), dtype=dtype), karras_sigmas(3))
