"""The model that is distilled: a diffusers pipeline as one frozen denoiser, with its conditions and its latents."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from distill.folders import (
    FACTS,
    class_count,
    index_of,
    load_pipeline,
    missing_text_part,
    pipeline_folder,
    read_facts,
    read_pipeline,
    sample_shape,
)
from distill.latents import embedding_widths
from samplers import Denoiser, Guided, NetworkDenoiser, SampleNoise, decode, denoiser_from, latent_shape
from samplers.prompts import (
    GUIDANCE_EMBEDDING,
    PIPELINES,
    check_scaling,
    condition,
    denoiser_of,
    embed,
    kind_of,
    name_of,
)

TEXT_PARTS = tuple(f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3"))


class Embeddings(Protocol):
    """Rows of prompts' embeddings, as `distill.encoded.Encoded` reads them from disk."""

    def __len__(self) -> int: ...

    def rows(self, numbers: Sequence[int], names: Sequence[str] | None = None) -> Mapping[str, Tensor]: ...


class Prompted(dict[str, Any]):
    """What a network is given for a batch of prompts, and which ones those are: their numbers, [B], on the CPU."""

    numbers: Tensor


class PromptsInWords:
    """Prompts that are embedded as they are asked for, each different one of a batch once."""

    def __init__(self, prompts: Sequence[str], embed: Callable[[str], Mapping[str, Tensor]]) -> None:
        self._prompts, self._embed = prompts, embed

    def __len__(self) -> int:
        return len(self._prompts)

    def rows(self, numbers: Sequence[int], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Some rows, in their order, [B, ...] each; names: of the embeddings, None is all."""
        asked = [self._prompts[number] for number in numbers]
        found = {prompt: self._embed(prompt) for prompt in dict.fromkeys(asked)}
        return {name: torch.cat([found[prompt][name] for prompt in asked]) for name in names or found[asked[0]]}


@dataclass(frozen=True)
class Words:
    """How a pipeline's network is told of words.

    null: the embeddings, each of one row, of what guidance leads away from. height, width: of the pictures, in pixels;
    None is the pipeline's own. guidance_embedding: what a guidance-distilled network is fed. prompts: those that
    batches are drawn from, None where there are none to draw.
    """

    pipe: Any
    null: Mapping[str, Tensor]
    height: int | None = None
    width: int | None = None
    guidance_embedding: float = GUIDANCE_EMBEDDING
    prompts: Embeddings | None = None

    def condition(self, embeddings: Mapping[str, Tensor]) -> dict[str, Any]:
        """The network's arguments for the embeddings of B prompts, on the pipeline's device."""
        size = {"height": self.height, "width": self.width}
        return condition(self.pipe, embeddings, **size, guidance_embedding=self.guidance_embedding)

    def of_numbers(self, numbers: Tensor) -> Prompted:
        """The network's arguments for the prompts with these numbers, [B]."""
        if self.prompts is None:
            raise ValueError("prompts: there are none; needed is prompts.file or prompts.encoded")
        cond = Prompted(self.condition(self.prompts.rows(numbers.tolist(), tuple(self.null))))
        cond.numbers = numbers
        return cond


@dataclass(frozen=True)
class Teacher:
    """A frozen denoiser, the shape [C, H, W] of its samples (pixels, or a pipeline's latents) and their conditions.

    n_classes: class labels are drawn from 0 .. n_classes - 1; None is a model without classes. null_label: the label
    that stands for "no class", needed for guidance; None if the model has none. interval: the noise levels that are
    guided; None is all. facts: what `distill.json` says. pipe: a pipeline of latents, whose VAE decodes them. words:
    where the model is conditioned on them.
    """

    denoiser: NetworkDenoiser
    scheduler: Any
    shape: tuple[int, ...]
    n_classes: int | None = None
    null_label: int | None = None
    guidance: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    pipe: Any = None
    words: Words | None = None

    def __post_init__(self) -> None:
        if self.guidance != 1 and self.null_label is None and self.words is None:
            raise ValueError(
                f"guidance: {self.guidance} needs a null label, and the model names none "
                f'(a file {FACTS} with "classes" and "null_label" beside model_index.json would)'
            )

        low, high = self.interval or (0.0, math.inf)
        if high < self.denoiser.sigma_min or low > self.denoiser.sigma_limit:
            raise ValueError(
                f"guidance_interval: [{low}, {high}] has no level of the teacher's, [{self.denoiser.sigma_min:.6g}, "
                f"{self.denoiser.sigma_limit:.6g}]"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        guidance: float = 1.0,
        *,
        interval: tuple[float, float] | None = None,
        negative_prompt: str | None = None,
        guidance_embedding: float = GUIDANCE_EMBEDDING,
        height: int | None = None,
        width: int | None = None,
        null: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """Reads a pipeline folder of diffusers, a run folder of `distill teach`, or a repository in the hub's cache,
        from local safetensors only, in float32.

        negative_prompt: what guidance leads away from; None is the pipeline's own idea of no prompt. null: its
        embeddings; the pipeline's text encoders are then not read. Raises ValueError for a folder that is none, a
        pipeline or a scheduler that is not supported, naming it, guidance of a model without a null label, and words
        for one that has no use for them.
        """
        folder = pipeline_folder(path)
        name = str(index_of(folder).get("_class_name"))
        kind = PIPELINES.get(name)
        check_words(folder, negative_prompt, height, width)
        if kind is None or (kind.network == "unet" and not kind.embeddings):
            return cls.of_pixels(folder, *read_pipeline(folder), guidance, interval)

        pipe = load_pipeline(folder, () if null is None and kind.embeddings else TEXT_PARTS)
        if kind.embeddings and null is None:
            if missing := missing_text_part(folder):
                raise ValueError(f"{folder}: its {name} has no {missing}; needed is prompts.encoded")
            null = embed(pipe, negative_prompt)
        size = {"height": height, "width": width}
        found = cls.of_pipeline(pipe, guidance, **size, guidance_embedding=guidance_embedding, null=null)
        return replace(found, interval=interval, facts=read_facts(folder))

    @classmethod
    def of_pipeline(
        cls,
        pipe: Any,
        guidance: float = 1.0,
        *,
        height: int | None = None,
        width: int | None = None,
        guidance_embedding: float = GUIDANCE_EMBEDDING,
        null: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """A pipeline of latents that is loaded already. null: None is the pipeline's own idea of no prompt."""
        kind = kind_of(pipe)
        denoiser = denoiser_of(pipe).requires_grad_(False).eval()
        shape = latent_shape(pipe, height, width)
        if pipe.vae is not None:
            check_scaling(pipe.vae.config, kind)
        if not kind.embeddings:
            label = getattr(pipe, kind.network).config.num_embeds_ada_norm
            return cls(denoiser, pipe.scheduler, shape, label, label, guidance, pipe=pipe)
        null = embed(pipe, None) if null is None else null
        for key, wanted in embedding_widths(name_of(pipe), getattr(pipe, kind.network).config).items():
            if key in null and wanted is not None and null[key].shape[-1] != wanted:
                raise ValueError(
                    f"{key}: of width {null[key].shape[-1]}; the {kind.network} is told of words of width {wanted}, so "
                    "other text encoders belong to it"
                )
        words = Words(pipe, null, height, width, guidance_embedding)
        return cls(denoiser, pipe.scheduler, shape, guidance=guidance, pipe=pipe, words=words)

    @classmethod
    def of_pixels(
        cls,
        folder: Path,
        network: Any,
        scheduler: Any,
        guidance: float = 1.0,
        interval: tuple[float, float] | None = None,
    ) -> Self:
        """A network of pixels and its scheduler, with the classes that its folder tells of. Raises ValueError for
        labels that the network does not have."""
        denoiser = denoiser_from(network, scheduler).requires_grad_(False).eval()

        facts = read_facts(folder)
        n_classes = class_count(facts, network.config.num_class_embeds)
        null_label = facts.get("null_label")
        labels = [label for label in (n_classes and n_classes - 1, null_label) if label is not None]
        if labels and max(labels) >= (network.config.num_class_embeds or 0):
            raise ValueError(
                f"{folder / FACTS}: speaks of label {max(labels)}, but the network has "
                f"{network.config.num_class_embeds or 'no'} labels"
            )
        return cls(denoiser, scheduler, sample_shape(network.config), n_classes, null_label, guidance, facts, interval)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.guided(x, sigma, cond)

    @property
    def guided(self) -> Denoiser:
        """The denoiser with its guidance: x [B, C, H, W], sigma [] or [B], cond: labels [B], a network's arguments for
        words, or None."""
        if self.guidance == 1:
            return self.denoiser
        null = self.null_label if self.words is None else self.words.condition(self.words.null)
        return Guided(self.denoiser, self.guidance, null, self.interval)

    @property
    def classes(self) -> dict[str, int]:
        """The labels of the classes that have names."""
        return getattr(self.pipe, "labels", None) or {name: k for k, name in enumerate(self.facts.get("classes", []))}

    @property
    def sigma_min(self) -> float:
        return self.denoiser.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.denoiser.sigma_max

    def clone(self) -> NetworkDenoiser:
        """A trainable copy of the denoiser, without guidance: where a student or a fake score starts."""
        return copy.deepcopy(self.denoiser).requires_grad_(True)

    def embed(self, prompt: str) -> dict[str, Tensor]:
        """A prompt's embeddings by the pipeline's own text encoders, each [1, ...]."""
        return embed(self.pipe, prompt)

    def under(self, prompts: Embeddings | None) -> Self:
        """The teacher with prompts to draw from, and no text encoders: embeddings are there, the encoders' memory is
        wanted. Prompts in words are embedded as they are asked for, and keep the encoders."""
        if self.words is None:
            return self
        for part in TEXT_PARTS if not isinstance(prompts, PromptsInWords) else ():
            if getattr(self.pipe, part, None) is not None:
                self.pipe.register_modules(**{part: None})
        return replace(self, words=replace(self.words, prompts=prompts))

    def conditions(self, noise: SampleNoise, device: torch.device | str = "cpu") -> Any:
        """Class labels [B], or what the network is given for prompts, uniform, each from its sample's stream; None if
        the model is unconditional."""
        if self.words is not None:
            count = 0 if self.words.prompts is None else len(self.words.prompts)
            return self.words.of_numbers((noise.uniform() * count).long())
        if self.n_classes is None:
            return None
        labels = noise.integers(self.n_classes)
        cond = labels.to(device, non_blocking=True)
        if cond is not labels:
            cond.numbers = labels  # type: ignore[attr-defined]  # which they are, for who reads rows by number
        return cond

    def condition_of(self, numbers: Tensor, device: torch.device | str = "cpu") -> Any:
        """The conditions of samples by number, [B] on the CPU: classes or prompts in their order, again and again."""
        if self.words is not None:
            count = 0 if self.words.prompts is None else len(self.words.prompts)
            return self.words.of_numbers(numbers % max(1, count))
        return None if self.n_classes is None else (numbers % self.n_classes).to(device)

    @torch.no_grad()
    def pictures(self, x: Tensor) -> Tensor:
        """Samples as pictures [B, C, H, W], nominally in [-1, 1]: latents are decoded, one at a time."""
        if self.pipe is None:
            return x
        return torch.cat([decode(self.pipe, one).float() for one in x.split(1)])


def check_words(folder: Path, negative_prompt: str | None, height: int | None, width: int | None) -> None:
    """Raises ValueError where a pipeline without words is told of some, or of a size."""
    name = str(index_of(folder).get("_class_name"))
    kind = PIPELINES.get(name)
    if (kind is None or not kind.embeddings) and not (negative_prompt is height is width is None):
        raise ValueError(
            f"negative_prompt, height, width: {negative_prompt!r}, {height}, {width}; {folder} is a {name} and has no "
            "use for them"
        )
