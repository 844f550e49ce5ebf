import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from samplers import GaussianMixture, score
from tests.truth import relative_error

FORMS = ["full", "diagonal", "isotropic"]
SIGMAS = [1e-6, 0.05, 1.0, 30.0, 1e6]


def parameters(form: str, d: int, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(k, generator=generator, dtype=torch.float64) + 0.2
    means = 3 * torch.randn((k, d), generator=generator, dtype=torch.float64)
    if form == "full":
        root = torch.randn((k, d, d), generator=generator, dtype=torch.float64) / math.sqrt(d)
        covariances = root @ root.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    else:
        shape = (k, d) if form == "diagonal" else (k,)
        covariances = 0.1 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return weights, means, covariances


def as_matrices(covariances: Tensor, d: int) -> Tensor:
    eye = torch.eye(d, dtype=covariances.dtype)
    return covariances if covariances.ndim == 3 else covariances.reshape(len(covariances), -1, 1) * eye


def noised(mixture: GaussianMixture, sigma: float, n: int = 5) -> Tensor:
    return mixture.sample(n, sigma, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("d", [1, 2, 64])
@pytest.mark.parametrize("form", FORMS)
def test_log_density_is_that_of_torch_distributions(form, d, sigma) -> None:
    weights, means, covariances = parameters(form, d)
    mixture = GaussianMixture(weights, means, covariances)
    noise = sigma**2 * torch.eye(d, dtype=torch.float64)
    expected = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, as_matrices(covariances, d) + noise))
    x = noised(mixture, sigma)
    sigmas = torch.full((5,), sigma, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_density(x, sigma), expected.log_prob(x), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(mixture.log_density(x, sigmas), expected.log_prob(x), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("d", [1, 2, 64])
@pytest.mark.parametrize("form", FORMS)
def test_the_denoiser_is_tweedies_formula_of_the_log_density(form, d, sigma) -> None:
    mixture = GaussianMixture(*parameters(form, d))
    x = noised(mixture, sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    x = x.detach()
    denoised = mixture(x, torch.tensor(sigma, dtype=torch.float64))
    # x + sigma^2 gradient loses what |x| exceeds |D| by: the bound is rounding relative to x.
    assert float((denoised - (x + sigma**2 * gradient)).abs().max()) < 1e-13 * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize("sigma", [0.05, 0.7, 5.0, 1e3])
def test_the_denoiser_in_one_dimension_is_the_posterior_mean_by_quadrature(sigma) -> None:
    weights, means, variances = parameters("isotropic", 1)
    mixture = GaussianMixture(weights, means, variances)
    x = noised(mixture, sigma)
    x0 = torch.linspace(-20, 20, 200_001, dtype=torch.float64)
    prior = (weights / variances.sqrt() * torch.exp(-((x0[:, None] - means[:, 0]) ** 2) / (2 * variances))).sum(-1)
    likelihood = torch.exp(-((x - x0) ** 2) / (2 * sigma**2))
    expected = (x0 * prior * likelihood).sum(-1) / (prior * likelihood).sum(-1)
    assert relative_error(mixture(x, torch.tensor(sigma, dtype=torch.float64))[:, 0], expected) < 1e-9


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_the_density_in_one_dimension_integrates_to_one(sigma) -> None:
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    density = GaussianMixture(*parameters("full", 1)).log_density(x[:, None], sigma).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_the_three_forms_of_a_covariance_agree(form) -> None:
    weights, means, _ = parameters("full", 4)
    variance = torch.tensor([0.2, 0.5, 2.0], dtype=torch.float64)
    covariances = {
        "full": variance[:, None, None] * torch.eye(4, dtype=torch.float64),
        "diagonal": variance[:, None].expand(3, 4),
        "isotropic": variance,
    }[form]
    x, sigma = torch.randn((6, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor(0.8)
    reference = GaussianMixture(weights, means, variance)
    mixture = GaussianMixture(weights, means, covariances)
    torch.testing.assert_close(mixture(x, sigma), reference(x, sigma), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.log_density(x, sigma), reference.log_density(x, sigma), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_sigma_per_sample_equals_a_call_per_sample(form) -> None:
    mixture = GaussianMixture(*parameters(form, 3))
    x = noised(mixture, 1.0, n=4)
    sigma = torch.tensor([0.0, 0.01, 1.0, 100.0], dtype=torch.float64)
    together, densities = mixture(x, sigma), mixture.log_density(x, sigma)
    for k in range(4):
        torch.testing.assert_close(together[k : k + 1], mixture(x[k : k + 1], sigma[k]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(densities[k : k + 1], mixture.log_density(x[k : k + 1], sigma[k]))
    torch.testing.assert_close(together[0], x[0], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_without_noise_the_denoiser_is_the_identity(form) -> None:
    mixture = GaussianMixture(*parameters(form, 3))
    x = noised(mixture, 5.0)
    assert torch.equal(mixture(x, torch.tensor(0.0)), x)
    points = GaussianMixture(torch.ones(3), parameters(form, 3)[1], torch.zeros(3))
    assert torch.equal(points(x, torch.tensor(0.0)), x)


def test_point_masses_are_denoised_by_a_softmax_over_distances() -> None:
    weights, means, _ = parameters("isotropic", 2)
    points = GaussianMixture(weights, means, torch.zeros(3, dtype=torch.float64))
    x, sigma = noised(points, 2.0), torch.tensor(2.0, dtype=torch.float64)
    logits = weights.log() - torch.cdist(x, means) ** 2 / (2 * sigma**2)
    torch.testing.assert_close(points(x, sigma), logits.softmax(-1) @ means, rtol=1e-12, atol=1e-12)
    near = means + 1e-6
    torch.testing.assert_close(points(near, torch.tensor(1e-5)), means, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="no density"):
        points.log_density(x, 0.0)


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_components_far_apart_stay_finite_and_exact(sigma) -> None:
    means = torch.tensor([[-1e5, 0.0], [1e5, 0.0], [0.0, 1e5]], dtype=torch.float64)
    covariances = torch.diag_embed(torch.tensor([[1.0, 0.0], [1.0, 1e-4], [1e-8, 1.0]], dtype=torch.float64))
    mixture = GaussianMixture(torch.ones(3), means, covariances)
    x = torch.cat([means + 0.1 * sigma, torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), 1e7).double()])
    level = torch.tensor(sigma, dtype=torch.float64)
    denoised, density = mixture(x, level), mixture.log_density(x, level)
    assert bool(denoised.isfinite().all())
    assert bool(density.isfinite().all())
    if sigma <= 1e3:  # one component owns each of the first three points
        variance = torch.diagonal(covariances, dim1=1, dim2=2)
        expected = means + variance / (variance + sigma**2) * 0.1 * sigma
        torch.testing.assert_close(denoised[:3], expected, rtol=1e-12, atol=1e-9)


def test_far_above_the_data_the_denoiser_is_the_mean_of_the_data() -> None:
    weights, means, covariances = parameters("full", 2)
    mixture = GaussianMixture(weights, means, covariances)
    x = torch.ones((2, 2), dtype=torch.float64)
    expected = (weights / weights.sum()) @ means
    torch.testing.assert_close(mixture(x, torch.tensor(1e6).double()), expected.expand(2, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_samples_have_the_mean_and_covariance_of_the_mixture(form, sigma) -> None:
    d, n = 3, 40_000
    weights, means, covariances = parameters(form, d)
    weights = weights / weights.sum()
    x = GaussianMixture(weights, means, covariances).sample(n, sigma, torch.Generator().manual_seed(2))
    mean = weights @ means
    second = as_matrices(covariances, d) + sigma**2 * torch.eye(d, dtype=torch.float64)
    spread = means - mean
    covariance = torch.einsum("k,kij->ij", weights, second + spread[:, :, None] * spread[:, None, :])
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(n)).all())
    assert bool(((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(n)).all())


def test_samples_choose_components_by_weight_and_repeat_with_the_generator() -> None:
    mixture = GaussianMixture(torch.tensor([1.0, 3.0]), torch.tensor([[-1.0], [1.0]]), torch.zeros(2))
    first, again = (mixture.sample(10_000, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert abs(float((first > 0).double().mean()) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 10_000)


def test_images_keep_their_shape_and_dtype() -> None:
    mixture = GaussianMixture(*parameters("diagonal", 12))
    x = torch.randn((5, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    denoised = mixture(x, torch.tensor(0.5))
    assert (denoised.shape, denoised.dtype) == (x.shape, torch.float32)
    flat = mixture(x.flatten(1).double(), torch.tensor(0.5))
    torch.testing.assert_close(denoised.flatten(1).double(), flat, rtol=1e-6, atol=1e-6)


def test_a_float32_mixture_is_the_float64_one_to_rounding() -> None:
    weights, means, covariances = parameters("full", 8)
    single, double = (
        GaussianMixture(weights, means.float(), covariances.float()),
        GaussianMixture(weights, means, covariances),
    )
    for sigma in (0.01, 1.0, 80.0):
        x, level = noised(double, sigma), torch.tensor(sigma)
        assert relative_error(single(x.float(), level), double(x, level)) < 1e-5


def test_a_covariance_of_low_rank_in_either_precision_is_accepted() -> None:
    root = torch.randn((2, 64, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        covariances = root.to(dtype) @ root.to(dtype).mT
        mixture = GaussianMixture(torch.ones(2), torch.zeros((2, 64), dtype=dtype), covariances)
        assert bool(mixture(torch.ones((1, 64), dtype=dtype), torch.tensor(1.0)).isfinite().all())


def test_the_score_of_a_gaussian_is_minus_x_over_its_variance() -> None:
    gaussian = GaussianMixture(torch.ones(1), torch.zeros((1, 2), dtype=torch.float64), torch.full((1,), 3.0))
    x, sigma = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=torch.float64), torch.tensor([1.0, 2.0])
    expected = -x / torch.tensor([[4.0], [7.0]], dtype=torch.float64)
    torch.testing.assert_close(score(gaussian, x, sigma), expected, rtol=1e-12, atol=0)


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        (torch.ones(3), torch.zeros(2, 2), ONES, "weights"),
        (torch.tensor([1.0, 0.0]), torch.zeros(2, 2), ONES, "weights"),
        (torch.tensor([1.0, math.nan]), torch.zeros(2, 2), ONES, "weights"),
        (torch.tensor([1.0, math.inf]), torch.zeros(2, 2), ONES, "weights"),
        (ONES, torch.zeros(2), ONES, "means"),
        (ONES, torch.zeros(2, 2, dtype=torch.int64), ONES, "means"),
        (ONES, torch.full((2, 2), math.nan), ONES, "means"),
        (ONES, torch.zeros(2, 3), torch.ones(2, 2), "covariances: have shape"),
        (ONES, torch.zeros(2, 2), torch.tensor([1.0, -1e-3]), "negative"),
        (ONES, torch.zeros(2, 2), torch.tensor([1.0, math.inf]), "not finite"),
        (ONES, torch.zeros(2, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]] * 2), "negative eigenvalue"),
        (ONES, torch.zeros(2, 2), torch.tensor([[[1.0, 0.1], [0.0, 1.0]]] * 2), "symmetric"),
    ],
)
def test_bad_parameters_raise(weights, means, covariances, message) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(weights, means, covariances)


def test_a_batch_that_does_not_fit_raises() -> None:
    mixture = GaussianMixture(*parameters("full", 3))
    with pytest.raises(ValueError, match="dimension 3"):
        mixture(torch.zeros(2, 4), torch.tensor(1.0))
    for call in (mixture, mixture.log_density):
        with pytest.raises(ValueError, match="sigma"):
            call(torch.zeros(2, 3), torch.ones(3))


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize("form", FORMS)
def test_placed_points_have_the_covariance_of_their_component(form, sigma) -> None:
    """The map from eps is affine: mean plus a root of S_k + sigma^2 I, read off the unit vectors, without sampling."""
    d = 4
    weights, means, covariances = parameters(form, d)
    mixture = GaussianMixture(weights, means, covariances)
    eye = torch.eye(d, dtype=torch.float64)
    for k in range(3):
        component = torch.full((d,), k)
        center = mixture.place(component, torch.zeros(d, d, dtype=torch.float64), sigma)
        torch.testing.assert_close(center, means[k].expand(d, d), rtol=0, atol=0)
        root = mixture.place(component, eye, sigma) - means[k]
        expected = as_matrices(covariances, d)[k] + sigma**2 * eye
        torch.testing.assert_close(root.mT @ root, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_every_row_is_placed_in_its_own_component(form) -> None:
    mixture = GaussianMixture(*parameters(form, 3))
    component = torch.tensor([2, 0, 1, 0, 2])
    eps = torch.randn((5, 3), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    together = mixture.place(component, eps, 0.3)
    for row in range(5):
        alone = mixture.place(component[row : row + 1], eps[row : row + 1], 0.3)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_placed_normal_numbers(form) -> None:
    mixture, generator = GaussianMixture(*parameters(form, 3)), torch.Generator().manual_seed(5)
    component = torch.multinomial(mixture.log_weights.exp(), 7, replacement=True, generator=generator)
    eps = torch.randn((7, 3), generator=generator, dtype=torch.float64)
    again = torch.Generator().manual_seed(5)
    assert torch.equal(mixture.sample(7, 0.4, again), mixture.place(component, eps, 0.4))


@pytest.mark.parametrize("form", FORMS)
def test_standard_deviations_are_those_of_the_components_averaged_over_directions(form) -> None:
    d = 5
    weights, means, covariances = parameters(form, d)
    trace = as_matrices(covariances, d).diagonal(dim1=1, dim2=2).sum(1)
    found = GaussianMixture(weights, means, covariances).standard_deviations
    torch.testing.assert_close(found, (trace / d).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_moved_mixture_is_another_with_every_tensor_there(form) -> None:
    """The device without memory tells: whatever is left behind cannot be combined with what moved."""
    mixture = GaussianMixture(*parameters(form, 3))
    x, sigma = noised(mixture, 1.0), torch.tensor(1.0, dtype=torch.float64)
    before, same = mixture(x, sigma), mixture.to("cpu")
    assert same is not mixture
    assert torch.equal(same(x, sigma), before)
    moved = mixture.to("meta")
    assert all(t.device.type == "meta" for t in vars(moved).values() if isinstance(t, Tensor))
    assert moved(x.to("meta"), sigma.to("meta")).device.type == "meta"
    assert moved.standard_deviations.device.type == "meta"
    assert moved.dim == 3
    assert torch.equal(mixture(x, sigma), before)  # the first stays where it is
