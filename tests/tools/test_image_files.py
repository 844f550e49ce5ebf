"""Images of files: the levels that were written, in the order of names, and by name what cannot be right."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tools.sources import Source, open_source, write_png


def levels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def everything(source: Source) -> list[Tensor]:
    assert source.count is not None
    return list(source.read(0, range(source.count)).images)


def zipped(path: Path, files: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def png(image: Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()).save(out, "PNG")
    return out.getvalue()


def sixteen_bits(colour: int, channels: int) -> bytes:
    """A PNG of 4 x 4 pixels with 16 bits a channel, of the colour type 0 (grey), 2 (RGB) or 4 (grey and alpha)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(8 * channels)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3])
def test_what_was_written_is_read_in_the_order_of_names(tmp_path: Path, channels: int) -> None:
    images = levels(12, channels, 6, 5)
    names = ["b/0.png", "a/10.png", "a/2.PNG", "a-b/0.png", *(f"{k}.png" for k in range(8))]
    for name, image in zip(names, images, strict=True):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(tmp_path / "set" / name, image)
    for other in ("README.md", ".hidden.png", "a/Thumbs.db"):
        (tmp_path / "set" / other).write_bytes(b"no image")
    folder = open_source(tmp_path / "set")
    order = sorted(range(12), key=lambda k: Path(names[k]).parts)
    assert torch.equal(torch.stack(everything(folder)), images[order])
    assert (folder.shape, folder.count, folder.labels if hasattr(folder, "labels") else None) == (
        (channels, 6, 5),
        12,
        None,
    )
    assert (folder.n_classes, folder.nfe, folder.pictures.skipped) == (None, None, 3)

    files = {str(f.relative_to(tmp_path / "set")): f.read_bytes() for f in (tmp_path / "set").rglob("*") if f.is_file()}
    files |= {"__MACOSX/0.png": b"a resource fork"}
    archive = open_source(zipped(tmp_path / "set.zip", dict(reversed(files.items()))))
    assert torch.equal(torch.stack(everything(archive)), images[order])
    archive.close()
    assert torch.equal(torch.stack(archive.read(9, [3, 1]).images), images[order][[3, 1]])
    assert (archive.shape, archive.pictures.skipped) == ((channels, 6, 5), 4)


def test_every_format_is_read_as_clean_fid_reads_it(tmp_path: Path) -> None:
    image = Image.fromarray(levels(9, 7, 3).numpy())
    for name, mode in (("a.jpg", "RGB"), ("b.jpg", "CMYK"), ("c.webp", "RGB"), ("d.bmp", "RGB"), ("e.tiff", "L"),
                       ("f.png", "P"), ("g.png", "1"), ("h.png", "RGBA"), ("i.gif", "P"), ("j.jpeg", "L")):  # fmt: skip
        image.convert(mode).save(tmp_path / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "k.jpg", exif=turned)
    source = open_source(tmp_path)
    assert source.shape == (3, 9, 7)
    for file, found in zip(sorted(tmp_path.iterdir()), everything(source), strict=True):
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(Image.open(file).convert("RGB"))), file.name


def test_mixed_sizes_are_left_as_they_are(tmp_path: Path) -> None:
    images = [levels(1, 4, 4), levels(1, 4, 6)]
    for k, image in enumerate(images):
        write_png(tmp_path / f"{k}.png", image)
    source = open_source(tmp_path)
    assert source.shape is None
    for found, image in zip(everything(source), images, strict=True):
        assert torch.equal(found, image)


def test_facts_are_of_the_bytes_and_their_order_only(tmp_path: Path) -> None:
    images = levels(3, 1, 4, 4)
    for folder, names, k in (("a", "012", 0), ("b/c", "xyz", 0), ("d", "021", 0), ("e", "012", 1)):
        (tmp_path / folder).mkdir(parents=True)
        for name, image in zip(names, images, strict=True):
            write_png(tmp_path / folder / f"{name}.png", image if name != "2" else image + k)
    facts = [open_source(tmp_path / folder).facts for folder in ("a", "b/c", "d", "e")]
    assert facts[0] == facts[1]
    assert facts[0] != facts[2]
    assert facts[0] != facts[3]


