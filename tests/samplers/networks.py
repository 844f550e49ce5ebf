"""Tiny real diffusers networks with random weights: the same classes that carry published models."""

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel


def unet(dtype: torch.dtype = torch.float64, classes: int | None = None) -> UNet2DModel:
    """Images [B, 3, 8, 8]; with `classes`, conditioned on labels 0 .. classes - 1."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=classes,
    )
    return network.to(dtype).eval().requires_grad_(False)


def dit(dtype: torch.dtype = torch.float64) -> DiTTransformer2DModel:
    """Latents [B, 4, 8, 8], labels 0 .. 10 (10 is the null label), learned variance: 8 channels out."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        dropout=0.0,
    )
    return network.to(dtype).eval().requires_grad_(False)


def conditional_unet(dtype: torch.dtype = torch.float64, **options: Any) -> UNet2DConditionModel:
    """Latents [B, 4, 8, 8], conditioned on `encoder_hidden_states` [B, length, 16]."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=16,
        **options,
    )
    return network.to(dtype).eval().requires_grad_(False)
