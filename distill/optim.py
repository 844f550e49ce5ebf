"""One network's update: backward, clip, learning rate, AdamW."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distill import sharding
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
    """A network ready for any number of processes, and its update; of `heads` with peak learning rate `lr` too.

    The network is put on the device, or shared out (`distill.sharding`), in place; it runs as the launcher says, in
    bfloat16 or compiled, while its weights, the optimizer's state and what it returns stay in float32. What is
    returned is to be called where it learns: the network, or what sums its gradients over the processes.
    heads: as `replicated` returned them.
    """
    sharding.place(accelerator, network)
    run_in(accelerator, network)
    _compile(accelerator, network)
    prepared = network if sharding.is_sharded(network) else replicated(accelerator, network)
    rate = partial(schedule, optimizer, steps=steps)
    synchronised = [prepared] if heads is None else [prepared, heads]
    return prepared, Update(adamw(network, optimizer, heads, lr), rate, optimizer.clip, modules=synchronised)


def replicated(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """A module as it is to be called where it learns, alike on all processes: its gradients are means over them."""
    module.to(accelerator.device)
    if accelerator.num_processes == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    devices = None if accelerator.device.type == "cpu" else [accelerator.device.index or 0]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of a name that older torch has only
        return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)


def run_in(accelerator: Accelerator, network: nn.Module) -> None:
    """Lets a denoiser run in the launcher's precision, wherever it is called from; its result has x's."""
    if accelerator.mixed_precision == "no":
        return
    network.forward = MethodType(_in_bfloat16, network)  # a method: a copy of the network calls its own


def _in_bfloat16(network: nn.Module, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return type(network).forward(network, x, sigma, cond).to(x.dtype)


def _compile(accelerator: Accelerator, network: nn.Module) -> None:
    """Compiles the plain network, in place, so that its keys stay; what surrounds it is not worth it."""
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend.value == "NO":
        return
    options = plugin.to_kwargs()
    getattr(network, "network", network).compile(**options)


class Update:
    """One optimizer step on a loss []: the only place that turns a loss into new weights.

    Several losses, which are added, can be given as an iterator: each is differentiated before the next is computed, so
    that only one graph is held at a time. Gradients are gone after the step.

    schedule: step -> learning rate, which a group of parameters multiplies with its "scale", if it has one. clip: the
    largest norm of a group's gradient. backward: how a loss is differentiated. modules: what `prepare` and `replicated`
    returned, whose gradients several processes sum.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Callable[[int], float],
        clip: float | None = None,
        backward: Callable[[Tensor], object] = Tensor.backward,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.optimizer, self._schedule, self._clip, self._backward = optimizer, schedule, clip, backward
        self._modules = modules

    def __call__(self, losses: Tensor | Iterable[Tensor], step: int) -> None:
        for loss in [losses] if isinstance(losses, Tensor) else losses:
            self._backward(loss)
        for group in self.optimizer.param_groups:
            group["lr"] = self._schedule(step) * group.get("scale", 1.0)
            if self._clip is not None:
                nn.utils.clip_grad_norm_(group["params"], self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # so that no gradient lies about while another network learns

    @contextmanager
    def no_sync(self, held: bool = True) -> Iterator[None]:
        """Gradients of the losses computed and differentiated inside stay on their process; the first ones outside take
        them along. For all parts of a batch but the last, inside the iterator of losses. held: whether to do so."""
        with ExitStack() as stack:
            for module in self._modules if held else ():
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
                elif sharding.is_sharded(module):
                    shared: Any = module
                    shared.set_requires_gradient_sync(False)
                    stack.callback(shared.set_requires_gradient_sync, True)
            yield
