"""Pipelines of latents, as far as their small files tell: noise levels to sample at, and the shape of the pictures."""

from typing import Any

from torch import Tensor

from samplers import flow_sigmas, karras_sigmas
from samplers.adapters import Coordinates, FlowMatching, coordinates_of
from samplers.network_call import PACKED
from samplers.prompts import PIPELINES

PROMPTED = {name: kind.network for name, kind in PIPELINES.items() if name not in ("DDIMPipeline", "DDPMPipeline")}

UNSIZED = 128  # the latents' height and width where the network does not say: Flux


def prompt_schedule(scheduler: Any, steps: int) -> Tensor:
    """Noise levels [steps + 1] for a scheduler's network: Karras', or evenly in flow time with its shift."""
    shift = scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0
    return schedule(coordinates_of(scheduler), steps, shift)


def schedule(coordinates: Coordinates, steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels [steps + 1]: Karras', or, for a network of flow time, even in it with a shift."""
    if isinstance(coordinates, FlowMatching):
        return flow_sigmas(steps, coordinates.sigma_max, shift)
    return karras_sigmas(steps, coordinates.sigma_min, coordinates.sigma_max)


def picture_shape(network: dict[str, Any], vae: dict[str, Any]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes [c, h, w] of latents and [C, H, W] of pictures, by the configurations of a network and a VAE."""
    size, factor = network.get("sample_size") or UNSIZED, 2 ** (len(vae["block_out_channels"]) - 1)
    h, w = size if isinstance(size, list) else (size, size)
    channels = network["in_channels"] // (4 if network.get("_class_name") in PACKED else 1)
    return (channels, h, w), (vae["out_channels"], h * factor, w * factor)
