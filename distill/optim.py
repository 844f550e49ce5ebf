"""One network's update: backward, clip, learning rate, AdamW."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.sections import Optimizer as OptimizerConfig


def adamw(
    network: nn.Module, config: OptimizerConfig, heads: nn.Module | None = None, lr: float | None = None
) -> Optimizer:
    """Fused AdamW over a network's trainable parameters, and those of `heads` with a peak rate of their own."""
    groups = [
        {"params": [p for p in module.parameters() if p.requires_grad], "scale": scale}
        for module, scale in ((network, 1.0), (heads, (lr or config.lr) / config.lr))
        if module is not None
    ]
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])  # type: ignore[attr-defined]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=fused)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of update `step` (from 0) of `steps`: a linear warm-up, then as the schedule says.

    constant; half a cosine, to 0; or constant with one drop.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "drop":
        return config.lr * (config.drop_to if step >= config.drop_at * steps else 1.0)
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def student_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a student: as `learning_rate`, but 0 at step 0.

    Why: there the fake score still is the teacher, so that the gradient is nothing but rounding errors, and Adam, which
    divides by their size, would make a full step in a random direction of them.
    """
    return learning_rate(config, step, steps) if step else 0.0


def prepare(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: OptimizerConfig,
    steps: int,
    schedule: Callable[..., float] = learning_rate,
    heads: nn.Module | None = None,
    lr: float | None = None,
) -> "tuple[nn.Module, Update]":
    """A network ready for any number of processes, and its update; of `heads` with peak learning rate `lr` too."""
    network.to(accelerator.device)
    prepared, prepared_optimizer = accelerator.prepare(network, adamw(network, optimizer, heads, lr))
    rate = partial(schedule, optimizer, steps=steps)
    return prepared, Update(prepared_optimizer, rate, optimizer.clip, accelerator.backward)


class Update:
    """One optimizer step on a loss []: the only place that turns a loss into new weights.

    Several losses, which are added, can be given as an iterator: each is differentiated before the next is computed, so
    that only one graph is held at a time. Gradients are gone after the step.

    schedule: step -> learning rate, which a group of parameters multiplies with its "scale", if it has one.
    backward: how the loss is differentiated (accelerate's `backward`, which scales and synchronises, or Tensor's).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Callable[[int], float],
        clip: float | None = None,
        backward: Callable[[Tensor], object] = Tensor.backward,
    ) -> None:
        self.optimizer, self._schedule, self._clip, self._backward = optimizer, schedule, clip, backward

    def __call__(self, losses: Tensor | Iterable[Tensor], step: int) -> None:
        for loss in [losses] if isinstance(losses, Tensor) else losses:
            self._backward(loss)
        for group in self.optimizer.param_groups:
            group["lr"] = self._schedule(step) * group.get("scale", 1.0)
            if self._clip is not None:
                nn.utils.clip_grad_norm_(group["params"], self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # so that no gradient lies about while another network learns
