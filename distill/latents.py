"""Pipelines of latents: what their small files tell, and images as their denoisers meet them, by the VAE inverted.

Pipelines decode z = latents / scaling_factor + shift_factor (none is 0), and those of Stable Diffusion XL, where the
VAE has them, z = latents * latents_std / scaling_factor + latents_mean; here is the inverse of each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.folders import index_of, pipeline_folder, read_model
from samplers import SampleNoise, flow_sigmas, karras_sigmas
from samplers.adapters import Coordinates, FlowMatching, coordinates_of
from samplers.network_call import PACKED
from samplers.prompts import PIPELINES

PROMPTED = {name: kind.network for name, kind in PIPELINES.items() if name not in ("DDIMPipeline", "DDPMPipeline")}

UNSIZED = 128  # the latents' height and width where the network does not say: Flux


class Encoder:
    """The VAE of a pipeline: (images [B, C, H, W] in [-1, 1], noise) -> latents [B, c, h, w], float32, on the CPU.

    Raises ValueError for a VAE whose coordinates the pipeline does not have.
    """

    def __init__(self, vae: Any, pipeline_class: str, device: torch.device | str = "cpu") -> None:
        self.vae = vae.to(device).requires_grad_(False).eval()
        self._device = device
        self._shift, self._scale = _affine(vae.config, pipeline_class)

    def shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """The shape [c, h, w] of the latents of square images. Raises ValueError for images that do not fit."""
        config = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if channels != config.in_channels:
            raise ValueError(f"data.channels: {channels}; the pipeline's VAE takes images of {config.in_channels}")
        if size % factor:
            raise ValueError(f"data.size: {size}; the pipeline's VAE takes multiples of {factor}")
        return config.latent_channels, size // factor, size // factor

    @torch.no_grad()
    def __call__(self, images: Tensor, noise: SampleNoise) -> Tensor:
        """A sample of each image's posterior, by its own stream."""
        posterior = self.vae.encode(images.to(self._device)).latent_dist
        z = posterior.mean + posterior.std * noise.normal(posterior.mean.shape[1:], device=self._device)
        return ((z.cpu() - self._shift) * self._scale).float()


def read_encoder(path: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """The VAE of a pipeline folder of diffusers, from local safetensors and JSON only.

    Raises ValueError for a folder that is none, a VAE other than an AutoencoderKL, and files that cannot be read.
    """
    folder = pipeline_folder(path)
    try:
        index = index_of(folder)
    except ValueError as error:
        raise ValueError(f"pipeline: {error}") from error
    pipeline_class, (library, vae_class) = str(index.get("_class_name")), index.get("vae") or (None, None)
    if (library, vae_class) != ("diffusers", "AutoencoderKL"):
        found = "has no VAE, its samples are pixels" if vae_class is None else f"its VAE is a {vae_class}"
        raise ValueError(f"pipeline: {folder}: {found}; supported is an AutoencoderKL")
    from diffusers import AutoencoderKL

    try:
        vae = read_model(folder / "vae", AutoencoderKL, torch.float32)
    except ValueError as error:
        raise ValueError(f"pipeline: {error}") from error
    return Encoder(vae, pipeline_class, device)


def _affine(config: Any, pipeline_class: str) -> tuple[Tensor, Tensor]:
    """Shift and scale with latents = (z - shift) * scale, each [] or [1, c, 1, 1], float32."""
    mean, std, shift = (config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    centred = mean is not None and std is not None
    shifted = _is_shifted(pipeline_class)
    for name, has, applied in (
        ("shift_factor", bool(shift), shifted),
        ("latents_mean and latents_std", centred, pipeline_class.startswith("StableDiffusionXL")),
    ):
        if has and not applied:
            raise ValueError(f"pipeline: its VAE has {name}, which a {pipeline_class} does not apply")
    if centred:
        centre, spread = (torch.tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (mean, std))
        return centre, config.scaling_factor / spread
    return torch.tensor(float(shift or 0)), torch.tensor(float(config.scaling_factor))


def _is_shifted(pipeline_class: str) -> bool:
    """Whether a pipeline decodes with a shift: as the supported one that its name begins as; an unknown one does."""
    alike = [name for name in PIPELINES if pipeline_class.startswith(name.removesuffix("Pipeline"))]
    return not alike or PIPELINES[max(alike, key=len)].shifted


def prompt_schedule(scheduler: Any, steps: int) -> Tensor:
    """Noise levels [steps + 1] for a scheduler's network: Karras', or evenly in flow time with its shift."""
    shift = scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0
    return schedule(coordinates_of(scheduler), steps, shift)


def schedule(coordinates: Coordinates, steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels [steps + 1]: Karras', or, for a network of flow time, even in it with a shift."""
    if isinstance(coordinates, FlowMatching):
        return flow_sigmas(steps, coordinates.sigma_max, shift)
    return karras_sigmas(steps, coordinates.sigma_min, coordinates.sigma_max)


def embedding_widths(kind: str, network: Mapping[str, Any]) -> dict[str, int | None]:
    """The last dimension of what a pipeline's network is told of words, by the names of the pipeline's arguments; None
    where its configuration does not say."""
    names = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
    words = next((network[name] for name in names if network.get(name)), None)
    pooled = network.get("pooled_projection_dim")
    if kind == "StableDiffusionXLPipeline":
        pooled = network["projection_class_embeddings_input_dim"] - 6 * network["addition_time_embed_dim"]
    return {
        "prompt_embeds": words if isinstance(words, int | None) else words[0],
        "pooled_prompt_embeds": pooled,
    }


def picture_shape(network: dict[str, Any], vae: dict[str, Any]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes [c, h, w] of latents and [C, H, W] of pictures, by the configurations of a network and a VAE."""
    size, factor = network.get("sample_size") or UNSIZED, 2 ** (len(vae["block_out_channels"]) - 1)
    h, w = size if isinstance(size, list) else (size, size)
    channels = network["in_channels"] // (4 if network.get("_class_name") in PACKED else 1)
    return (channels, h, w), (vae["out_channels"], h * factor, w * factor)
