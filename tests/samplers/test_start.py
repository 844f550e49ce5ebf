"""Where particles begin: the product of Gaussians against dense matrices, and what a late start is worth."""

import math

import pytest
import torch
from torch import Tensor

from samplers import (
    Conditioned,
    Corrector,
    Gaussian,
    GaussianMixture,
    Resampling,
    SampleNoise,
    annealed,
    feynman_kac,
    geometric_average,
    karras_sigmas,
    product,
    start_particles,
)
from samplers.start import gaussian_product
from tests.samplers.mixtures import Labelled

D = 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(rank: int, rest: float, seed: int, classes: int | None = None) -> Gaussian:
    generator = seeded(seed)
    basis = torch.linalg.qr(torch.randn((D, D), generator=generator, dtype=torch.float64)).Q[:rank]
    variances = 4 * torch.rand(rank, generator=generator, dtype=torch.float64).sort(descending=True).values
    shape = (D,) if classes is None else (classes, D)
    return Gaussian(
        torch.randn(shape, generator=generator, dtype=torch.float64), basis, variances, rest, n_classes=classes
    )


def covariance(model: Gaussian, sigma: float) -> Tensor:
    own = model.components.mT @ (model.variances[:, None] * model.components)
    across = torch.eye(D, dtype=torch.float64) - model.components.mT @ model.components
    return own + model.rest * across + sigma**2 * torch.eye(D, dtype=torch.float64)


def dense(models: list[Gaussian], exponents: list[float], means: list[Tensor], sigma: float) -> tuple[Tensor, Tensor]:
    """The mean and the covariance of the product."""
    precisions = [b * torch.linalg.inv(covariance(g, sigma)) for g, b in zip(models, exponents, strict=True)]
    joint = torch.linalg.inv(sum(precisions, torch.zeros(D, D)))
    return joint @ sum(p @ m for p, m in zip(precisions, means, strict=True)), joint


RANKS = [((2, 0.1), (3, 0.2)), ((2, 0.0), (2, 0.0)), ((D, 0.0), (1, 0.5)), ((0, 1.0), (0, 0.3)), ((4, 0.1), (5, 0.2))]


