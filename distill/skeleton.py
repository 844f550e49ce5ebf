"""A pipeline folder's networks without their weights: built from the config.json files, on the meta device.

A model of billions of parameters takes a second and no memory. What a pass needs and costs is found on it
(`distill.memory`), and that weights fit is read from the headers of their files.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from distill.folders import LEFT_OVER, index_of, part_folder, read_keys, weight_files
from distill.latents import embedding_widths
from samplers.network_call import predict
from samplers.prompts import PIPELINES, condition, latent_shape

META = torch.device("meta")
_TOKENS = {  # of a prompt, as the pipelines' calls pad it; CLIP's are in its tokenizer's file
    "FluxPipeline": 512,
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "StableDiffusion3Pipeline": 256 + 77,
}
_CLIP_TOKENS = 77


@dataclass(frozen=True)
class Skeleton:
    """pipe: of the pipeline's class, with its networks on meta and without text encoders; None for one of pixels.

    kind: the pipeline's class, by name. encoders: parameters of each text encoder, by its part's name. tokens: of a
    prompt. height, width: of the pictures, in pixels; None is the pipeline's own.
    """

    folder: Path
    kind: str
    network: Any
    scheduler: Any
    pipe: Any = None
    encoders: dict[str, int] = field(default_factory=dict)
    tokens: int = _CLIP_TOKENS
    height: int | None = None
    width: int | None = None

    @property
    def part(self) -> Path:
        """Where the network lies."""
        return part_folder(self.folder, PIPELINES[self.kind].network if self.kind in PIPELINES else "unet")

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, h, w] of what is sampled: latents, or pixels."""
        if self.pipe is not None:
            return latent_shape(self.pipe, self.height, self.width)
        size = self.network.config.sample_size
        h, w = size if isinstance(size, list | tuple) else (size, size)
        return self.network.config.in_channels, h, w

    @property
    def vae(self) -> Any:
        return getattr(self.pipe, "vae", None)

    @property
    def worded(self) -> bool:
        """Whether the network is told of words."""
        return self.kind in PIPELINES and bool(PIPELINES[self.kind].embeddings)

    def embeddings(self, rows: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the embeddings of `rows` prompts, by the names of the pipeline's arguments."""
        widths = embedding_widths(self.kind, self.network.config)
        shapes: dict[str, Any] = {
            "prompt_embeds": (rows, self.tokens, widths["prompt_embeds"]),
            "pooled_prompt_embeds": (rows, widths["pooled_prompt_embeds"]),
            "prompt_attention_mask": (rows, self.tokens),
        }
        return {name: shapes[name] for name in PIPELINES[self.kind].embeddings}

    def condition(self, rows: int) -> Any:
        """What the network is given for `rows` samples: labels, embeddings, or None."""
        config = self.network.config
        if not self.worded:
            has_labels = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
            return torch.zeros(rows, dtype=torch.long, device=META) if has_labels else None
        embeddings = {name: torch.zeros(shape, device=META) for name, shape in self.embeddings(rows).items()}
        return condition(self.pipe, embeddings, height=self.height, width=self.width)

    def call(self, rows: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """A pass of the network over `rows` samples, in its own dtype, and its inputs."""
        dtype = next(self.network.parameters()).dtype
        x = torch.zeros(rows, *self.shape, device=META, dtype=dtype)
        timestep, cond = torch.zeros(rows, device=META), self.condition(rows)
        arguments = {} if cond is None else cond if isinstance(cond, dict) else {"class_labels": cond}
        arguments = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, arguments)
        inputs = [x, timestep, *(v for v in tree_leaves(arguments) if isinstance(v, Tensor))]
        return lambda: predict(self.network, x, timestep, arguments), inputs


def read_skeleton(
    folder: Path, dtype: torch.dtype = torch.float32, height: int | None = None, width: int | None = None
) -> Skeleton:
    """The skeleton of a pipeline folder, its network in `dtype`.

    Raises ValueError, naming the file, for a part whose configuration cannot be read.
    """
    import diffusers

    index = index_of(folder)
    kind = str(index.get("_class_name"))
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part[0] is not None}
    name = PIPELINES[kind].network if kind in PIPELINES else "unet"
    if name not in parts or "scheduler" not in parts:
        raise ValueError(f"{folder}: its model_index.json names no {name} and scheduler")
    network = nn.Module.to(_build(folder, name, *parts[name]), dtype)  # diffusers' own would warn
    scheduler = _build(folder, "scheduler", *parts["scheduler"])
    if kind not in PIPELINES or "vae" not in parts:
        return Skeleton(folder, kind, network, scheduler)
    encoders = {
        part: sum(p.numel() for p in _build(folder, part, *parts[part]).parameters())
        for part in parts
        if part.startswith("text_encoder")
    }
    known = {name: network, "scheduler": scheduler, "vae": _build(folder, "vae", *parts["vae"])}
    pipeline = getattr(diffusers, kind)
    taken = inspect.signature(pipeline.__init__).parameters  # diffusers passes over what the class does not take, too
    absent = dict.fromkeys(key for key in index if key in taken and key not in known and isinstance(index[key], list))
    settings = {key: value for key, value in index.items() if key in taken and not isinstance(value, list)}
    if "requires_safety_checker" in settings:
        settings["requires_safety_checker"] = False  # a skeleton makes no pictures; its absence would be told
    pipe = pipeline(**absent, **known, **settings)
    tokens = _TOKENS.get(kind) or _clip_tokens(folder / "tokenizer/tokenizer_config.json")
    return Skeleton(folder, kind, network, scheduler, pipe, encoders, tokens, height, width)


def check_weights(network: Any, part: Path) -> None:
    """Raises ValueError where the weights in a part of a folder are not those of its config.json; reads headers only.

    A part without weights is not judged.
    """
    files = weight_files(part)
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{part}: cannot be read ({error})") from error
    network._fix_state_dict_keys_on_load(found)  # the names of attention in files of 2022
    found = {key: shape for key, shape in found.items() if key not in LEFT_OVER}
    wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if files and wrong:
        raise ValueError(f"{part}: its weights are not those of its config.json: {wrong[0]} and {len(wrong) - 1} more")


def _build(folder: Path, name: str, library: str, kind: str) -> Any:
    """A part from its configuration: of a model, on meta and in float32."""
    part, known = part_folder(folder, name), library in ("diffusers", "transformers")
    cls = getattr(import_module(library), kind, None) if known else None
    if cls is None:
        raise ValueError(f"{part}: is a {library}.{kind}; known are the parts of diffusers and transformers")
    file = part / ("scheduler_config.json" if name == "scheduler" else "config.json")
    config = read_keys(file)
    try:
        with META if file.name == "config.json" else torch.device("cpu"):
            if library == "diffusers":
                return cls.from_config(config)
            return cls(cls.config_class.from_dict(config))
    except Exception as error:  # each class has its own for what is wrong with its settings
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file}: is no configuration of a {kind} ({why})") from error


def _clip_tokens(file: Path) -> int:
    """The longest prompt of a CLIP tokenizer, to which all are padded."""
    length = read_keys(file).get("model_max_length") if file.is_file() else None
    return length if isinstance(length, int) and length < 10_000 else _CLIP_TOKENS
