"""An optimizer's parts: a step on several losses, the schedule with one drop, heads with a rate of their own."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from distill.optim import Update, adamw, learning_rate
from distill.sections import Optimizer

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def layer() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 2)


def three(module: nn.Linear) -> list[Tensor]:
    """Losses of different parts of the parameters."""
    return [module(X).square().mean(), 3 * module.weight.sum(), module.bias.exp().sum()]


@pytest.mark.parametrize("clip", [None, 0.1])
def test_several_losses_make_the_step_of_their_sum(clip: float | None) -> None:
    """The clip acts on the gradient of the sum, whose norm is 7 and more."""
    modules = [layer(), layer(), layer()]
    updates = [Update(torch.optim.SGD(module.parameters()), lambda step: 0.1, clip) for module in modules]
    for step in range(3):
        updates[0](iter(three(modules[0])), step)
        updates[1](sum(three(modules[1])), step)
        updates[2](three(modules[2])[0], step)
    for one, other, first in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(one, first, rtol=1e-2)


def test_each_loss_is_computed_when_the_one_before_was_differentiated() -> None:
    """By the given backward, before the step; afterwards no gradient is left."""
    module, events = layer(), []

    class Noted(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            events.append("step")
            assert all(p.grad is not None for p in module.parameters())

    def losses() -> Iterator[Tensor]:
        for k, loss in enumerate(three(module)):
            events.append(f"loss {k}")
            yield loss

    def backward(loss: Tensor) -> None:
        events.append("backward")
        loss.backward()

    update = Update(Noted(module.parameters()), lambda step: 0.1, backward=backward)
    update(losses(), 0)
    assert events == ["loss 0", "backward", "loss 1", "backward", "loss 2", "backward", "step"]
    assert all(p.grad is None for p in module.parameters())
    update(module(X).sum(), 1)
    assert all(p.grad is None for p in module.parameters())


def test_the_rate_that_drops_is_constant_on_both_sides() -> None:
    config = Optimizer(lr=2.0, warmup=2, schedule="drop", drop_at=0.75, drop_to=0.25)
    assert [learning_rate(config, step, 8) for step in range(8)] == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.5]
    odd = Optimizer(lr=1.0, schedule="drop", drop_at=0.5, drop_to=3.0)
    assert [learning_rate(odd, step, 5) for step in range(5)] == [1.0, 1.0, 1.0, 3.0, 3.0]


def test_heads_follow_the_schedule_at_their_own_rate() -> None:
    """As two optimizers would, each with its rate; parameters that do not train stay."""
    config = Optimizer(lr=0.1, betas=(0.5, 0.9), weight_decay=0.1, warmup=2, schedule="constant")
    network, heads, other, others = layer(), layer(), layer(), layer()
    network.bias.requires_grad_(False)
    joint = Update(adamw(network, config, heads, lr=0.4), lambda step: learning_rate(config, step, 4))
    options = {"betas": config.betas, "weight_decay": config.weight_decay}
    apart = [torch.optim.AdamW([other.weight], **options), torch.optim.AdamW(others.parameters(), **options)]
    for step in range(4):
        joint((network(X) - heads(X)).square().sum() + sum(three(heads)), step)
        for optimizer, rate in zip(apart, (0.1, 0.4), strict=True):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate * (0.5 if step == 0 else 1.0)
        ((other(X) - others(X)).square().sum() + sum(three(others))).backward()
        for optimizer in apart:
            optimizer.step()
    assert torch.equal(network.bias, layer().bias)
    for one, two in ((network.weight, other.weight), (heads.weight, others.weight), (heads.bias, others.bias)):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    alike = adamw(layer(), config, layer())
    assert [group["scale"] for group in alike.param_groups] == [1.0, 1.0]
