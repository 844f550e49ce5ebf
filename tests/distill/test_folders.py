"""Where a teacher lies: a folder, a run, or the hub's cache, which is read and never filled."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from distill.folders import missing_text_part, network_part, pipeline_folder
from distill.teacher import Teacher
from tests.distill import families, tiny

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, in its own layout."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def keep(cache: Path, name: str, folder: Path) -> Path:
    """Puts a folder where the hub's cache keeps the newest revision of a repository."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(REVISION)
    shutil.copytree(folder, place / "snapshots" / REVISION)
    return place / "snapshots" / REVISION


def test_a_repository_in_the_hubs_cache_is_a_teacher(cache: Path, tmp_path: Path) -> None:
    kept = keep(cache, "someone/a-model.v1", tiny.save_teacher(tmp_path / "saved"))
    assert pipeline_folder("someone/a-model.v1") == kept
    assert Teacher.load("someone/a-model.v1").shape == (1, 8, 8)


def test_what_the_cache_does_not_have_is_not_fetched(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="someone/else: there is no such folder, and the hub's cache has none of this"):
        pipeline_folder("someone/else")
    with pytest.raises(ValueError, match=r"a/b/c: there is no such folder$"):
        pipeline_folder("a/b/c")
    (tmp_path / "empty").mkdir()
    keep(cache, "someone/data", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"someone/data: is no pipeline of diffusers, there is no model_index\.json"):
        pipeline_folder("someone/data")


def test_a_folder_comes_before_the_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tiny.save_teacher(tmp_path / "someone/a-model")
    keep(cache, "someone/a-model", saved)
    monkeypatch.chdir(tmp_path)
    assert pipeline_folder("someone/a-model") == Path("someone/a-model")


def test_a_folder_tells_its_network_and_its_text_encoders(tmp_path: Path) -> None:
    folders = {name: families.save(name, tmp_path / name) for name in ("sd15", "dit")}
    assert {name: network_part(folder) for name, folder in folders.items()} == {"sd15": "unet", "dit": "transformer"}
    assert {name: missing_text_part(folder) for name, folder in folders.items()} == {"sd15": None, "dit": None}
