"""Toys: mixtures with the moments that they claim, networks that start where they say, runs by the command."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import norm

from distill import toy
from distill.sections import Toy
from distill.student import OneStep
from distill.toy import AffineStudent, ToyNetwork
from samplers import GaussianMixture
from tests.distill.command import distill
from tests.distill.runs import assert_refused, entries, lines

FOLDER = Path(__file__).parents[2] / "configs"
WALKED = [FOLDER / f"toy-ring-{name}.yaml" for name in ("disback", "disback-f-distill", "teacher")]
CONFIGS = sorted({*FOLDER.glob("toy-*.yaml")} - {*WALKED})
VARIANCE = {"two-modes": 0.25 + 4 - 0.8**2, "ring": 0.04 + 4 / 2, "grid": 0.01 + 2.0}  # of a coordinate
LINE: dict[str, Any] = {
    "command": "train",
    "run": "line",
    "teacher": {"name": "two-modes"},
    "student": {"sigma_init": 1.0, "optimizer": {"lr": 1e-2}},
    "noise": {"sigma_min": 0.05, "sigma_max": 5.0},
    "batch_size": 16,
    "steps": 4,
    "logging": {"log_every": 1, "sample_every": 100, "checkpoint_every": 2},
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", toy.MIXTURES)
def test_the_mixtures_have_their_moments(name: str) -> None:
    mixture, n = toy.MIXTURES[name](), 40_000
    x = mixture.sample(n, generator=torch.Generator().manual_seed(1))
    mean = 0.3 * -2 + 0.7 * 2 if name == "two-modes" else 0.0
    assert x.shape == (n, 1 if name == "two-modes" else 2)
    assert ((x.mean(0) - mean).abs() <= 5 * x.std(0) / n**0.5).all()
    squares = (x - mean) ** 2
    assert ((squares.mean(0) - VARIANCE[name]).abs() <= 5 * squares.std(0) / n**0.5).all()
    if x.shape[1] == 2:
        product = x.prod(1)
        assert abs(float(product.mean())) <= 5 * float(product.std()) / n**0.5
    error = 0.5 * float(squares.std()) / math.sqrt(VARIANCE[name] * 20_000)
    assert abs(toy.standard_deviation(mixture) - math.sqrt(VARIANCE[name])) <= 5 * error


def test_the_mixtures_have_their_modes() -> None:
    line, ring, grid = (toy.MIXTURES[name]() for name in ("two-modes", "ring", "grid"))
    assert line.means[:, 0].tolist() == [-2, 2]
    assert line.log_weights.exp().tolist() == pytest.approx([0.3, 0.7])
    assert line.standard_deviations.tolist() == [0.5, 0.5]
    assert ring.means.norm(dim=1).tolist() == pytest.approx([2.0] * 8, rel=1e-6)
    gaps = (ring.means.roll(-1, 0) - ring.means).norm(dim=1)
    assert gaps.tolist() == pytest.approx([4 * math.sin(math.pi / 8)] * 8, rel=1e-5)
    assert sorted(map(tuple, grid.means.tolist())) == [(a, b) for a in range(-2, 3) for b in range(-2, 3)]
    assert ring.standard_deviations.tolist() == pytest.approx([0.2] * 8)
    assert grid.standard_deviations.tolist() == pytest.approx([0.1] * 25)


@pytest.mark.parametrize("name", toy.MIXTURES)
def test_a_fake_score_starts_as_the_exact_denoiser_of_a_normal_law(name: str) -> None:
    """D = s^2 / (s^2 + sigma^2) x, at every level that it accepts."""
    mixture = toy.MIXTURES[name]()
    _, fake = toy.networks(mixture, Toy())
    variance = torch.tensor([toy.standard_deviation(mixture) ** 2])
    exact = GaussianMixture(torch.ones(1), torch.zeros(1, mixture.dim), variance)
    sigma = torch.logspace(math.log10(toy.SIGMA_MIN), math.log10(toy.SIGMA_MAX), 50)
    x = 3 * normal(50, mixture.dim)
    assert torch.allclose(fake(x, sigma), exact(x, sigma), rtol=1e-5, atol=1e-6)
    assert (fake.sigma_min, fake.sigma_max) == (0.02, 20.0)
    with pytest.raises(ValueError, match="outside the network's range"):
        fake(x[:1], torch.tensor([21.0]))


@pytest.mark.parametrize("affine", [False, True])
def test_a_student_starts_as_its_spread_and_ignores_the_level_that_it_is_called_at(affine: bool) -> None:
    mixture = toy.ring()
    student, _ = toy.networks(mixture, Toy(spread=1.7, affine=affine))
    z = normal(30, 2)
    for sigma_init in (0.5, 4.0):
        assert torch.allclose(OneStep(student, sigma_init)(z), 1.7 * z, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.ones_like(p))
    moved = [OneStep(student, sigma_init)(z) for sigma_init in (0.5, 4.0)]
    assert torch.allclose(*moved, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(moved[0], 1.7 * z, atol=1e-2)


def test_an_affine_students_law_is_that_of_its_samples() -> None:
    student = AffineStudent(2, 0.7, torch.float64)
    with torch.no_grad():
        student.shift.copy_(torch.tensor([1.0, -2.0]))
        student.scale.fill_(-1.3)  # the sign of a symmetric law does not matter
    law = student.law()
    x = torch.tensor([[0.3, -1.0], [2.0, 4.0]], dtype=torch.float64)
    expected = norm.logpdf(x[:, 0], 1.0, 1.3) + norm.logpdf(x[:, 1], -2.0, 1.3)
    assert law.log_density(x).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    samples = OneStep(student, 2.5)(normal(20_000, 2).double())
    assert ((samples.mean(0) - student.shift).abs() <= 5 * 1.3 / 20_000**0.5).all()
    assert ((samples.var(0) - 1.69).abs() <= 5 * 1.69 * (2 / 20_000) ** 0.5).all()
    with torch.no_grad():
        student.scale.fill_(0.2)
    assert law.standard_deviations.tolist() == pytest.approx([1.3])  # "as it stands": a copy, not a view


def test_the_network_reads_its_input_and_the_level() -> None:
    torch.manual_seed(0)
    network = ToyNetwork(2, 16, 2)
    x, time = normal(5, 2), torch.linspace(-1, 0.75, 5)
    assert network(x, time)[0].abs().max() == 0
    torch.nn.init.ones_(network.leave.weight)
    (out,) = network(x, time)
    assert (out - network(x, time + 0.1)[0]).abs().min() > 1e-4
    assert (out - network(x + 0.1, time)[0]).abs().min() > 1e-4
    assert torch.allclose(out[2:3], network(x[2:3], time[2:3])[0], atol=1e-6)


def write(place: Path, base: dict[str, Any], **changes: Any) -> Path:
    file = place / "toy.yaml"
    file.write_text(yaml.safe_dump(base | changes))
    return file


def test_there_are_toy_configurations() -> None:
    assert CONFIGS


@pytest.mark.slow
def test_the_toys_of_disback_go_their_way_by_the_command(tmp_path: Path) -> None:
    """A teacher with weights is taught, then degraded and walked back to, plain and on a bridge."""
    brief = ("--batch_size", 16, "--logging.log_every", 1, "--logging.mismatch_every", "null")
    taught = distill("teach", "--config", WALKED[-1], "--steps", 3, *brief, cwd=tmp_path)
    assert taught.code == 0, taught.err
    for config in WALKED[:-1]:
        words = ("--steps", 4, "--target.updates", 2, "--degradation.steps", 3, "--run", config.stem)
        result = distill("train", "--config", config, *words, *brief, cwd=tmp_path)
        assert result.code == 0, result.err
        found = lines(tmp_path / config.stem)
        assert [line["node"] > 0 for line in found] == [True, True, False, False]
        assert all(math.isfinite(value) for line in found for value in line.values())
        assert ("weight_mean" in found[0]) == config.stem.endswith("f-distill")


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_a_toy_trains_by_the_command(config: Path, tmp_path: Path) -> None:
    """A few updates of every toy configuration: metrics with the weights' statistics, a picture, a checkpoint."""
    short = ("--steps", 3, "--batch_size", 16, "--logging.log_every", 1, "--run", "run")
    result = distill("train", "--config", config, *short, cwd=tmp_path)
    assert result.code == 0, result.err
    run = tmp_path / "run"
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
    for line in lines(run):
        assert all(math.isfinite(value) for value in line.values())
        assert line["weight_mean"] == pytest.approx(1, rel=1e-5)  # the second stage of the normalisation
        assert line["weight_max"] >= 1 - 1e-5
        assert 0 < line["weight_ess"] <= 1 + 1e-6
        assert line["discriminator_loss"] > 0
    assert [line["log_ratio"] == 0 for line in lines(run)] == [True, False, False]  # it begins without an opinion
    with Image.open(run / "samples/step-00000003.png") as picture:
        picture.load()
        assert min(picture.size) > 100
    assert (run / "curves.png").is_file()
    kept = {file.stem for file in (run / "checkpoints/step-00000003").glob("*.safetensors")}
    names = {"student", "fake", "average", "discriminator", "ratio_weight", "student.optimizer", "fake.optimizer"}
    assert kept == names
    assert json.loads((run / "versions.json").read_text())["torch"]
    assert not (run / "network").exists()  # there is no teacher to copy


