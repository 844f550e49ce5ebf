"""Tiny but real batches of evaluations: models of a few thousand weights, small pictures, manifests, the command."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from tests.distill.tiny import save_teacher
from tools.results import Result, Values, read_results

SHAPE = (1, 8, 8)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.tools.preload"])
COMMAND = (sys.executable, "-m", "tools.fid")
ROOT = Path(__file__).parents[2]


def save_student(folder: Path, seed: int = 0) -> Path:
    """A pipeline that says of itself that it makes an image in one step."""
    facts = save_teacher(folder, seed=seed) / "distill.json"
    facts.write_text(facts.read_text().replace('"teacher"', '"student"'))
    return folder


def save_pictures(folder: Path, count: int = 40, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Path:
    """A folder of noise, as PNG files: what a file's number is, is in its name."""
    folder.mkdir(parents=True, exist_ok=True)
    levels = torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    for k, image in enumerate(levels):
        array = image[0] if shape[0] == 1 else image.permute(1, 2, 0)
        Image.fromarray(array.contiguous().numpy()).save(folder / f"{k:04}.png")
    return folder


def manifest(reference: object, sources: Mapping[str, object] | object, **changes: Any) -> dict[str, Any]:
    """Two feature spaces, 40 samples in chunks of 8 and batches of 4, two steps; `changes` replace fields, and axes
    where there are such."""
    axes = {axis: changes.pop(axis) for axis in ("sampler", "steps", "guidance", "draw") if axis in changes}
    named = {name: str(path) for name, path in sources.items()} if isinstance(sources, Mapping) else str(sources)
    fields = {
        "reference": str(reference),
        "features": {"digits": ["fd", "kd"], "pixels": ["fd", "precision"]},
        "n": 40,
        "chunk": 8,
        "batch": 4,
        "matrix": {"source": named, "sampler": "euler", "steps": 2} | axes,
    }
    return fields | changes


def write_manifest(file: Path, fields: Mapping[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(dict(fields)))
    return file


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds the packages from any folder, on one thread."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def fid(*arguments: object, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """`distill-fid ARGUMENTS` in a process of its own; `more` goes into its environment."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=300, check=False
    )


def forked(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in a process that a server forks which has imported the libraries: of its own, and at once."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as spare:
        streams = [Path(spare) / name for name in ("out", "err")]
        process = SERVER.Process(target=_forked, args=(words, cwd, streams))
        process.start()
        process.join(200)
        assert process.exitcode is not None, "still running"
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in streams))


class Running:
    """`distill-fid ARGUMENTS` at work, in a process that a server forks which has imported the libraries and never
    computed: one of its own, that can be killed, and starts at once. file_limit: no file can grow beyond so many bytes.
    """

    def __init__(self, *arguments: object, log: Path, file_limit: int | None = None) -> None:
        self.log = log
        self.process: BaseProcess = SERVER.Process(target=_main, args=([*map(str, arguments)], log, file_limit))
        self.process.start()

    def until(self, happened: Callable[[], bool]) -> "Running":
        """Waits until then, and asserts that it did not end before."""
        while not happened():
            assert self.process.is_alive(), self.text
            time.sleep(0.001)
        return self

    def end(self, number: signal.Signals) -> int | None:
        """Sends a signal, and returns the exit code."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return self.wait()

    def wait(self, timeout: float = 200) -> int | None:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {self.text}"
        return self.process.exitcode

    @property
    def text(self) -> str:
        """What it has printed until now, on both streams."""
        return self.log.read_text() if self.log.exists() else ""


def _main(arguments: list[str], log: Path, file_limit: int | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    from tools.fid import main

    sys.exit(main(arguments))


def _forked(arguments: list[str], cwd: Path, streams: list[Path]) -> None:
    for number, file in enumerate(streams, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    torch.set_num_threads(1)

    from tools.fid import main

    sys.exit(main(arguments))


def values_in(folder: Path) -> dict[str, Values]:
    """key -> values of all results of a batch; equal dictionaries are equal bits."""
    return {result.key: result.values for result in read_results([folder])}


def results_in(folder: Path) -> dict[str, Result]:
    """name -> result, of a batch that has each source once."""
    results = read_results([folder])
    assert len({result.name for result in results}) == len(results)
    return {result.name: result for result in results}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """File -> (inode, mtime_ns) of all finished chunks and results: a file that was written again has others."""
    files = [*(folder / "features").rglob("*.safetensors"), *(folder / "results").glob("*.json")]
    return {str(f.relative_to(folder)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}
