from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from samplers import GaussianMixture, Guided, denoiser_from, euler, karras_sigmas, sample, score
from samplers.denoiser import expand, join_conditions, repeat_conditions
from tests.samplers.networks import conditional_unet, unet
from tests.truth import Counted, relative_error


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def labelled() -> Counted:
    return Counted(denoiser_from(unet(classes=11), DDIMScheduler()))


def test_expand_makes_one_level_per_sample_broadcast() -> None:
    x = torch.zeros((3, 2, 4, 4))
    assert expand(torch.tensor(2.0), x).ndim == 0
    assert expand(torch.ones(3).double(), x).shape == (3, 1, 1, 1)
    assert expand(torch.ones(3).double(), x).dtype == torch.float32
    for bad in (torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="sigma"):
            expand(bad, x)


@pytest.mark.parametrize("sigma", [torch.tensor(3.0), torch.tensor([0.5, 3.0, 40.0])])
def test_the_score_is_the_gradient_of_the_log_density(sigma) -> None:
    mixture = GaussianMixture(torch.ones(2), noise(2, 4), torch.tensor([0.5, 2.0]))
    x = (2 * noise(3, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    torch.testing.assert_close(score(mixture, x.detach(), sigma), gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sigma", [torch.tensor(5.0), torch.tensor([5.0]), torch.tensor([0.5, 5.0, 40.0])])
@pytest.mark.parametrize("null", [10, torch.tensor(10), torch.tensor([10]), torch.tensor([10, 10, 10])], ids=repr)
def test_guidance_is_one_call_and_equals_the_formula_of_two(null, sigma) -> None:
    denoiser, x, labels = labelled(), 5 * noise(3, 3, 8, 8), torch.tensor([1, 4, 7])
    guided = Guided(denoiser, 2.5, null)
    ours, pair = guided(x, sigma, labels), guided.pair(x, sigma, labels)
    assert denoiser.batches == [6, 6]

    conditional, unconditional = denoiser(x, sigma, labels), denoiser(x, sigma, torch.tensor([10, 10, 10]))
    torch.testing.assert_close(pair, (conditional, unconditional), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, unconditional + 2.5 * (conditional - unconditional), rtol=1e-10, atol=1e-10)
    assert relative_error(conditional, unconditional) > 1e-3  # the label matters at all


def test_scale_one_runs_the_conditional_batch_only_and_scale_zero_is_unconditional() -> None:
    denoiser, x, sigma, labels = labelled(), 5 * noise(3, 3, 8, 8), torch.tensor(5.0), torch.tensor([1, 4, 7])
    alone = Guided(denoiser, 1, 10)(x, sigma, labels)
    assert denoiser.batches == [3]
    assert torch.equal(alone, denoiser(x, sigma, labels))
    unconditional = denoiser(x, sigma, torch.tensor([10, 10, 10]))
    torch.testing.assert_close(Guided(denoiser, 0, 10)(x, sigma, labels), unconditional, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_by_a_prompt_in_a_dict(rows) -> None:
    denoiser = Counted(denoiser_from(conditional_unet(), DDIMScheduler()))
    x, sigma, prompt, negative = 5 * noise(3, 4, 8, 8), torch.tensor(5.0), noise(3, 6, 16), -noise(rows, 6, 16)
    cond, uncond = {"encoder_hidden_states": prompt}, {"encoder_hidden_states": negative}
    ours = Guided(denoiser, 7.5, uncond)(x, sigma, cond)
    assert denoiser.batches == [6]
    conditional = denoiser(x, sigma, cond)
    unconditional = denoiser(x, sigma, {"encoder_hidden_states": negative.expand(3, 6, 16)})
    torch.testing.assert_close(ours, unconditional + 7.5 * (conditional - unconditional), rtol=1e-10, atol=1e-10)
    assert relative_error(conditional, unconditional) > 1e-6


def test_guided_sampling_runs_two_rows_a_sample_and_publishes_the_range() -> None:
    denoiser = denoiser_from(unet(classes=11), DDIMScheduler())
    counted = Counted(denoiser)
    guided = Guided(denoiser, 2.0, 10)
    assert (guided.sigma_min, guided.sigma_max) == (denoiser.sigma_min, denoiser.sigma_max)
    with pytest.raises(ValueError, match="range"):
        sample(euler, guided, noise(2, 3, 8, 8), karras_sigmas(3, sigma_max=1e4), torch.tensor([0, 1]))
    sample(euler, Guided(counted, 2.0, 10), 80 * noise(2, 3, 8, 8), karras_sigmas(3, 0.02), torch.tensor([0, 1]))
    assert counted.batches == [4, 4, 4]
    assert not hasattr(Guided(counted, 2.0, 10), "sigma_min")


def test_guidance_of_gaussians_is_exact() -> None:
    """Two Gaussians of one variance: guidance moves the mean to m_u + scale (m_c - m_u) at every level."""
    means = torch.tensor([[1.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)

    def denoiser(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        variance = 0.5 / (0.5 + expand(sigma, x) ** 2)
        return means[cond] + variance * (x - means[cond])

    x, sigma = noise(4, 2), torch.tensor([0.1, 1.0, 3.0, 9.0], dtype=torch.float64)
    ours = Guided(denoiser, 3.0, 1)(x, sigma, torch.tensor([0, 0, 0, 0]))
    mean = means[1] + 3 * (means[0] - means[1])
    expected = mean + 0.5 / (0.5 + sigma[:, None] ** 2) * (x - mean)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_conditions_of_every_form_are_joined_first_then_second() -> None:
    first = {"a": torch.ones(2, 3), "b": [torch.zeros(1, 2), 5], "c": ("x", None, True)}
    second = {"a": torch.full((1, 3), 2), "b": [7, 5], "c": ("x", None, True)}
    with pytest.raises(ValueError, match="equal shape"):
        join_conditions([first, second], 2)
    second["b"] = [torch.ones(2, 2), 5]
    joined = join_conditions([first, second], 2)
    assert torch.equal(joined["a"], torch.tensor([[1.0] * 3, [1.0] * 3, [2.0] * 3, [2.0] * 3]))
    assert torch.equal(joined["b"][0], torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]]))
    assert joined["b"][1] == 5
    assert joined["c"] == ("x", None, True)
    assert join_conditions([None, None], 2) is None
    assert join_conditions([torch.tensor([3, 4]), 9], 2).dtype == torch.int64


@pytest.mark.parametrize(
    ("cond", "uncond"),
    [
        (torch.ones(3), None),
        (None, 5),
        (4, 5),
        ({"a": torch.ones(3)}, {"b": torch.ones(3)}),
        ({"a": torch.ones(3)}, torch.ones(3)),
        (torch.ones(2), 5),
        (torch.ones(3), torch.ones(2)),
        (torch.ones(3, 4, 16), torch.ones(3, 5, 16)),
        (torch.ones(3, 4), 0),
    ],
)
def test_conditions_that_do_not_fit_raise(cond, uncond) -> None:
    with pytest.raises(ValueError, match="cond"):
        join_conditions([cond, uncond], 3)


def test_conditions_of_every_form_are_repeated_as_whole_batches() -> None:
    rows, shared = torch.arange(6).reshape(2, 3), torch.ones(1, 3)
    cond = {"a": rows, "b": [torch.tensor([4, 9]), 5], "c": ("x", None, rows), "d": torch.tensor(7.0), "e": shared}
    repeated = repeat_conditions(cond, 3, 2)
    assert list(repeated) == list(cond)
    assert torch.equal(repeated["a"], torch.cat([rows, rows, rows]))
    assert repeated["b"][0].tolist() == [4, 9, 4, 9, 4, 9]
    assert repeated["b"][1] == 5
    assert isinstance(repeated["c"], tuple)
    assert repeated["c"][:2] == ("x", None)
    assert torch.equal(repeated["c"][2], repeated["a"])
    assert repeated["d"] is cond["d"]
    assert repeated["e"] is shared
    assert repeat_conditions(None, 3, 2) is None
    assert repeat_conditions(torch.tensor([5]), 2, 1).tolist() == [5, 5]
    assert torch.equal(repeat_conditions(rows, 1, 2), rows)
    assert torch.equal(repeat_conditions(rows, 2, 2), join_conditions([rows, rows], 2))
    assert torch.equal(cond["a"], rows)  # what was given is left alone


@pytest.mark.parametrize("form", ["labels", "prompt"])
def test_a_repeated_batch_is_denoised_as_the_batches_are(form) -> None:
    network = unet(classes=11) if form == "labels" else conditional_unet()
    denoiser = denoiser_from(network, DDIMScheduler())
    x = 5 * noise(6, 3 if form == "labels" else 4, 8, 8)
    sigma = torch.tensor([0.5, 5.0, 40.0])
    cond = torch.tensor([1, 4, 7]) if form == "labels" else {"encoder_hidden_states": noise(3, 6, 16)}
    together = denoiser(x, sigma.repeat(2), repeat_conditions(cond, 2, 3))
    apart = torch.cat([denoiser(part, sigma, cond) for part in x.chunk(2)])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)
