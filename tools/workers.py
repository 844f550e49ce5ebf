"""Workers of a batch: each takes the chunks that nobody holds, and the results whose chunks are all there.

Any number of them run on one folder, as processes of one command, of `accelerate launch`, of a Slurm array, or by hand;
there is no server. A worker that dies leaves its locks to the others, and a run after it starts where it was.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tools.manifest import Manifest

if TYPE_CHECKING:
    from torch import Tensor

    from tools.jobs import Batch, Job
    from tools.results import Result
    from tools.sources import Source

WAIT = 0.5  # seconds between looks, while others hold all that is left

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
    if executor is not None:
        for future in [executor.submit(_worker, *task) for _ in range(workers)]:
            future.result()
    elif workers > 1:
        _processes(task, workers)
    return _work(*task)


def _worker(manifest: Manifest, folder: str, device: str | None, shard: Shard, command: str) -> None:
    """A call that another process can be asked for: results are read from the folder."""
    _work(manifest, folder, device, shard, command)


def _processes(task: tuple[Any, ...], workers: int) -> None:
    """Each on its own: one that is killed takes no other with it, and its work is left to them, or to the caller."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_quiet_worker, args=task) for _ in range(workers)]
    for process in started:
        process.start()
    try:
        for number, process in enumerate(started, 1):
            process.join()
            if process.exitcode and process.exitcode < 0:
                name = signal.Signals(-process.exitcode).name
                _line(f"worker {number} of {workers} was ended by {name}; what it held is taken over")
    finally:
        for process in started:
            process.terminate()


def _quiet_worker(*task: Any) -> None:
    """Errors are the caller's to report: it meets them again, when it looks at what is left."""
    try:
        with _terminated_in_order():
            _worker(*task)
    except (ValueError, OSError):
        sys.exit(2)


def _work(manifest: Manifest, folder: str, device: str | None, shard: Shard, command: str) -> "list[Result]":
    from tools.jobs import Batch

    batch = Batch(manifest, folder, device or own_device(), command)
    return Worker(batch, shard).run()


def own_device() -> str:
    """The CUDA device of this process in a launch, if there is one."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM, which a scheduler sends before it kills, ends the block as an exception would: drafts are removed."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

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

        self._bar = tqdm(unit="chunk", disable=not sys.stderr.isatty())
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
        left = [job for job in self.jobs if not self.batch.result_file(job).is_file()]
        if len(left) < total:
            self.bar.say(f"{total - len(left)} of {total} results are there")
        while left:
            moved = False
            for job in left:
                moved |= self._advance(job)
            left = [job for job in left if job.key not in self.failures and not self.batch.result_file(job).is_file()]
            if left and not moved:
                time.sleep(WAIT)

    def _advance(self, job: "Job") -> bool:
        """Whether anything of the job could be done now."""
        try:
            moved, complete = self._chunks(job)
            return (complete and self._finish(job)) or moved
        except ValueError as error:
            self.failures[job.key] = f"{job.point.name}: {error}"
            self.bar.say(self.failures[job.key])
            return True

    def _chunks(self, job: "Job") -> tuple[bool, bool]:
        """Computes the chunks that nobody holds: whether there was one, and whether all are there."""
        cache, moved, complete = self.batch.cache, False, True
        for stream, extractors in self.batch.streams_of(job):
            for chunk in range(stream.chunks):
                if not cache.missing(stream, extractors, chunk):
                    continue
                with cache.claim(f"{stream.key}-{chunk}") as mine:
                    missing = cache.missing(stream, extractors, chunk) if mine else []
                    if missing:
                        self._make_room_for(stream.source)
                        started = time.perf_counter()
                        cache.compute(stream, missing, chunk, self._keep(job, stream is job.stream))
                        moved = True
                        rows = stream.rows(chunk)
                        done = f"{chunk * stream.chunk + len(rows)}/{len(stream.numbers)}"
                        took = time.perf_counter() - started
                        self.bar.say(f"{stream.source.title} [{stream.key[:8]}-{chunk}]: image {done}, {took:.1f} s")
                    complete &= mine
        return moved, complete

    def _make_room_for(self, source: "Source") -> None:
        if self._open is not None and self._open is not source:
            self._open.close()
        self._open = source

    def _keep(self, job: "Job", own: bool) -> "Callable[[int, Tensor], None] | None":
        if not (self.batch.manifest.keep and own and job.stream.source.count is None):
            return None
        from tools.sources import write_png

        folder = self.batch.folder / "samples" / job.stream.key
        folder.mkdir(parents=True, exist_ok=True)
        return lambda number, image: write_png(folder / f"{number:06d}.png", image)

    def _finish(self, job: "Job") -> bool:
        with self.batch.cache.claim(job.key) as mine:
            if not mine or self.batch.result_file(job).is_file():
                return False
            result = self.batch.judge(job)
            self.batch.result_file(job).parent.mkdir(exist_ok=True)
            result.save(self.batch.result_file(job))
            self.bar.say(f"{result.title}: {job.key[:8]}.json")
            return True
