"""Images in the order that they are judged in, and what samples are compared with: streams, statistics."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from tools.arithmetic import one_thread
from tools.cache import Cache, Stream
from tools.digest import HashCache
from tools.features import load_extractor
from tools.sources import Source, open_source
from tools.statistics import BLOCK, FeatureStatistics

WAIT = 0.5  # seconds between looks, while another process makes a chunk


def dealt(count: int, seed: int) -> list[int]:
    """The numbers of images in random order: folders are often sorted by class, and a part should be like the whole."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def reference_stream(source: Source, device: str, chunk: int, batch: int) -> Stream:
    """All images of a source, as a reference. Raises ValueError for one that makes them."""
    if source.count is None:
        raise ValueError(f"reference: {source.title} makes images; needed are images that exist, or statistics")
    return stream_of(source, 0, dealt(source.count, 0), {"order": [0, 0, source.count]}, device, chunk, batch)


def stream_of(
    source: Source, seed: int, numbers: Sequence[int], which: dict[str, Any], device: str, chunk: int, batch: int
) -> Stream:
    """The samples `numbers` of a source. Their bits are those of a kind of device, which is among the facts."""
    facts = {"source": source.facts, "which": which, "device": torch.device(device).type}
    return Stream(source, seed, numbers, facts, chunk, batch)


def reference_statistics(
    path: str, spec: str, folder: str | Path, device: str, chunk: int, batch: int, say: Callable[[str], object]
) -> FeatureStatistics:
    """The statistics of all images of a source under an extractor, by the chunks that a batch in `folder` shares.

    say: told what is done. Raises ValueError as `Batch` does.
    """
    source = open_source(
        "digits:held-out" if path == "digits" else path, hashes=HashCache(Path(folder) / "hashes.json")
    )
    stream, cache = reference_stream(source, device, chunk, batch), Cache(folder)
    extractor = load_extractor(spec, source.shape, device)
    for number in range(stream.chunks):
        while cache.missing(stream, [extractor], number):
            with cache.claim(f"{stream.key}-{number}") as mine:
                if mine and cache.missing(stream, [extractor], number):
                    cache.compute(stream, [extractor], number)
            if not mine:  # a worker of a batch makes it
                time.sleep(WAIT)
        say(f"image {min((number + 1) * chunk, len(stream.numbers))}/{len(stream.numbers)}")
    statistics = FeatureStatistics(extractor.dim, extractor.name)
    with one_thread():
        for rows in cache.read(stream, extractor.name).rows.split(BLOCK):
            statistics.update(rows)
    return statistics


def is_statistics(path: str) -> bool:
    """Whether a file is an .npz with mu and sigma, and no images beside them (ADM's have both)."""
    if not path.lower().endswith(".npz"):
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            return "mu" in file.files and "arr_0" not in file.files
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(f"reference: {path} cannot be read as an .npz ({type(error).__name__})") from error
