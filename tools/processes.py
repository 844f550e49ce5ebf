"""A batch done by processes: of this machine, of an executor, or by this one alone.

Each works on its own (`tools.workers`), so one that is killed takes no other with it. What is wrong with a manifest is
said before any is started.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tools.manifest import Manifest
from tools.workers import Shard, Worker, say_line

if TYPE_CHECKING:
    from tools.results import Result

GRACE = 10.0  # seconds for a process to end in order


def run_batch(
    manifest: Manifest,
    folder: str | Path,
    *,
    workers: int = 1,
    executor: Executor | None = None,
    device: str | None = None,
    shard: Shard = (1, 1),
    command: str = "",
) -> "list[Result]":
    """Does all jobs of a manifest, and returns their results in the manifest's order.

    workers: processes of this machine, or, with an executor, calls of its `submit`: any `concurrent.futures` executor,
    submitit's, dask's. device: None is a CUDA device where there is one. shard (i, n): the jobs i, i + n, ... only.
    Raises ValueError for what the manifest asks for and cannot be, and, after everything else is done, naming them, for
    jobs that failed; OSError where nothing can be written; ChildProcessError where every worker died.
    """
    task = (manifest, str(folder), device, shard, command)
    with _ended_in_order():
        worker = _planned(*task)  # what is wrong is said, and files are hashed, before anything is started
        for note in worker.batch.notes:
            say_line(note)
        if not worker.batch.jobs:
            raise ValueError(f"manifest: leaves no job: {'; '.join(worker.batch.notes)}")
        if not worker.jobs:
            say_line(f"shard {shard[0]}/{shard[1]}: none of {len(worker.batch.jobs)} jobs is in it")
        if executor is not None:
            _calls(task, workers, executor)
        elif workers > 1:
            _processes(task, workers)
        return worker.run()


def _worker(manifest: Manifest, folder: str, device: str | None, shard: Shard, command: str) -> None:
    """A call that another process can be asked for: results are read from the folder.

    What it cannot do is the caller's to report, who meets it again when it looks at what is left.
    """
    with suppress(ValueError, OSError):
        _planned(manifest, folder, device, shard, command).run()


def _calls(task: tuple[Any, ...], workers: int, executor: Executor) -> None:
    """Waits for all, however they end. Raises ChildProcessError if none came to its end."""
    died = []
    for number, future in enumerate([executor.submit(_worker, *task) for _ in range(workers)], 1):
        try:
            future.result()
        except Exception as error:  # each executor has its own for a process that it lost
            died.append(f"worker {number} of {workers} was lost: {' '.join(str(error).split())}")
            say_line(died[-1])
    if len(died) == workers:
        raise ChildProcessError(f"{died[-1]}; none is left; the same command continues")


def _processes(task: tuple[Any, ...], workers: int) -> None:
    """Each on its own: one that is killed takes no other with it, and its work is left to them, or to the caller.

    Raises ChildProcessError if none came to its end.
    """
    context = multiprocessing.get_context("spawn")
    manifest, folder, device, shard, command = task
    tasks = [(manifest, folder, device or _device_of(worker), shard, command) for worker in range(workers)]
    started = [context.Process(target=_process, args=own) for own in tasks]
    died = []
    try:
        for process in started:
            process.start()
        for number, process in enumerate(started, 1):
            process.join()
            if process.exitcode:
                died.append(f"worker {number} of {workers} was ended by {_cause(process.exitcode)}")
                say_line(f"{died[-1]}; what it held is taken over")
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
        for process in started:
            if process.pid is not None:
                process.join(GRACE)
    if len(died) == workers:
        raise ChildProcessError(f"{died[-1]}; none is left; the same command continues")


def _process(*task: Any) -> None:
    with _ended_in_order():
        try:
            _worker(*task)
        except KeyboardInterrupt:  # the terminal tells all processes; the caller says so
            sys.exit(128 + signal.SIGINT)


def _cause(exitcode: int) -> str:
    number = -exitcode if exitcode < 0 else exitcode - 128
    return signal.Signals(number).name if number > 0 else f"an error (exit code {exitcode})"


def _planned(manifest: Manifest, folder: str, device: str | None, shard: Shard, command: str) -> Worker:
    from tools.jobs import Batch

    return Worker(Batch(manifest, folder, device or own_device(), command), shard)


def own_device() -> str:
    """The CUDA device of this process in a launch, if there is one."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _device_of(worker: int) -> str:
    """The CUDA devices in turns, if there are any."""
    import torch

    return f"cuda:{worker % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM, which a scheduler sends before it kills, ends the block as an exception would: drafts are removed, and
    so are the processes that were started. Only the main thread of a process can see to it."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
