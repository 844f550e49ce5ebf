"""Students of one step and of several, trained on what their own earlier steps made."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import Fixed, OneStep, Trainer
from distill.average import Average
from distill.noise import Share
from distill.optim import Update
from distill.student import Student
from samplers import GaussianMixture, SampleNoise
from samplers.denoiser import expand

SIGMAS, NOISES = (4.0, 1.5, 0.4), (1.4, 0.3)
MIXTURE = GaussianMixture(torch.ones(2), torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), torch.tensor([0.3, 0.2]))


class Gains(nn.Module):
    """x gain(sigma): a weight of its own at each level, so that a gradient tells which steps it came through."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        level = int(torch.tensor([abs(float(sigma) - s) for s in SIGMAS]).argmin())
        return self.gains[level] * x


def test_several_steps_are_written_out() -> None:
    """Against the recursion by hand, with the samples' own streams."""
    student = Student(MIXTURE, SIGMAS, 4.2, NOISES)
    noise, mine = SampleNoise(3, range(5)), SampleNoise(3, range(5))
    z = noise.normal((2,))
    found = student(z, None, noise)

    x = 4.2 * mine.normal((2,))
    for sigma, deviation in zip(SIGMAS, (*NOISES, 0.0), strict=True):
        x = MIXTURE(x, torch.tensor(sigma))
        if deviation:
            x = x + deviation * mine.normal((2,))
    assert torch.equal(found, x)
    assert len(student) == 3


def test_one_step_draws_nothing_and_several_ask_for_streams() -> None:
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OneStep(MIXTURE, 2.5)(z), Student(MIXTURE, [2.5], 2.5)(z))
    with pytest.raises(ValueError, match="noise: None; a student of 3 steps draws from the samples' streams"):
        Student(MIXTURE, SIGMAS, 4.0, NOISES)(z)
    with pytest.raises(ValueError, match="noises: 1 for 3 levels"):
        Student(MIXTURE, SIGMAS, 4.0, (1.0,))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_gradient_is_that_of_the_last_step_simulated(count: int) -> None:
    """Earlier steps have no graph (DMD2's backward simulation); their numbers are those of sampling."""
    network = Gains()
    student = Student(network, SIGMAS, 4.0, NOISES)
    noise = SampleNoise(0, range(4))
    z = noise.normal((2,))
    streams = copy.deepcopy(noise)
    student.rollout(z, None, noise, count).sum().backward()
    assert (network.gains.grad != 0).tolist() == [k + 1 == count for k in range(3)]

    x = 4.0 * z
    for k in range(count):
        x = network.gains[k].detach() * x
        if k + 1 < count:
            x = x + NOISES[k] * streams.normal((2,))
    slope = (x / network.gains[count - 1]).detach().sum()
    assert float(network.gains.grad[count - 1]) == pytest.approx(float(slope), rel=1e-5)


def test_every_step_is_trained_as_often_and_alike_on_all_processes() -> None:
    """In turns through all, in a random order, each for so many updates: a function of (seed, update)."""
    student = Student(MIXTURE, SIGMAS, 4.0, NOISES)
    for hold in (1, 4):
        drawn = torch.tensor([student.trained_step(7, n, hold) for n in range(600 * hold)]).unflatten(0, (200, 3, hold))
        assert bool((drawn == drawn[..., :1]).all())
        orders = drawn[..., 0]
        assert orders.sort(1).values.unique(dim=0).tolist() == [[1, 2, 3]]
        # each of the six orders as often as the others, to 4 standard errors of 200 draws
        found = orders.unique(dim=0, return_counts=True)[1]
        assert len(found) == 6
        assert bool(((found - 200 / 6).abs() < 4 * (200 * 5 / 36) ** 0.5).all())
    assert [student.trained_step(8, n, 1) for n in range(60)] != [student.trained_step(7, n, 1) for n in range(60)]
    assert OneStep(MIXTURE, 2.5).trained_step(7, 9, 25) == 1


def test_a_step_is_trained_as_long_as_the_trainer_holds_it() -> None:
    """As seen by the network: a student's update calls it as often as the step's number, and once more for the fake."""
    calls: list[int] = []

    class Counting(Affine):
        def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            calls[-1] += 1
            return super().forward(x, sigma, cond)

    student, fake = Counting(0.5), Affine(0.5)
    updates = [
        Update(torch.optim.SGD(n.parameters(), lr=0.05), lambda step: 0.05, modules=[n]) for n in (student, fake)
    ]
    trainer = Trainer(
        Student(student, SIGMAS, 4.0, NOISES), fake, Fixed(MIXTURE), *updates, student_level=lambda u: 0.1 + u,
        fake_level=lambda u: 0.2 + u, share=Share(3, 4), shape=(2,), hold=5,
    )  # fmt: skip
    for n in range(30):
        calls.append(0)
        trainer.step(n)
    assert calls == [trainer.student.trained_step(3, n, 5) for n in range(30)]
    assert sorted(calls) == [1] * 10 + [2] * 10 + [3] * 10
    assert all(len(set(calls[n : n + 5])) == 1 for n in range(0, 30, 5))


class Affine(nn.Module):
    """A denoiser of Gaussians with weights that learn."""

    sigma_min, sigma_max = 0.01, 20.0

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.full((2,), mean)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        s, v = expand(sigma, x) ** 2, self.spread**2
        return (v * x + s * self.mean) / (v + s)


def trained(parts: int, steps: tuple[float, ...] = (4.0,)) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The weights after three updates of Diff-Instruct, and the last metrics."""
    networks = [Affine(0.5), Affine(0.5)]
    updates = [Update(torch.optim.SGD(n.parameters(), lr=0.05), lambda step: 0.05, modules=[n]) for n in networks]
    average = copy.deepcopy(networks[0])
    trainer = Trainer(
        Student(networks[0], steps, steps[0], steps[1:]), networks[1], Fixed(MIXTURE), *updates,
        student_level=lambda u: 0.1 + u, fake_level=lambda u: 0.2 + u, share=Share(0, 12), shape=(2,), fake_steps=2,
        average=Average(average, networks[0], 0.5), parts=parts, hold=1,
    )  # fmt: skip
    metrics: dict[str, Tensor] = {}
    for n in range(3):
        metrics = trainer.step(n)
    return [p.detach() for network in (*networks, average) for p in network.parameters()], metrics


@pytest.mark.parametrize("steps", [(4.0,), (4.0, 1.0)])
def test_a_batch_in_parts_is_the_batch(steps: tuple[float, ...]) -> None:
    """Gradients add up: the weights after three updates are the same to rounding, and so are the metrics."""
    whole, metrics = trained(1, steps)
    for parts in (2, 4):
        apart, found = trained(parts, steps)
        for a, b in zip(whole, apart, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert found.keys() == metrics.keys()
        for name in metrics:
            assert float(found[name]) == pytest.approx(float(metrics[name]), rel=1e-4)


def test_parts_are_whole() -> None:
    with pytest.raises(ValueError, match=r"memory\.accumulation: 12 samples a process do not divide into 5 parts"):
        trained(5)
