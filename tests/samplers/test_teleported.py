"""The solver that jumps: exact on Gaussians, the jump and then the solver, the free correction of the landing."""

import math
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import (
    SOLVERS,
    Gaussian,
    Guided,
    SampleNoise,
    ancestral,
    choose_sigma_skip,
    dpmpp_2m,
    gaussian_exponential,
    heun,
    karras_sigmas,
    sample,
    teleported,
)
from samplers.schedules import restarted
from tests.samplers.mixtures import Labelled, mixture_and_gaussian
from tests.truth import Counted, relative_error

D = 96
mixture = cache(mixture_and_gaussian)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(n: int = 4, d: int = D, sigma: float = 80.0) -> Tensor:
    return sigma * torch.randn((n, d), generator=seeded(1), dtype=torch.float64)


def gaussian(n_classes: int | None = None) -> Gaussian:
    components = torch.linalg.qr(torch.randn((6, 6), generator=seeded(0), dtype=torch.float64))[0][:3]
    mean = torch.randn((n_classes or 1, 6), generator=seeded(2), dtype=torch.float64)
    variances = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)
    return Gaussian(mean if n_classes else mean[0], components, variances, 0.2, n_classes=n_classes)


@pytest.mark.parametrize("landing", [None, 0.5, 0.0, 2.0])
@pytest.mark.parametrize("n_classes", [None, 3])
@pytest.mark.parametrize("sigma_skip", [79.9, 8.4, 0.5])
def test_on_its_own_gaussian_the_landing_is_the_exact_flow(sigma_skip, n_classes, landing) -> None:
    """For any solver; where the solver is exact too, so is the sample."""
    law, x = gaussian(n_classes), start(3, 6)
    cond, sigmas = None if n_classes is None else torch.tensor([2, 0, 1]), karras_sigmas(12)
    exact = law.transport(x, 80.0, sigma_skip, cond)
    for solver in SOLVERS.values():
        jump = teleported(solver, law, sigma_skip, landing=landing)
        first = next(jump(law, x, sigmas, cond, seeded(3)))
        assert relative_error(first.x, exact) < 1e-13
        onward = sample(jump, law, x, sigmas, cond, seeded(3))
        assert (
            relative_error(onward, sample(solver, law, exact, restarted(sigmas, sigma_skip), cond, seeded(3))) < 1e-12
        )
    jump = teleported(partial(gaussian_exponential, gaussian=law), law, sigma_skip, landing=landing)
    end = sample(jump, law, x, sigmas[:-1], cond)
    assert relative_error(end, law.transport(x, 80.0, 0.002, cond)) < 1e-10


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("mode", ["ode", "marginal"])
def test_without_a_correction_it_is_the_jump_and_then_the_solver(name, mode) -> None:
    """Bit for bit, with the same random numbers, which the jump leaves alone."""
    denoiser, law = mixture()
    sigmas, x, solver = karras_sigmas(9), start(), SOLVERS[name]
    before = x.clone()
    states = list(teleported(solver, law, 8.4, mode=mode, landing=None)(denoiser, x, sigmas, None, seeded(4)))
    below = restarted(sigmas, 8.4)
    landed = law.transport(x, 80.0, 8.4, mode=mode)
    others = list(solver(denoiser, landed, below, None, seeded(4)))
    assert torch.equal(states[0].x, landed)
    assert states[0].sigma == 8.4
    assert torch.equal(states[0].denoised, law(x, 80.0))
    assert [state.step for state in states] == list(range(len(below)))
    for ours, theirs in zip(states[1:], others, strict=True):
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.sigma, theirs.sigma)
        assert torch.equal(ours.denoised, theirs.denoised)
    assert torch.equal(x, before)


@pytest.mark.parametrize("sigma_skip", [80.0, 100.0])
@pytest.mark.parametrize("landing", [None, 0.5])
def test_a_schedule_from_the_level_or_below_it_is_left_as_it_is(sigma_skip, landing) -> None:
    denoiser, law = mixture()
    x, sigmas = start(), karras_sigmas(6)
    plain, ours = (
        list(solver(denoiser, x, sigmas, None, seeded(4)))
        for solver in (ancestral, teleported(ancestral, law, sigma_skip, landing=landing))
    )
    for a, b in zip(plain, ours, strict=True):
        assert torch.equal(a.x, b.x)
        assert a.step == b.step


