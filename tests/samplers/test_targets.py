"""Targets: their exponents, how targets make new ones, and what of a target is one batch of a network."""

import math
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from samplers import (
    Conditioned,
    Denoiser,
    GaussianMixture,
    Target,
    annealed,
    denoiser_from,
    geometric_average,
    product,
    reward_tilted,
)
from samplers.targets import Tilt
from tests.samplers.mixtures import Labelled
from tests.samplers.networks import unet
from tests.truth import Counted


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(*means: float) -> GaussianMixture:
    centres = torch.tensor(means, dtype=torch.float64)[:, None]
    return GaussianMixture(torch.ones(len(means)), centres, torch.full((len(means),), 0.5).double())


@pytest.fixture(scope="module")
def network() -> Denoiser:
    return denoiser_from(unet(classes=4), EDMEulerScheduler())


FIRST, SECOND, THIRD = mixture(-2.0, 1.0), mixture(0.0, 3.0), mixture(-1.0)
IMAGES = 2.0 * torch.randn((3, 3, 8, 8), generator=seeded(0), dtype=torch.float64)
SIGMA = torch.tensor(2.0, dtype=torch.float64)


def test_products_powers_and_averages_have_their_exponents() -> None:
    assert product([FIRST, SECOND]).exponents_at(1.0) == [1, 1]
    assert product([FIRST, SECOND, THIRD], [2.0, -0.5, 0.25]).exponents_at(1.0) == [2, -0.5, 0.25]
    assert annealed(FIRST, 3.0).exponents_at(0.0) == [3]
    average = geometric_average(FIRST, SECOND, 2.5)
    assert average.exponents_at(0.0) == [-1.5, 2.5]
    assert average.denoisers == (FIRST, SECOND)
    assert not average.varies


def test_a_target_in_a_product_is_raised_to_its_exponent_as_a_whole() -> None:
    inner = reward_tilted(geometric_average(FIRST, SECOND, 3.0), lambda x: x[:, 0], 0.5)
    outer = product([annealed(product([inner, THIRD], [2.0, 4.0]), 0.5), FIRST], [3.0, 1.0])
    assert outer.denoisers == (FIRST, SECOND, THIRD, FIRST)
    assert outer.exponents_at(0.0) == [-6, 9, 6, 1]
    x = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    torch.testing.assert_close(outer.tilt(x, 0.0), 0.5 * 2 * 0.5 * 3 * x[:, 0])
    assert inner.exponents_at(0.0) == [-2, 3]  # unchanged


def test_the_product_of_targets_is_the_density_that_it_says() -> None:
    """By densities: (q1^2 q2)^.5 q3 = q1 q2^.5 q3."""
    target = product([annealed(product([FIRST, SECOND], [2.0, 1.0]), 0.5), THIRD])
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    ours = sum(b * d.log_density(x) for b, d in zip(target.exponents_at(0.0), target.denoisers, strict=True))
    truth = 0.5 * (2 * FIRST.log_density(x) + SECOND.log_density(x)) + THIRD.log_density(x)
    torch.testing.assert_close(ours, truth)


def test_exponents_and_scales_that_depend_on_sigma() -> None:
    average = geometric_average(FIRST, SECOND, lambda sigma: 1 + sigma)
    assert average.varies
    assert average.exponents_at(0.5) == [-0.5, 1.5]
    assert average.exponents_at(3.0) == [-3, 4]
    nested = product([average, THIRD], [lambda sigma: 2 / (1 + sigma), 1.0])
    assert nested.exponents_at(1.0) == [-1, 2, 1]
    assert nested.exponents_at(3.0) == [-1.5, 2, 1]
    tilted = reward_tilted(THIRD, lambda x: x[:, 0], lambda sigma: 4 / (1 + sigma))
    assert not tilted.varies
    x = torch.tensor([[2.0]], dtype=torch.float64)
    assert float(tilted.tilt(x, 0.0)) == 8
    assert float(tilted.tilt(x, 3.0)) == 2
    assert float(annealed(tilted, lambda sigma: 3.0 + sigma).tilt(x, 1.0)) == 4 * 4
    late = geometric_average(FIRST, SECOND, lambda sigma: 2.0 if sigma < 1 else 1.0)
    assert (late.exponents_at(2.0), late.exponents_at(0.9)) == ([0, 1], [-1, 2])


