"""The losses against what defines them: their gradients and their minimisers."""

import pytest
import torch

from distill.divergences import DIVERGENCES
from distill.losses import denoising_loss, distribution_matching_loss, matching_weight
from samplers import GaussianMixture
from tests.truth import relative_error


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_matching_gradient_is_the_weighted_difference_of_the_predictions() -> None:
    x = normal(5, 2, 3, seed=1).requires_grad_()
    fake, target = normal(5, 2, 3, seed=2).requires_grad_(), normal(5, 2, 3, seed=3).requires_grad_()
    weight = normal(5, seed=4).exp().requires_grad_()
    loss = distribution_matching_loss(x, fake, target, weight)
    assert loss.shape == (5,)
    loss.sum().backward()
    expected = weight[:, None, None] * (fake - target) / 6
    assert relative_error(x.grad, expected.detach()) < 1e-14
    assert fake.grad is None
    assert target.grad is None
    assert weight.grad is None


def test_the_matching_weight_makes_the_direction_comparable_between_samples() -> None:
    x, target = normal(4, 3, seed=1).requires_grad_(), normal(4, 3, seed=2)
    h = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    weight = matching_weight(x, target, h)
    assert not weight.requires_grad
    assert relative_error(weight * (x - target).abs().mean(1).detach(), h) < 1e-14
    assert torch.equal(matching_weight(x, target), matching_weight(x, target, torch.ones_like(h)))
    assert matching_weight(x, x.detach(), 1.0, floor=1e-3).tolist() == pytest.approx([1e3] * 4)


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-1.0, 0.5], [0.8, -0.2]], dtype=torch.float64),
        torch.tensor([0.05, 0.2], dtype=torch.float64),
    )


def draws(mixture: GaussianMixture, n: int = 40_000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x0 = mixture.sample(n, generator=torch.Generator().manual_seed(5))
    return x0, normal(n, 2, seed=6), normal(n, seed=7).exp()


def test_the_denoising_loss_is_edms(mixture: GaussianMixture) -> None:
    x0, eps, sigma = draws(mixture, 6)
    actual = denoising_loss(mixture, x0, sigma, eps, sigma_data=0.7)
    expected = [
        (s**2 + 0.49) / (0.49 * s**2) * ((mixture((x + s * e)[None], s)[0] - x) ** 2).mean()
        for x, s, e in zip(x0, sigma, eps, strict=True)
    ]
    assert relative_error(actual, torch.stack(expected)) < 1e-13


@pytest.mark.parametrize("direction", ["shift", "scale", "sigma", "cubic"])
def test_the_denoising_loss_is_least_at_the_posterior_mean(mixture: GaussianMixture, direction: str) -> None:
    """Its slope at the exact denoiser is 0 within five standard errors, and a step either way costs more."""
    x0, eps, sigma = draws(mixture)
    strength = torch.zeros(len(x0), dtype=torch.float64, requires_grad=True)

    def moved(x: torch.Tensor, s: torch.Tensor, cond: object = None) -> torch.Tensor:
        way = {"shift": torch.ones_like(x), "scale": x, "sigma": s[:, None] * x.tanh(), "cubic": x.clamp(-2, 2) ** 3}
        return mixture(x, s) + strength[:, None] * way[direction]

    loss = denoising_loss(moved, x0, sigma, eps)
    (slopes,) = torch.autograd.grad(loss.sum(), strength)
    assert abs(slopes.mean()) < 5 * slopes.std() / len(slopes) ** 0.5

    for step in (-0.1, 0.1):
        with torch.no_grad():
            strength.fill_(step)
            more = denoising_loss(moved, x0, sigma, eps) - loss
        assert more.mean() > 5 * more.std() / len(more) ** 0.5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_and_its_weight_belong_together(name: str) -> None:
    """f(1) = 0, f is convex, and h(r) = r^2 f''(r) by automatic differentiation."""
    divergence = DIVERGENCES[name]
    assert divergence.name == name
    assert abs(float(divergence.f(torch.ones((), dtype=torch.float64)))) < 1e-15
    r = torch.logspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(divergence.f(r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert relative_error(divergence.weight(r.detach()), r.detach() ** 2 * curvature) < 1e-12
    assert bool((divergence.weight(r.detach()) > 0).all())
    assert divergence.constant == bool(divergence.weight(r.detach()).std() < 1e-12)
