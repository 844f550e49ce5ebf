"""Where the images to be judged come from: files of them, the embedded digits, or a model that makes them.

A source says what decides its images (`facts`) without reading them twice or loading a network, so that results can be
kept under what they are of. Image k of files is the k-th by name; image k of a model depends on (seed, k) only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from distill.data import Split
from distill.generate import ImageGenerator, generator_of, usable_device
from distill.recipe import Recipe, Sampling, read_recipe
from tools.digest import HashCache, Hashed, digest_json
from tools.features import quantise
from tools.image_arrays import digits_array, npz_array, safetensors_array
from tools.image_files import ImageFolder, ImageZip, Shape, write_png

__all__ = ["Samples", "Source", "SourceSettings", "open_source", "write_png"]

SourceSettings = Sampling  # how a diffusion model is sampled; other sources take no notice
DIGITS: dict[str, Split] = {"digits": "train", "digits:held-out": "held-out"}
# One of these makes a folder a generator; the last is one checkpoint of a run, or a snapshot.
GENERATED = ("model_index.json", "config.yaml", "model/model_index.json", "average.safetensors")


@dataclass(frozen=True)
class Samples:
    """Images, uint8 [C, H, W] each, and the class labels [B] (int64) that they have or were asked for, or None."""

    images: tuple[Tensor, ...]
    labels: Tensor | None = None


class Source(Protocol):
    """Images by number.

    facts: all that decides them but the seed, JSON, without paths: equal facts are equal images. title: for a table.
    count: how many there are; None is as many as are asked for. nfe: network evaluations for one; None for files.
    shape: [C, H, W]; None for mixed sizes. n_classes: None without labels.
    """

    @property
    def facts(self) -> dict[str, Any]: ...

    @property
    def title(self) -> str: ...

    @property
    def count(self) -> int | None: ...

    @property
    def nfe(self) -> int | None: ...

    @property
    def shape(self) -> Shape | None: ...

    @property
    def n_classes(self) -> int | None: ...

    def read(self, seed: int, indices: Sequence[int]) -> Samples:
        """The images with these numbers, in one batch; the same bits in any batch of the same size.

        Raises ValueError, naming the file, for one that is damaged or has changed since the source was opened.
        """

    def open(self) -> object:
        """Load networks now, which `read` would."""

    def close(self) -> None:
        """Let go of networks and files; reading opens them again."""


class Pictures(Protocol):
    """Images that exist already (`tools.image_files`, `tools.image_arrays`). skipped: files beside them."""

    facts: dict[str, Any]
    shape: Shape | None
    labels: Tensor | None
    skipped: int

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> list[Tensor]: ...

    def close(self) -> None: ...


FILES: dict[str, Callable[[Path, HashCache], Pictures]] = {
    ".npz": npz_array,
    ".safetensors": safetensors_array,
    ".zip": ImageZip,
}


@dataclass(frozen=True)
class Fixed:
    """A source of images that exist already; the seed is of no matter."""

    title: str
    pictures: Pictures
    nfe: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return self.pictures.facts

    @property
    def count(self) -> int:
        return len(self.pictures)

    @property
    def shape(self) -> Shape | None:
        return self.pictures.shape

    @property
    def n_classes(self) -> int | None:
        labels = self.pictures.labels
        return None if labels is None else int(labels.max()) + 1

    def read(self, seed: int, indices: Sequence[int]) -> Samples:
        if not all(0 <= k < self.count for k in indices):
            raise ValueError(f"indices: {min(indices)} .. {max(indices)}; {self.title} has {self.count} images, from 0")
        labels = self.pictures.labels
        images = tuple(self.pictures.read(indices))
        return Samples(images, None if labels is None else labels[list(indices)].long())

    def open(self) -> None:
        """There is nothing to load."""

    def close(self) -> None:
        self.pictures.close()


@dataclass
class Generated:
    """A source of images that a model makes, quantised as a PNG would be."""

    title: str
    path: Path
    settings: SourceSettings
    recipe: Recipe
    files: list[Hashed]
    facts: dict[str, Any]
    device: str = "cpu"
    count: int | None = None
    _generator: ImageGenerator | None = field(default=None, repr=False)

    @property
    def nfe(self) -> int:
        return self.recipe.nfe

    @property
    def shape(self) -> Shape | None:
        return self.recipe.shape

    @property
    def n_classes(self) -> int | None:
        return self.recipe.n_classes

    def read(self, seed: int, indices: Sequence[int]) -> Samples:
        generator = self.open()
        return Samples(tuple(quantise(generator(seed, indices))), generator.labels(indices))

    def open(self) -> ImageGenerator:
        if self._generator is None:
            self._generator = self._load()
        return self._generator

    def close(self) -> None:
        self._generator = None

    def _load(self) -> ImageGenerator:
        """Raises ValueError where the folder is not what was hashed; a run that trains has new checkpoints."""
        now = read_recipe(self.path, self.settings)
        if (now.files, now.settings) != (self.recipe.files, self.recipe.settings):
            raise ValueError(f"{self.path}: is not what it was when it was opened (a run that goes on?)")
        generator = generator_of(self.recipe, self.device)
        for file in self.files:
            file.check()
        return generator


def open_source(
    path: str | Path,
    settings: SourceSettings | None = None,
    *,
    device: str = "cpu",
    hashes: HashCache | None = None,
) -> Source:
    """The source that a path is: a folder, zip, .npz or .safetensors file of images, a run folder, a pipeline folder,
    'digits' (the training half of the embedded ones) or 'digits:held-out'.

    settings: how a diffusion model is sampled. hashes: what is remembered of files. Nothing heavy happens but hashing.
    Raises ValueError for a path that is none of these, and settings that do not fit it.
    """
    hashes = HashCache() if hashes is None else hashes
    if str(path) in DIGITS:
        return Fixed(str(path), digits_array(DIGITS[str(path)]))
    path = Path(path)
    title = path.resolve().name
    if path.is_file() and path.suffix.lower() in FILES:
        return Fixed(title, FILES[path.suffix.lower()](path, hashes))
    if not path.is_dir():
        raise ValueError(
            f"source: {str(path)!r} is no folder, nor a file of images ({', '.join(FILES)}), nor one of "
            f"{', '.join(DIGITS)}"
        )
    if not any((path / name).is_file() for name in GENERATED):
        return Fixed(title, ImageFolder(path, hashes))
    return _generated(path, SourceSettings() if settings is None else settings, device, hashes)


def _generated(path: Path, settings: SourceSettings, device: str, hashes: HashCache) -> Generated:
    usable_device(device)
    recipe = read_recipe(path, settings)
    files = hashes.hash_all(recipe.files)
    names = {recipe.name_of(file.path): file.sha256 for file in files}
    facts = recipe.settings | {"files": digest_json(names)}
    if recipe.gaussian is not None:
        files += hashes.hash_all([recipe.gaussian])
        facts["gaussian"] = files[-1].sha256
    if recipe.prompts is not None:
        facts["prompts"] = digest_json(recipe.prompts)
    return Generated(path.resolve().name, path, settings, recipe, files, facts, device)
