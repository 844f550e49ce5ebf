"""The running average: against its formula, on the CPU as on the device, and what is shown of it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from distill.average import Average
from tests.distill.tiny import unet


def moved(network: nn.Module, step: int) -> None:
    """Weights as an update might leave them."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def pair(where: str) -> tuple[nn.Module, Average]:
    network = unet(None).requires_grad_(True)
    return network, Average(copy.deepcopy(network).requires_grad_(False), network, 0.6, where)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["device", "cpu"])
def test_it_is_the_exponential_mean_with_a_ramp(where: str) -> None:
    """decay = min(0.6, (step + 1) / (step + 10)), in float64, over steps on both sides of the bound."""
    network, average = pair(where)
    expected = [p.detach().double() for p in network.parameters()]
    for step in range(20):
        moved(network, step)
        average(step)
        decay = min(0.6, (step + 1) / (step + 10))
        expected = [
            decay * e + (1 - decay) * p.detach().double() for e, p in zip(expected, network.parameters(), strict=True)
        ]
    kept = average.module.state_dict()  # waits for the thread
    for (name, _), e in zip(network.named_parameters(), expected, strict=True):
        torch.testing.assert_close(kept[name].double(), e, rtol=1e-5, atol=1e-6)


def test_on_the_cpu_it_is_bit_for_bit_what_it_is_on_the_device() -> None:
    found: list[list[Tensor]] = []
    for where in ("device", "cpu"):
        network, average = pair(where)
        for step in range(5):
            moved(network, step)
            average(step)
        average.settle()
        found.append(list(average.module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("where", ["device", "cpu"])
def test_what_is_shown_has_its_weights_and_the_network_keeps_its_own(where: str) -> None:
    network, average = pair(where)
    moved(network, 0)
    average(0)
    before = [p.detach().clone() for p in network.parameters()]
    with average.shown() as shown:
        weights = [p.detach().clone() for p in shown.parameters()]
        assert (shown is network) is (where == "cpu")
    kept = list(average.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, kept, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))


def test_weights_that_both_hold_are_left_alone() -> None:
    """A frozen base that belongs to a teacher too is not even written with its own values."""
    base, adapter = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3, bias=False)
    network = nn.Sequential(base, adapter)
    average = Average(nn.Sequential(base, copy.deepcopy(adapter).requires_grad_(False)), network, 0.5)
    versions = [p._version for p in base.parameters()]
    moved(adapter, 0)
    average(30)
    assert [p._version for p in base.parameters()] == versions
    assert not torch.equal(average.module[1].weight, adapter.weight)


@pytest.mark.parametrize("where", ["device", "cpu"])
def test_buffers_are_the_networks(where: str) -> None:
    network = nn.BatchNorm1d(3)
    average = Average(copy.deepcopy(network).requires_grad_(False), network, 0.5, where)  # type: ignore[arg-type]
    network(torch.arange(12.0).reshape(4, 3))
    average(0)
    kept = average.module.state_dict()
    for name, buffer in network.named_buffers():
        assert torch.equal(kept[name], buffer)
    assert float(kept["running_mean"].abs().sum()) > 0
