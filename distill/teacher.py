"""The model that is distilled: a diffusers pipeline folder as one frozen denoiser, with what it is conditioned on."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from samplers import Denoiser, Guided, NetworkDenoiser, SampleNoise, denoiser_from

FACTS = "distill.json"  # beside model_index.json: what a diffusers folder has no place for
SUPPORTED = ("UNet2DModel",)


@dataclass(frozen=True)
class Teacher:
    """A frozen denoiser, the shape [C, H, W] of its samples and their conditions.

    n_classes: class labels are drawn from 0 .. n_classes - 1; None is an unconditional model. null_label: the label
    that stands for "no class", needed for guidance; None if the model has none. facts: what `distill.json` says.
    """

    denoiser: NetworkDenoiser
    scheduler: Any
    shape: tuple[int, ...]
    n_classes: int | None = None
    null_label: int | None = None
    guidance: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.guidance != 1 and self.null_label is None:
            raise ValueError(
                f"guidance: {self.guidance} needs a null label, and the model names none "
                f'(a file {FACTS} with "classes" and "null_label" beside model_index.json would)'
            )

    @classmethod
    def load(cls, path: str | Path, guidance: float = 1.0) -> Self:
        """Reads a pipeline folder of diffusers, or a run folder of `distill teach`, from local safetensors only.

        Raises ValueError for a folder that is neither, for a network other than a UNet2DModel, a scheduler that is not
        understood, or guidance of a model without a null label.
        """
        folder = pipeline_folder(path)
        network, scheduler = read_pipeline(folder)
        denoiser = denoiser_from(network, scheduler).requires_grad_(False).eval()

        facts = read_facts(folder)
        n_classes = len(facts["classes"]) if facts.get("classes") else network.config.num_class_embeds
        null_label = facts.get("null_label")
        labels = [label for label in (n_classes and n_classes - 1, null_label) if label is not None]
        if labels and max(labels) >= (network.config.num_class_embeds or 0):
            raise ValueError(
                f"{folder / FACTS}: speaks of label {max(labels)}, but the network has "
                f"{network.config.num_class_embeds or 'no'} labels"
            )
        return cls(denoiser, scheduler, sample_shape(network), n_classes, null_label, guidance, facts)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.guided(x, sigma, cond)

    @property
    def guided(self) -> Denoiser:
        """The denoiser with its guidance: x [B, C, H, W], sigma [] or [B], cond: labels [B] or None."""
        if self.guidance == 1:
            return self.denoiser
        return Guided(self.denoiser, self.guidance, self.null_label)

    @property
    def sigma_min(self) -> float:
        return self.denoiser.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.denoiser.sigma_max

    def clone(self) -> NetworkDenoiser:
        """A trainable copy of the denoiser, without guidance: where a student or a fake score starts."""
        return copy.deepcopy(self.denoiser).requires_grad_(True)

    def conditions(self, noise: SampleNoise, device: torch.device | str = "cpu") -> Tensor | None:
        """Class labels [B], uniform, each from its sample's stream; None if the model is unconditional."""
        return None if self.n_classes is None else noise.integers(self.n_classes, device)


def sample_shape(network: Any) -> tuple[int, int, int]:
    """The shape [C, H, W] of a UNet2DModel's samples."""
    size = network.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return network.config.in_channels, height, width


def pipeline_folder(path: str | Path) -> Path:
    """The folder with a model_index.json: `path`, or `path`/model where `path` is a run of `distill teach`."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "model_index.json").is_file():
            return folder
    if not Path(path).is_dir():
        raise ValueError(f"{path}: there is no such folder")
    unfinished = (
        " (this run has not finished: continue it with --resume)" if (Path(path) / "config.yaml").is_file() else ""
    )
    raise ValueError(f"{path}: is no pipeline folder of diffusers, there is no model_index.json in it{unfinished}")


def read_facts(folder: Path) -> dict[str, Any]:
    """What the `distill.json` of a pipeline folder says; empty if there is none."""
    file = folder / FACTS
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{file}: holds no keys")
    return facts


@contextmanager
def _quiet() -> Iterator[None]:
    """What diffusers would log about a folder is told in our one line instead."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)


def read_pipeline(folder: Path) -> tuple[Any, Any]:
    """The network and the scheduler of a pipeline folder. Reads safetensors and JSON only."""
    import diffusers

    try:
        index = json.loads((folder / "model_index.json").read_text())
        library, network_class = index["unet"]
        _, scheduler_class = index["scheduler"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: its model_index.json names no unet and scheduler; supported is a {' or '.join(SUPPORTED)}"
        ) from error
    if library != "diffusers" or network_class not in SUPPORTED:
        raise ValueError(f"{folder}: its network is a {network_class}; supported is a {' or '.join(SUPPORTED)}")
    if not hasattr(diffusers, scheduler_class):
        raise ValueError(f"{folder}: its scheduler {scheduler_class} is not one of diffusers")

    scheduler = _read(folder / "scheduler", getattr(diffusers, scheduler_class).from_pretrained)
    if scheduler is None:  # diffusers stands a dummy in for a class that needs what is not installed
        raise ValueError(f"scheduler: {scheduler_class} needs a package that is not installed here")
    return read_model(folder / "unet", getattr(diffusers, network_class)), scheduler


def read_model(part: Path, kind: Any, dtype: torch.dtype | None = None) -> Any:
    """The model of a diffusers class in a part of a pipeline folder, from safetensors, in its own dtype or another.

    Raises ValueError, naming the part, for files that cannot be read, and weights that are not those of the config.
    """
    options: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    options |= {} if dtype is None else {"torch_dtype": dtype}
    model, loaded = _read(part, kind.from_pretrained, **options)
    wrong = [*loaded["missing_keys"], *loaded["unexpected_keys"], *loaded["mismatched_keys"]]
    if wrong:  # diffusers would go on with random weights
        raise ValueError(f"{part}: its weights are not those of its config.json: {wrong[0]} and {len(wrong) - 1} more")
    return model


def _read(part: Path, load: Callable[..., Any], **options: Any) -> Any:
    try:
        with _quiet():
            return load(part, local_files_only=True, **options)
    except Exception as error:  # diffusers raises a different type for each thing that can be wrong with a folder
        raise ValueError(f"{part}: cannot be read ({str(error).splitlines()[0]})") from error
