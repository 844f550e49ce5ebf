"""Workers of a batch: each takes the chunks that nobody holds, and the results whose chunks are all there.

Any number of them run on one folder, as processes of one command, of `accelerate launch`, of a Slurm array, or by hand;
there is no server. A worker that dies leaves its locks to the others, and a run after it starts where it was.
"""

import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tools.cache import Stream
    from tools.features import Extractor
    from tools.jobs import Batch, Job
    from tools.results import Result
    from tools.sources import Source

WAIT = 0.5  # seconds between looks, while others hold all that is left

Shard = tuple[int, int]  # i of n, from 1


def say_line(text: str) -> None:
    """On stderr, at once."""
    print(text, file=sys.stderr, flush=True)


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
            say_line(text)
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
        except OSError as error:  # of a full disk, which is no job's fault
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, str(self.batch.folder)) from error
        except Exception as error:  # of memory, or whatever a network of the user's raises: the other jobs go on
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self.failures[job.key] = f"{job.point.name}: {kind}{' '.join(str(error).split())}"
            self.bar.say(self.failures[job.key])
            return True

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
        from tools.cache import remove_drafts

        self._make_room_for(stream.source)
        if unkept:
            self._samples(stream).mkdir(parents=True, exist_ok=True)
            remove_drafts(self._samples(stream), unkept.values())
        started = time.perf_counter()
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
