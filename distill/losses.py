"""The losses, as pure functions of tensors and denoisers: no optimizer, no device, no configuration.

Use them in any training loop. Every loss is per sample, [B], in float32; average it over the batch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

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


def adversarial_loss(logits: Tensor) -> Tensor:
    """The non-saturating loss of a generator, [B]: the mean over heads of softplus(-logit), logits [B, heads].

    Logits [B, heads, ratios] give [B, ratios], here and in `discriminator_loss`.
    """
    return softplus(-logits).mean(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic regression of real against fake samples, [B], for the logits [B, heads] of both.

    softplus(fake) + softplus(-real), meaned over heads. Its minimiser is the log-ratio ln p_real / p_fake.
    """
    return (softplus(fake) + softplus(-real)).mean(1)


def gradient_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """|grad_x ln r|^2, [B], of the log-ratio that logits [B, heads] of x [B, ...] give (R1: Mescheder et al. 2018).

    x requires a gradient, and attention on the way a second derivative (`torch.nn.attention.SDPBackend.MATH`).
    """
    (gradient,) = torch.autograd.grad(logits.mean(1).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def difference_penalty(logits: Tensor, moved: Tensor, step: float) -> Tensor:
    """An estimate of `gradient_penalty`, [B], without a second derivative: (ln r(x + step n) - ln r(x))^2 / step^2.

    logits, moved [B, heads]: at x and at x + step n, n standard normal. To first order in step its mean over n is the
    squared gradient (the form of APT, Lin et al. 2025, divided by step^2, so that gamma keeps its meaning).
    """
    return ((moved.mean(1) - logits.mean(1)) / step).square()


def matching_weight(x: Tensor, denoised_target: Tensor, h: Tensor | float = 1.0, floor: float = 1e-6) -> Tensor:
    """The weight of a sample, [B]: h / mean |x - D_target(x_sigma)| (Yin et al. 2024, eq. 8).

    It makes noise levels alike in size. h [B]: the divergence's h(r), 1 for reverse KL. floor keeps the mean absolute
    difference away from zero.
    """
    distance = (x - denoised_target).detach().abs().flatten(1).mean(1)
    return (h.to(distance) if isinstance(h, Tensor) else h) / distance.clamp_min(floor)


def level_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """A weight by noise level alone, [B] like sigma: sqrt(sigma^2 + sigma_data^2) / (sigma sigma_data).

    The inverse of how far D is from a clean sample if the data are N(0, sigma_data^2). Unlike `matching_weight` it
    leaves every level's gradient that of its divergence, exactly.
    """
    return (sigma**2 + sigma_data**2).sqrt() / (sigma * sigma_data)
