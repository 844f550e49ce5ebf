"""Real samples: images of the class asked for, exact samples of a mixture, and a teacher's samples made once."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from scipy.stats import kstest, norm

from distill import toy
from distill.config import Train
from distill.data import Images
from distill.generate import load_generator
from distill.noise import GENERATION, TEACHER_SAMPLES
from distill.real import CHUNK, RealImages, RealMixture, cache_key, teacher_samples
from distill.subject import load_subject
from samplers import GaussianMixture, SampleNoise
from tests.distill.command import Running, distill
from tests.distill.runs import forked
from tests.distill.tiny import TRAIN, save_teacher, write_config


def numbered(labels: list[int] | None, n: int = 0) -> Images:
    """Images [N, 1, 2, 2] that hold their own number."""
    n = n if labels is None else len(labels)
    images = torch.arange(n).float()[:, None, None, None].expand(n, 1, 2, 2)
    return Images(images, None if labels is None else torch.tensor(labels))


MIXED = [2, 0, 2, 1, 0, 2, 2, 2, 0, 2]  # 3 of class 0, 1 of class 1, 6 of class 2


def test_real_images_are_of_the_class_asked_for_and_uniform_within_it() -> None:
    n = 12_000
    images = numbered(MIXED)
    cond = torch.arange(n) % 3
    drawn = RealImages(images, (1, 2, 2), 3)(SampleNoise(3, range(n)), cond)
    assert drawn.shape == (n, 1, 2, 2)
    number = drawn[:, 0, 0, 0].long()
    assert torch.equal(torch.tensor(MIXED)[number], cond)
    counts = torch.bincount(number, minlength=10)
    for k, label in enumerate(MIXED):
        p, m = 1 / MIXED.count(label), n // 3
        assert abs(int(counts[k]) - m * p) <= 5 * (m * p * (1 - p)) ** 0.5, k


def test_real_images_without_classes_are_uniform_over_all() -> None:
    n = 10_000
    drawn = RealImages(numbered(MIXED), (1, 2, 2), None)(SampleNoise(4, range(n)), None)
    counts = torch.bincount(drawn[:, 0, 0, 0].long(), minlength=10)
    assert (counts - n / 10).abs().max() <= 5 * (n * 0.1 * 0.9) ** 0.5
    unlabelled = RealImages(numbered(None, 10), (1, 2, 2), None)(SampleNoise(4, range(n)), None)
    assert torch.equal(unlabelled, drawn)


REALS: dict[str, Callable[[], Any]] = {
    "images": lambda: RealImages(numbered(MIXED), (1, 2, 2), 3),
    "all images": lambda: RealImages(numbered(MIXED), (1, 2, 2), None),
    "mixture": lambda: RealMixture(toy.grid()),
}


@pytest.mark.parametrize("kind", REALS)
def test_a_real_sample_depends_on_its_stream_only(kind: str) -> None:
    """The same in any batch and order; it goes on where the stream stands, and is another the next time."""
    reals, n = REALS[kind](), 24
    cond = torch.arange(n) % 3
    whole, again = SampleNoise(5, range(n)), SampleNoise(5, range(n))
    first, second = reals(whole, cond), reals(whole, cond)
    parts = [reals(SampleNoise(5, range(k, k + 6)), cond[k : k + 6]) for k in range(0, n, 6)]
    assert torch.equal(torch.cat(parts), first)
    assert torch.equal(reals(SampleNoise(5, range(n - 1, -1, -1)), cond.flip(0)).flip(0), first)
    assert not torch.equal(first, second)
    assert not torch.equal(reals(SampleNoise(6, range(n)), cond), first)
    again.normal((1,))
    assert not torch.equal(reals(again, cond), first)  # what was drawn before is not drawn again
    torch.manual_seed(1)
    assert torch.equal(reals(SampleNoise(5, range(n)), cond), first)  # and nothing else decides


@pytest.mark.parametrize(
    ("labels", "shape", "n_classes", "message"),
    [
        (MIXED, (1, 4, 4), 3, r"real\.data: its images are \[1, 2, 2\], the teacher's \[1, 4, 4\]"),
        (MIXED, (3, 2, 2), None, r"real\.data: its images are \[1, 2, 2\], the teacher's \[3, 2, 2\]"),
        (MIXED, (1, 2, 2), 4, r"real\.data: has none of class 3; needed are images of each of the teacher's 4"),
        ([0, 2, 2], (1, 2, 2), 3, r"real\.data: has none of class 1"),
        (MIXED, (1, 2, 2), 2, r"real\.data: has 3 classes; needed are images of each of the teacher's 2"),
        (None, (1, 2, 2), 3, r"real\.data: has no classes, and the teacher has 3"),
    ],
)
def test_images_that_do_not_fit_the_teacher(
    labels: list[int] | None, shape: tuple[int, ...], n_classes: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RealImages(numbered(labels, 4), shape, n_classes)


def test_a_mixture_on_a_line_has_its_distribution() -> None:
    """Kolmogorov-Smirnov against the exact distribution function: 0.001 is about three standard errors."""
    drawn = RealMixture(toy.two_modes())(SampleNoise(1, range(20_000)), None)
    assert drawn.shape == (20_000, 1)

    def cdf(x: Any) -> Any:
        return 0.3 * norm.cdf(x, -2, 0.5) + 0.7 * norm.cdf(x, 2, 0.5)

    assert kstest(drawn[:, 0].double().numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", ["ring", "grid", "correlated"])
def test_a_mixture_in_the_plane_has_its_moments(name: str) -> None:
    full = torch.tensor([[[1.0, 0.6], [0.6, 0.5]], [[0.2, -0.1], [-0.1, 0.3]]])
    means, weights = torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), torch.tensor([0.25, 0.75])
    mixture = GaussianMixture(weights, means, full) if name == "correlated" else toy.MIXTURES[name]()
    if name != "correlated":
        k = len(mixture.means)
        weights, means = torch.full((k,), 1 / k), mixture.means
        full = mixture.standard_deviations[:, None, None] ** 2 * torch.eye(2).expand(k, 2, 2)
    mean = weights @ means
    second = torch.einsum("k,kij->ij", weights, full + means[:, :, None] * means[:, None, :])

    n = 20_000
    drawn = RealMixture(mixture)(SampleNoise(2, range(n)), None)
    assert ((drawn.mean(0) - mean).abs() <= 5 * drawn.std(0) / n**0.5).all()
    products = drawn[:, :, None] * drawn[:, None, :]
    assert ((products.mean(0) - second).abs() <= 5 * products.std(0) / n**0.5).all()
    nearest = torch.cdist(drawn, mixture.means).argmin(1) if name != "correlated" else None
    if nearest is not None:
        share = torch.bincount(nearest, minlength=len(weights)) / n
        assert ((share - weights).abs() <= 5 * (weights * (1 - weights) / n).sqrt()).all()


def make(place: Path, teacher: dict[str, Any] | None = None, **changes: Any) -> Images:
    """Few samples of the teacher in place/pipeline by two Euler steps, kept in place/cache."""
    settings = {"name": "teacher", "count": 20, "sampler": "euler", "steps": 2, "cache": str(place / "cache")}
    config = run_of(place, {**settings, **changes}, **(teacher or {}))
    return teacher_samples(config, load_subject(config, torch.device("cpu")), Accelerator(cpu=True))


def run_of(place: Path, real: dict[str, Any], **teacher: Any) -> Train:
    return Train(run="run", teacher={"path": str(place / "pipeline")} | teacher, real=real)


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file of samples is written again: its inode and its time."""
    files = sorted(folder.glob("*/*.safetensors"))
    return {str(f.relative_to(folder)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def test_the_samples_are_the_generators_of_their_own_stream(place: Path) -> None:
    """Against `load_generator`, in another batch; not those that a student is judged on."""
    for guidance in (1.0, 2.0):
        kept = make(place, {"guidance": guidance}, seed=7, sampler="heun", steps=3)
        generator = load_generator(place / "pipeline", "heun", 3, guidance)
        same = replace(generator, stream=TEACHER_SAMPLES)(7, range(20))
        assert torch.allclose(kept.images, same, atol=1e-5)
        judged = replace(generator, stream=GENERATION)(7, range(20))
        assert (kept.images - judged).abs().mean() > 0.1
    assert TEACHER_SAMPLES not in (GENERATION, 0)


def test_labels_are_balanced_and_are_those_that_the_samples_were_made_with(place: Path) -> None:
    kept = make(place, count=47)
    assert kept.labels is not None
    assert kept.labels.tolist() == [k % 10 for k in range(47)]
    generator = replace(load_generator(place / "pipeline", "euler", 2), stream=TEACHER_SAMPLES)
    assert torch.allclose(generator(0, range(47), labels=kept.labels), kept.images, atol=1e-5)
    assert not torch.allclose(generator(0, range(47), labels=(kept.labels + 1) % 10), kept.images, atol=1e-3)


def test_an_unconditional_teacher_has_no_labels(tmp_path: Path) -> None:
    save_teacher(tmp_path / "pipeline", n_classes=None)
    kept = make(tmp_path)
    assert kept.labels is None
    assert RealImages(kept, (1, 8, 8), None)(SampleNoise(0, range(3)), None).shape == (3, 1, 8, 8)


def test_samples_are_made_once_and_extended(place: Path) -> None:
    few = make(place)
    before = marks(place / "cache")
    assert len(before) == 1
    again = make(place)
    assert marks(place / "cache") == before
    assert torch.equal(again.images, few.images)

    more = make(place, count=CHUNK + 10)
    after = marks(place / "cache")
    assert len(after) == 2
    assert before.items() <= after.items()
    assert more.images.shape == (CHUNK + 10, 1, 8, 8)
    assert torch.equal(more.images[:20], few.images)
    assert len(torch.unique(more.images.flatten(1), dim=0)) == CHUNK + 10  # no chunk repeats another
    assert torch.equal(make(place, count=5).images, few.images[:5])
    assert marks(place / "cache") == after


def test_whatever_decides_a_sample_has_a_folder_of_its_own(place: Path) -> None:
    save_teacher(place / "other", seed=1)
    shutil.copytree(place / "pipeline", place / "sharper")
    scheduler = place / "sharper/scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"sigma_max": 10.0}))
    shutil.copytree(place / "pipeline", place / "copy")
    base = make(place)
    folders = {p.name for p in (place / "cache").iterdir()}
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "weights": ({"path": str(place / "other")}, {}),
        "coordinates": ({"path": str(place / "sharper")}, {}),
        "guidance": ({"guidance": 2.0}, {}),
        "sampler": ({}, {"sampler": "heun"}),
        "steps": ({}, {"steps": 3}),
        "seed": ({}, {"seed": 1}),
    }
    for what, (teacher, real) in changes.items():
        other = make(place, teacher, **real)
        new = {p.name for p in (place / "cache").iterdir()} - folders
        assert len(new) == 1, what
        assert not torch.equal(other.images, base.images), what
        assert (place / "cache" / new.pop() / "key.json").is_file()
        folders = {p.name for p in (place / "cache").iterdir()}

    make(place, {"path": str(place / "copy")}, count=30)  # where it lies and how many are asked for decide nothing
    assert {p.name for p in (place / "cache").iterdir()} == folders


def test_the_key_says_what_made_the_samples(place: Path) -> None:
    make(place, seed=5)
    (file,) = (place / "cache").glob("*/key.json")
    key = json.loads(file.read_text())
    config = run_of(place, {"name": "teacher", "sampler": "euler", "steps": 2, "seed": 5})
    assert key == cache_key(config)
    assert cache_key(config, torch.bfloat16) == key | {"dtype": "torch.bfloat16"}
    assert (key["seed"], key["sampler"], key["steps"], key["guidance"]) == (5, "euler", 2, 1.0)
    assert {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"} <= (
        key["teacher"].keys()
    )


@pytest.mark.parametrize("harm", ["truncated", "empty", "text", "shape", "key", "gone"])
def test_a_file_that_is_not_whole_is_made_anew(place: Path, harm: str) -> None:
    good = make(place, count=2 * CHUNK)
    first, second = sorted((place / "cache").glob("*/*.safetensors"))
    content, kept = first.read_bytes(), marks(place / "cache")
    if harm == "truncated":
        first.write_bytes(content[:-7])
    elif harm == "empty":
        first.write_bytes(b"")
    elif harm == "text":
        first.write_text("samples")
    elif harm == "shape":
        save_file({"images": torch.zeros(CHUNK, 1, 4, 4)}, first)
    elif harm == "key":
        save_file({"pictures": load_file(first)["images"]}, first)
    else:
        first.unlink()
    assert torch.equal(make(place, count=2 * CHUNK).images, good.images)
    assert first.read_bytes() == content
    name = str(second.relative_to(place / "cache"))
    assert marks(place / "cache")[name] == kept[name]


def test_nothing_is_pickled(place: Path) -> None:
    make(place)
    (folder,) = (place / "cache").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["000000.safetensors", "key.json"]
    assert load_file(folder / "000000.safetensors").keys() == {"images"}


def contents(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*") if p.is_file()}


REAL = {"name": "teacher", "count": 4 * CHUNK - 5, "sampler": "euler", "steps": 3}


@pytest.mark.slow
def test_killed_while_samples_are_made_it_goes_on_where_it_stopped(place: Path) -> None:
    config = write_config(place, TRAIN, steps=1, real=REAL)
    command = ("train", "--config", config, "--real.cache")
    whole = distill(*command, "whole", "--run", "one", cwd=place)
    assert whole.code == 0, whole.err
    assert f"teacher sample {4 * CHUNK - 5}/{4 * CHUNK - 5}" in whole.out

    running = Running((*command, "killed", "--run", "two"), place)
    while running.process.is_alive() and not list((place / "killed").glob("*/*.safetensors")):
        time.sleep(0.001)
    running.kill()
    assert running.wait().code == -9
    begun = marks(place / "killed")
    assert 1 <= len(begun) < 4

    last = distill(*command, "killed", "--run", "two", "--resume", cwd=place)
    assert last.code == 0, last.err
    assert begun.items() <= marks(place / "killed").items()
    made = {name: content for name, content in contents(place / "killed").items() if not name.endswith(".tmp")}
    assert made == contents(place / "whole")
    checkpoints = [place / run / "checkpoints/step-00000001/discriminator.safetensors" for run in ("one", "two")]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()
    third = distill(*command, "killed", "--run", "three", cwd=place)
    assert third.code == 0
    assert "teacher sample" not in third.out


@pytest.mark.slow
def test_two_processes_share_the_work_and_make_the_same_samples(place: Path) -> None:
    config = write_config(place, TRAIN, steps=1, real=REAL)
    assert distill("train", "--config", config, "--real.cache", "one", "--run", "a", cwd=place).code == 0
    text = forked(place, "train", "--config", config, "--real.cache", "two", "--run", "b")
    assert text.startswith("0\n"), text
    assert contents(place / "one") == contents(place / "two")