@pytest.mark.slow
def test_an_affine_student_stays_affine(tmp_path: Path) -> None:
    config = write(tmp_path, LINE, toy={"affine": True, "spread": 0.8})
    result = distill("train", "--config", config, cwd=tmp_path)
    assert result.code == 0, result.err
    weights = load_file(tmp_path / "line/checkpoints/step-00000004/student.safetensors")
    assert weights.keys() == {"shift", "scale"}
    student = AffineStudent(1, 0.8)
    student.load_state_dict(weights)
    assert float(weights["shift"].abs().max()) > 1e-4  # it learns
    assert abs(float(weights["scale"]) - 0.8) > 1e-4
    law = student.law()
    assert law.means.flatten().tolist() == pytest.approx(weights["shift"].tolist())
    assert law.standard_deviations.tolist() == pytest.approx([abs(float(weights["scale"]))], rel=1e-6)
    with Image.open(tmp_path / "line/samples/step-00000004.png") as picture:
        picture.verify()


def test_a_toy_without_a_discriminator_has_no_ratio(tmp_path: Path) -> None:
    result = distill("train", "--config", write(tmp_path, LINE), cwd=tmp_path)
    assert result.code == 0, result.err
    assert lines(tmp_path / "line")[0].keys() == {"step", "gap", "student_loss", "fake_loss"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("student.lora.rank", 2),
        ("fake.lora.rank", 2),
        ("memory.checkpointing", "true"),
        ("prompts.file", "words.txt"),
        ("prompts.height", 64),
        ("prompts.width", 64),
    ],
)
def test_a_toy_has_nothing_of_a_pipeline(tmp_path: Path, option: str, value: object) -> None:
    result = distill("train", "--teacher.name", "ring", "--run", "run", f"--{option}", value, cwd=tmp_path)
    assert_refused(result, option, "for teachers that are pipelines", "ring is a toy")


