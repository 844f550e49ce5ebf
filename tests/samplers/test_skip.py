"""The certificate: that its KL is the KL, what level it chooses, and what it refuses."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from samplers import (
    Gaussian,
    GaussianMixture,
    choose_sigma_skip,
    dpmpp_2m,
    exponential_sigmas,
    gaussian_exponential,
    heun,
    karras_sigmas,
    nfe,
    sample,
    teleported,
)
from samplers.skip import Skip
from tests.samplers.mixtures import Labelled, mixture_and_gaussian
from tests.truth import Counted

DATA, MODEL = "KL(p || N)", "KL(N || p)"
both_kinds = pytest.mark.parametrize("rotated", [False, True])
both_directions = pytest.mark.parametrize("direction", [DATA, MODEL])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


mixture = cache(mixture_and_gaussian)


def points(rotated: bool, direction: str, count: int, seed: int) -> Callable[[float], Tensor]:
    """One trajectory of the heat flow for each of so many points, of the law that the direction names."""
    denoiser, gaussian = mixture(rotated=rotated)
    eps = torch.randn((count, gaussian.dim), generator=seeded(seed), dtype=torch.float64)
    if direction == MODEL:
        return lambda sigma: gaussian.transport(eps, 1.0, sigma, mode="marginal")
    x0 = denoiser.sample(count, generator=seeded(seed + 1))
    return lambda sigma: x0 + sigma * eps


@torch.no_grad()
def fine_integral(rotated: bool, point: Callable[[float], Tensor], sigma: float, per_octave: int = 16) -> Tensor:
    """int |D - D_N|^2 sigma^-2 d ln sigma of each point from sigma = 20 (above, 1e-5 of it), by the trapezoid rule."""
    top = 20.0
    denoiser, gaussian = mixture(rotated=rotated)
    levels = torch.logspace(math.log10(top), math.log10(sigma), round(per_octave * math.log2(top / sigma)) + 1).double()
    values = []
    for level in levels:
        x = point(float(level))
        values.append((denoiser(x, level) - gaussian(x, level)).square().sum(1) / level**2)
    return torch.trapezoid(torch.stack(values), -levels.log(), dim=0)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def monte_carlo_kl(rotated: bool, direction: str, sigma: float, count: int) -> tuple[float, float]:
    """E_a ln a / b by log-densities, with b / a, whose mean is 1, as a control variate."""
    denoiser, gaussian = mixture(rotated=rotated)
    law, other = (denoiser, gaussian) if direction == DATA else (gaussian, denoiser)
    x = law.sample(count, sigma, generator=seeded(20))
    log_ratio = other.log_density(x, sigma) - law.log_density(x, sigma)
    known = log_ratio.exp() - 1
    slope = (known * log_ratio).mean() / known.square().mean()
    return mean_and_error(slope * known - log_ratio)


@both_kinds
@both_directions
def test_the_integral_is_the_kl_of_log_densities(rotated, direction) -> None:
    """At five levels, within four combined standard errors and 5 % for the rule (bounded below)."""
    denoiser, gaussian = mixture(rotated=rotated)
    samples = denoiser.sample(1024, generator=seeded(1)) if direction == DATA else None
    skip = choose_sigma_skip(denoiser, gaussian, 1.0, samples=samples, count=1024, generator=seeded(2))
    assert skip.direction == direction
    curve = [row for row in zip(skip.sigmas, skip.kls, skip.errors, strict=True) if 5e-4 < row[1] < 2]
    assert len(curve) >= 5
    for sigma, kl, error in curve[-5:]:
        expected, expected_error = monte_carlo_kl(rotated, direction, sigma, 4096)
        both = math.hypot(error, expected_error)
        assert both < 0.2 * expected
        assert abs(kl - expected) < 4 * both + 0.05 * expected


@both_kinds
@both_directions
def test_levels_a_factor_of_root_two_apart_are_enough(rotated, direction) -> None:
    """On the same points as a fine grid, so that only the rule's own error is left."""
    denoiser, gaussian = mixture(rotated=rotated)
    count, point = 64, points(rotated, direction, 64, 2)
    samples = denoiser.sample(count, generator=seeded(3)) if direction == DATA else None
    skip = choose_sigma_skip(denoiser, gaussian, 1.0, samples=samples, count=count, generator=seeded(2))
    for sigma, kl in zip(skip.sigmas, skip.kls, strict=True):
        if 1e-4 < kl < 1.2:
            assert kl == pytest.approx(float(fine_integral(rotated, point, sigma).mean()), rel=0.05)