@pytest.mark.parametrize(
    ("exponents", "shown"), [([1.0, -1.0], r"\[1.0, -1.0\]"), ([0.5, -2.0], "-2.0"), ([math.nan, 1.0], "nan")]
)
def test_exponents_without_a_positive_sum_are_refused(exponents: list[float], shown: str) -> None:
    with pytest.raises(ValueError, match=rf"exponents: .*{shown}.* positive sum"):
        product([FIRST, SECOND], exponents)
    for beta in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="exponents"):
            annealed(FIRST, beta)
    turning = annealed(FIRST, lambda sigma: 1 - sigma)
    assert turning.exponents_at(0.5) == [0.5]
    with pytest.raises(ValueError, match=r"exponents: \[-1.0\] at sigma 2"):
        turning.exponents_at(2.0)


def test_another_number_of_exponents_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exponents: are 3; .* each of 2 denoisers"):
        product([FIRST, SECOND], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"exponents: are 0; .* each of 0 denoisers"):
        product([])


def conditions(network: Denoiser) -> tuple[Conditioned, Conditioned]:
    return Conditioned(network, 3), Conditioned(network, torch.tensor([0, 1, 2]))  # a class, and one of each row


def test_conditions_of_one_network_are_one_batch_and_equal_separate_evaluation(network: Denoiser) -> None:
    counted = Counted(network)
    for one, own in (conditions(counted), conditions(counted)[::-1]):
        counted.batches.clear()
        together = geometric_average(one, own, 2.0).predict([IMAGES, IMAGES], SIGMA)
        assert counted.batches == [6]
        assert float((together[0] - together[1]).abs().max()) > 1e-3  # the conditions are seen
        for answer, term in zip(together, (one, own), strict=True):
            torch.testing.assert_close(answer, term(IMAGES, SIGMA), rtol=1e-10, atol=1e-10)
    direct = network(IMAGES, SIGMA, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(conditions(network)[1](IMAGES, SIGMA), direct, rtol=1e-10, atol=1e-10)


def test_a_bare_network_with_the_runs_condition_joins_its_conditioned_terms(network: Denoiser) -> None:
    counted, labels = Counted(network), torch.tensor([2, 0, 1])
    target = geometric_average(Conditioned(counted, 3), counted, 2.0)
    uncond, cond = target.predict([IMAGES, IMAGES], SIGMA, labels)
    assert counted.batches == [6]
    torch.testing.assert_close(cond, network(IMAGES, SIGMA, labels), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(uncond, network(IMAGES, SIGMA, torch.tensor([3] * 3)), rtol=1e-10, atol=1e-10)


def test_conditions_that_are_dicts_are_joined(network: Denoiser) -> None:
    counted = Counted(network)
    terms = [Conditioned(counted, {"class_labels": torch.tensor([k])}) for k in (1, 2)]
    both = product(terms).predict([IMAGES, IMAGES], SIGMA)
    assert counted.batches == [6]
    for k, answer in zip((1, 2), both, strict=True):
        torch.testing.assert_close(answer, network(IMAGES, SIGMA, torch.tensor([k] * 3)), rtol=1e-10, atol=1e-10)


def test_the_same_question_is_asked_once(network: Denoiser) -> None:
    counted = Counted(network)
    one, other = conditions(counted)
    target = product([one, other, annealed(one, 0.5)])
    answers = target.predict([IMAGES] * 3, SIGMA)
    assert counted.batches == [6]
    assert torch.equal(answers[0], answers[2])
    counted.batches.clear()
    apart = IMAGES + 1.0  # of its own x, for derivatives, it is another question
    answers = target.predict([IMAGES, IMAGES, apart], SIGMA)
    assert counted.batches == [9]
    torch.testing.assert_close(answers[2], one(apart, SIGMA), rtol=1e-10, atol=1e-10)


def test_denoisers_without_conditions_are_asked_by_themselves() -> None:
    first, second = Counted(FIRST), Counted(SECOND)
    x = torch.randn((5, 1), generator=seeded(1), dtype=torch.float64)
    answers = product([first, second]).predict([x, x], SIGMA)
    assert first.batches == second.batches == [5]
    assert torch.equal(answers[0], FIRST(x, SIGMA))
    assert torch.equal(answers[1], SECOND(x, SIGMA))


def test_a_condition_of_the_wrong_number_of_rows_is_refused(network: Denoiser) -> None:
    terms = [Conditioned(network, torch.tensor([0, 1])), Conditioned(network, 1)]
    with pytest.raises(ValueError, match="cond"):
        product(terms).predict([IMAGES, IMAGES], SIGMA)


def test_conditioned_publishes_the_range_and_the_density_of_its_denoiser(network: Denoiser) -> None:
    labelled = Labelled(d=4, components=2, classes=3)
    x = labelled.all.sample(6, 0.7, seeded(2))
    with_density = DensityOf(labelled)
    term = Conditioned(with_density, 1)
    torch.testing.assert_close(term.log_density(x, 0.7), labelled.classes[1].log_density(x, 0.7))
    torch.testing.assert_close(term(x, torch.tensor(0.7)), labelled.classes[1](x, torch.tensor(0.7).double()))
    assert not hasattr(term, "sigma_min")
    published = Conditioned(network, 1)
    assert (published.sigma_min, published.sigma_max) == (network.sigma_min, network.sigma_max)  # type: ignore[attr-defined]
    assert not hasattr(published, "log_density")


class DensityOf:
    """The mixtures of the classes, with the density of each row's class."""

    def __init__(self, labelled: Labelled) -> None:
        self.labelled = labelled

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        return self.labelled(x, sigma, cond)

    def log_density(self, x: Tensor, sigma: float, cond: Tensor) -> Tensor:
        every = torch.stack([part.log_density(x, sigma) for part in self.labelled.classes], 1)
        return every.gather(1, cond.expand(len(x))[:, None])[:, 0]


def test_tilts_add_up_and_those_that_steer_can_be_told_apart() -> None:
    target = reward_tilted(FIRST, lambda x: x[:, 0], 2.0)
    target = reward_tilted(target, lambda x: -(x[:, 0] ** 2).float(), lambda sigma: 1 + sigma, gradient=True)
    x = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    black, steered = 2 * x[:, 0], -3 * x[:, 0] ** 2
    torch.testing.assert_close(target.tilt(x, 2.0), black + steered)
    torch.testing.assert_close(target.tilt(x, 2.0, gradient=True), steered)
    torch.testing.assert_close(target.tilt(x, 2.0, gradient=False), black)
    assert target.tilt(x, 2.0).dtype == torch.float64
    assert torch.equal(Target((FIRST,), (1.0,)).tilt(x, 1.0), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x: x, r"reward: gave shape \[3, 1\]; needed is a tensor \[3\]"),
        (lambda x: x.sum(), r"reward: gave shape \[\]"),
        (lambda x: 1.0, "reward: gave float"),
        (lambda x: (x[:, 0] - 1).log(), r"reward: is not finite for 2 of 3 samples at sigma 1.5"),
    ],
)
def test_rewards_of_another_shape_and_rewards_that_are_no_numbers_are_refused(reward, message: str) -> None:
    x = torch.tensor([[3.0], [0.0], [1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        Tilt(reward, 1.0)(x, 1.5)


@pytest.mark.parametrize("beta", ["2", None, torch.tensor([2.0])])
def test_exponents_are_numbers_or_functions(beta: Any) -> None:
    with pytest.raises(ValueError, match="exponents: "):
        annealed(FIRST, beta)
