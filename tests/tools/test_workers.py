"""Workers of a batch: what is interrupted continues, what is finished is never computed again, and bits are bits."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distill.tiny import save_teacher
from tests.tools.batches import manifest, save_pictures, stamps, values_in
from tools.jobs import Batch
from tools.manifest import Manifest, manifest_of
from tools.processes import run_batch
from tools.results import read_results
from tools.sources import SourceSettings, open_source, write_png
from tools.workers import Worker

BROKEN = """
import torch

class Broken(torch.nn.Module):
    def forward(self, images):  # where the first pixel is bright
        features = images.flatten(1)[:, :6]
        return torch.where(images[:, :1, 0, 0] > 0.7, torch.nan, features)

class Failing(torch.nn.Module):
    def forward(self, images):
        if (images[:, 0, 0, 0] > 0.7).any():
            raise RuntimeError("no room\\nfor this")
        return images.flatten(1)[:, :6]
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    return {name: save_pictures(tmp_path / name, 24, seed) for seed, name in enumerate("abc")}


def small(reference: object, sources: object, **changes: Any) -> Manifest:
    """Two chunks of each source, one space."""
    fields: dict[str, Any] = {"n": 12, "features": {"pixels": ["fd", "precision"]}}
    return manifest_of(manifest(reference, sources, **(fields | changes)), "test")


