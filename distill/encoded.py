"""What `distill encode` made, read row by row: latents of images and embeddings of prompts, in safetensors shards.

A folder has `manifest.json` (written last), `common.safetensors` (labels; the embeddings of no prompt and of the
negative one) and shards of a fixed number of rows. Nothing is read before it is asked for.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill import checkpoint
from distill.folders import index_of, read_keys

FORMAT = 1
MANIFEST, COMMON = "manifest.json", "common.safetensors"
LATENTS, MIRRORED = "latents", "mirrored"
STAMP = "distill"  # the metadata of a shard: what it is a part of
_OPEN = 128  # shards whose files are kept open, below the 256 that some systems allow
_BLOCK, _BLOCKS = 2**20, 16


class _File(BaseModel):
    bytes: int
    sha256: str


class _Manifest(BaseModel):
    """What a manifest says at least."""

    format: int
    classes: list[str]
    count: PositiveInt
    encoders: dict[str, str]
    files: dict[str, _File]
    flip: bool
    negative_prompt: str | None
    pipeline: str
    rows: PositiveInt
    settings: str
    tensors: dict[str, list[int]]
    vae: dict[str, Any] | None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of `distill encode` in a folder says. Raises ValueError for one that is none."""
    file = folder / MANIFEST
    facts = read_keys(file, f"encoded: {file}")
    if facts.get("format", FORMAT) != FORMAT:
        raise ValueError(f"encoded: {file} is of format {facts['format']}; read is {FORMAT}")
    try:
        _Manifest.model_validate(facts, strict=True)
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        raise ValueError(f"encoded: {file} is not the manifest of `distill encode` ({wrong})") from error
    return facts


class Encoded:
    """Rows of latents and embeddings on disk.

    facts: what the manifest says. Row k is image or prompt k; where `distill encode` was asked to flip, row n + k is
    the mirror image of row k of n, with the same prompt and label.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts
        self._files: OrderedDict[int, Any] = OrderedDict()

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The rows in a folder. Raises ValueError for one that is none or unfinished, and a file that is missing or
        truncated."""
        folder = Path(folder)
        file = folder / MANIFEST
        if not file.is_file():
            begun = any(folder.glob("*.safetensors"))
            why = (
                "has not finished: start `distill encode` again" if begun else f"has no {MANIFEST} of `distill encode`"
            )
            raise ValueError(f"encoded: {folder} {why}")
        facts = read_manifest(folder)
        for name, entry in facts["files"].items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"is truncated: it has {size} bytes of {entry['bytes']}"
                raise ValueError(f"encoded: {folder / name} {found}")
        return cls(folder, facts)

    def __len__(self) -> int:
        return self.facts["count"] * (1 + self.facts["flip"])

    @property
    def shape(self) -> tuple[int, ...] | None:
        """[c, h, w] of the latents; None where there are prompts only."""
        found = self.facts["tensors"].get(LATENTS)
        return None if found is None else tuple(found)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The names of the embeddings, which are those of the pipeline's arguments; none where there are no prompts."""
        return tuple(name for name in self.facts["tensors"] if name not in (LATENTS, MIRRORED))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the order of their labels."""
        return tuple(self.facts["classes"])

    @property
    def negative_prompt(self) -> str | None:
        """Whose embeddings are `negative`."""
        return self.facts["negative_prompt"]

    @cached_property
    def labels(self) -> Tensor | None:
        """[N], int64; None where the images have no classes."""
        labels = self._common.get("labels")
        return None if labels is None else labels.repeat(1 + self.facts["flip"])

    @cached_property
    def null(self) -> dict[str, Tensor]:
        """The embeddings, each [1, ...], of what the pipeline itself guides away from."""
        return self._of("null")

    @cached_property
    def negative(self) -> dict[str, Tensor]:
        """Those of the negative prompt; of none where none was given."""
        return self._of("null" if self.negative_prompt is None else "negative")

    def rows(self, numbers: Sequence[int], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Some rows, in their order, on the CPU as they are stored: `latents` [B, c, h, w], and embeddings [B, ...].

        names: which of them are read; None is all. Raises ValueError for a number out of range, a name that is not
        there, and a shard that is damaged.
        """
        there = (*((LATENTS,) if self.shape is not None else ()), *self.embeddings)
        names = there if names is None else names
        for name in names:
            if name not in there:
                raise ValueError(f"encoded: {self.folder} has no {name}; there are {', '.join(there)}")
        if not len(numbers):
            return {name: torch.empty(0, *self.facts["tensors"][name]) for name in names}
        found = [self._read(span, names) for span in self._spans(numbers)]
        return {name: torch.cat([part[name] for part in found]) for name in names}

    def check(self, pipe_class: str, vae: Mapping[str, Any] | None, encoders: Mapping[str, str]) -> None:
        """Raises ValueError, naming both, for rows that another pipeline, VAE or text encoders made.

        vae: `samplers.pipelines.vae_facts`. encoders: `encoder_facts`; what either side lacks is not compared.
        """
        ours = self.facts
        if ours["pipeline"] != pipe_class:
            raise ValueError(f"encoded: {self.folder} was made for a {ours['pipeline']}; the teacher is a {pipe_class}")
        if self.shape is not None:
            self._check_vae(vae)
        for part in sorted(ours["encoders"].keys() & encoders.keys()) if self.embeddings else ():
            if ours["encoders"][part] != encoders[part]:
                raise ValueError(
                    f"encoded: {self.folder} was made by a {part} with the hash {ours['encoders'][part][:16]}; that of "
                    f"the teacher has {encoders[part][:16]}"
                )

    def verify(self) -> None:
        """Reads every file. Raises ValueError, naming it, for one whose SHA-256 is not that of the manifest."""
        for name, entry in self.facts["files"].items():
            if checkpoint.sha256(self.folder / name) != entry["sha256"]:
                raise ValueError(f"encoded: {self.folder / name} is damaged: its SHA-256 is not that of {MANIFEST}")

    def _check_vae(self, vae: Mapping[str, Any] | None) -> None:
        ours = self.facts["vae"]
        if vae is None:
            raise ValueError(f"encoded: {self.folder} has latents of a {ours['class']}; the teacher has no VAE")
        for name in sorted(ours.keys() - {"sha256"}):
            if ours[name] != vae.get(name):
                raise ValueError(
                    f"encoded: {self.folder} has latents of a VAE with {name} {ours[name]}; that of the teacher has "
                    f"{vae.get(name)}"
                )
        theirs = vae.get("sha256", {})
        if not any(theirs.get(dtype) == digest for dtype, digest in ours["sha256"].items()):
            told = [next(iter(hashes.values()), "none")[:16] for hashes in (ours["sha256"], theirs)]
            raise ValueError(
                f"encoded: {self.folder} has latents of a VAE with weights of SHA-256 {told[0]}; those of the "
                f"teacher's are {told[1]}"
            )

    def _spans(self, numbers: Sequence[int]) -> Iterator[range]:
        """The numbers, in their order, as far as one look into one shard goes."""
        start = stop = -1
        for number in map(int, numbers):
            if not 0 <= number < len(self):
                raise ValueError(f"encoded: row {number}; {self.folder} has rows 0 .. {len(self) - 1}")
            if number != stop or number % self.facts["count"] % self.facts["rows"] == 0:
                if stop > start:
                    yield range(start, stop)
                start = number
            stop = number + 1
        yield range(start, stop)

    def _read(self, span: range, names: Sequence[str]) -> dict[str, Tensor]:
        """Rows that lie side by side in a shard, each [n, ...]."""
        mirrored, number = divmod(span.start, self.facts["count"])
        k, place = divmod(number, self.facts["rows"])
        file, where = self._shard(k), slice(place, place + len(span))
        keys = {name: MIRRORED if mirrored and name == LATENTS else name for name in names}
        return {name: file.get_slice(key)[where] for name, key in keys.items()}

    def _shard(self, k: int) -> Any:
        if k in self._files:
            self._files.move_to_end(k)
            return self._files[k]
        file = open_shard(self.folder / shard_name(k), self.facts["settings"])
        self._files[k] = file
        if len(self._files) > _OPEN:
            self._files.popitem(last=False)
        return file

    @cached_property
    def _common(self) -> dict[str, Tensor]:
        file = open_shard(self.folder / COMMON, self.facts["settings"])
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)

    def _of(self, which: str) -> dict[str, Tensor]:
        return {name: self._common[f"{which}.{name}"] for name in self.embeddings}


