"""The `distill` command in real processes of its own, without a new import of torch for each.

A server process imports the libraries once, never computes, and forks: each run is a fresh process that can be killed
and limited like any other, and starts in milliseconds. `fresh` is the slow road: a new interpreter.
"""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.distill.preload"])


@dataclass(frozen=True)
class Result:
    """What a process left: the exit code (negative: killed by that signal) and its two streams."""

    code: int | None
    out: str
    err: str


class Running:
    """A `distill` command at work."""

    def __init__(
        self,
        arguments: tuple[object, ...],
        cwd: Path,
        file_limit: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._streams = [cwd / f".{name}.{id(self)}" for name in ("out", "err")]
        texts = [str(argument) for argument in arguments]
        given = (texts, cwd, self._streams, file_limit, dict(environment or {}))
        self.process: BaseProcess = _SERVER.Process(target=_main, args=given)
        self.process.start()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)

    def wait(self, timeout: float = 120) -> Result:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "still running"
        texts = [file.read_text() if file.exists() else "" for file in self._streams]
        for file in self._streams:
            file.unlink(missing_ok=True)
        return Result(self.process.exitcode, *texts)


def distill(*arguments: object, cwd: Path, file_limit: int | None = None) -> Result:
    """Runs a command to its end. file_limit: no file can grow beyond so many bytes, as on a full disk."""
    return Running(arguments, cwd, file_limit).wait()


def fresh(*command: object, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python with arguments in a new interpreter."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout, check=False)


def _main(
    arguments: list[str], cwd: Path, streams: list[Path], file_limit: int | None, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    for number, file in enumerate(streams, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    sys.argv = ["distill", *arguments]

    import torch

    from distill.cli import main

    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    main()


def processor_time() -> float:
    """Seconds that the processes which were waited for have computed: what else the machine does is not in it."""
    times = os.times()
    return times.children_user + times.children_system
