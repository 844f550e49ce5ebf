"""The one-step student, and the running average of its weights."""

from typing import Any

import torch
from torch import Tensor, nn

from distill import sharding
from samplers import Denoiser


class OneStep:
    """x = D(sigma_init z, sigma_init): a denoiser called once, on pure noise.

    z [B, ...] is standard normal; the result is like z. Raises ValueError for a sigma_init outside the range that the
    denoiser publishes.
    """

    def __init__(self, denoiser: Denoiser, sigma_init: float) -> None:
        low, high = getattr(denoiser, "sigma_min", 0.0), getattr(denoiser, "sigma_max", float("inf"))
        if not low <= sigma_init <= high:
            raise ValueError(f"student.sigma_init: {sigma_init} is outside the teacher's range [{low:.6g}, {high:.6g}]")
        self.denoiser, self.sigma_init = denoiser, sigma_init

    def __call__(self, z: Tensor, cond: Any = None) -> Tensor:
        return self.denoiser(self.sigma_init * z, z.new_tensor(self.sigma_init), cond)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """One step of an exponential moving average of a module's parameters; its buffers are copied.

    The decay ramps up as (step + 1) / (step + 10), step from 0, so that a short run does not remember its start.
    """
    decay = min(decay, (step + 1) / (step + 10))
    kept_weights, weights = ([sharding.local(p) for p in network.parameters()] for network in (average, module))
    torch._foreach_lerp_(kept_weights, weights, 1 - decay)
    for kept, current in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(current)
