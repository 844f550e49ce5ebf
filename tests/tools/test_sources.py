from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.data import digits
from tools.features import quantise
from tools.sources import Draw, Fixed, Generated, Source, image_folder


class Counter:
    """A generator whose sample k of a seed is the constant image seed + k / 1000; it remembers its calls."""

    nfe = 3

    def __init__(self) -> None:
        self.calls: list[tuple[int, range]] = []

    def labels(self, indices: range) -> torch.Tensor:
        return torch.tensor([k % 10 for k in indices])

    def __call__(self, seed: int, indices: range) -> torch.Tensor:
        self.calls.append((seed, indices))
        return torch.stack([torch.full((1, 2, 2), seed + k / 1000, dtype=torch.float64) for k in indices])


def drawn(source: Source, n: int, draws: int, seed: int = 0) -> tuple[list[Draw], int]:
    made: list[int] = []
    return list(source.draws(n, draws, seed, made.append)), sum(made)


def write(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for k, image in enumerate(quantise(images)):
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(folder / f"{k:04}.png")
    return folder


def test_a_generator_makes_draw_j_from_seed_plus_j_in_batches_after_one_to_warm_up() -> None:
    counter = Counter()
    result, made = drawn(Generated(counter), 1100, 2, seed=7)
    batches = [range(500), range(500, 1000), range(1000, 1100)]
    assert counter.calls == [(7, range(500)), *[(seed, batch) for seed in (7, 8) for batch in batches]]
    assert made == 2200
    for j, draw in enumerate(result):
        assert draw.images.dtype == torch.float32
        torch.testing.assert_close(draw.images[:, 0, 0, 0], 7 + j + torch.arange(1100) / 1000)
        assert torch.equal(draw.labels, torch.arange(1100) % 10)
        assert draw.seconds > 0
    assert Generated(counter).nfe == 3


def test_fixed_images_are_dealt_into_disjoint_draws() -> None:
    images = torch.arange(100.0).reshape(100, 1, 1, 1)
    result, made = drawn(Fixed(images, torch.arange(100)), 30, 5)
    assert [len(draw.images) for draw in result] == [30, 30, 30]
    assert made == 90
    values = torch.cat([draw.images.flatten() for draw in result])
    assert len(values.unique()) == 90
    assert not torch.equal(values, values.sort().values)
    assert torch.equal(values.long(), torch.cat([draw.labels for draw in result]))

    again, other = drawn(Fixed(images), 30, 1)[0][0], drawn(Fixed(images), 30, 1, seed=1)[0][0]
    assert torch.equal(again.images, result[0].images)
    assert not torch.equal(other.images, result[0].images)


def test_too_few_fixed_images_are_one_draw_of_all() -> None:
    (draw,), _ = drawn(Fixed(torch.arange(20.0).reshape(20, 1, 1, 1)), 30, 3)
    assert draw.images.flatten().sort().values.tolist() == list(range(20))
    assert draw.seconds is None


def test_a_folder_of_pngs_is_the_images_it_was_written_from(tmp_path) -> None:
    images = digits("held-out").images[:20]
    assert torch.equal(quantise(image_folder(write(tmp_path / "grey", images)).images), quantise(images))
    colour = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(quantise(image_folder(write(tmp_path / "rgb", colour)).images), quantise(colour))


def test_folders_that_would_need_resizing_or_reading_raise(tmp_path) -> None:
    folder = write(tmp_path / "a", torch.zeros(3, 1, 8, 8))
    Image.new("L", (16, 16)).save(folder / "z.png")
    with pytest.raises(ValueError, match=r"z\.png is 16x16, not 8x8"):
        image_folder(folder)
    Image.new("L", (8, 4)).save(folder / "z.png")
    with pytest.raises(ValueError, match=r"z\.png is 8x4, not 8x8"):
        image_folder(folder)
    (folder / "z.png").write_bytes(b"\x89PNG but not really")
    with pytest.raises(ValueError, match=r"z\.png cannot be read"):
        image_folder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images"):
        image_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        image_folder(tmp_path / "nowhere")
