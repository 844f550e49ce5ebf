"""What files and settings are, as SHA-256: the names under which results are kept.

Why: a cache that is keyed by a name returns yesterday's numbers for today's images. Hashing a data set takes as long as
reading it, so `HashCache` remembers a file's hash for as long as the file system says that it is the same file.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from samplers.atomic import atomic_write

_SETTLED = 2 * 10**9  # nanoseconds; a file younger than that may change again under the same time stamp


def digest_json(value: Any) -> str:
    """SHA-256 of a value as canonical JSON: keys in order, no spaces, ASCII; in hexadecimal.

    A value that was written as JSON and read again has the same digest (1 and 1.0 are not the same number).
    Raises ValueError for NaN and infinity, TypeError for what JSON does not have.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Stamp(NamedTuple):
    """What a file system knows of a file: if none of it has changed, the bytes have not."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> "Stamp":
        """Raises OSError if there is no such file."""
        status = Path(path).stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True)
class Hashed:
    """A file, its SHA-256, and how it was found when that was computed."""

    path: Path
    sha256: str
    stamp: Stamp

    def check(self) -> None:
        """Raises ValueError, naming the file, if it has changed since, or is gone."""
        try:
            now = Stamp.of(self.path)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read any more ({error.strerror})") from error
        if (now.size, now.mtime_ns, now.inode) != (self.stamp.size, self.stamp.mtime_ns, self.stamp.inode):
            raise ValueError(
                f"{self.path}: has changed since it was hashed ({self.stamp.size} bytes then, {now.size} now); "
                "results under the old hash would be of other bytes"
            )

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is read inside is what was hashed, or ValueError is raised as by `check`."""
        self.check()
        yield
        self.check()


@dataclass
class HashCache:
    """Hashes of files, remembered in a JSON file between runs; None remembers them in memory only.

    A file's entry counts while its size, times and inode are the same. Any number of processes may share the file: each
    writes it whole, with what the others have written by then, so the most that can be lost is a hash to compute again;
    a cache file that cannot be read or written is one that remembers nothing.
    """

    path: str | Path | None = None
    _entries: dict[str, tuple[Stamp, str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._entries = self._read()

    def digest(self, path: str | Path) -> str:
        """SHA-256 of a file. Raises as `hash_all`."""
        return self.hash_all([path])[0].sha256

    def hash_all(self, paths: Sequence[str | Path]) -> list[Hashed]:
        """The hashes of many files, in their order.

        Raises OSError for a file that cannot be read, ValueError for one that changes while it is.
        """
        found, new = [], {}
        for path in map(Path, paths):
            stamp, name, now = Stamp.of(path), str(path.resolve()), time.time_ns()
            entry = self._entries.get(name)
            if entry is None or entry[0] != stamp:
                entry = stamp, digest_file(path)
                Hashed(path, entry[1], stamp).check()
                if now - max(stamp.mtime_ns, stamp.ctime_ns) > _SETTLED:
                    self._entries[name] = new[name] = entry
            found.append(Hashed(path, entry[1], stamp))
        if new:
            self._write()
        return found

    def _read(self) -> dict[str, tuple[Stamp, str]]:
        if self.path is None:
            return {}
        try:
            entries = json.loads(Path(self.path).read_bytes())
            return {str(name): (Stamp(*map(int, stamp)), str(sha256)) for name, (stamp, sha256) in entries.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        if self.path is None:
            return
        self._entries = self._read() | self._entries
        try:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps(self._entries).encode())
        except OSError:
            return
