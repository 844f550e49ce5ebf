"""Train a small teacher: an EDM denoiser on a diffusers UNet2DModel, class-conditional with label dropout.

Karras et al. 2022: ln sigma ~ N(P_mean, P_std^2), the loss weight of Table 1, an average of the weights. The
coordinates are those of CMStochasticIterativeScheduler (timestep 250 ln sigma), because they are the ones in which a
stock diffusers pipeline can run a class-conditional student.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.data import Images, epoch_order
from distill.losses import denoising_loss
from distill.noise import Share
from distill.optim import Update
from distill.sections import Network
from samplers import Denoiser
from samplers.noise import moved


def build_unet(config: Network, size: int, channels: int, n_classes: int | None) -> Any:
    """An untrained UNet2DModel; with n_classes it has one more label, the null label n_classes."""
    from diffusers import UNet2DModel

    levels = range(len(config.channels))
    if size % 2 ** (len(config.channels) - 1):
        raise ValueError(f"network.channels: {len(config.channels)} levels do not fit images of {size} pixels")
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=config.layers,
        block_out_channels=config.channels,
        down_block_types=tuple("AttnDownBlock2D" if i in config.attention else "DownBlock2D" for i in levels),
        up_block_types=tuple("AttnUpBlock2D" if i in config.attention else "UpBlock2D" for i in reversed(levels)),
        norm_num_groups=math.gcd(64, *config.channels) // 2,  # divides every width, and at most 32
        dropout=config.dropout,
        num_class_embeds=None if n_classes is None else n_classes + 1,
    )


@dataclass
class Pretrainer:
    """Denoising score matching on images; `step` is one update.

    noise_level: u [B] in [0, 1) -> sigma [B]. null_label replaces a share `label_dropout` of the labels.
    average(n): told when the network is as it is after update n; the running average is the result.
    """

    denoiser: Denoiser
    update: Update
    images: Images
    noise_level: Callable[[Tensor], Tensor]
    share: Share
    average: Callable[[int], object]
    null_label: int | None = None
    label_dropout: float = 0.0
    sigma_data: float = 0.5
    device: torch.device | str = "cpu"

    def step(self, n: int) -> dict[str, Tensor]:
        """Update number n (from 0); returns its metrics, each []. A function of n and the weights."""
        noise = self.share.noise(n)
        chosen = epoch_order(len(self.images), self.share.seed, self.share.numbers(n))
        x0 = moved(self.images.read(chosen), self.device)
        sigma = moved(self.noise_level(noise.uniform()), self.device)
        eps = noise.normal(x0.shape[1:], device=self.device)

        cond = None
        if self.images.labels is not None and self.null_label is not None:
            dropped = noise.uniform() < self.label_dropout
            cond = moved(torch.where(dropped, self.null_label, self.images.labels[chosen]), self.device)

        loss = denoising_loss(self.denoiser, x0, sigma, eps, cond, self.sigma_data).mean()
        self.update(loss, n)
        self.average(n)
        return {"loss": loss.detach()}