@pytest.mark.slow
@both_kinds
@both_directions
def test_the_kl_where_the_jump_lands_is_the_tolerance(rotated, direction) -> None:
    denoiser, gaussian = mixture(rotated=rotated)
    samples = denoiser.sample(512, generator=seeded(1)) if direction == DATA else None
    tolerances, chosen = (0.01, 0.05, 0.2, 1.0), []
    for tolerance in tolerances:
        skip = choose_sigma_skip(denoiser, gaussian, tolerance, samples=samples, count=512, generator=seeded(2))
        assert skip.kl + 1.645 * skip.kl_error == pytest.approx(tolerance, rel=1e-6)
        expected, error = mean_and_error(fine_integral(rotated, points(rotated, direction, 192, 5), skip.sigma_skip, 8))
        assert abs(skip.kl - expected) < 4 * math.hypot(error, skip.kl_error) + 0.05 * expected
        chosen.append(skip.sigma_skip)
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > 2 * chosen[-1]


def test_a_gaussian_that_is_the_law_carries_to_the_lowest_level() -> None:
    _, gaussian = mixture()
    skip = choose_sigma_skip(gaussian, gaussian, count=8, generator=seeded(0))
    assert skip.kl == skip.kl_error == 0
    assert 0.002 <= skip.sigma_skip < 0.002 * math.sqrt(2)
    assert skip.nfe_after == 1


