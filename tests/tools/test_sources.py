"""Sources: what they give is what was written or sampled, bit for bit, and their facts say what decides it."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data import digits
from distill.generate import load_generator
from samplers import Gaussian
from tests.distill.command import distill
from tests.distill.tiny import TRAIN, save_teacher, write_config
from tools.features import quantise
from tools.sources import SourceSettings, open_source, write_png


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "pipeline")


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    half = digits("train")
    file = tmp_path_factory.mktemp("gaussian") / "digits.safetensors"
    Gaussian.fit([(half.images, half.labels)], n_classes=10).save(file)
    return file


def facts(path: Path | str, **settings: Any) -> dict[str, Any]:
    return open_source(path, SourceSettings(**settings)).facts


def test_the_digits_are_the_embedded_ones_in_their_order() -> None:
    for name, split in (("digits", "train"), ("digits:held-out", "held-out")):
        source, half = open_source(name), digits(split)
        samples = source.read(3, [5, 0, 5])
        assert torch.equal(torch.stack(samples.images), quantise(half.images[[5, 0, 5]]))
        assert samples.labels.tolist() == half.labels[[5, 0, 5]].tolist()
        assert (source.count, source.shape, source.n_classes, source.nfe) == (len(half), (1, 8, 8), 10, None)
        with pytest.raises(ValueError, match=f"{name} has {len(half)} images, from 0"):
            source.read(0, [len(half)])
    assert facts("digits") != facts("digits:held-out")


def test_a_models_images_are_its_samples_as_a_png_would_hold_them(teacher: Path, tmp_path: Path) -> None:
    source = open_source(teacher, SourceSettings("euler", 3, 1.5))
    samples, expected = source.read(7, range(6)), load_generator(teacher, "euler", 3, 1.5)(7, range(6))
    assert torch.equal(torch.stack(samples.images), (127.5 * expected + 128).floor().clamp(0, 255).to(torch.uint8))
    assert samples.labels.tolist() == list(range(6))
    assert (source.count, source.shape, source.n_classes, source.nfe) == (None, (1, 8, 8), 10, 6)
    for k, image in enumerate(samples.images):
        write_png(tmp_path / f"{k}.png", image)
    assert torch.equal(torch.stack(open_source(tmp_path).read(0, range(6)).images), torch.stack(samples.images))


def test_a_sample_has_the_same_bits_in_any_batch_of_the_same_size(teacher: Path) -> None:
    source = open_source(teacher, SourceSettings("ancestral", 3))
    first, second = (torch.stack(source.read(1, numbers).images) for numbers in (range(8), [3, 9, 4, 0, 11, 5, 6, 7]))
    assert torch.equal(second[[0, 2, 3, 5, 6, 7]], first[[3, 4, 0, 5, 6, 7]])
    source.close()
    assert torch.equal(torch.stack(source.read(1, range(8)).images), first)
    assert not torch.equal(torch.stack(source.read(2, range(8)).images), first)


def test_equal_facts_are_of_equal_images_wherever_the_folder_lies(
    teacher: Path, gaussian: Path, tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "copy")
    half = digits("train")
    Gaussian.fit([(1.1 * half.images, half.labels)], n_classes=10).save(tmp_path / "wider")
    own = [
        facts(teacher, **settings)
        for settings in (
            {},
            {"steps": 4},
            {"sampler": "euler"},
            {"guidance": 2.0},
            {"teleport": str(gaussian), "sigma_skip": 3.0},
            {"teleport": str(gaussian), "sigma_skip": 4.0},
            {"teleport": str(tmp_path / "wider"), "sigma_skip": 3.0},
        )
    ]
    assert all(a != b for i, a in enumerate(own) for b in own[:i])
    assert facts(tmp_path / "copy") == own[0] == facts(teacher, tolerance=0.2)
    shutil.copy(gaussian, tmp_path / "g")
    assert facts(tmp_path / "copy", teleport=str(tmp_path / "g"), sigma_skip=3) == own[4]
    (tmp_path / "copy/README.md").write_text("Another card")
    (tmp_path / "copy/unet/diffusion_pytorch_model.bin").write_bytes(b"never read")
    assert facts(tmp_path / "copy") == own[0]
    assert facts(save_teacher(tmp_path / "other", seed=1)) != own[0]
    text = str(own)
    assert str(teacher.parent) not in text


def test_a_student_is_the_same_whatever_the_sampler(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "student")
    file = folder / "distill.json"
    file.write_text(file.read_text().replace('"teacher"', '"student"'))
    known = [facts(folder, **settings) for settings in ({}, {"sampler": "euler", "steps": 3, "guidance": 2.0})]
    assert known[0] == known[1]
    assert "sampler" not in known[0]
    assert open_source(folder).nfe == 1


def test_no_network_is_read_before_the_first_image(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "broken")
    (tmp_path / "broken/unet/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    source = open_source(tmp_path / "broken")
    assert source.nfe == 35
    with pytest.raises(ValueError, match=r"unet: cannot be read"):
        source.read(0, range(2))


def test_a_model_that_changes_after_it_was_opened_is_refused(teacher: Path, gaussian: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "pipeline")
    weights = tmp_path / "pipeline/unet/diffusion_pytorch_model.safetensors"
    source = open_source(tmp_path / "pipeline")
    shutil.copy(save_teacher(tmp_path / "other", seed=1) / "unet" / weights.name, weights)
    os.utime(weights, ns=(0, 1))
    with pytest.raises(ValueError, match=r"model\.safetensors: has changed since it was hashed"):
        source.read(0, range(2))

    source = open_source(tmp_path / "pipeline", SourceSettings(teleport=str(gaussian), sigma_skip=3.0))
    (tmp_path / "pipeline/unet/extra.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what it was when it was opened"):
        source.read(0, range(2))


def test_paths_and_settings_that_are_none_are_refused_at_once(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    for path in (tmp_path / "nowhere", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=rf"source: .*{path.name}' is no folder, nor a file of images"):
            open_source(path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("command: teach\n")
    with pytest.raises(ValueError, match="this run has not finished"):
        open_source(tmp_path / "run")
    with pytest.raises(ValueError, match="device: 'abacus'"):
        open_source(teacher, device="abacus")
    with pytest.raises(ValueError, match=r"prompts: .* has no use for words"):
        open_source(teacher, SourceSettings(prompts="words.txt"))
    for settings, message in (
        ({"sampler": "eulr"}, "sampler: 'eulr'; accepted are euler, heun"),
        ({"steps": 0}, "steps: 0; accepted are whole numbers from 1"),
        ({"steps": 2.5}, "steps: 2.5"),
        ({"guidance": float("nan")}, "guidance: nan"),
        ({"tolerance": 0.0}, "tolerance: 0.0"),
        ({"sigma_skip": 3.0}, "sigma_skip: 3.0; accepted are positive levels, with a Gaussian to jump by"),
    ):
        with pytest.raises(ValueError, match=message):
            SourceSettings(**settings)


@pytest.mark.slow
def test_a_students_run_is_what_it_exports_and_is_watched_while_it_trains(tmp_path: Path) -> None:
    save_teacher(tmp_path / "pipeline")
    write_config(tmp_path, TRAIN)
    assert distill("train", "--config", "config.yaml", cwd=tmp_path).code == 0
    assert distill("export", "student", "exported", cwd=tmp_path).code == 0
    run, exported = (open_source(tmp_path / name) for name in ("student", "exported"))
    for source in (run, exported):
        assert (source.nfe, source.shape, source.n_classes) == (1, (1, 8, 8), 10)
    pairs = zip(run.read(3, range(8)).images, exported.read(3, range(8)).images, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert run.facts == facts(tmp_path / "student", sampler="euler", guidance=3.0)

    run.close()
    checkpoints = tmp_path / "student/checkpoints"
    shutil.copytree(checkpoints / "step-00000006", checkpoints / "step-00000008")
    with pytest.raises(ValueError, match="student: is not what it was when it was opened"):
        run.read(3, range(8))
