"""A file is whole under its name, or it is not there: write beside it, fsync, rename.

Why: a run that is killed must not leave half a file that the next one reads.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the name `path` when the block ends without an exception.

    An older file of that name stays whole until then; after an exception nothing of the new one is left.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(draft, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends without an exception.

    An older folder of that name stays whole until then; what killed processes left beside it is removed after that.
    Raises OSError where safetensors could not be written.
    """
    draft, old = (folder.with_name(f".{folder.name}.{kind}.{os.getpid()}.tmp") for kind in ("new", "old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.exists():
            folder.replace(old)
        draft.replace(folder)
        _clear(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: cannot be written ({error})") from error
    finally:
        if old.exists() and not folder.exists():
            old.replace(folder)
        for spare in (draft, old):
            shutil.rmtree(spare, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Removes drafts of a folder whose processes are gone."""
    for entry in folder.parent.iterdir():
        start, _, process = entry.name.removesuffix(".tmp").rpartition(".")
        if start in (f".{folder.name}.new", f".{folder.name}.old") and process.isdigit() and not _runs(int(process)):
            shutil.rmtree(entry, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