@pytest.mark.slow
def test_a_toy_is_no_pipeline(tmp_path: Path) -> None:
    """It cannot be exported nor drawn as images: one line, and nothing is written."""
    assert distill("train", "--config", write(tmp_path, LINE, steps=1), cwd=tmp_path).code == 0
    before = entries(tmp_path)
    assert_refused(distill("export", "line", "exported", cwd=tmp_path), "line")
    assert_refused(distill("sample", "line", "--n", 2, "--out", "grid.png", cwd=tmp_path), "line")
    assert entries(tmp_path) == before


@pytest.mark.slow
def test_another_toy_is_another_run(tmp_path: Path) -> None:
    config = write(tmp_path, LINE, steps=2)
    assert distill("train", "--config", config, cwd=tmp_path).code == 0
    result = distill("train", "--config", config, "--teacher.name", "ring", "--resume", cwd=tmp_path)
    assert_refused(result, "the configuration of line has changed in teacher.name")
    shutil.rmtree(tmp_path / "line/checkpoints/step-00000002")
    again = distill("train", "--config", config, "--resume", cwd=tmp_path)
    assert again.code == 0, again.err
    assert distill("train", "--config", config, "--run", "other", "--seed", 1, cwd=tmp_path).code == 0
    assert lines(tmp_path / "other") != lines(tmp_path / "line")
