"""Pictures in files: a folder or a zip of them, in the order of their names, each decoded when it is asked for.

They are read as clean-fid reads them, without resizing or turning, to uint8 [C, H, W]: C = 1 if all are grey, else 3.
What 8 bits of red, green and blue cannot hold is refused by name, not converted: 16 bits, transparency, animations.
Files that are no images are skipped and counted; nothing of a zip is ever written to the disk.
"""

import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data import IMAGE_SUFFIXES
from samplers.atomic import atomic_write
from tools.digest import HashCache, digest_json

Shape = tuple[int, int, int]  # channels, height, width


class _Header(NamedTuple):
    """What the first bytes of an image say."""

    width: int
    height: int
    grey: bool


def _files_below(root: Path) -> list[Path]:
    """Of folders that are links, too; a link to a folder that it lies in is not followed."""

    def walk(folder: Path, around: frozenset[str]) -> Iterator[Path]:
        inside = around | {os.path.realpath(folder)}
        for path in folder.iterdir():
            if not path.is_dir():
                yield path
            elif os.path.realpath(path) not in inside:
                yield from walk(path, inside)

    return list(walk(root, frozenset()))


class ImageFolder:
    """Every image below a folder. Raises ValueError, naming the file, for one that is none, and when there is none."""

    labels: Tensor | None = None

    def __init__(self, root: Path, hashes: HashCache) -> None:
        files = sorted(_files_below(root), key=lambda f: f.relative_to(root).parts)
        chosen = [f for f in files if _is_image(f.name)]
        self.skipped = len(files) - len(chosen)
        if not chosen:
            raise ValueError(f"{root}: has no images ({', '.join(IMAGE_SUFFIXES)}), and is no run or pipeline either")
        self._files = hashes.hash_all(chosen)
        headers = [_header(file, str(file)) for file in chosen]
        self._channels, self.shape = _common(headers)
        self.facts = {"kind": "images", "count": len(chosen), "sha256": digest_json([f.sha256 for f in self._files])}

    def __len__(self) -> int:
        return len(self._files)

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """uint8 [C, H, W] each. Raises ValueError, naming the file, for one that is damaged, or not what was hashed."""
        images = []
        for file in (self._files[number] for number in numbers):
            with file.unchanged():
                images.append(_decode(file.path, str(file.path), self._channels))
        return images

    def close(self) -> None:
        """Nothing is open."""


class ImageZip:
    """Every image in a zip. Raises ValueError, naming the zip and the file in it, as `ImageFolder` does."""

    labels: Tensor | None = None

    def __init__(self, path: Path, hashes: HashCache) -> None:
        (self._file,) = hashes.hash_all([path])
        self._archive: zipfile.ZipFile | None = None
        members = [member for member in self._open().infolist() if not member.is_dir()]
        chosen = sorted((m for m in members if _is_image(m.filename)), key=lambda m: PurePosixPath(m.filename).parts)
        self.skipped = len(members) - len(chosen)
        if not chosen:
            raise ValueError(f"{path}: has no images ({', '.join(IMAGE_SUFFIXES)}) among {len(members)} files")
        self._members, headers = chosen, []
        for member in chosen:
            with self._stream(member) as stream:
                headers.append(_header(stream, self._name(member)))
        self._channels, self.shape = _common(headers)
        self.facts = {"kind": "zip", "count": len(chosen), "sha256": self._file.sha256}

    def __len__(self) -> int:
        return len(self._members)

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """uint8 [C, H, W] each. Raises ValueError, naming the file, for one that is damaged, or not what was hashed."""
        images = []
        with self._file.unchanged():
            for member in (self._members[number] for number in numbers):
                with self._stream(member) as stream:
                    images.append(_decode(stream, self._name(member), self._channels))
        return images

    def close(self) -> None:
        """Close the zip; it is opened again when it is read."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self._file.path)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self._file.path}: cannot be read as a zip ({error})") from error
        return self._archive

    def _stream(self, member: zipfile.ZipInfo) -> IO[bytes]:
        try:
            return self._open().open(member)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # the second: it has a password
            raise ValueError(f"{self._name(member)}: cannot be read ({error})") from error

    def _name(self, member: zipfile.ZipInfo) -> str:
        return f"{self._file.path}/{member.filename}"


def write_png(path: Path, image: Tensor) -> None:
    """Write uint8 [C, H, W], C 1 or 3, as a PNG that is whole or not there; reading it gives the same levels."""
    from PIL import Image

    levels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    with atomic_write(path) as file:
        Image.fromarray(levels.contiguous().numpy()).save(file, "PNG")


def _is_image(name: str) -> bool:
    """By its name. Hidden files and macOS's resource forks have the suffixes of images too."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and "__MACOSX" not in path.parts


def _common(headers: Sequence[_Header]) -> tuple[int, Shape | None]:
    """The channels that all are read with, and their shape, None if it is not one."""
    channels = 1 if all(header.grey for header in headers) else 3
    sizes = {(header.height, header.width) for header in headers}
    return channels, (channels, *sizes.pop()) if len(sizes) == 1 else None


def _header(file: Path | IO[bytes], name: str) -> _Header:
    from PIL import Image

    try:
        with Image.open(file) as image:
            _check_depth(image)
            return _Header(*image.size, image.mode in ("1", "L", "LA"))
    except Exception as error:  # Pillow raises a different type for each thing that can be wrong
        raise ValueError(f"{name}: cannot be read as an image ({error or type(error).__name__})") from error


def _decode(file: Path | IO[bytes], name: str, channels: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            if getattr(image, "is_animated", False):
                raise ValueError("it has several frames; accepted are still images")
            if _has_alpha(image) and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                raise ValueError("it is transparent in places; compose it over a background first")
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:
        raise ValueError(f"{name}: cannot be read as an image ({error or type(error).__name__})") from error
    levels = torch.from_numpy(pixels)
    return levels[None] if channels == 1 else levels.permute(2, 0, 1).contiguous()


def _has_alpha(image: Any) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")


def _check_depth(image: Any) -> None:
    """Pillow would cut 16 bits a channel to 8 without a word: by its mode if there is one channel, when it reads if
    there are more."""
    read_as = [str(tile[3]) for tile in getattr(image, "tile", [])]
    if image.mode.startswith(("I", "F")) or any(";16" in mode for mode in read_as):
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); accepted are 8")