def test_it_looks_no_lower_than_the_schedule_goes() -> None:
    _, gaussian = mixture()
    skip = choose_sigma_skip(gaussian, gaussian, count=8, sigmas=karras_sigmas(6, 0.5), generator=seeded(0))
    assert 0.5 <= skip.sigma_skip < 0.5 * math.sqrt(2)
    assert (skip.steps, skip.nfe_after) == (6, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_samples_of_less_precision_give_the_same_certificate(dtype) -> None:
    denoiser, gaussian = mixture()
    samples = denoiser.sample(64, generator=seeded(1)).to(dtype)
    ours, theirs = (
        choose_sigma_skip(
            lambda x, sigma, cond=None: denoiser(x.double(), sigma.double()).to(x),
            gaussian,
            samples=given,
            sigmas=None,
            generator=seeded(2),
        )
        for given in (samples, samples.float())
    )
    assert ours.sigma_skip == pytest.approx(theirs.sigma_skip, rel=1e-6)


def two_sample_p_value(x: Tensor, y: Tensor, generator: torch.Generator) -> float:
    """Of the kernel two-sample statistic (Gretton et al. 2012) with exp(-2 |x - y|), by 499 permutations."""
    joined, n = torch.cat([x, y]), len(x)
    signs = torch.cat([torch.ones(n), -torch.ones(n)]).double()
    shuffled = [signs[torch.randperm(2 * n, generator=generator)] for _ in range(499)]
    signs = torch.stack([signs, *shuffled])
    distances = ((signs @ (-2 * torch.cdist(joined, joined)).exp()) * signs).sum(1)
    return float((distances >= distances[0] * (1 - 1e-12)).double().mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_two_sample_test_notices_a_certified_jump_where_it_notices_one_to_half_the_level(seed) -> None:
    """Four components in four dimensions, 550 samples each; the test sees half the level on all of 12 seeds."""
    denoiser, gaussian = mixture(4, 4, share=0.9)
    skip = choose_sigma_skip(denoiser, gaussian, count=2048, batch=2048, generator=seeded(2))
    generator, sigmas = seeded(10 + seed), karras_sigmas(18)

    def drawn(solver) -> Tensor:
        return sample(solver, denoiser, 80 * torch.randn((550, 4), generator=generator, dtype=torch.float64), sigmas)

    plain = drawn(heun)
    jump = partial(teleported, heun, gaussian, mode="marginal", landing=None)
    assert two_sample_p_value(plain, drawn(jump(skip)), seeded(0)) > 0.01
    assert two_sample_p_value(plain, drawn(jump(skip.sigma_skip / 2)), seeded(0)) < 0.01


class Erring:
    """The exact denoiser and an error that does not fall with the noise level, of so much a pixel."""

    def __init__(self, denoiser: GaussianMixture, size: float) -> None:
        self.denoiser = denoiser
        direction = torch.randn(denoiser.dim, generator=seeded(7), dtype=torch.float64)
        self.error = size * math.sqrt(denoiser.dim) * direction / direction.norm()

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.denoiser(x, sigma) + self.error

    def nats(self, sigma: float) -> float:
        """int |e|^2 sigma^-3 d sigma; the cross term with D - D_N has no mean, for both have the data's mean."""
        return float(self.error.square().sum()) / (2 * sigma**2)


@pytest.mark.parametrize("size", [0.0, 0.02, 0.035])
def test_the_network_s_own_error_is_told_from_the_data_s_shape(size) -> None:
    """Within four standard errors of the exact one; they are small beside the KL."""
    denoiser, gaussian = mixture(rotated=True)
    erring, samples = Erring(denoiser, size), denoiser.sample(512, generator=seeded(1))
    skip = choose_sigma_skip(erring, gaussian, samples=samples, generator=seeded(2))
    assert skip.network_error is not None
    mean, error = skip.network_error
    assert error < 0.15 * skip.kl
    assert abs(mean - erring.nats(skip.sigma_skip)) < 4 * error


@pytest.mark.parametrize("size", [0.1, 0.4, 4.0])
def test_a_network_whose_own_error_dominates_is_refused_with_the_numbers(size) -> None:
    denoiser, gaussian = mixture(rotated=True)
    erring, samples = Erring(denoiser, size), denoiser.sample(256, generator=seeded(1))
    with pytest.raises(ValueError, match=r"^denoiser: .* nats .* own error") as refusal:
        choose_sigma_skip(erring, gaussian, samples=samples, generator=seeded(2))
    own, of, sigma = (float(str(refusal.value).split(before)[1].split()[0]) for before in (": ", "of the ", "sigma "))
    assert own == pytest.approx(erring.nats(sigma), rel=0.1)
    assert own <= 1.02 * of
    if size == 0.1:  # without samples it cannot be told
        assert choose_sigma_skip(erring, gaussian, generator=seeded(2)).network_error is None


@both_directions
def test_a_tolerance_that_no_level_meets_raises_with_the_smallest_kl(direction) -> None:
    denoiser, gaussian = mixture(rotated=True)
    samples = denoiser.sample(512, generator=seeded(1)) if direction == DATA else None
    with pytest.raises(ValueError, match=r"tolerance: 0.05 nats is met at no noise level, so nothing") as refusal:
        choose_sigma_skip(denoiser, gaussian, samples=samples, count=512, sigma_max=0.9, generator=seeded(2))
    said = str(refusal.value).split("the smallest ")[1]
    assert said.startswith(direction)
    assert said.endswith("at sigma 0.9")
    assert float(said.split(" is ")[1].split()[0]) > 0.05


def test_too_few_samples_raise_with_how_many_are_needed_which_then_pass() -> None:
    denoiser, _ = mixture(rotated=True)
    samples = denoiser.sample(256, generator=seeded(1))
    choose = partial(choose_sigma_skip, denoiser, tolerance=0.1, samples=samples, sigma_max=3.0, generator=seeded(2))

    def fitted(count: int) -> Gaussian:
        return Gaussian.fit([denoiser.sample(count, generator=seeded(3))], rank=min(count - 1, denoiser.dim))

    with pytest.raises(ValueError, match=r"it is of 30 samples, and about \d+ are needed at sigma 3") as refusal:
        choose(fitted(30))
    needed = int(str(refusal.value).split("about ")[1].split()[0])
    assert needed < 1000
    assert choose(fitted(needed)).sigma_skip <= 3.0


def test_samples_that_the_gaussian_was_fitted_to_do_not_hide_how_few_they_were() -> None:
    denoiser, exact = mixture()
    few = Gaussian(exact.mean, exact.components, exact.variances, exact.rest, count=50)
    with pytest.raises(ValueError, match=r"gaussian: cannot be certified to 0.05 nats; it is of 50 samples"):
        choose_sigma_skip(denoiser, few, generator=seeded(2))


@pytest.mark.parametrize("n_classes", [None, 3])
@pytest.mark.parametrize(("rank", "rest"), [(0, 0.3), (3, 0.3), (6, 0.0), (3, 0.0)])
def test_the_price_of_the_start_is_the_kl_of_two_gaussians(rank, rest, n_classes) -> None:
    components = torch.linalg.qr(torch.randn((6, 6), generator=seeded(0), dtype=torch.float64))[0][:rank]
    variances = 4.0 / torch.arange(1, rank + 1, dtype=torch.float64)
    means = torch.randn((n_classes or 1, 6), generator=seeded(1), dtype=torch.float64)
    gaussian = Gaussian(means if n_classes else means[0], components, variances, rest, n_classes=n_classes)
    matrix = components.mT @ torch.diag(variances) @ components
    matrix = matrix + rest * (torch.eye(6).double() - components.mT @ components) + 25 * torch.eye(6).double()
    start = MultivariateNormal(torch.zeros(6).double(), 25 * torch.eye(6).double())
    expected = torch.stack([kl_divergence(MultivariateNormal(mean, matrix), start) for mean in means]).mean()
    skip = choose_sigma_skip(gaussian, gaussian, count=8, sigma_max=5.0, generator=seeded(0))
    assert skip.prior_kl == pytest.approx(float(expected), rel=1e-10)


def certificate(sigma_skip: float = 8.4, **others: Any) -> Skip:
    values = {"sigma_max": 80.0, "kl": 0.041, "kl_error": 0.006, "tolerance": 0.05, "direction": MODEL}
    values |= {"network_error": None, "prior_kl": 0.0, "count": 8, "shape": (4,), "sigmas": (), "kls": (), "errors": ()}
    return Skip(sigma_skip, **(values | others))


def test_a_certificate_is_one_line() -> None:
    line = "skipped 6 of 18 steps, sigma 80 -> 8.4, KL 0.041 +- 0.006 nats, 35 -> 23 NFE"
    assert str(certificate(float(karras_sigmas(18)[6])).on(heun, karras_sigmas(18))) == line
    other = "skipped 5 of 12 steps, sigma 80 -> 5, KL 0.041 +- 0.006 nats, 12 -> 7 NFE"
    skip = certificate(5.0).on(dpmpp_2m, karras_sigmas(12))
    assert str(skip) == other
    assert str(skip.on(heun, karras_sigmas(18)).on(dpmpp_2m, karras_sigmas(12))) == other
    assert certificate(90.0).on(heun, karras_sigmas(18)).skipped == 0
    dear = str(replace(certificate(5.0), prior_kl=0.31).on(dpmpp_2m, karras_sigmas(12)))
    assert dear == other.replace("nats", "nats, beside 0.31 of the start")


@pytest.mark.parametrize("solver", [heun, dpmpp_2m])
@pytest.mark.parametrize("landing", [None, 0.5])
@pytest.mark.parametrize("mode", ["ode", "marginal"])
def test_the_evaluations_it_counts_are_those_made(solver, landing, mode) -> None:
    """The jump costs none, nor does the correction of the landing."""
    denoiser, gaussian = mixture()
    counted = Counted(denoiser)
    for sigmas in (karras_sigmas(18), exponential_sigmas(10), karras_sigmas(18)[:-1]):
        skip = choose_sigma_skip(denoiser, gaussian, count=32, solver=solver, sigmas=sigmas, generator=seeded(2))
        assert skip.nfe == nfe(solver, sigmas)
        assert skip.skipped == int((sigmas > skip.sigma_skip).sum())
        counted.batches = []
        x = 80 * torch.randn((3, 96), generator=seeded(0), dtype=torch.float64)
        sample(teleported(solver, gaussian, skip, mode=mode, landing=landing), counted, x, sigmas)
        assert counted.batches == [3] * skip.nfe_after
        assert len(skip.grid(sigmas)) == skip.steps - skip.skipped + 1


def test_samples_without_their_labels_are_refused() -> None:
    law = Labelled(classes=4)
    samples = law.sample(torch.arange(100) % 4, 0.0, seeded(1))
    with pytest.raises(ValueError, match=r"cond: None; needed are the class labels \[100\] of the samples"):
        choose_sigma_skip(law, law.gaussian, samples=samples, sigma_max=10.0)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_network_that_falls_short_of_the_data_certifies_nothing(share) -> None:
    """Drawn to the Gaussian, it is near to it where the data is not; what is said of the data is true of it."""
    denoiser, gaussian = mixture(rotated=True)

    def shrunk(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return torch.lerp(gaussian(x, sigma), denoiser(x, sigma), share)

    samples = denoiser.sample(512, generator=seeded(1))
    with pytest.raises(ValueError, match=r"falls short of the data's shape") as refusal:
        choose_sigma_skip(shrunk, gaussian, samples=samples, generator=seeded(2))
    said = str(refusal.value)
    least, sigma = float(said.split("at least ")[1].split()[0]), float(said.split("down to sigma ")[1].split(":")[0])
    x = denoiser.sample(4000, sigma, generator=seeded(3))
    nats = denoiser.log_density(x, sigma) - gaussian.log_density(x, sigma)
    assert 0.05 < least < float(nats.mean() + 4 * nats.std() / 4000**0.5)


def test_a_certificate_tells_of_the_schedule_it_is_for_and_of_solvers_that_need_the_shape() -> None:
    denoiser, gaussian = mixture()
    own = partial(gaussian_exponential, gaussian=gaussian)
    sigmas = karras_sigmas(10, 0.01, 20.0)
    skip = choose_sigma_skip(denoiser, gaussian, count=64, solver=own, sigmas=sigmas, generator=seeded(2))
    assert (skip.sigma_max, skip.on(heun, karras_sigmas(18)).sigma_max) == pytest.approx((20.0, 80.0))
    assert (skip.nfe, skip.shape) == (10, gaussian.shape)


def test_a_denoiser_that_is_not_finite_raises_with_the_level() -> None:
    denoiser, gaussian = mixture()

    def broken(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return denoiser(x, sigma) if sigma > 30 else torch.full_like(x, math.nan)

    with pytest.raises(ValueError, match=r"denoiser: is not finite at sigma 28\.28"):
        choose_sigma_skip(broken, gaussian, generator=seeded(0))


@pytest.mark.parametrize("form", ["turns", "rows", "one row", "dict"])
def test_a_condition_has_a_row_for_each_point_or_one_for_all(form) -> None:
    """The denoiser gets the same labels as the Gaussian, in every batch; class means make the jump cheap."""
    law, seen = Labelled(classes=4), []

    def watched(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        labels = cond["class_labels"] if isinstance(cond, dict) else cond
        assert len(labels) == len(x)
        seen.append(labels)
        return law(x, sigma, cond)

    labels = torch.arange(100) % 4
    given: Any = {"turns": None, "rows": labels, "one row": torch.tensor([2]), "dict": {"class_labels": labels}}[form]
    drawn = torch.full((100,), 2) if form == "one row" else labels
    samples = law.sample(drawn, 0.0, seeded(1))
    own = None if form == "turns" else samples
    with_labels = choose_sigma_skip(
        watched, law.gaussian, samples=own, cond=given, count=100, batch=30, sigma_max=10.0, generator=seeded(2)
    )
    assert [len(part) for part in seen[:4]] == [30, 30, 30, 10]
    assert torch.equal(torch.cat(seen[:4]), drawn)
    if form != "one row":
        unlabelled = choose_sigma_skip(
            law, law.unlabelled, samples=samples, cond=labels, batch=50, sigma_max=10.0, generator=seeded(2)
        )
        assert unlabelled.sigma_skip > 1.5 * with_labels.sigma_skip


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(("tolerance", {"tolerance": value}) for value in (0.0, -1.0, math.nan, math.inf)),
        ("sigma_min, sigma_max", {"sigma_min": 3.0, "sigma_max": 3.0}),
        ("sigma_min, sigma_max", {"sigma_max": math.nan}),
        ("count", {"count": 7}),
        ("batch", {"batch": 0}),
        ("samples", {"samples": torch.zeros(7, 96).double()}),
        ("samples", {"samples": torch.zeros(32, 95).double()}),
        ("samples", {"samples": torch.zeros(32, 3, 32).double()}),
        ("samples", {"samples": torch.zeros(32, 96, dtype=torch.int64)}),
        ("samples", {"samples": torch.full((32, 96), math.nan).double()}),
        ("cond", {"cond": torch.zeros(5, dtype=torch.int64)}),
    ],
    ids=str,
)
def test_bad_input_raises_before_the_denoiser_is_asked(field, bad) -> None:
    denoiser, gaussian = mixture()
    counted = Counted(denoiser)
    with pytest.raises(ValueError, match=f"^[a-z, _]*{field}[a-z, _]*:"):
        choose_sigma_skip(counted, gaussian, **bad)
    assert not counted.batches
