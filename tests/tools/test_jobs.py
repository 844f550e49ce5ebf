"""A manifest opened: which jobs it has, what their keys depend on, and what is refused before any work."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distill.tiny import save_teacher
from tests.tools.batches import manifest, save_pictures, save_student
from tools.digest import digest_json
from tools.jobs import Batch, Job
from tools.manifest import manifest_of
from tools.statistics import FeatureStatistics


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {"teacher": save_teacher(place / "teacher"), "student": save_student(place / "student", seed=1)}


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "reference", 30)


def opened(place: Path, reference: object, sources: object, **changes: Any) -> Batch:
    return Batch(manifest_of(manifest(reference, sources, **changes), "test"), place / "out")


def keys(place: Path, reference: object, sources: object, **changes: Any) -> list[str]:
    return [job.key for job in opened(place, reference, sources, **changes).jobs]


def test_jobs_are_the_points_of_the_matrix_and_a_student_is_one(
    models: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    batch = opened(tmp_path, reference, models, sampler=["euler", "heun"], steps=[2, 3], draw=[0, 1])
    found = [(job.point.name, *job.result({}, {}).axes.values()) for job in batch.jobs]
    teacher = [("teacher", s, n, 1.0, None, None, d) for s in ("euler", "heun") for n in (2, 3) for d in (0, 1)]
    axes = batch.jobs[0].result({}, {}).axes
    assert list(axes) == ["sampler", "steps", "guidance", "teleport", "prompts", "draw"]
    assert found == [*teacher, ("student", 0), ("student", 1)]
    assert [job.result({}, {}).nfe for job in batch.jobs] == [2, 2, 3, 3, 3, 3, 5, 5, 1, 1]
    assert len({job.key for job in batch.jobs}) == 10
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_key_is_what_decides_the_numbers(models: dict[str, Path], reference: Path, tmp_path: Path) -> None:
    teacher = {"a": models["teacher"]}
    (own,) = keys(tmp_path, reference, teacher)
    shutil.copytree(models["teacher"], tmp_path / "moved")
    shutil.copytree(reference, tmp_path / "moved reference")
    (tmp_path / "moved reference/notes.txt").write_text("not an image")
    same = keys(tmp_path, tmp_path / "moved reference", {"another name": tmp_path / "moved"}, keep=True)
    assert [own] == same == keys(tmp_path, reference, teacher, guidance=1)

    others: list[dict[str, Any]] = [
        {"n": 41}, {"chunk": 4}, {"batch": 2}, {"draw": 1}, {"steps": 3}, {"sampler": "heun"},
        {"guidance": 2}, {"features": {"digits": ["fd"]}}, {"features": {"digits": ["fd", "kd"], "pixels": ["fd"]}},
    ]  # fmt: skip
    found = {own} | {key for changes in others for key in keys(tmp_path, reference, teacher, **changes)}
    found |= {*keys(tmp_path, save_pictures(tmp_path / "b", 30, seed=1), teacher)}
    found |= {*keys(tmp_path, reference, {"a": models["student"]})}
    assert len(found) == len(others) + 3
    assert keys(tmp_path, reference, teacher, seed=1) == keys(tmp_path, reference, teacher, draw=1)


def test_an_image_that_changes_gives_another_key(reference: Path, tmp_path: Path) -> None:
    """Also under the same size and time stamp, which the remembered hash is not fooled by."""
    pictures = save_pictures(tmp_path / "a", 12, seed=1)
    (before,) = keys(tmp_path, reference, {"a": pictures})
    old = os.stat(pictures / "0003.png")
    shutil.copy(pictures / "0004.png", pictures / "0003.png")
    os.utime(pictures / "0003.png", ns=(old.st_atime_ns, old.st_mtime_ns))
    (changed,) = keys(tmp_path, reference, {"a": pictures})
    save_pictures(pictures, 12, seed=1)
    assert [before] == keys(tmp_path, reference, {"a": pictures})
    (renamed := pictures / "0003.png").rename(pictures / "x.png")
    (moved,) = keys(tmp_path, reference, {"a": pictures})
    (pictures / "x.png").rename(renamed)
    shutil.copy(reference / "0005.png", reference / "0006.png")
    (other_reference,) = keys(tmp_path, reference, {"a": pictures})
    assert len({before, changed, moved, other_reference}) == 4


def test_a_folder_is_dealt_out_to_draws_without_repeats(reference: Path, tmp_path: Path) -> None:
    """Draws are parts of one random order, each of n images; a draw with nothing left is no job, and is said."""
    pictures = {"a": save_pictures(tmp_path / "a", 25, seed=1)}
    batch = opened(tmp_path, reference, pictures, n=10, draw=[0, 1, 2], steps=[2, 3])
    dealt = [list(job.stream.numbers) for job in batch.jobs]
    assert [len(numbers) for numbers in dealt] == [10, 10]
    assert len({k for numbers in dealt for k in numbers}) == 20
    assert dealt[0] != sorted(dealt[0])
    assert dealt[0] + dealt[1] == torch.randperm(25, generator=torch.Generator().manual_seed(0)).tolist()[:20]
    assert batch.notes == ["a: has 25 images, enough for 2 draws of 10; left out: draw 2"]

    (whole,) = opened(tmp_path, reference, pictures, n=40, draw=[0, 1]).jobs
    assert sorted(whole.stream.numbers) == list(range(25))
    assert whole.result({}, {}).n == 25
    (all_of_it,) = opened(tmp_path, reference, pictures, n=25).jobs
    assert all_of_it.key == whole.key
    with pytest.raises(ValueError, match="source: three has 3 images; needed are 4 or more"):
        opened(tmp_path, reference, {"x": save_pictures(tmp_path / "three", 3)})


def test_two_manifests_share_the_streams_that_are_the_same(
    models: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    """Another number of samples, another reference, more metrics: no image is made again."""
    (first,) = opened(tmp_path, reference, {"a": models["teacher"]}).jobs
    other = save_pictures(tmp_path / "b", 20, seed=3)
    (second,) = opened(tmp_path, other, {"b": models["teacher"]}, n=80, features={"pixels": "fd"}).jobs
    assert first.stream.key == second.stream.key
    assert first.key != second.key


def test_the_facts_are_json_without_paths_and_their_digest_is_the_key(
    models: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    (job,) = opened(tmp_path, reference, {"a": models["teacher"]}).jobs
    assert job.key == digest_json(job.facts)[:32]
    assert str(tmp_path.parent) not in str(job.facts) + str(job.stream.facts)
    assert job.inputs["source"] == str(models["teacher"])


def test_class_accuracy_is_of_those_that_were_asked_for_by_class(
    models: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    sources = {"teacher": models["teacher"], "pictures": save_pictures(tmp_path / "a", 20, seed=1)}
    batch = opened(tmp_path, reference, sources, features={"digits": ["fd", "class-accuracy"]})
    assert [job.facts["metrics"]["digits"] for job in batch.jobs] == [["fd", "class-accuracy"], ["fd"]]


def statistics(place: Path, batch: Batch, spec: str, extractor: str | None = "", dim: int = 0) -> Path:
    """The statistics of noise, as of an extractor; "" is the right one."""
    job: Job = batch.jobs[0]
    name = job.extractors[spec].name if extractor == "" else extractor
    found = FeatureStatistics(dim or job.extractors[spec].dim, name)
    found.update(torch.randn(200, found.dim, generator=torch.Generator().manual_seed(0)))
    found.save(place / "reference.npz")
    return place / "reference.npz"


def test_a_reference_is_images_or_statistics_of_the_same_extractor(
    models: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    teacher, fd = {"a": models["teacher"]}, {"features": {"digits": "fd"}}
    batch = opened(tmp_path, reference, teacher)
    file = statistics(tmp_path, batch, "digits")
    (job,) = opened(tmp_path, file, teacher, **fd).jobs
    assert "statistics" in job.facts["references"]["digits"]
    statistics(tmp_path, batch, "digits", extractor=None)  # of another tool, that does not say
    assert len(opened(tmp_path, file, teacher, **fd).jobs) == 1

    with pytest.raises(ValueError, match=r"metrics: kd needs the reference's images; for digits there are statistics"):
        opened(tmp_path, file, teacher, features={"digits": ["fd", "kd"]})
    with pytest.raises(ValueError, match=r"reference: .*npz is of one extractor; name one for each"):
        opened(tmp_path, file, teacher)
    statistics(tmp_path, batch, "digits", extractor="inception-deadbeef|299x299 pil-bicubic x/128-1|u8|f32")
    with pytest.raises(ValueError, match=r"statistics of inception-deadbeef\|.*, and samples read by digits-\w{8}\|"):
        opened(tmp_path, file, teacher, **fd)
    statistics(tmp_path, batch, "digits", extractor=None, dim=2048)
    with pytest.raises(ValueError, match=r"statistics of 2048 features; digits-\w{8}\|.* has 32"):
        opened(tmp_path, file, teacher, **fd)
    with pytest.raises(ValueError, match=r"reference: .*teacher makes images; needed are images that exist"):
        opened(tmp_path, models["teacher"], teacher)


def test_samples_of_another_size_are_refused_naming_both(reference: Path, tmp_path: Path) -> None:
    colour = save_pictures(tmp_path / "colour", 10, shape=(3, 8, 8))
    with pytest.raises(
        ValueError, match=r"colour is read by pixels\|3x8x8 .*, the reference reference by pixels\|1x8x8"
    ):
        opened(tmp_path, reference, {"a": colour}, features={"pixels": "fd"})
    mixed = save_pictures(tmp_path / "mixed", 4)
    save_pictures(tmp_path / "mixed/b", 4, shape=(1, 5, 8))
    with pytest.raises(ValueError, match="features: pixels reads images of one size, and these have several"):
        opened(tmp_path, reference, {"a": mixed}, features={"pixels": "fd"})


def test_what_is_wrong_with_the_last_job_is_found_before_the_first(
    models: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    damaged = save_pictures(tmp_path / "damaged", 10)
    (damaged / "0007.png").write_bytes(b"no picture")
    sources: dict[str, object] = {"a": models["teacher"], "b": damaged}
    with pytest.raises(ValueError, match=r"damaged/0007\.png: cannot be read as an image"):
        opened(tmp_path, reference, sources)
    with pytest.raises(ValueError, match="source: 'nowhere'"):
        opened(tmp_path, reference, {"a": models["teacher"], "b": "nowhere"})
    with pytest.raises(ValueError, match=r"features: nowhere\.at_all:Network cannot be imported"):
        opened(tmp_path, reference, {"a": models["teacher"]}, features={"nowhere.at_all:Network": "fd"})
    with pytest.raises(ValueError, match=r"metrics: class-entropy needs an extractor that classifies; pixels\|.* does"):
        opened(tmp_path, reference, {"a": models["teacher"]}, features={"pixels": ["fd", "class-entropy"]})
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.slow
def test_a_judgement_has_the_same_bits_on_any_number_of_threads(reference: Path, tmp_path: Path) -> None:
    """A launcher gives a process one thread, a shell gives it all: with 200 pixels their covariances differ."""
    pictures = {name: save_pictures(tmp_path / name, 400, k, (1, 14, 14)) for k, name in enumerate("ab")}
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            batch = opened(tmp_path, pictures["a"], {"b": pictures["b"]}, features={"pixels": ["fd", "vendi"]}, n=400)
            (job,) = batch.jobs
            for stream, extractors in batch.streams_of(job):
                for chunk in range(stream.chunks):
                    batch.cache.compute(stream, batch.cache.missing(stream, extractors, chunk), chunk)
            found.append(batch.judge(job).values)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
