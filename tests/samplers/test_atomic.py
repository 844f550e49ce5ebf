"""Folders come into place whole, and what a killed process left beside them goes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from samplers.atomic import atomic_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from samplers.atomic import atomic_folder
with atomic_folder(Path(sys.argv[1])) as draft:
    (draft / "half").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def fill(folder: Path, text: str) -> None:
    with atomic_folder(folder) as draft:
        (draft / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_replaces_an_older_one_or_leaves_it_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    fill(folder, "first")
    (folder / "more").write_text("of the first")
    with pytest.raises(TypeError):
        fill(folder, 3)  # type: ignore[arg-type]
    assert names(folder) == ["file", "more"]
    fill(folder, "second")
    assert [(folder / "file").read_text(), *names(folder)] == ["second", "file"]
    assert names(folder.parent) == ["model"]


def test_an_older_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    fill(folder, "first")
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if ".new." in self.name:
            raise OSError("no space left")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        fill(folder, "second")
    assert (folder / "file").read_text() == "first"
    assert names(tmp_path) == ["model"]


def test_what_a_killed_process_left_is_cleared_away_once_the_folder_is_whole(tmp_path: Path) -> None:
    folder, other = tmp_path / "model", tmp_path / ".models.new.1.tmp"
    fill(folder, "first")
    other.mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "file").read_text() == "first"
    assert len(names(tmp_path)) == 3
    fill(folder, "second")
    assert names(tmp_path) == [other.name, "model"]