@pytest.mark.parametrize("in_zip", [False, True])
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("z.png", png(levels(1, 8, 8))[:-30], "cannot be read as an image"),
        ("z.png", png(levels(1, 8, 8))[:20], "cannot be read as an image"),
        ("z.jpg", b"a page that said: not found", "cannot be read as an image"),
        ("z.png", b"", "cannot be read as an image"),
        ("z.png", sixteen_bits(0, 1), "more than 8 bits a channel"),
        ("z.png", sixteen_bits(2, 3), "more than 8 bits a channel"),
        ("z.png", sixteen_bits(4, 2), "more than 8 bits a channel"),
    ],
)
def test_a_bad_image_is_named(tmp_path: Path, name: str, data: bytes, message: str, in_zip: bool) -> None:
    good = png(levels(1, 8, 8, seed=1))
    if in_zip:
        place = zipped(tmp_path / "set.zip", {"a.png": good, name: data})
    else:
        place = tmp_path
        (place / "a.png").write_bytes(good)
        (place / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{place.name}/{name}: .*{message}"):
        everything(open_source(place))


def test_transparency_and_animations_are_refused(tmp_path: Path) -> None:
    rgba = Image.fromarray(levels(4, 4, 4).numpy(), "RGBA")
    palette = Image.fromarray(levels(4, 4).numpy()).convert("P")
    for save in (
        lambda file: rgba.save(file),
        lambda file: rgba.convert("LA").save(file),
        lambda file: palette.save(file, transparency=int(np.array(palette)[0, 0])),
    ):
        save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"a\.png: .*transparent in places; compose it over a background"):
            everything(open_source(tmp_path))
    (tmp_path / "a.png").unlink()
    rgba.convert("RGB").save(tmp_path / "b.gif", save_all=True, append_images=[palette.convert("RGB")])
    with pytest.raises(ValueError, match=r"b\.gif: .*several frames"):
        everything(open_source(tmp_path))


def test_nothing_to_judge_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: has no images .*and is no run or pipeline either"):
        open_source(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"a\.zip: has no images .*among 1 files"):
        open_source(zipped(tmp_path / "a.zip", {"notes.txt": b""}))
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 but not really")
    with pytest.raises(ValueError, match=r"b\.zip: cannot be read as a zip"):
        open_source(tmp_path / "b.zip")


def test_a_zip_writes_nowhere_and_its_damage_is_named(tmp_path: Path) -> None:
    images = levels(2, 3, 8, 8)
    place = tmp_path / "inner"
    place.mkdir()
    path = zipped(place / "set.zip", {"../../evil.png": png(images[0]), "/b.png": png(images[1])})
    before = sorted(tmp_path.rglob("*"))
    assert len(everything(open_source(path))) == 2
    assert sorted(tmp_path.rglob("*")) == before

    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 60] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"set\.zip/\.\./\.\./evil\.png: cannot be read as an image"):
        everything(open_source(path))


def test_a_file_that_changes_after_it_was_hashed_is_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", levels(1, 8, 8))
    folder = open_source(tmp_path)
    write_png(tmp_path / "a.png", levels(1, 8, 8, seed=1))
    with pytest.raises(ValueError, match=r"a\.png: has changed since it was hashed"):
        folder.read(0, [0])
    archive = open_source(zipped(tmp_path / "a.zip", {"a.png": png(levels(1, 8, 8))}))
    archive.close()
    os.utime(zipped(tmp_path / "a.zip", {"a.png": png(levels(1, 8, 8, seed=1))}), ns=(0, 1))
    with pytest.raises(ValueError, match=r"a\.zip: has changed since it was hashed"):
        archive.read(0, [0])
