"""The rows that `distill encode` keeps: an image as its latent, its words as their embeddings, by a pipeline's parts.

Of a pipeline only the VAE is loaded, where there are images, and the text encoders, where there are words.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.captions import captioned, read_prompts
from distill.config import Encode
from distill.data import ImageFiles, image_files, images_identity
from distill.encoded import FORMAT, LATENTS, MIRRORED, encoder_facts
from distill.folders import index_of, load_words, pipeline_folder
from distill.latents import Encoder, read_encoder
from distill.noise import LATENTS as LATENTS_STREAM
from samplers import SampleNoise
from samplers.pipelines import vae_facts
from samplers.prompts import PIPELINES, embed


@dataclass(frozen=True)
class Rows:
    """What is encoded, and by what. settings: all that decides the rows, as JSON.

    encoder: of the images, None where there are prompts only. pipe: whose text encoders are asked, None where there
    are no words.
    """

    config: Encode
    images: ImageFiles | None
    words: tuple[str, ...] | None
    encoder: Encoder | None
    pipe: Any
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.words if self.images is None else self.images)  # type: ignore[arg-type]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the images' classes."""
        return () if self.images is None else self.images.classes

    def make(self, numbers: range, report: Callable[[int], None] | None = None) -> dict[str, Tensor]:
        """The tensors [B, ...] of some rows, on the CPU; `report` is told how many are done.

        Raises ValueError, naming the image or prompt, for what cannot be read, or is not finite in the dtype.
        """
        tensors: dict[str, list[Tensor]] = {}
        for start in range(numbers.start, numbers.stop, self.config.batch):
            batch = range(start, min(start + self.config.batch, numbers.stop))
            for name, value in (self._latents(batch) | self._embeddings(batch)).items():
                tensors.setdefault(name, []).append(value)
            if report is not None:
                report(batch.stop - numbers.start)
        return {name: torch.cat(parts) for name, parts in tensors.items()}

    def common(self) -> dict[str, Tensor]:
        """Labels, and the embeddings, each [1, ...], of no prompt and of the negative one."""
        tensors = {}
        if self.images is not None and self.images.labels is not None:
            tensors["labels"] = self.images.labels
        if self.pipe is not None:
            negative = self.config.negative_prompt
            asked = {"null": None} | ({} if negative is None else {"negative": negative})
            for which, prompt in asked.items():
                tensors |= {f"{which}.{name}": value for name, value in self._embed(prompt, f"{which} prompt").items()}
        return tensors

    def _latents(self, numbers: range) -> dict[str, Tensor]:
        if self.images is None or self.encoder is None:
            return {}
        images, noise = self.images.read(numbers), SampleNoise(self.config.seed, numbers, LATENTS_STREAM)
        found = {LATENTS: self.encoder(images, noise)}
        if self.config.flip:
            found[MIRRORED] = self.encoder(images.flip(-1), noise)
        return {
            name: torch.stack([self._stored(z, self.images.name(k), "latent") for z, k in zip(x, numbers, strict=True)])
            for name, x in found.items()
        }

    def _embeddings(self, numbers: range) -> dict[str, Tensor]:
        if self.words is None:
            return {}
        words = [self.words[k] for k in numbers]
        found = {prompt: self._embed(prompt, repr(prompt)) for prompt in dict.fromkeys(words)}
        return {name: torch.cat([found[prompt][name] for prompt in words]) for name in found[words[0]]}

    def _embed(self, prompt: str | None, called: str) -> dict[str, Tensor]:
        return {name: self._stored(value, called, name) for name, value in embed(self.pipe, prompt).items()}

    def _stored(self, value: Tensor, called: str, what: str) -> Tensor:
        """As it is kept: numbers in the dtype, masks as they are."""
        stored = value.cpu()
        stored = stored.to(getattr(torch, self.config.dtype)) if stored.is_floating_point() else stored
        if not bool(stored.isfinite().all()):
            finite = bool(value.isfinite().all())
            why = f"is too large for dtype: {self.config.dtype}; float32 has room" if finite else "is not finite"
            raise ValueError(f"{called}: its {what} {why}")
        return stored.contiguous()


def read_rows(config: Encode, device: torch.device) -> Rows:
    """What a configuration asks for, with the parts of the pipeline that it needs, on the device.

    Raises ValueError for data, prompts or a pipeline that do not fit.
    """
    folder = pipeline_folder(config.pipeline)
    name = _class_of(folder)
    images, words = _inputs(config, name)
    encoder = pipe = None
    settings: dict[str, Any] = {"format": FORMAT, "pipeline": name, "rows": config.rows, "dtype": config.dtype}
    if images is not None:
        encoder = read_encoder(folder, device)
        encoder.shape(images.channels, images.size)
        identity = images_identity(images.files, Path(str(config.data.path)))
        settings["images"] = {"size": images.size, "files": identity, "count": len(images)}
        settings |= {"flip": config.flip, "seed": config.seed, "vae": vae_facts(encoder.vae)}
    if words is not None:
        pipe = load_words(folder, getattr(torch, config.text_dtype)).to(device)
        settings["prompts"] = {"words": _hash(list(words)), "count": len(words)}
        settings |= {"negative_prompt": config.negative_prompt, "text_dtype": config.text_dtype}
        settings["encoders"] = encoder_facts(folder)
        embed(pipe, None)  # a pipeline without text encoders is refused here
    elif config.negative_prompt is not None:
        raise ValueError(f"negative_prompt: {config.negative_prompt!r} has no use where there are no prompts")
    return Rows(config, images, words, encoder, pipe, settings)


def _inputs(config: Encode, pipeline: str) -> tuple[ImageFiles | None, tuple[str, ...] | None]:
    prompted = bool(PIPELINES[pipeline].embeddings)
    if config.prompts is not None and not prompted:
        raise ValueError(f"prompts: {config.prompts}; a {pipeline} has no use for words")
    path, size = config.data.path, config.data.size
    if path is None:
        return None, read_prompts(str(config.prompts), config.column)
    if not prompted:
        return image_files(path, size), None
    images, words = captioned(path, size, column=config.column, metadata=config.prompts)
    if words is None:
        raise ValueError(
            f"data.path: {path} has no words for its images, which a {pipeline} is conditioned on; needed is NAME.txt "
            "beside each, a metadata.csv or metadata.jsonl, or --prompts"
        )
    return images, words


def _class_of(folder: Path) -> str:
    name = index_of(folder).get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"pipeline: {folder} is a {name}; supported are {', '.join(PIPELINES)}")
    return name


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
