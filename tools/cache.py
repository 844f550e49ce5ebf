"""Features of a stream of samples, kept by content: chunks of rows that are computed once, by whoever comes first.

A stream is samples in an order; its key is the sha256 of all that decides them. A chunk is a safetensors file that is
whole or not there (`samplers.atomic`): what a killed run loses is the chunk that it was at. A lock of the operating
system, which dies with its process, keeps two workers from the same chunk.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from samplers.atomic import atomic_write
from tools.arithmetic import reproducible
from tools.digest import digest_json
from tools.features import Extracted, Extractor
from tools.provenance import maker
from tools.sources import Source

VERSION = 1  # of what a chunk holds; a change of the arithmetic that moves bits is a new version


@dataclass(frozen=True)
class Stream:
    """Samples numbers[0], numbers[1], ... of a source and a seed; facts are all that decides them."""

    source: Source
    seed: int
    numbers: Sequence[int]
    facts: dict[str, Any]
    chunk: int
    batch: int

    @cached_property
    def key(self) -> str:
        return digest_json(self.facts | {"chunk": self.chunk, "batch": self.batch, "version": VERSION})[:32]

    @property
    def chunks(self) -> int:
        return -(-len(self.numbers) // self.chunk)

    def rows(self, chunk: int) -> Sequence[int]:
        """The sample numbers of a chunk."""
        return self.numbers[chunk * self.chunk : (chunk + 1) * self.chunk]


@dataclass(frozen=True)
class Features:
    """Of the rows of a stream: features [N, d], logits [N, C] and labels [N] if there are any.

    making, seconds: that the samples took, and with their features. made_on: the devices that computed.
    """

    rows: Tensor
    logits: Tensor | None
    labels: Tensor | None
    making: float
    seconds: float
    made_on: tuple[str, ...]


class Cache:
    """A folder of chunks and locks that any number of processes share, on one machine or a shared disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process alone may work on `name` inside the block; it is told at once."""
        lock = FileLock(self.folder / "locks" / f"{name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def file(self, stream: Stream, extractor: str, chunk: int) -> Path:
        """Where a chunk's features lie. The number of rows is in the name: only the last chunk may have fewer."""
        own = digest_json({"extractor": extractor})[:16]
        return self.folder / "features" / stream.key / own / f"{chunk:06d}-{len(stream.rows(chunk))}.safetensors"

    def missing(self, stream: Stream, extractors: Sequence[Extractor], chunk: int) -> list[Extractor]:
        """Those whose features of this chunk are not there yet."""
        return [e for e in extractors if not self.file(stream, e.name, chunk).is_file()]

    def compute(
        self,
        stream: Stream,
        extractors: Sequence[Extractor],
        chunk: int,
        keep: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Makes a chunk's samples, and writes its features under every extractor.

        A batch is of full size, and cut after it was made, where the source can make more. keep: told every sample's
        number and image. Raises ValueError, naming the stream, for features that are not finite.
        """
        with reproducible(torch.device(stream.facts["device"])):
            self._compute(stream, extractors, chunk, keep)

    def _compute(
        self, stream: Stream, extractors: Sequence[Extractor], chunk: int, keep: Callable[[int, Tensor], None] | None
    ) -> None:
        stream.source.open()  # what it takes to load is no time of a sample
        numbers, started = list(stream.rows(chunk)), time.perf_counter()
        found: dict[str, list[Extracted]] = {e.name: [] for e in extractors}
        labels, making = [], 0.0
        for start in range(0, len(numbers), stream.batch):
            asked = numbers[start : start + stream.batch]
            if stream.source.count is None:  # a shape of its own would have bits of its own
                asked = asked + list(range(asked[-1] + 1, asked[-1] + 1 + stream.batch - len(asked)))
            begun = time.perf_counter()
            samples = stream.source.read(stream.seed, asked)
            making += time.perf_counter() - begun
            images = samples.images[: len(numbers) - start]
            if samples.labels is not None:
                labels.append(samples.labels[: len(images)])
            for extractor in extractors:
                found[extractor.name].append(extractor(images))
            if keep is not None:
                for number, image in zip(asked, images, strict=False):
                    keep(number, image)

        seconds = {"making": making, "all": time.perf_counter() - started}
        for extractor in extractors:
            parts = found[extractor.name]
            tensors = {"features": torch.cat([part.features for part in parts])}
            if parts[0].logits is not None:
                tensors["logits"] = torch.cat([part.logits for part in parts if part.logits is not None])
            bad = (~torch.cat([*tensors.values()], dim=1).isfinite().all(dim=1)).nonzero()[:, 0]
            if len(bad):
                shown = ", ".join(str(numbers[i]) for i in bad[:5].tolist())
                raise ValueError(
                    f"features: {len(bad)} of {len(numbers)} samples of {stream.source.title} have NaN or infinite "
                    f"{extractor.name} features (samples {shown}{', ...' if len(bad) > 5 else ''})"
                )
            if labels:
                tensors["labels"] = torch.cat(labels)
            facts = _facts(stream, extractor.name, chunk) | {"made_on": maker(extractor.device)}
            self._write(self.file(stream, extractor.name, chunk), facts, tensors, seconds)

    def _write(self, file: Path, facts: dict[str, str], tensors: dict[str, Tensor], seconds: dict[str, float]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_drafts(file.parent, [file])
        metadata = facts | {"seconds": json.dumps(seconds)}
        with atomic_write(file) as opened:
            opened.write(save(tensors, metadata | {"sha256": _digest(tensors, metadata)}))

    def read(self, stream: Stream, extractor: str) -> Features:
        """All rows of a stream whose chunks are there, in order.

        Raises ValueError, naming the file, for a chunk that is not what it was when it was written: of other facts,
        changed or cut.
        """
        parts, making, seconds = [], 0.0, 0.0
        made_on: dict[str, None] = {}
        for chunk in range(stream.chunks):
            file, asked = self.file(stream, extractor, chunk), len(stream.rows(chunk))
            try:
                with safe_open(file, "pt") as opened:
                    metadata = opened.metadata() or {}
                    tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"cache: {file} cannot be read ({error}); delete it, and it is made again") from error
            sha256, expected = metadata.pop("sha256", None), _facts(stream, extractor, chunk)
            if {n: metadata.get(n) for n in expected} != expected or sha256 != _digest(tensors, metadata):
                raise ValueError(
                    f"cache: {file} is not what was written under its key; delete it, and it is made again"
                )
            if len(tensors["features"]) != asked:
                raise ValueError(f"cache: {file} has {len(tensors['features'])} rows, not {asked}; delete it")
            parts.append(tensors)
            took = json.loads(metadata["seconds"])
            making, seconds = making + took["making"], seconds + took["all"]
            made_on[metadata["made_on"]] = None

        def joined(name: str) -> Tensor | None:
            return torch.cat([part[name] for part in parts]) if name in parts[0] else None

        rows = torch.cat([part["features"] for part in parts])
        return Features(rows, joined("logits"), joined("labels"), making, seconds, tuple(made_on))


def remove_drafts(folder: Path, files: Iterable[Path]) -> None:
    """What killed workers left in a folder of files that were never finished; for the one who alone may write them."""
    names = {f".{file.name}" for file in files}
    for draft in folder.glob(".*.tmp"):
        if draft.name.rsplit(".", 2)[0] in names:
            draft.unlink(missing_ok=True)


def _facts(stream: Stream, extractor: str, chunk: int) -> dict[str, str]:
    return {"stream": stream.key, "extractor": extractor, "chunk": str(chunk)}


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(digest_json(metadata).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
