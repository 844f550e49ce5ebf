"""CLIP and DINOv2 as feature networks: transformers' models from a folder or the local Hugging Face cache.

CLIP gives the projected image embedding (CMMD, CLIP-FID), DINOv2 the normalised class token (FD-DINOv2). EDM2 and
dgm-eval run Meta's own DINOv2 code, which stretches the position embedding from 37 x 37 to 16 x 16 patches a little
differently from transformers': numbers agree closely, not to the last digits. Only safetensors are read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.digest import digest_file, digest_json
from tools.presets import Preset


@dataclass(frozen=True)
class Kind:
    """What to ask of transformers: the class, the field of its output, and the field of its config with the width."""

    model: str
    output: str
    width: str


KINDS = {
    "clip": Kind("CLIPVisionModelWithProjection", "image_embeds", "projection_dim"),
    "dinov2": Kind("Dinov2Model", "pooler_output", "hidden_size"),
}


@dataclass(frozen=True)
class Vision:
    """Prepared images [B, 3, size, size] -> features [B, dim], without logits."""

    name: str
    dim: int
    model: Any
    output: str

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        return getattr(self.model(pixel_values=images), self.output), None


def load(preset: Preset, path: str | None, device: torch.device) -> Vision:
    """The network of `preset` from the folder `path` (config.json and safetensors), or from the local cache.

    Raises ValueError, naming the folder, when transformers or weights are missing, when the file lacks a part of the
    network, or when the network reads images of another size.
    """
    kind = KINDS[preset.network]
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"features: {preset.network} needs the package transformers (pip install transformers)"
        ) from error

    folder = _find_folder(preset, path)
    _check_size(transformers.AutoConfig.from_pretrained(folder, local_files_only=True), preset, folder)
    model, report = _read(getattr(transformers, kind.model), folder)
    if report["missing_keys"] or report["mismatched_keys"]:
        lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(f"weights: {folder} lacks {len(lacking)} tensors of {kind.model}, among them {lacking[0]}")
    model = model.float().to(device).eval().requires_grad_(False)
    return Vision(f"{preset.network}-{_fingerprint(folder)}", getattr(model.config, kind.width), model, kind.output)


def _find_folder(preset: Preset, path: str | None) -> Path:
    """Raises ValueError that says where was looked, and how the weights get there."""
    from huggingface_hub import constants, try_to_load_from_cache

    if path:
        folder = Path(path)
    else:
        found = try_to_load_from_cache(preset.repository, "config.json")
        if not isinstance(found, str):
            raise ValueError(
                f"weights: {preset.repository} is not in {constants.HF_HUB_CACHE}; fetch it with "
                f"`hf download {preset.repository}`, or name a folder after the preset and a colon"
            )
        folder = Path(found).parent
    for needed in ("config.json", "*.safetensors"):
        if not any(folder.glob(needed)):
            raise ValueError(f"weights: {folder} has no {needed}; accepted: a folder that transformers saved")
    return folder


def _check_size(config: Any, preset: Preset, folder: Path) -> None:
    config = getattr(config, "vision_config", config)  # of a whole CLIP, the half that sees
    assert preset.size is not None
    if preset.network == "clip" and config.image_size != preset.size:
        raise ValueError(f"weights: {folder} reads {config.image_size} x {config.image_size} pixels, not {preset.size}")
    if preset.size % config.patch_size:
        raise ValueError(f"weights: {folder} has patches of {config.patch_size} pixels; {preset.size} is no multiple")


def _read(model: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """(the model, what was missing). Attention is eager: the same arithmetic whatever kernels are installed."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a whole CLIP also has the half that reads; what is missing is an error below
    try:
        return model.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, attn_implementation="eager"
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"weights: {folder} cannot be read as {model.__name__} ({type(error).__name__})") from error
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _fingerprint(folder: Path) -> str:
    """Eight hex digits of the sha256 of the configuration and all weights."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return digest_json([digest_file(path) for path in files])[:8]
