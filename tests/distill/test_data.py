"""Training images: the split of the digits, folders as they come, and the order of an epoch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import continuous, digits, epoch_order, folder, image_files


def test_the_digits_are_split_once_and_evenly() -> None:
    train, held_out = digits("train"), digits("held-out")
    assert (len(train), len(held_out)) == (899, 898)
    assert train.classes == tuple("0123456789")
    assert train.labels is not None
    assert held_out.labels is not None
    counts = [torch.bincount(s.labels, minlength=10) for s in (train, held_out)]
    assert int((counts[0] - counts[1]).abs().max()) <= 1
    for images in (train.images, held_out.images):
        assert images.shape[1:] == (1, 8, 8)
        assert images.dtype == torch.float32
        assert (float(images.min()), float(images.max())) == (-1.0, 1.0)

    from sklearn.datasets import load_digits

    rows = [tuple(v) for s in (train, held_out) for v in ((s.images + 1) * 8).flatten(1).tolist()]
    assert sorted(rows) == sorted(tuple(v) for v in load_digits().data.tolist())  # every image, once
    assert not set(rows[:899]) & set(rows[899:])
    assert torch.equal(train.images, digits("train").images)


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_sub_folders_are_classes_and_every_format_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey, colour = (rng.integers(0, 256, s, dtype=np.uint8) for s in ((8, 8), (8, 8, 3)))
    save(tmp_path / "zebra/a.png", grey)
    save(tmp_path / "ant/deeper/b.png", colour)
    save(tmp_path / "ant/large.PNG", np.full((40, 20, 3), 200, np.uint8))
    (tmp_path / "ant/notes.txt").write_text("not an image")
    images = folder(tmp_path, 8, 3)
    assert images.classes == ("ant", "zebra")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]
    assert images.images.shape == (3, 3, 8, 8)
    assert images.images.dtype == torch.uint8
    first, second, third = images.read(range(3))
    expected = torch.from_numpy(colour).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(first, expected, atol=1e-6)
    assert torch.allclose(second, torch.full((3, 8, 8), 200 / 127.5 - 1), atol=1e-6)
    assert torch.allclose(third, (torch.from_numpy(grey).float() / 127.5 - 1).expand(3, 8, 8), atol=1e-6)

    one = folder(tmp_path, 8, 1)
    assert one.images.shape == (3, 1, 8, 8)
    assert torch.allclose(one.read([2])[0, 0], torch.from_numpy(grey).float() / 127.5 - 1, atol=1e-6)


def test_without_sub_folders_there_are_no_classes(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    images = folder(tmp_path, 4, 1)
    assert images.labels is None
    assert images.classes == ()
    save(tmp_path / "b/c.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"a\.png lies beside class folders"):
        folder(tmp_path, 4, 1)


def test_hidden_folders_and_files_are_no_images_and_no_classes(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png", ".ipynb_checkpoints/x-checkpoint.png", "a/._x.png", "a/.trash/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = image_files(tmp_path, 8)
    assert (found.classes, [str(f.relative_to(tmp_path)) for f in found.files]) == (("a", "b"), ["a/x.png", "b/x.png"])


def test_a_picture_is_turned_as_its_camera_was_and_cropped_in_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0] = 255  # a white edge on top; orientation 3 is upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    save(tmp_path / "a.png", pixels, exif=exif)
    image = folder(tmp_path, 8, 1).read([0])[0, 0]
    assert torch.equal(image[-1], torch.ones(8))
    assert torch.equal(image[:-1], -torch.ones(7, 8))

    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = 255
    save(tmp_path / "a.png", wide)
    assert torch.equal(folder(tmp_path, 8, 1).read([0]), torch.ones(1, 1, 8, 8))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        folder(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match="has no images"):
        folder(tmp_path, 8)
    save(tmp_path / "a.png", np.full((8, 8), 7, np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image"):
        folder(tmp_path, 8)
    (tmp_path / "b.png").unlink()
    save(tmp_path / "c.png", np.full((8, 8), 40_000, np.uint16))
    with pytest.raises(ValueError, match=r"c\.png cannot be read as an image \(its mode is I"):
        folder(tmp_path, 8)


def test_files_are_read_when_they_are_asked_for_and_as_a_folder_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(6):
        save(tmp_path / f"{'ba'[k % 2]}/{k}.png", rng.integers(0, 256, (9, 8, 3), dtype=np.uint8))
    whole, files = folder(tmp_path, 8), image_files(tmp_path, 8)
    assert (len(files), files.shape, files.classes) == (6, (3, 8, 8), ("a", "b")) == (6, whole.shape, whole.classes)
    assert files.labels is not None
    assert whole.labels is not None
    assert files.labels.tolist() == whole.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for numbers in (range(6), [4, 0, 0], range(2, 3)):
        assert torch.equal(files.read(numbers), whole.read(numbers))
        assert torch.equal(whole.read(numbers), continuous(whole.images[torch.tensor(list(numbers))]))
    assert [Path(files.name(k)).name for k in (0, 3)] == ["1.png", "0.png"]

    (tmp_path / "a/3.png").write_bytes(b"no image")
    files = image_files(tmp_path, 8)
    assert len(files.read([0, 2, 3])) == 3
    with pytest.raises(ValueError, match=r"a/3\.png cannot be read as an image"):
        files.read([0, 1])


def test_an_epoch_is_a_permutation_however_it_is_cut() -> None:
    n, seed = 7, 3
    whole = epoch_order(n, seed, range(4 * n))
    for epoch in range(4):
        assert sorted(whole[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    assert len({tuple(whole[e * n : (e + 1) * n].tolist()) for e in range(4)}) > 1
    cut = torch.cat([epoch_order(n, seed, range(k, min(k + 5, 4 * n))) for k in range(0, 4 * n, 5)])
    assert torch.equal(cut, whole)
    assert not torch.equal(epoch_order(n, seed + 1, range(4 * n)), whole)
