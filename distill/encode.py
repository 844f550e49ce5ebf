"""Latents of images and embeddings of prompts, made once and kept in shards: `distill encode`.

A shard is a fixed number of rows, whole under its name or not there, so that a run that was killed goes on where it
stopped; processes share what is missing. A latent is one sample of its image's posterior, by seed and number, as
`distill gaussian` has it. Why one: a VAE's posterior is far narrower than its latents are spread, and mean and width
would take twice the disk to say almost the same.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save
from torch import Tensor

from distill import checkpoint
from distill.config import Encode
from distill.encoded import COMMON, FORMAT, MANIFEST, STAMP, Encoded, open_shard, read_manifest, shard_name
from distill.generate import usable_device
from distill.progress import Progress
from distill.rows import Rows, read_rows
from distill.run import differences
from distill.together import joined, together
from samplers.atomic import atomic_write

SETTINGS = "settings.json"  # written first: what every file of the folder is made with


def encode(config: Encode) -> Encoded:
    """Makes what is missing of what the configuration asks for, and writes the manifest.

    Raises ValueError, the same on all processes: before anything is written, for data, prompts or a pipeline that do
    not fit, and a folder of other settings; with the finished shards kept, for an image that cannot be read, and what
    is not finite in the dtype.
    """
    accelerator = joined()
    device = accelerator.device if config.device is None else usable_device(config.device)
    folder, rows = Path(config.out), read_rows(config, device)
    begun = together(lambda _: _begin(folder, rows), None, accelerator, only_first=True)
    kept, told = broadcast_object_list([begun])[0]  # as the first process found it: another may have begun to write

    shards = _shards(rows)
    missing = [k for k in range(len(shards)) if shard_name(k) not in kept]
    own = _Share(folder, rows, accelerator)
    own.each(own.check, [(name, told.get(name)) for name in kept])
    with Progress(len(rows), "row") as progress:
        own.begin(progress, len(rows) - sum(len(shards[k]) for k in missing))
        own.each(own.make, missing)

    found = {name: digest for part in gather_object([own.hashes]) for name, digest in part.items()}
    together(lambda _: _finish(folder, rows, found), None, accelerator, only_first=True)
    return Encoded.read(folder)


class _Share:
    """A process's share of the work: every file that it checks or makes, with its SHA-256."""

    def __init__(self, folder: Path, rows: Rows, accelerator: Accelerator) -> None:
        self._folder, self._rows, self._accelerator = folder, rows, accelerator
        self._shards, self._stamp = _shards(rows), _stamp(rows.settings)
        self.hashes: dict[str, str] = {}

    def each(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        """work(item), each on one of the processes, in step, so that what goes wrong on one ends all."""
        processes, first = self._accelerator.num_processes, self._accelerator.process_index
        for start in range(0, len(items), processes):
            mine = items[start + first : start + first + 1] if start + first < len(items) else []
            together(lambda mine: list(map(work, mine)), mine, self._accelerator)

    def check(self, named: tuple[str, str | None]) -> None:
        """A file that is there. Raises ValueError where a manifest told otherwise."""
        name, told = named
        self.hashes[name] = checkpoint.sha256(self._folder / name)
        if told not in (None, self.hashes[name]):
            raise ValueError(f"out: {self._folder / name} is damaged; remove it and start again")

    def begin(self, progress: Progress, done: int) -> None:
        """Where the bar starts."""
        self._progress, self._done, self._shown = progress, done, -1
        self._show(done)

    def make(self, k: int) -> None:
        """Shard k."""
        tensors = self._rows.make(
            self._shards[k], lambda n: self._show(self._done + n * self._accelerator.num_processes)
        )
        self.hashes[shard_name(k)] = _write(self._folder / shard_name(k), tensors, self._stamp)
        self._done += len(self._shards[k]) * self._accelerator.num_processes

    def _show(self, done: int) -> None:
        """Where there is no bar, a line for every hundredth."""
        done = min(done, len(self._rows))
        if (share := 100 * done // len(self._rows)) > self._shown:
            self._shown = share
            self._progress(done)


def _begin(folder: Path, rows: Rows) -> tuple[list[str], dict[str, str]]:
    """Which files of the folder are whole already, and the SHA-256 that an older manifest tells of each.

    Raises ValueError for a folder of something else or of other settings, and a damaged file.
    """
    settings, file = rows.settings, folder / SETTINGS
    if file.is_file():
        _check_settings(file, settings)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out: {folder} is there and is not of `distill encode`; accepted is a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for draft in folder.glob(".*.tmp"):  # of a run that was killed
        draft.unlink()
    if not file.is_file():
        with atomic_write(file) as opened:
            opened.write(json.dumps(settings, indent=1).encode())
    if not (folder / COMMON).is_file():
        _write(folder / COMMON, rows.common(), _stamp(settings))

    names = [COMMON, *(shard_name(k) for k in range(len(_shards(rows))))]
    kept = [name for name in names if (folder / name).is_file()]
    for name in kept:
        open_shard(folder / name, _stamp(settings))
    if not (folder / MANIFEST).is_file():
        return kept, {}
    told = read_manifest(folder)["files"]
    return kept, {name: entry["sha256"] for name, entry in told.items()}


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"out: {file} cannot be read as JSON ({error})") from error
    for key in differences(before, settings):
        values = [_at(which, key) for which in (before, settings)]
        raise ValueError(
            f"out: {file.parent} was made with {key} {values[0]}, not {values[1]}; accepted are the same settings, or "
            "another folder"
        )


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return f"{settings[:16]}..." if isinstance(settings, str) and len(settings) == 64 else settings


def _finish(folder: Path, rows: Rows, hashes: dict[str, str]) -> None:
    """Writes the manifest, which says that all is there."""
    first = open_shard(folder / shard_name(0), _stamp(rows.settings))
    names = [COMMON, *(shard_name(k) for k in range(len(_shards(rows))))]
    manifest = {
        "format": FORMAT,
        "settings": _stamp(rows.settings),
        "count": len(rows),
        "flip": rows.config.flip,
        "classes": rows.classes,
        "tensors": {name: first.get_slice(name).get_shape()[1:] for name in first.keys()},  # noqa: SIM118 (no mapping)
        **{key: rows.settings.get(key) for key in ("pipeline", "rows", "dtype", "vae", "negative_prompt")},
        "encoders": rows.settings.get("encoders", {}),
        "made": rows.config.model_dump(mode="json"),
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in names},
    }
    with atomic_write(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def _write(file: Path, tensors: dict[str, Tensor], stamp: str) -> str:
    content = save(tensors, {STAMP: stamp})
    with atomic_write(file) as opened:
        opened.write(content)
    return hashlib.sha256(content).hexdigest()


def _shards(rows: Rows) -> list[range]:
    """The rows of each shard."""
    n = rows.config.rows
    return [range(k, min(k + n, len(rows))) for k in range(0, len(rows), n)]


def _stamp(settings: dict[str, Any]) -> str:
    """A hash of what decides the rows, which every file bears."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