@pytest.mark.parametrize("sigma", [0.4, 3.0, 40.0])
@pytest.mark.parametrize("exponents", [[1.0, 1.0], [-0.1, 1.1], [2.0, 0.3], [0.0, 1.0]])
@pytest.mark.parametrize("ranks", RANKS)
def test_products_of_gaussians_are_those_of_dense_matrices(ranks, exponents: list[float], sigma: float) -> None:
    models = [gaussian(*parts, seed) for seed, parts in enumerate(ranks)]
    means = [g.mean for g in models]
    expected = dense(models, exponents, means, sigma)
    if bool((torch.linalg.eigvalsh(expected[1]) < 0).any()):
        with pytest.raises(ValueError, match="no density"):
            gaussian_product(models, exponents, sigma, [m[None] for m in means])
        return
    mean, joint = gaussian_product(models, exponents, sigma, [m[None] for m in means])
    torch.testing.assert_close(mean[0], expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(covariance(joint, 0.0), expected[1], rtol=1e-9, atol=1e-9)


def test_a_power_of_one_gaussian_has_its_mean_and_its_covariance_over_beta() -> None:
    model = gaussian(3, 0.2, 1)
    mean, joint = gaussian_product([model], [2.5], 0.7, [model.mean[None]])
    torch.testing.assert_close(mean[0], model.mean)
    torch.testing.assert_close(covariance(joint, 0.0), covariance(model, 0.7) / 2.5)


def test_three_factors_and_a_mean_for_each_sample() -> None:
    models, exponents = [gaussian(r, 0.3, 5 + r) for r in (1, 2, 3)], [1.0, -0.2, 0.7]
    means = [torch.randn((4, D), generator=seeded(r), dtype=torch.float64) for r in (1, 2)] + [models[2].mean[None]]
    mean, joint = gaussian_product(models, exponents, 1.5, means)
    for row in range(4):
        own = [m[min(row, len(m) - 1)] for m in means]
        expected = dense(models, exponents, own, 1.5)
        torch.testing.assert_close(mean[row], expected[0])
        torch.testing.assert_close(covariance(joint, 0.0), expected[1])


def test_a_product_that_is_no_density_is_refused_with_its_precision() -> None:
    narrow, wide = gaussian(0, 0.1, 1), gaussian(0, 4.0, 2)
    with pytest.raises(ValueError, match=r"exponents: \[-0.5, 1.5\] .* sigma 0.5 .* precision -1.08"):
        start_particles(product([narrow, wide], [-0.5, 1.5]), (D,), 0.5, 8, gaussians=[narrow, wide])
    start_particles(product([narrow, wide], [-0.5, 1.5]), (D,), 4.0, 8, gaussians=[narrow, wide])


@pytest.mark.parametrize("generator", ["torch", "streams"])
def test_particles_have_the_products_moments(generator: str) -> None:
    models, exponents, n = [gaussian(2, 0.1, 1), gaussian(3, 0.2, 2)], [0.6, 0.9], 8000
    source = seeded(3) if generator == "torch" else SampleNoise(3, range(2 * n))
    x, log_weights = start_particles(
        product(models, exponents), (D,), 1.5, n, groups=2, gaussians=models, generator=source, dtype=torch.float64
    )
    assert log_weights.shape == (2, n)
    mean, joint = dense(models, exponents, [g.mean for g in models], 1.5)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(joint), (x - mean).mT, upper=False).mT
    assert float(white.mean(0).abs().max()) < 4.5 / math.sqrt(2 * n)
    assert float((white.mT @ white / (2 * n) - torch.eye(D)).abs().max()) < 4.5 * math.sqrt(2 / (2 * n))