def shard_name(k: int) -> str:
    """The file of shard k."""
    return f"shard-{k:06d}.safetensors"


def open_shard(file: Path, settings: str) -> Any:
    """A file of `distill encode`, its tensors not yet read. Raises ValueError for a damaged one or other settings'."""
    try:
        opened = safe_open(file, "pt")
        stamp = (opened.metadata() or {}).get(STAMP)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"encoded: {file} is damaged ({error}); remove it and start `distill encode` again") from error
    if stamp != settings:
        raise ValueError(f"encoded: {file} was made with other settings; accepted are those of its folder's others")
    return opened


def encoder_facts(folder: str | Path) -> dict[str, str]:
    """What tells the text encoders and tokenizers of a pipeline folder from others', by part: a hash.

    Of the settings and, so that nobody waits for the twenty gigabytes of a T5, of a file's size and 16 evenly spaced
    megabytes of it: training changes all of a network.
    """
    folder = Path(folder)
    parts = [
        name for name, part in index_of(folder).items() if name.startswith(("text_encoder", "tokenizer")) and part[0]
    ]
    return {part: digest for part in parts if (digest := _fingerprint(folder / part)) is not None}


def _fingerprint(part: Path) -> str | None:
    # A variant (model.fp16.safetensors) is not read, nor are the records of who saved the part.
    files = [f for f in sorted(part.glob("*")) if f.suffix in (".txt", ".model", ".safetensors") and "." not in f.stem]
    files += [f for name in ("vocab.json", "tokenizer.json") if (f := part / name).is_file()]
    config = part / "config.json"
    if not files and not config.is_file():
        return None
    digest = hashlib.sha256()
    if config.is_file():
        settings = {
            key: value
            for key, value in json.loads(config.read_text()).items()
            if not key.startswith("_") and key not in ("transformers_version", "torch_dtype", "dtype")
        }
        digest.update(json.dumps(settings, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            steps = range(0, size, _BLOCK) if size <= _BLOCK * _BLOCKS else range(0, size - _BLOCK, size // _BLOCKS)
            for start in steps:
                content.seek(start)
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()
