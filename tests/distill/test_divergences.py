"""Every divergence against its definition, and the variance of its weight against exact Gaussians."""

import math
import typing

import pytest
import torch
from torch import Tensor

from distill.divergences import DIVERGENCES, FDivergence, alpha, named
from distill.methods import DivergenceChoice, DivergenceName
from tests.truth import relative_error

EXPONENTS = [-2.0, -1.0, -0.3, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0]
ALL = [*DIVERGENCES.values(), *(alpha(a) for a in EXPONENTS)]
EVERY = pytest.mark.parametrize("divergence", ALL, ids=[d.name for d in ALL])


def ratios() -> Tensor:
    return torch.logspace(-3, 3, 61, dtype=torch.float64)


def derivatives(divergence: FDivergence, r: Tensor) -> tuple[Tensor, Tensor]:
    """f' and f'' by automatic differentiation."""
    r = r.clone().requires_grad_()
    (slope,) = torch.autograd.grad(divergence.f(r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    return slope.detach(), curvature


@EVERY
def test_the_weight_is_r_squared_times_the_second_derivative(divergence: FDivergence) -> None:
    r = ratios()
    _, curvature = derivatives(divergence, r)
    torch.testing.assert_close(divergence.weight(r), r**2 * curvature, rtol=1e-9, atol=0)


@EVERY
def test_f_is_zero_at_one_and_convex(divergence: FDivergence) -> None:
    assert abs(float(divergence.f(torch.ones((), dtype=torch.float64)))) < 1e-15
    slope, curvature = derivatives(divergence, ratios())
    assert bool((curvature > 0).all())
    assert bool((slope.diff() > 0).all())


@EVERY
def test_a_divergence_is_constant_where_its_weight_is_one(divergence: FDivergence) -> None:
    h = divergence.weight(ratios())
    assert bool((h > 0).all())
    assert divergence.constant == torch.equal(h, torch.ones_like(h))
    assert divergence.constant == (float(h.std()) == 0)


@EVERY
def test_a_weight_keeps_shape_and_dtype(divergence: FDivergence) -> None:
    for dtype in (torch.float32, torch.float64):
        r = torch.ones((2, 3), dtype=dtype)
        assert (divergence.weight(r).shape, divergence.weight(r).dtype) == ((2, 3), dtype)
        assert (divergence.f(r).shape, divergence.f(r).dtype) == ((2, 3), dtype)


def test_the_schema_names_the_table_and_alpha() -> None:
    assert sorted(typing.get_args(DivergenceName)) == sorted([*DIVERGENCES, "alpha"])
    assert all(name == divergence.name for name, divergence in DIVERGENCES.items())


@pytest.mark.parametrize("name", typing.get_args(DivergenceName))
@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_the_schema_knows_which_weights_are_constant(name: str, exponent: float) -> None:
    given = {"exponent": exponent} if name == "alpha" else {}
    assert DivergenceChoice(name=name, **given).constant == named(name, **given).constant


def test_a_name_gives_its_divergence() -> None:
    assert all(named(name) is divergence for name, divergence in DIVERGENCES.items())
    r = ratios()
    assert torch.equal(named("alpha", 0.3).weight(r), alpha(0.3).weight(r))
    assert named("alpha", 0).constant


@pytest.mark.parametrize(
    ("name", "exponent", "match"),
    [
        ("kl", None, r"divergence: 'kl'.*reverse-kl.*neyman, alpha"),
        ("alpha", None, r"exponent: None does not go with alpha"),
        ("forward-kl", 1.0, r"exponent: 1\.0 does not go with forward-kl"),
        ("reverse-kl", 0.0, r"exponent: 0\.0 does not go with reverse-kl"),
        ("alpha", math.nan, r"exponent: nan.*finite"),
        ("alpha", math.inf, r"exponent: inf.*finite"),
    ],
)
def test_a_wrong_name_or_exponent_is_refused(name: str, exponent: float | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        named(name, exponent)


PEARSON = FDivergence("pearson", lambda r: (r - 1) ** 2, lambda r: 2 * r**2)


@pytest.mark.parametrize(
    ("exponent", "special", "factor"),
    [
        (-1.0, DIVERGENCES["neyman"], 2.0),
        (0.0, DIVERGENCES["reverse-kl"], 1.0),
        (0.5, DIVERGENCES["squared-hellinger"], 0.25),
        (1.0, DIVERGENCES["forward-kl"], 1.0),
        (2.0, PEARSON, 2.0),
    ],
)
def test_alpha_meets_the_known_divergences(exponent: float, special: FDivergence, factor: float) -> None:
    """The weights agree up to a factor; so does f, up to a multiple of r - 1, whose mean under q is 0."""
    r, divergence = ratios(), alpha(exponent)
    torch.testing.assert_close(factor * divergence.weight(r), special.weight(r), rtol=1e-12, atol=0)
    r = r[(r - 1).abs() > 1e-6]
    difference = special.f(r) - factor * divergence.f(r)
    multiple = float((difference / (r - 1)).median())
    scale = special.f(r).abs().max()
    assert float((difference - multiple * (r - 1)).abs().max() / scale) < 1e-12


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_alpha_is_continuous_at_its_two_limits(limit: float) -> None:
    """Weights and divergences are compared: f itself may differ by a multiple of r - 1, whose mean is 0."""
    r = ratios()
    for step in (-1e-6, 1e-6):
        assert relative_error(alpha(limit + step).weight(r).log(), alpha(limit).weight(r).log() + step * r.log()) < 1e-9
        assert gaussian(alpha(limit + step).f) == pytest.approx(gaussian(alpha(limit).f), rel=1e-4)


SHIFT = 2.0


def gaussian(function: typing.Callable[[Tensor], Tensor]) -> float:
    """E_q function(r) for q = N(0, 1) and p = N(2, 1), by the trapezoid rule (exact to rounding for a Gaussian)."""
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    q = (-0.5 * x**2).exp() / math.sqrt(2 * math.pi)
    kept = q > 0
    value = function((SHIFT * x - SHIFT**2 / 2).exp())
    return float(torch.trapezoid(torch.where(kept, q * value, 0.0), x))


def variance(divergence: FDivergence) -> float:
    """Var_q h / (E_q h)^2."""
    return gaussian(lambda r: divergence.weight(r) ** 2) / gaussian(divergence.weight) ** 2 - 1


@pytest.mark.parametrize(
    ("name", "published", "closed"),
    [
        ("reverse-kl", 0.0, 0.0),
        ("softened-reverse-kl", 0.103, None),
        ("jensen-shannon", 1.224, None),
        ("squared-hellinger", 1.718, math.exp(SHIFT**2 / 4) - 1),
        ("jeffreys", 13.40, (math.exp(SHIFT**2) - 1) / 4),
        ("forward-kl", 53.60, math.exp(SHIFT**2) - 1),
        ("neyman", 53.60, math.exp(SHIFT**2) - 1),
    ],
)
def test_the_variance_of_the_weights_of_two_gaussians(name: str, published: float, closed: float | None) -> None:
    found = variance(DIVERGENCES[name])
    assert found == pytest.approx(published, abs=6e-4 if published < 2 else 6e-3)
    if closed is not None:
        assert found == pytest.approx(closed, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_the_variance_of_the_weight_of_alpha(exponent: float) -> None:
    """ln r^a is normal with variance (a shift)^2."""
    assert variance(alpha(exponent)) == pytest.approx(math.expm1((exponent * SHIFT) ** 2), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("reverse-kl", SHIFT**2 / 2),
        ("forward-kl", SHIFT**2 / 2),
        ("jeffreys", SHIFT**2),
        ("squared-hellinger", 1 - math.exp(-(SHIFT**2) / 8)),
        ("neyman", math.exp(SHIFT**2) - 1),
    ],
)
def test_the_divergence_of_two_gaussians(name: str, closed: float) -> None:
    assert gaussian(DIVERGENCES[name].f) == pytest.approx(closed, rel=1e-9)


def test_the_direction_is_that_of_p_against_q() -> None:
    """Unequal spreads tell KL(p || q) from KL(q || p): p = N(0, 2^2), q = N(0, 1)."""
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    log_q = -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
    log_r = 0.375 * x**2 - math.log(2)
    for name, closed in (("reverse-kl", math.log(2) - 0.375), ("forward-kl", 1.5 - math.log(2))):
        value = torch.trapezoid(log_q.exp() * DIVERGENCES[name].f(log_r.exp()), x)
        assert float(value) == pytest.approx(closed, rel=1e-6)