@cache
def exact_at(rotated: bool, sigma: float) -> Tensor:
    """The flow from 80, by 400 Heun steps."""
    denoiser, _ = mixture(rotated=rotated)
    return sample(heun, denoiser, start(32), karras_sigmas(401, sigma, 80.0)[:-1])


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def landed(rotated: bool, sigma: float, landing: float | None) -> tuple[Tensor, list[int]]:
    """Where the solver starts from, seen by a solver that only looks, and the evaluations it cost."""
    denoiser, law = mixture(rotated=rotated)
    counted, seen = Counted(denoiser), []

    def look(denoiser, x, sigmas, cond=None, generator=None):
        seen.append(x)
        denoiser(x, sigmas[0], cond)  # the first answer costs no evaluation
        yield from ()

    list(teleported(look, law, sigma, landing=landing)(counted, start(32), karras_sigmas(18)))
    return seen[0], counted.batches


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("sigma", [8.4, 5.0])
def test_the_correction_at_least_halves_the_error_of_the_landing_for_no_evaluation(sigma, rotated) -> None:
    """With p from 1 to 2, for so the residual of these mixtures falls there; 1/2, the default, overshoots."""
    exact = exact_at(rotated, sigma)
    plain, calls = landed(rotated, sigma, None)
    assert calls == [32]
    error = rms(plain - exact)
    for power, gain in ((0.5, 1.0), (1.0, 1.9), (1.5, 4.0), (2.0, 7.0)):
        corrected, calls = landed(rotated, sigma, power)
        assert calls == [32]
        assert rms(corrected - exact) * gain < error


@pytest.mark.parametrize("rotated", [False, True])
def test_at_the_certified_level_the_default_correction_halves_the_error_of_the_sample(rotated) -> None:
    denoiser, law = mixture(rotated=rotated)
    skip, x = choose_sigma_skip(denoiser, law, count=128, generator=seeded(6)), start(32)
    exact, solver = sample(heun, denoiser, x, karras_sigmas(100)), partial(gaussian_exponential, gaussian=law)
    sigmas = torch.cat([x.new_tensor([80.0]), karras_sigmas(8, 0.002, skip.sigma_skip)])
    plain, corrected = (
        rms(sample(teleported(solver, law, skip, landing=landing), denoiser, x, sigmas) - exact)
        for landing in (None, 0.5)
    )
    assert 2 * corrected < plain


