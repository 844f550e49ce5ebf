"""Workers of a batch: each takes the chunks that nobody holds, and the results whose chunks are all there.

Any number of them run on one folder, as processes of one command, of `accelerate launch`, of a Slurm array, or by hand;
there is no server. A worker that dies leaves its locks to the others, and a run after it starts where it was.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tools.manifest import Manifest

if TYPE_CHECKING:
    from torch import Tensor

    from tools.cache import Stream
    from tools.features import Extractor
    from tools.jobs import Batch, Job
    from tools.results import Result
    from tools.sources import Source

WAIT = 0.5  # seconds between looks, while others hold all that is left
GRACE = 10.0  # seconds for a process to end in order

Shard = tuple[int, int]  # i of n, from 1


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
            _line(note)
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
            _line(died[-1])
    if len(died) == workers:
        raise ChildProcessError(f"{died[-1]}; none is left; the same command continues")


def _processes(task: tuple[Any, ...], workers: int) -> None:
    """Each on its own: one that is killed takes no other with it, and its work is left to them, or to the caller.

    Raises ChildProcessError if none came to its end.
    """
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_process, args=task) for _ in range(workers)]
    died = []
    try:
        for process in started:
            process.start()
        for number, process in enumerate(started, 1):
            process.join()
            if process.exitcode:
                died.append(f"worker {number} of {workers} was ended by {_cause(process.exitcode)}")
                _line(f"{died[-1]}; what it held is taken over")
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


def _planned(manifest: Manifest, folder: str, device: str | None, shard: Shard, command: str) -> "Worker":
    from tools.jobs import Batch

    return Worker(Batch(manifest, folder, device or own_device(), command), shard)


def own_device() -> str:
    """The CUDA device of this process in a launch, if there is one."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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


class Bar:
    """The chunks that are there, of all that a worker waits for: a bar on a terminal, lines elsewhere."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker

    def __enter__(self) -> "Bar":
        from tqdm import tqdm

        one_of_many = multiprocessing.parent_process() is not None
        self._bar = tqdm(unit="chunk", disable=one_of_many or not sys.stderr.isatty())
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        if self._bar.disable:
            _line(text)
        else:
            self._bar.n, self._bar.total = self._worker.chunks()
            self._bar.write(text, file=sys.stderr)
            self._bar.refresh()


class Worker:
    """One process's part of a batch."""

    def __init__(self, batch: "Batch", shard: Shard = (1, 1)) -> None:
        self.batch = batch
        self.jobs = batch.jobs[shard[0] - 1 :: shard[1]]
        self.failures: dict[str, str] = {}  # job -> why
        self._open: Source | None = None  # the one whose networks are in memory

    def run(self) -> "list[Result]":
        """Until every job of the shard has its result, whoever made it. Raises ValueError for those that cannot."""
        from tools.results import Result

        with Bar(self) as self.bar:
            self._until_done()
        if self.failures:
            failed, first = len(self.failures), next(iter(self.failures.values()))
            raise ValueError(f"{failed} of {len(self.jobs)} jobs failed, the others are done; the first: {first}")
        return [Result.load(self.batch.result_file(job)) for job in self.jobs]

    def chunks(self) -> tuple[int, int]:
        """How many chunks of features are there, and how many there will be."""
        cache, needed = self.batch.cache, {}
        for job in self.jobs:
            for stream, extractors in self.batch.streams_of(job):
                needed[stream.key] = stream, extractors
        missing = [
            bool(cache.missing(stream, extractors, chunk))
            for stream, extractors in needed.values()
            for chunk in range(stream.chunks)
        ]
        return missing.count(False), len(missing)

    def _until_done(self) -> None:
        total = len(self.jobs)
        left = [job for job in self.jobs if not self._done(job)]
        if len(left) < total:
            self.bar.say(f"{total - len(left)} of {total} results are there")
        while left:
            moved = False
            for job in left:
                moved |= self._advance(job)
            left = [job for job in left if job.key not in self.failures and not self._done(job)]
            if left and not moved:
                time.sleep(WAIT)

    def _advance(self, job: "Job") -> bool:
        """Whether anything of the job could be done now."""
        try:
            moved, complete = self._chunks(job)
            return (complete and self._finish(job)) or moved
        except (ValueError, RuntimeError) as error:  # the second is torch's: of memory, or of a network of the user's
            self.failures[job.key] = f"{job.point.name}: {' '.join(str(error).split())}"
            self.bar.say(self.failures[job.key])
            return True
        except OSError as error:  # of a full disk, which is no job's fault
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(self.batch.folder)) from error

    def _chunks(self, job: "Job") -> tuple[bool, bool]:
        """Computes the chunks that nobody holds: whether there was one, and whether all are there."""
        cache, moved, complete = self.batch.cache, False, True
        for stream, extractors in self.batch.streams_of(job):
            own = stream is job.stream
            for chunk in range(stream.chunks):
                if not (cache.missing(stream, extractors, chunk) or (own and self._unkept(job, chunk))):
                    continue
                with cache.claim(f"{stream.key}-{chunk}") as mine:
                    missing = cache.missing(stream, extractors, chunk) if mine else []
                    unkept = self._unkept(job, chunk) if mine and own else {}
                    if missing or unkept:
                        self._compute(stream, missing, chunk, unkept)
                        moved = True
                    complete &= mine
        return moved, complete

    def _compute(self, stream: "Stream", missing: "list[Extractor]", chunk: int, unkept: dict[int, Path]) -> None:
        from tools.arithmetic import one_thread
        from tools.cache import remove_drafts

        self._make_room_for(stream.source)
        if unkept:
            self._samples(stream).mkdir(parents=True, exist_ok=True)
            remove_drafts(self._samples(stream), unkept.values())
        started = time.perf_counter()
        with one_thread() if self.batch.device == "cpu" else nullcontext():
            self.batch.cache.compute(stream, missing, chunk, partial(_write_sample, unkept) if unkept else None)
        done = f"{chunk * stream.chunk + len(stream.rows(chunk))}/{len(stream.numbers)}"
        took = time.perf_counter() - started
        self.bar.say(f"{stream.source.title} [{stream.key[:8]}-{chunk}]: image {done}, {took:.1f} s")

    def _make_room_for(self, source: "Source") -> None:
        if self._open is not None and self._open is not source:
            self._open.close()
        self._open = source

    def _samples(self, stream: "Stream") -> Path:
        return self.batch.folder / "samples" / stream.key

    def _unkept(self, job: "Job", chunk: int) -> dict[int, Path]:
        """The files of a chunk's samples that are to be kept and are not there."""
        if not self.batch.manifest.keep or job.stream.source.count is not None:
            return {}
        folder = self._samples(job.stream)
        files = {number: folder / f"{number:06d}.png" for number in job.stream.rows(chunk)}
        return {number: file for number, file in files.items() if not file.is_file()}

    def _done(self, job: "Job") -> bool:
        return self.batch.result_file(job).is_file() and not any(
            self._unkept(job, chunk) for chunk in range(job.stream.chunks)
        )

    def _finish(self, job: "Job") -> bool:
        from tools.cache import remove_drafts

        file = self.batch.result_file(job)
        with self.batch.cache.claim(job.key) as mine:
            if not mine or file.is_file():
                return False
            result = self.batch.judge(job)
            file.parent.mkdir(exist_ok=True)
            remove_drafts(file.parent, [file])
            result.save(file)
            self.bar.say(f"{result.title}: {job.key[:8]}.json")
            return True


def _write_sample(files: dict[int, Path], number: int, image: "Tensor") -> None:
    from tools.sources import write_png

    if number in files:
        write_png(files[number], image)
