"""Images from a diffusers pipeline of latents: DiT under classes, Stable Diffusion (XL, 3) under prompts.

Sample k has prompt k modulo their number, and its own noise. The network, text encoders and VAE of the pipeline are
used; its loop and the steps of its scheduler are not (`samplers.prompts`).
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.teacher import read_model
from samplers import Denoiser, Gaussian, Guided, decode, denoiser_from, flow_sigmas, karras_sigmas, latent_shape
from samplers.adapters import FlowMatching, coordinates_of
from samplers.denoiser import join_conditions
from samplers.prompts import PIPELINES
from samplers.teleport_checks import check_gaussian, family_of

PROMPTED = {name: kind.network for name, kind in PIPELINES.items() if name not in ("DDIMPipeline", "DDPMPipeline")}
UNUSED = ("feature_extractor", "image_encoder", "safety_checker")  # parts that no sample is made by
_LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class PromptedPipeline:
    """A pipeline as a denoiser of its latents, with the conditions of its samples.

    prompts: None where there are classes. guidance: 1 is none.
    """

    pipe: Any
    prompts: tuple[str, ...] | None
    guidance: float

    @property
    def denoiser(self) -> Denoiser:
        """Of latents [B, c, h, w], guided away from the pipeline's own idea of no condition."""
        none = denoiser_from(self.pipe)
        return none.denoiser if self.guidance == 1 else Guided(none.denoiser, self.guidance, none.cond)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[c, h, w] of the latents."""
        return latent_shape(self.pipe)

    def condition(self, indices: Sequence[int], labels: Tensor | None) -> Any:
        """What the denoiser is conditioned on for these samples: their labels, or their prompts' embeddings."""
        if self.prompts is None:
            return labels
        asked = [self.prompts[k % len(self.prompts)] for k in indices]
        embedded = {prompt: denoiser_from(self.pipe, prompt).cond for prompt in dict.fromkeys(asked)}
        return join_conditions([embedded[prompt] for prompt in asked], 1)

    def check(self, gaussian: Gaussian) -> None:
        """Raises ValueError for a Gaussian of other latents than this pipeline's."""
        check_gaussian(self.pipe, family_of(self.pipe), gaussian)

    def decode(self, x: Tensor) -> Tensor:
        """Latents as pictures [B, 3, H, W], nominally in [-1, 1]."""
        return decode(self.pipe, x).float()


def prompt_schedule(scheduler: Any, steps: int) -> Tensor:
    """Noise levels [steps + 1] for a scheduler's network: Karras', or evenly in flow time with its shift."""
    coordinates = coordinates_of(scheduler)
    if isinstance(coordinates, FlowMatching):
        shift = scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0
        return flow_sigmas(steps, coordinates.sigma_max, shift)
    return karras_sigmas(steps, coordinates.sigma_min, coordinates.sigma_max)


def picture_shape(network: dict[str, Any], vae: dict[str, Any]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes [c, h, w] of latents and [C, H, W] of pictures, by the configurations of a network and a VAE."""
    size, factor = network["sample_size"], 2 ** (len(vae["block_out_channels"]) - 1)
    h, w = size if isinstance(size, list) else (size, size)
    return (network["in_channels"], h, w), (vae["out_channels"], h * factor, w * factor)


@contextmanager
def _silent() -> Iterator[None]:
    """Neither library draws bars for the loading of each part, or tells what is told in our one line."""
    logs = [import_module(f"{library}.utils.logging") for library in _LIBRARIES if find_spec(library) is not None]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity(log.CRITICAL)
            log.disable_progress_bar()
        yield
    finally:
        for log, (verbosity, bar) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()


def load_pipeline(folder: Path, without: Sequence[str] = (), text_dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline from local safetensors, in float32, without the parts that are not used, and those named `without`.

    text_dtype: of its text encoders. Raises ValueError, naming the part, for what cannot be read, or is not of
    diffusers or transformers.
    """
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    parts: dict[str, Any] = {}
    for name, part in index.items():
        if not isinstance(part, list):
            continue
        library, kind = part
        if name in UNUSED or name in without or library is None:
            parts[name] = None
        else:
            with _silent():
                parts[name] = _part(folder / name, library, kind, text_dtype)
    with _silent(), _named(folder):
        pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """The libraries raise a different type for each thing that can be wrong with a folder."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{folder}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error


def _part(folder: Path, library: str, name: str, text_dtype: torch.dtype) -> Any:
    if library not in _LIBRARIES or find_spec(library) is None or not hasattr(import_module(library), name):
        raise ValueError(
            f"{folder}: is a {library}.{name}, which is not here; read are parts of {' and '.join(_LIBRARIES)}"
        )
    kind = getattr(import_module(library), name)
    is_network = isinstance(kind, type) and issubclass(kind, torch.nn.Module)
    if not is_network:
        with _named(folder):
            return kind.from_pretrained(folder, local_files_only=True)
    if library == "diffusers":
        return read_model(folder, kind, torch.float32).requires_grad_(False).eval()
    options = {"use_safetensors": True, "output_loading_info": True, "torch_dtype": text_dtype}
    with _named(folder):
        model, loaded = kind.from_pretrained(folder, local_files_only=True, **options)
    wrong = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
    if wrong:  # transformers would go on with random weights
        raise ValueError(f"{folder}: its weights are not those of its config.json: {wrong[0]}")
    return model.requires_grad_(False).eval()