def test_the_first_answer_after_a_correction_is_the_evaluation_moved_by_the_gaussian() -> None:
    """So that where the residual is constant it is exact, though the landing has moved since."""
    law, delta = gaussian(), torch.randn(6, generator=seeded(5), dtype=torch.float64)

    def shifted(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return law(x, sigma) + delta

    states = list(teleported(heun, law, 8.4)(shifted, start(3, 6), karras_sigmas(9)))
    corrected = landing_of(shifted, law)
    torch.testing.assert_close(
        states[1].denoised, shifted(corrected, torch.tensor(8.4, dtype=torch.float64)), rtol=1e-12, atol=1e-12
    )
    fine = sample(heun, shifted, start(3, 6), karras_sigmas(2001, 8.4, 80.0)[:-1])
    assert relative_error(landing_of(shifted, law, 0.0), fine) < 1e-6  # p = 0: a residual that does not fall


def landing_of(denoiser: Any, law: Gaussian, power: float = 0.5) -> Tensor:
    seen = []

    def look(denoiser, x, sigmas, cond=None, generator=None):
        seen.append(x)
        yield from ()

    list(teleported(look, law, 8.4, landing=power)(denoiser, start(3, 6), karras_sigmas(9)))
    return seen[0]


@pytest.mark.parametrize("form", ["labels", "one label", "dict", "guided"])
def test_with_class_labels_it_carries_to_the_class_s_own_gaussian(form) -> None:
    """The error to the exact flow, guided too, is less than a third of that of one Gaussian for all classes."""
    law = Labelled()
    rows = torch.full((12,), 2) if form == "one label" else torch.arange(12) % 4
    cond: Any = {"one label": torch.tensor([2]), "dict": {"class_labels": rows}}.get(form, rows)
    denoiser = Guided(law, 1.2, torch.tensor(-1)) if form == "guided" else law
    x, sigmas = start(12), karras_sigmas(60)
    exact = sample(heun, denoiser, x, sigmas, cond)
    ours, others = (
        rms(sample(teleported(heun, g, 8.4, landing=None), denoiser, x, sigmas, cond) - exact)
        for g in (law.gaussian, law.unlabelled)
    )
    assert ours < others / (1.5 if form == "guided" else 3)


def test_a_sample_is_the_same_alone_in_a_batch_and_in_another_order() -> None:
    denoiser, law = mixture()
    x, sigmas = start(5), karras_sigmas(9)
    solver = teleported(ancestral, law, 8.4)
    batch = sample(solver, denoiser, x, sigmas, generator=SampleNoise(0, range(5)))
    pair = sample(solver, denoiser, x[[4, 1]], sigmas, generator=SampleNoise(0, [4, 1]))
    torch.testing.assert_close(pair, batch[[4, 1]], rtol=1e-11, atol=1e-11)
    other = sample(solver, denoiser, x, sigmas, generator=SampleNoise(1, range(5)))
    assert not torch.isclose(batch, other).all(1).any()


def test_a_float32_jump_is_the_float64_one() -> None:
    denoiser, law = mixture()
    x, sigmas = start(8).float(), karras_sigmas(18)
    single, double = (
        sample(teleported(heun, law, 5.0), denoiser, x.to(dtype), sigmas) for dtype in (torch.float32, torch.float64)
    )
    assert single.dtype == torch.float32
    assert relative_error(single, double) < 1e-5


def test_a_certificate_and_its_level_are_the_same() -> None:
    denoiser, law = mixture()
    skip = choose_sigma_skip(denoiser, law, count=64, generator=seeded(6))
    x, sigmas = start(), karras_sigmas(9)
    ours, theirs = (sample(teleported(dpmpp_2m, law, s), denoiser, x, sigmas) for s in (skip, skip.sigma_skip))
    assert torch.equal(ours, theirs)


def test_the_marginal_mode_repairs_the_start() -> None:
    """From sigma = 2 the noise N(0, 4) is far from the law there; a Gaussian's own law is met exactly."""
    law = gaussian()
    eps = torch.randn((20_000, 6), generator=seeded(7), dtype=torch.float64)
    for mode, exact in (("marginal", True), ("ode", False)):
        x = next(teleported(heun, law, 1.0, mode=mode)(law, 2 * eps, karras_sigmas(9, sigma_max=2.0))).x
        z = (x - law.mean) @ law.components.mT / (law.variances + 1).sqrt()
        near = bool((z.mean(0).abs() < 5 / math.sqrt(20_000)).all())
        near &= bool(((z.var(0) - 1).abs() < 5 * math.sqrt(2 / 20_000)).all())
        assert near == exact


@pytest.mark.parametrize(
    ("skip", "landing"), [(0.0, 0.5), (-1.0, 0.5), (math.nan, 0.5), (math.inf, 0.5), (8.4, -1.0), (8.4, math.nan)]
)
def test_a_level_that_is_not_positive_or_a_power_too_low_raises(skip, landing) -> None:
    with pytest.raises(ValueError, match="skip, landing"):
        teleported(heun, gaussian(), skip, landing=landing)


def test_an_unknown_mode_raises() -> None:
    with pytest.raises(ValueError, match="mode"):
        teleported(heun, gaussian(), 8.4, mode="odd")


def test_a_level_below_the_schedule_s_raises_before_anything_is_evaluated() -> None:
    denoiser, law = mixture()
    counted = Counted(denoiser)
    with pytest.raises(ValueError, match=r"outside the schedule's levels \[1, 80\]"):
        list(teleported(heun, law, 0.5)(counted, start(), karras_sigmas(6, 1.0)))
    with pytest.raises(ValueError, match="Gaussian is of"):
        list(teleported(heun, law, 8.4)(counted, start(d=95), karras_sigmas(6)))
    with pytest.raises(ValueError, match="cond"):
        list(teleported(heun, gaussian(3), 8.4)(counted, start(d=6), karras_sigmas(6)))
    assert not counted.batches


def test_a_state_in_half_precision_is_refused() -> None:
    _, gaussian = mixture_and_gaussian(rotated=False)
    x = torch.zeros((2, *gaussian.shape), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"x: is torch.float16; the state must be float32 or float64"):
        sample(teleported(heun, gaussian, 8.4), gaussian, x, karras_sigmas(6))
