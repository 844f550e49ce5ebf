"""The small parts: noise levels, learning rates, averages, pictures, the student, the order of public names."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import distill
from distill.average import Average
from distill.data import Images
from distill.methods import StudentNoise
from distill.noise import (
    Share,
    check_log_normal,
    check_range,
    karras_level,
    log_normal_level,
    student_level,
    uncovered,
)
from distill.optim import Update, adamw, learning_rate, student_rate
from distill.pictures import save_curves, save_grid, side_by_side, to_uint8
from distill.pretrain import Pretrainer
from distill.sections import Fake, LogNormal, Optimizer
from distill.student import OneStep
from samplers import GaussianMixture, karras_sigmas


def test_shares_of_a_batch_are_the_batch() -> None:
    whole = Share(5, 8)
    parts = [Share(5, 8, rank, 4) for rank in range(4)]
    assert [list(p.numbers(3)) for p in parts] == [[24, 25], [26, 27], [28, 29], [30, 31]]
    assert list(whole.numbers(3)) == list(range(24, 32))
    assert torch.equal(torch.cat([p.noise(3).normal((2,)) for p in parts]), whole.noise(3).normal((2,)))
    with pytest.raises(ValueError, match="batch_size: 8 does not divide among 3 processes"):
        Share(5, 8, 0, 3)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_part_of_a_batch_is_the_same_samples_on_any_number_of_processes(parts: int) -> None:
    for part in range(parts):
        alone = list(Share(5, 16).numbers(3, part, parts))
        assert alone == list(range(48 + part * 16 // parts, 48 + (part + 1) * 16 // parts))
        for processes in (2, 4):
            shares = [Share(5, 16, rank, processes).numbers(3, part, parts) for rank in range(processes)]
            assert [number for share in shares for number in share] == alone
    with pytest.raises(ValueError, match="8 samples a process do not divide into 3 parts"):
        Share(5, 16, 0, 2).numbers(0, 0, 3)


def test_both_laws_of_the_students_levels_and_what_the_fake_score_misses_of_them() -> None:
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    wide, law = StudentNoise(trim=0.0), StudentNoise(name="log-normal", mean=-0.5, std=0.9)
    assert torch.equal(student_level(u, wide, 0.002, 80.0), karras_level(u, wide, 0.002, 80.0))
    expected = log_normal_level(u, LogNormal(mean=-0.5, std=0.9), 0.002, 80.0)
    assert torch.equal(student_level(u, law, 0.002, 80.0), expected)
    # EDM's log-normal ends at sigma 12, where 30 % of the Karras grid's levels are yet to come
    assert uncovered(Fake(), wide, 0.002, 80.0) == pytest.approx(0.301, abs=0.001)
    assert uncovered(Fake(levels="student"), wide, 0.002, 80.0) == 0
    alike = StudentNoise(name="log-normal")
    assert uncovered(Fake(), alike, 0.002, 80.0) == pytest.approx(0.001, abs=1e-9)


def test_the_students_levels_are_uniform_in_the_karras_index() -> None:
    config = StudentNoise(trim=0.0)
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    assert torch.allclose(karras_level(u, config, 0.02, 10.0), karras_sigmas(9, 0.02, 10.0)[:-1], rtol=1e-12)
    trimmed = karras_level(torch.tensor([0.0, 1.0]), StudentNoise(trim=0.125), 0.02, 10.0)
    assert torch.allclose(trimmed.double(), karras_sigmas(9, 0.02, 10.0)[[1, 7]], rtol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"), [(-1.2, 1.2, 1e-6, 1e6), (-0.8, 1.2, 0.02, 10.0), (0, 3, 0.5, 2)]
)
def test_log_normal_levels_have_the_truncated_distribution(mean: float, std: float, low: float, high: float) -> None:
    from scipy.stats import truncnorm

    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    levels = log_normal_level(u, LogNormal(mean=mean, std=std), low, high)
    a, b = (math.log(low) - mean) / std, (math.log(high) - mean) / std
    expected = np.exp(truncnorm.ppf(u.numpy(), a, b, loc=mean, scale=std))
    assert np.allclose(levels.numpy(), expected, rtol=1e-8)


def test_a_distribution_outside_the_range_is_refused() -> None:
    check_log_normal("noise", LogNormal(), 0.01, 20.0)
    for mean in (60.0, -60.0, 9.0):
        with pytest.raises(ValueError, match=rf"noise.mean, noise.std: {mean}"):
            check_log_normal("noise", LogNormal(mean=mean), 0.01, 20.0)


def test_a_range_is_completed_and_checked() -> None:
    assert check_range(None, None, 0.1, 5.0) == (0.1, 5.0)
    assert check_range(0.2, None, 0.1, 5.0) == (0.2, 5.0)
    for low, high in ((0.05, 1.0), (0.2, 6.0), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match=r"noise\.sigma_min, noise\.sigma_max"):
            check_range(low, high, 0.1, 5.0)
    with pytest.raises(ValueError, match="noise"):
        check_range(None, None, 0.1, math.inf)


def test_the_learning_rate_warms_up_and_falls() -> None:
    config = Optimizer(lr=2.0, warmup=4, schedule="cosine")
    rates = [learning_rate(config, step, 24) for step in range(24)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx(1.0)
    assert rates[23] == pytest.approx(1 + math.cos(math.pi * 19 / 20))
    constant = Optimizer(lr=2.0, warmup=2, schedule="constant")
    assert [learning_rate(constant, step, 5) for step in range(5)] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert [student_rate(constant, step, 5) for step in range(5)] == [0.0, 2.0, 2.0, 2.0, 2.0]


def test_an_update_is_adamw_with_the_schedule_and_the_clip() -> None:
    """Against torch's own, step by step; the clip acts on the norm of all parameters."""
    config = Optimizer(lr=0.1, betas=(0.5, 0.9), weight_decay=0.1, warmup=2, clip=0.5)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    update = Update(adamw(ours, config), lambda step: learning_rate(config, step, 4), config.clip)
    reference = torch.optim.AdamW(theirs.parameters(), betas=(0.5, 0.9), weight_decay=0.1)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        update(ours(x).square().sum() * 10, step)
        reference.zero_grad()
        (theirs(x).square().sum() * 10).backward()
        norm = torch.cat([p.grad.flatten() for p in theirs.parameters() if p.grad is not None]).norm()
        for p in theirs.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, 0.5 / float(norm))
        reference.param_groups[0]["lr"] = learning_rate(config, step, 4)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_average_ramps_up_and_follows_buffers() -> None:
    average, module = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    module.weight.data.fill_(2.0)
    module.running_mean.fill_(7.0)
    expected, follow = 1.0, Average(average, module, 0.6)
    for step in range(30):
        follow(step)
        decay = min(0.6, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * 2.0
        assert average.weight.item() == pytest.approx(expected, rel=1e-6)
    assert average.running_mean.item() == 7.0


def test_a_student_is_a_denoiser_called_once() -> None:
    mixture = GaussianMixture(torch.ones(1), torch.tensor([[1.0, 2.0]]), torch.tensor([0.3]))
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OneStep(mixture, 2.5)(z), mixture(2.5 * z, torch.tensor(2.5)))


