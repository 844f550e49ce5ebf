"""The teacher that a configuration names, with its prompts: a file of words, or what `distill encode` made of one."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distill.captions import read_prompts
from distill.config import FirstStage, Train
from distill.encoded import Encoded, encoder_facts
from distill.folders import FACTS, index_of, load_words, missing_text_part, pipeline_folder, pixel_classes, read_facts
from distill.progress import Progress
from distill.stock import CONSISTENCY
from distill.teacher import Teacher
from samplers.pipelines import vae_facts
from samplers.prompts import PIPELINES, embed

LARGEST = 8 * 2**30  # bytes of embeddings that are held in memory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class EmbeddedPrompts:
    """Prompts' embeddings in memory, each prompt's once: those of a file that was not encoded before."""

    def __init__(self, prompts: Sequence[str], embed: Callable[[str], Mapping[str, Tensor]]) -> None:
        different = list(dict.fromkeys(prompts))
        embedded = []
        with Progress(len(different), "prompt") as progress:
            for k, prompt in enumerate(different, start=1):
                embedded.append({name: value.cpu() for name, value in embed(prompt).items()})
                size = len(different) * sum(value.nbytes for value in embedded[0].values())
                if size > LARGEST:
                    raise ValueError(
                        f"prompts.file: the embeddings of {len(different):,} prompts have {size / 2**30:.0f} GiB; "
                        f"{LARGEST / 2**30:.0f} are held at most, needed is prompts.encoded (`distill encode`)"
                    )
                if k % 100 == 0:
                    progress(k)
        self._table = {name: torch.cat([row[name] for row in embedded]) for name in embedded[0]}
        place = {prompt: k for k, prompt in enumerate(different)}
        self._places = torch.tensor([place[prompt] for prompt in prompts])

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, numbers: Sequence[int], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Some rows, in their order, [B, ...] each; names: of the embeddings, None is all."""
        places = self._places[list(numbers)]
        return {name: self._table[name][places] for name in names or self._table}


def load_teacher(config: Train | FirstStage, device: torch.device) -> tuple[Teacher, Encoded | None]:
    """The teacher with its prompts, in float32 on the CPU, and the rows that were encoded for it. Words are embedded on
    the device, by text encoders that are then let go.

    Raises ValueError as `Teacher.load`, and for prompts that are missing, of no use, or made by other text encoders.
    """
    source = config.teacher
    prompts = config.prompt_source if isinstance(config, Train) else config.prompts
    folder = teacher_folder(config)
    rows, words = read_prompts_of(config)
    null, text = None, None
    if words is not None:
        text = load_words(folder).to(device)
        null = {key: value.cpu() for key, value in embed(text, source.negative_prompt).items()}
    elif rows is not None and rows.embeddings:
        null = null_of(rows, source.negative_prompt)
    teacher = Teacher.load(
        folder,
        source.guidance,
        interval=source.guidance_interval,
        negative_prompt=source.negative_prompt,
        guidance_embedding=source.guidance_embedding,
        height=prompts.height,
        width=prompts.width,
        null=null,
    )
    if rows is not None:
        vae = None if teacher.pipe is None else vae_facts(teacher.pipe.vae)
        rows.check(str(index_of(folder).get("_class_name")), vae, encoder_facts(folder))
    if words is None:
        return teacher.under(rows), rows
    return teacher.under(EmbeddedPrompts(words, partial(embed, text))), rows


def teacher_folder(config: Train | FirstStage) -> Path:
    """The pipeline folder of a configuration's teacher. Raises ValueError where there is none, or it is a student, or a
    consistency model, which diffusers' files do not tell from a denoiser under the same scheduler."""
    folder = pipeline_folder(str(config.teacher.path))
    if read_facts(folder).get("kind") == "student":
        raise ValueError(
            f"teacher.path: {folder} is a student, which knows its own noise levels only; needed is a teacher"
        )
    scheduler = index_of(folder).get("scheduler") or [None, None]
    if scheduler[1] == CONSISTENCY and read_facts(folder).get("kind") != "teacher":
        raise ValueError(
            f"teacher.path: {folder} has the scheduler of consistency models, whose outputs are no means E[x0 | x]; if "
            f'its network is an EDM denoiser, a file {FACTS} with "kind": "teacher" beside model_index.json says so'
        )
    return folder


def read_prompts_of(config: Train | FirstStage) -> tuple[Encoded | None, tuple[str, ...] | None]:
    """What was encoded for a teacher, or the prompts that are to be embedded; of a model without words neither has any.

    Raises ValueError for a pipeline that is not supported, and for prompts that are missing or of no use to it.
    """
    prompts = config.prompt_source if isinstance(config, Train) else config.prompts
    folder = teacher_folder(config)
    name = str(index_of(folder).get("_class_name"))
    kind = PIPELINES.get(name)
    rows = None if prompts.encoded is None else Encoded.read(prompts.encoded)
    if kind is None or not kind.embeddings:
        if kind is None or kind.network == "unet":
            pixel_classes(folder)
        named = prompts.file or (prompts.encoded if not isinstance(config, Train) else config.prompts.encoded)
        if named is not None and not isinstance(config, FirstStage):
            key = "file" if prompts.file is not None else "encoded"
            raise ValueError(f"prompts.{key}: {named}; {folder} is a {name}, which has no use for words")
        return rows, None
    if rows is not None:
        if not rows.embeddings:
            key = "prompts.encoded" if config.prompts.encoded is not None else "real.encoded"
            raise ValueError(f"{key}: {rows.folder} has no prompts; needed are their embeddings")
        return rows, None
    if prompts.file is None:
        raise ValueError(
            f"prompts: there are none, and {folder} is a {name}, which is conditioned on words; needed is prompts.file "
            "or prompts.encoded"
        )
    if missing := missing_text_part(folder):
        raise ValueError(f"prompts.file: {folder} has no {missing}; needed is prompts.encoded")
    return None, read_prompts(prompts.file, prompts.column)


def null_of(rows: Encoded, negative_prompt: str | None) -> dict[str, Tensor]:
    """The embeddings that guidance leads away from. Raises ValueError where another negative prompt was encoded."""
    if negative_prompt is None:
        return rows.null
    if negative_prompt != rows.negative_prompt:
        raise ValueError(
            f"teacher.negative_prompt: {negative_prompt!r}; {rows.folder} was encoded with {rows.negative_prompt!r}"
        )
    return rows.negative


def frozen_dtype(name: str, precision: str, device: torch.device) -> torch.dtype:
    """The dtype of frozen networks. Raises ValueError for one that the device cannot compute in."""
    dtype = (torch.bfloat16 if precision == "bf16" else torch.float32) if name == "auto" else DTYPES[name]
    try:
        ones = torch.ones(1, 1, 8, 8, dtype=dtype, device=device)
        torch.nn.functional.scaled_dot_product_attention(ones, ones, ones)
        torch.nn.functional.group_norm(torch.nn.functional.conv2d(ones, ones[..., :1, :1]), 1)
    except RuntimeError as error:
        accepted = "accepted are float32 and those that it can compute in"
        raise ValueError(f"teacher.dtype: {name}; {device.type} cannot compute in {dtype}; {accepted}") from error
    return dtype