def test_weights_of_gaussians_are_the_constant_log_normaliser() -> None:
    """log of the integral of N(a, A) N(b, B) is log N(a - b; 0, A + B), of N^beta a closed form."""
    a, b, sigma = gaussian(2, 0.1, 1), gaussian(3, 0.2, 2), 1.5
    _, log_weights = start_particles(
        product([a, b]), (D,), sigma, 16, gaussians=[a, b], generator=seeded(0), dtype=torch.float64
    )
    both = torch.distributions.MultivariateNormal(torch.zeros(D).double(), covariance(a, sigma) + covariance(b, sigma))
    torch.testing.assert_close(log_weights, both.log_prob(a.mean - b.mean).expand(1, 16), rtol=1e-9, atol=1e-9)
    _, log_weights = start_particles(
        annealed(a, 2.5), (D,), sigma, 16, gaussians=a, generator=seeded(0), dtype=torch.float64
    )
    truth = -0.75 * float(torch.logdet(2 * math.pi * covariance(a, sigma))) - 0.5 * D * math.log(2.5)
    torch.testing.assert_close(log_weights, torch.full((1, 16), truth, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def mixture(means: list[float], deviations: list[float], weights: tuple[float, ...] = (1.0, 1.0)) -> GaussianMixture:
    m, s, w = (torch.tensor(v, dtype=torch.float64) for v in (means, deviations, weights))
    return GaussianMixture(w, m[:, None], s**2)


GRID = torch.linspace(-40, 40, 8001, dtype=torch.float64)[:, None]


def of_moments(model: GaussianMixture) -> Gaussian:
    """The Gaussian of a mixture's moments, by quadrature."""
    p = model.log_density(GRID).softmax(0)
    mean = p @ GRID[:, 0]
    variance = p @ (GRID[:, 0] - mean) ** 2
    return Gaussian(mean[None], torch.eye(1, dtype=torch.float64), variance[None], 0.0)


FIRST, SECOND = mixture([-2.0, 1.5], [0.6, 0.8]), mixture([0.5, 3.0], [0.7, 0.6])


def test_weights_of_mixtures_have_the_log_evidence_at_the_level() -> None:
    """By quadrature; with Gaussians and without (then from far above the data)."""
    target = geometric_average(FIRST, SECOND, 2.0)
    for sigma, models in ((3.0, [of_moments(FIRST), of_moments(SECOND)]), (8.0, None)):
        _, log_weights = start_particles(
            target, (1,), sigma, 20_000, gaussians=models, generator=seeded(1), dtype=torch.float64
        )
        log_p = -FIRST.log_density(GRID, sigma) + 2 * SECOND.log_density(GRID, sigma)
        truth = float(log_p.logsumexp(0)) + math.log(0.01)
        ratio = (log_weights[0] - truth).exp()
        error = float(ratio.std()) / math.sqrt(20_000)
        assert abs(float(ratio.mean()) - 1) < 4 * error
        assert error < 0.02


def test_without_gaussians_it_is_the_noise_of_the_whole_power() -> None:
    x, _ = start_particles(product([FIRST, SECOND], [1.5, 2.5]), (1,), 40.0, 20_000, generator=seeded(2))
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 4.5 * 20 / math.sqrt(20_000)
    assert float(x.var()) == pytest.approx(400, rel=4.5 * math.sqrt(2 / 20_000))


class WithoutDensity:
    """What a network knows of a mixture."""

    def __init__(self, model: GaussianMixture | Gaussian) -> None:
        self.model = model

    def __call__(self, x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
        return self.model(x, sigma)


def test_a_late_start_from_the_gaussian_product_is_nearer_to_the_target_than_a_plain_start() -> None:
    """Guidance 2.5 from sigma = 4, of denoisers without densities; the distance is W1 in quantiles."""
    uncond, cond = mixture([0.0, 6.0], [0.8, 0.8]), mixture([0.3, 5.8], [0.7, 0.6], (0.55, 0.45))
    target = geometric_average(WithoutDensity(uncond), WithoutDensity(cond), 2.5)
    models = [of_moments(uncond), of_moments(cond)]
    p = (-1.5 * uncond.log_density(GRID, 0.05) + 2.5 * cond.log_density(GRID, 0.05)).softmax(0)
    sigmas = karras_sigmas(80, 0.05, 4.0)[:-1]
    levels = (torch.arange(400) + 0.5).double() / 400
    truth = GRID[torch.searchsorted(p.cumsum(0), levels), 0]
    corrector = Corrector(form="score", zeta=1.0, proposal="ancestral", rule="trapezoid", resampling=Resampling())
    distances = []
    for gaussians in (None, models):
        x, log_weights = start_particles(
            target, (1,), 4.0, 4000, gaussians=gaussians, generator=seeded(4), dtype=torch.float64
        )
        assert float(log_weights.std()) < 1e-9  # nothing is known of what differs from the Gaussians
        *_, state = feynman_kac(target, x, sigmas, generator=seeded(5), log_weights=log_weights, corrector=corrector)
        found, places = state.x[:, 0].sort()
        cumulative = state.particles.weights.probabilities[0, places].cumsum(0)
        distances.append(float((found[torch.searchsorted(cumulative, levels).clamp_max(3999)] - truth).abs().mean()))
    assert distances[1] < 0.5 * distances[0], distances


def test_conditioned_terms_begin_at_their_classes_means() -> None:
    model, labelled = gaussian(2, 0.3, 1, classes=3), torch.tensor([0, 2, 1, 1])
    target = geometric_average(Conditioned(model, 2), Conditioned(model, 0), 3.0)
    x, log_weights = start_particles(
        target, (D,), 1.5, 40_000, gaussians=model, generator=seeded(6), dtype=torch.float64
    )
    expected, joint = dense([model, model], [-2.0, 3.0], [model.mean[2], model.mean[0]], 1.5)
    assert bool(((x.mean(0) - expected).abs() < 4.5 * joint.diagonal().sqrt() / 200).all())
    assert float(log_weights.std()) < 1e-9
    hidden = WithoutDensity(model)  # then the Gaussian's density is that of the term's own class
    apart = geometric_average(Conditioned(hidden, 2), Conditioned(hidden, 0), 3.0)
    own = start_particles(apart, (D,), 1.5, 40_000, gaussians=model, generator=seeded(6), dtype=torch.float64)
    assert torch.equal(own[0], x)
    torch.testing.assert_close(own[1], log_weights)
    for rows in (labelled, {"class_labels": labelled}):  # of each particle, given to the run
        x, log_weights = start_particles(
            annealed(model, 1e8), (D,), 1.5, 4, gaussians=model, cond=rows, generator=seeded(7), dtype=torch.float64
        )
        torch.testing.assert_close(x, model.mean[labelled], rtol=0, atol=0.01)
        assert float(log_weights.std()) < 1e-6


def test_the_density_of_a_conditioned_mixture_weighs_its_own_class() -> None:
    labelled = Labelled(d=2, components=2, classes=2)

    class Density:
        def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
            return labelled(x, sigma, cond)

        def log_density(self, x: Tensor, sigma: float, cond: Tensor) -> Tensor:
            both = torch.stack([part.log_density(x, sigma) for part in labelled.classes], 1)
            return both.gather(1, cond.expand(len(x))[:, None])[:, 0]

    network = Density()
    target = geometric_average(Conditioned(network, 0), Conditioned(network, 1), 2.0)
    plain = geometric_average(labelled.classes[0], labelled.classes[1], 2.0)
    starts = [start_particles(t, (2,), 3.0, 50, generator=seeded(8), dtype=torch.float64) for t in (target, plain)]
    assert torch.equal(starts[0][0], starts[1][0])
    torch.testing.assert_close(starts[0][1], starts[1][1])


def test_particles_of_streams_are_those_of_their_group_alone_and_shapes_are_images() -> None:
    model = Gaussian(torch.randn((2, 3), generator=seeded(9)), torch.eye(6)[:2], torch.tensor([2.0, 1.0]), 0.1)
    target = annealed(model, 2.0)
    together = start_particles(target, (2, 3), 3.0, 4, groups=3, gaussians=model, generator=SampleNoise(1, range(12)))
    assert together[0].shape == (12, 2, 3)
    assert together[0].dtype == torch.float32
    assert together[1].shape == (3, 4)
    assert together[1].dtype == torch.float64
    alone = start_particles(target, (2, 3), 3.0, 4, gaussians=model, generator=SampleNoise(1, range(4, 8)))
    torch.testing.assert_close(together[0][4:8], alone[0])
    torch.testing.assert_close(together[1][1:2], alone[1])
    again = [start_particles(target, (2, 3), 3.0, 4, gaussians=model, generator=seeded(1)) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0])


def test_what_does_not_fit_is_refused() -> None:
    target, models = product([FIRST, SECOND]), [of_moments(FIRST)]
    with pytest.raises(ValueError, match=r"gaussians: are 1; .* each of 2 denoisers"):
        start_particles(target, (1,), 4.0, 8, gaussians=models)
    with pytest.raises(ValueError, match=r"gaussians: are of \[1\] a sample; the particles are \[2\]"):
        start_particles(annealed(FIRST, 2.0), (2,), 4.0, 8, gaussians=models)
    for particles, groups, sigma in ((0, 1, 4.0), (8, 0, 4.0), (8, 1, 0.0), (8, 1, math.inf), (8, 1, math.nan)):
        with pytest.raises(ValueError, match="particles, groups, sigma: "):
            start_particles(target, (1,), sigma, particles, groups=groups)
    with pytest.raises(ValueError, match=r"exponents: \[-1.0\] at sigma 4"):
        start_particles(annealed(FIRST, lambda sigma: 3 - sigma), (1,), 4.0, 8)
    model = gaussian(2, 0.3, 1, classes=3)
    with pytest.raises(ValueError, match="class labels"):
        start_particles(annealed(model, 2.0), (D,), 4.0, 8, gaussians=model)