def test_a_teacher_sees_every_image_and_drops_its_share_of_labels() -> None:
    """The pretrainer on a denoiser that notes what it is asked."""

    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))
            self.labels: list[int] = []

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            self.labels += cond.tolist()
            return self.gain * x

    asked = Asked()
    images = Images(torch.zeros(30, 1, 2, 2), torch.arange(30) % 3, ("a", "b", "c"))
    update = Update(torch.optim.SGD(asked.parameters(), lr=0.0), lambda step: 0.0)
    average = Average(copy.deepcopy(asked), asked, 0.5)
    options = {"average": average, "null_label": 3, "sigma_data": 0.5}
    for dropout, nulls in ((0.0, (0, 0)), (0.25, (180, 270))):
        asked.labels = []
        trainer = Pretrainer(asked, update, images, lambda u: 1 + u, Share(0, 45), label_dropout=dropout, **options)
        for n in range(20):  # 900 samples: 30 epochs
            trainer.step(n)
        counts = np.bincount(asked.labels, minlength=4)
        assert nulls[0] <= counts[3] <= nulls[1]
        if dropout == 0:
            assert counts.tolist() == [300, 300, 300, 0]


def test_pictures_hold_the_values(tmp_path: Path) -> None:
    values = torch.tensor([-2.0, -1.0, -1 + 1 / 127.5, 0.0, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 128, 255, 255]
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 127.5 - 1), every.to(torch.uint8))  # what data.folder reads

    images = torch.stack([torch.full((1, 8, 8), k / 6 - 1) for k in range(13)])
    save_grid(images, tmp_path / "new" / "grid.png")
    pixels = np.array(Image.open(tmp_path / "new" / "grid.png"))
    assert pixels.shape == (2 * 34 + 2, 10 * 34 + 2, 3)  # 8 pixels enlarged 4 times, a gap of 2
    for k in range(13):
        row, column = divmod(k, 10)
        cell = pixels[2 + 34 * row : 34 + 34 * row, 2 + 34 * column : 34 + 34 * column]
        assert (cell == int(to_uint8(images[k, 0, 0, 0]))).all()
    save_grid(torch.zeros(2, 3, 64, 64), tmp_path / "large.png")
    assert Image.open(tmp_path / "large.png").size == (2 * 66 + 2, 66 + 2)

    side_by_side([("one", images), ("two", images[:10])], tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as picture:
        picture.verify()
        assert picture.format == "PNG"


def test_curves_are_a_picture_of_every_metric(tmp_path: Path) -> None:
    lines = [{"step": s, "seconds": s / 10, "loss": 1 / s, "gap": s - 3.0} for s in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        wide = picture.size
        assert len(set(np.array(picture.convert("L")).ravel().tolist())) > 10  # something is drawn
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 0.1, "loss": 1.0}) + "\n")
    save_curves(tmp_path / "metrics.jsonl", tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size[0] * 2 == wide[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl", "one.png"]


def test_every_public_name_is_there() -> None:
    for name in distill.__all__:
        assert getattr(distill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        distill.nonsense  # noqa: B018
