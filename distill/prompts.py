"""Images from a diffusers pipeline of latents: DiT under classes, Stable Diffusion (XL, 3) under prompts.

Sample k has prompt k modulo their number, and its own noise. The network, text encoders and VAE of the pipeline are
used; its loop and the steps of its scheduler are not (`samplers.prompts`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from samplers import Denoiser, Gaussian, Guided, decode, denoiser_from, flow_sigmas, karras_sigmas, latent_shape
from samplers.adapters import Coordinates, FlowMatching, coordinates_of
from samplers.denoiser import join_conditions
from samplers.network_call import PACKED
from samplers.prompts import GUIDANCE_EMBEDDING, PIPELINES, condition, denoiser_of, embed
from samplers.teleport_checks import check_gaussian, family_of

PROMPTED = {name: kind.network for name, kind in PIPELINES.items() if name not in ("DDIMPipeline", "DDPMPipeline")}

UNSIZED = 128  # the latents' height and width where the network does not say: Flux


@dataclass(frozen=True)
class PromptedPipeline:
    """A pipeline as a denoiser of its latents, with the conditions of its samples.

    prompts: None where there are classes. guidance: 1 is none. height, width: of the pictures, None is the pipeline's
    own; guidance_embedding: what a guidance-distilled network is fed.
    """

    pipe: Any
    prompts: tuple[str, ...] | None
    guidance: float
    height: int | None = None
    width: int | None = None
    guidance_embedding: float = GUIDANCE_EMBEDDING

    @property
    def denoiser(self) -> Denoiser:
        """Of latents [B, c, h, w], guided away from the pipeline's own idea of no condition."""
        denoiser = denoiser_of(self.pipe)
        if self.guidance == 1:
            return denoiser
        none = denoiser_from(self.pipe).cond if self.prompts is None else self._embedded("")
        return Guided(denoiser, self.guidance, none)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[c, h, w] of the latents."""
        return latent_shape(self.pipe, self.height, self.width)

    def condition(self, indices: Sequence[int], labels: Tensor | None) -> Any:
        """What the denoiser is conditioned on for these samples: their labels, or their prompts' embeddings."""
        if self.prompts is None:
            return labels
        asked = [self.prompts[k % len(self.prompts)] for k in indices]
        embedded = {prompt: self._embedded(prompt) for prompt in dict.fromkeys(asked)}
        return join_conditions([embedded[prompt] for prompt in asked], 1)

    def _embedded(self, prompt: str) -> dict[str, Any]:
        size = {"height": self.height, "width": self.width}
        return condition(self.pipe, embed(self.pipe, prompt), **size, guidance_embedding=self.guidance_embedding)

    def check(self, gaussian: Gaussian) -> None:
        """Raises ValueError for a Gaussian of other latents than this pipeline's."""
        check_gaussian(self.pipe, family_of(self.pipe), gaussian)

    def decode(self, x: Tensor) -> Tensor:
        """Latents as pictures [B, 3, H, W], nominally in [-1, 1]."""
        return decode(self.pipe, x).float()


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
