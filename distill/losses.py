"""The losses, as pure functions of tensors and denoisers: no optimizer, no device, no configuration.

Use them in any training loop. Every loss is per sample, [B], in float32; average it over the batch.
"""

from typing import Any

import torch
from torch import Tensor

from samplers import Denoiser
from samplers.denoiser import expand


def denoising_loss(
    denoiser: Denoiser, x0: Tensor, sigma: Tensor, eps: Tensor, cond: Any = None, sigma_data: float = 0.5
) -> Tensor:
    """EDM's denoising score matching, [B] (Karras et al. 2022, eqs. 2 and 8; weight of Table 1).

    (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 * mean (D(x0 + sigma eps) - x0)^2, for x0 and eps [B, ...] and
    sigma [B]. Its minimiser over denoisers is E[x0 | x], whatever the weight.
    """
    level = expand(sigma, x0)
    error = denoiser(x0 + level * eps, sigma, cond) - x0
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight.to(error) * error.square().flatten(1).mean(1)


def distribution_matching_loss(x: Tensor, denoised_fake: Tensor, denoised_target: Tensor, weight: Tensor) -> Tensor:
    """A loss, [B], whose gradient in x is weight * (D_fake - D_target) / numel, like x / sample.

    x [B, ...]: the student's samples, with their graph. The two predictions, like x, are made at the same noised
    sample. No gradient flows through anything but x. With weight [B] = h(r) its expectation is sigma^2 / numel times
    the gradient of D_f(target || student) at one noise level (Yin et al. 2024, eq. 7; Xu et al. 2025);
    `matching_weight` rescales every sample of that, which keeps the fixed point D_fake = D_target.
    """
    direction = expand(weight, x) * (denoised_fake - denoised_target)
    return 0.5 * (x - (x - direction).detach()).square().flatten(1).mean(1)


def matching_weight(x: Tensor, denoised_target: Tensor, h: Tensor | float = 1.0, floor: float = 1e-6) -> Tensor:
    """The weight of a sample, [B]: h / mean |x - D_target(x_sigma)| (Yin et al. 2024, eq. 8).

    It makes noise levels alike in size. h [B]: the divergence's h(r), 1 for reverse KL. floor keeps the mean absolute
    difference away from zero.
    """
    distance = (x - denoised_target).detach().abs().flatten(1).mean(1)
    return torch.as_tensor(h, dtype=distance.dtype, device=distance.device) / distance.clamp_min(floor)