def test_a_batch_that_is_done_is_not_done_again(
    teacher: Path, pictures: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither are chunks where only a result is gone."""
    asked = small(pictures["a"], {"t": teacher, "b": pictures["b"]}, steps=[2, 3])
    first = run_batch(asked, tmp_path / "out")
    assert [(r.name, r.axes.get("steps"), r.n, r.nfe) for r in first] == [
        ("t", 2, 12, 2),
        ("t", 3, 12, 3),
        ("b", None, 12, None),
    ]
    assert capfd.readouterr().err.count("]: image") == 3 + 3 * 2
    before = stamps(tmp_path / "out")
    assert len(before) == 9 + 3
    assert run_batch(asked, tmp_path / "out") == first
    assert capfd.readouterr().err == "3 of 3 results are there\n"
    assert stamps(tmp_path / "out") == before

    gone = tmp_path / "out/results" / f"{first[1].key}.json"
    gone.unlink()
    again = run_batch(asked, tmp_path / "out")
    assert [r.values for r in again] == [r.values for r in first]
    after = stamps(tmp_path / "out")
    assert {file for file in before if after[file] != before[file]} == {f"results/{gone.name}"}
    assert "]: image" not in capfd.readouterr().err


def test_an_image_that_changes_between_two_runs_is_judged_again(pictures: dict[str, Path], tmp_path: Path) -> None:
    asked = small(pictures["a"], {"b": pictures["b"], "c": pictures["c"]}, n=24)
    first = run_batch(asked, tmp_path / "out")
    before = stamps(tmp_path / "out")
    shutil.copy(pictures["a"] / "0000.png", pictures["c"] / "0007.png")
    second = run_batch(asked, tmp_path / "out")
    assert second[0] == first[0]
    assert second[1].key != first[1].key
    assert second[1].values != first[1].values
    after = stamps(tmp_path / "out")
    assert after.items() >= before.items()
    assert len(after) == len(before) + 3 + 1
    assert [r.values for r in second] == [r.values for r in run_batch(asked, tmp_path / "fresh")]


def test_an_image_that_changes_under_a_batch_fails_its_job_by_name(pictures: dict[str, Path], tmp_path: Path) -> None:
    asked = small(pictures["a"], {"b": pictures["b"], "c": pictures["c"]}, n=24)
    worker = Worker(Batch(asked, tmp_path / "out"))
    shutil.copy(pictures["a"] / "0000.png", pictures["b"] / "0007.png")
    with pytest.raises(
        ValueError, match=r"1 of 2 jobs failed, the others are done; the first: b: .*b/0007\.png: has changed since"
    ):
        worker.run()
    assert [r.name for r in run_batch(asked, tmp_path / "out")] == ["b", "c"]
    assert len(values_in(tmp_path / "out")) == 2  # nothing was kept under the key that was not its own


def test_rows_that_are_not_finite_fail_their_job_by_number(
    pictures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A network of the user's; the pictures of `dark` are all right, some of b are not."""
    (tmp_path / "code/of_a_user").mkdir(parents=True)
    (tmp_path / "code/of_a_user/network.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path / "code")
    for name in ("dark", "reference"):
        save_dark(tmp_path / name, pictures["a"])
    bright = [k for k in range(24) if open_source(pictures["b"]).read(0, [k]).images[0][0, 0, 0] > 216]
    assert 0 < len(bright) < 8
    sources = {"b": pictures["b"], "dark": tmp_path / "dark"}
    for network, message in (("Broken", "NaN or infinite"), ("Failing", "no room for this")):
        asked = small(tmp_path / "reference", sources, n=24, chunk=24, features={f"of_a_user.network:{network}": "fd"})
        with pytest.raises(ValueError, match=f"1 of 2 jobs failed, .*: b: .*{message}") as refused:
            run_batch(asked, tmp_path / network)
        assert "\n" not in str(refused.value)
        assert [r.name for r in read_results([tmp_path / network])] == ["dark"]
        if network == "Broken":
            found = str(refused.value)
            assert f"{len(bright)} of 24 samples of b have" in found
            numbers = found.partition("(samples ")[2].partition(")")[0].split(", ")
            assert set(map(int, numbers[:5])) <= set(bright)
        assert "b: " in capfd.readouterr().err


def save_dark(folder: Path, like: Path) -> None:
    folder.mkdir()
    for k, image in enumerate(open_source(like).read(0, range(24)).images):
        write_png(folder / f"{k:04}.png", image // 2)


def test_a_chunk_that_was_changed_fails_the_jobs_that_read_it(pictures: dict[str, Path], tmp_path: Path) -> None:
    asked = small(pictures["a"], {"b": pictures["b"], "c": pictures["c"]})
    worker = Worker(Batch(asked, tmp_path / "out"))
    worker.run()
    stream = worker.jobs[0].stream
    (chunk,) = (tmp_path / "out/features" / stream.key).rglob("000001-*.safetensors")
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\xff")
    for file in (tmp_path / "out/results").glob("*.json"):
        file.unlink()
    with pytest.raises(ValueError, match=rf"1 of 2 jobs failed, .*: b: cache: .*{chunk.name} .*delete it"):
        run_batch(asked, tmp_path / "out")
    chunk.unlink()
    assert [r.name for r in run_batch(asked, tmp_path / "out")] == ["b", "c"]


def test_kept_samples_are_the_samples(teacher: Path, pictures: dict[str, Path], tmp_path: Path) -> None:
    """Also when they are asked for after the numbers are there, and where one is gone; numbers are not made again."""
    sources = {"t": teacher, "b": pictures["b"]}
    run_batch(small(pictures["a"], sources), tmp_path / "out")
    assert not (tmp_path / "out/samples").exists()
    before = stamps(tmp_path / "out")
    asked = small(pictures["a"], sources, keep=True)
    run_batch(asked, tmp_path / "out")
    (folder,) = (tmp_path / "out/samples").iterdir()
    kept = open_source(folder)
    assert kept.count == 12
    assert sorted(file.name for file in folder.iterdir()) == [f"{k:06}.png" for k in range(12)]
    model = open_source(teacher, SourceSettings("euler", 2))
    made = [image for start in (0, 4, 8) for image in model.read(0, range(start, start + 4)).images]
    assert all(torch.equal(a, b) for a, b in zip(kept.read(0, range(12)).images, made, strict=True))

    others = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    (folder / "000009.png").unlink()
    (folder / ".000009.png.0badcafe.tmp").write_bytes(b"half")
    run_batch(asked, tmp_path / "out")
    assert sorted(others) == sorted(file.name for file in folder.iterdir())
    assert {n for n, mtime in others.items() if (folder / n).stat().st_mtime_ns != mtime} == {"000009.png"}
    assert stamps(tmp_path / "out") == before


def test_shards_are_parts_of_the_jobs_and_any_executor_does_them(
    teacher: Path, pictures: dict[str, Path], tmp_path: Path
) -> None:
    asked = small(pictures["a"], {"t": teacher, "b": pictures["b"]}, draw=[0, 1])
    whole = run_batch(asked, tmp_path / "whole")
    parts = [run_batch(asked, tmp_path / "parts", shard=(i, 3)) for i in (3, 1, 2)]
    assert [[(r.name, r.axes["draw"]) for r in part] for part in parts] == [
        [("b", 0)],
        [("t", 0), ("b", 1)],
        [("t", 1)],
    ]
    assert values_in(tmp_path / "parts") == values_in(tmp_path / "whole") == {r.key: r.values for r in whole}
    assert run_batch(asked, tmp_path / "parts", shard=(5, 5)) == []
    with ThreadPoolExecutor(3) as pool:
        threads = run_batch(asked, tmp_path / "threads", executor=pool, workers=3)
    assert [r.values for r in threads] == [r.values for r in whole]


def test_drafts_of_the_dead_are_gone_when_a_batch_is_done(pictures: dict[str, Path], tmp_path: Path) -> None:
    asked = small(pictures["a"], {"b": pictures["b"]})
    batch = Batch(asked, tmp_path / "out")
    file = batch.result_file(batch.jobs[0])
    file.parent.mkdir()
    (file.parent / f".{file.name}.0badcafe.tmp").write_text("{")
    (beside := file.parent / f".{file.name[1:]}.0badcafe.tmp").write_text("{")  # another worker's, which is at it
    run_batch(asked, tmp_path / "out")
    assert sorted(f.name for f in file.parent.iterdir()) == sorted([file.name, beside.name])


def test_a_disk_that_refuses_ends_the_batch_and_not_with_a_result(pictures: dict[str, Path], tmp_path: Path) -> None:
    """A folder where a chunk's folder has to be: no job's fault, and so the end of the worker."""
    asked = small(pictures["a"], {"b": pictures["b"]})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/features").write_text("a file")
    with pytest.raises(OSError, match="Not a directory"):
        run_batch(asked, tmp_path / "out")
    os.unlink(tmp_path / "out/features")
    assert len(run_batch(asked, tmp_path / "out")) == 1
