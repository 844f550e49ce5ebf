"""Images -> features, under a name that says how the images were prepared.

Every extractor first rounds the images to the 256 grey levels of a PNG, so that samples in memory, samples read
from files and the reference are judged alike. The name holds this, the network with a hash of its weights, the size,
the filter and the range; it is the key of every cache and is printed with every number. Numbers under different names
do not compare.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tools import digits_classifier, imported
from tools.arithmetic import full_precision
from tools.presets import PRESETS, RANGES, Preset, Shape
from tools.resize import resize

_OWN = Preset("the user's", "x/127.5-1")

FAR = 64.0  # above, floats are no pixels in [-1, 1], whatever a model has made of them


@dataclass(frozen=True)
class Extracted:
    """Of B images: features [B, dim] and, where the network classifies, logits [B, classes]; float32, on the CPU."""

    features: Tensor
    logits: Tensor | None


class Network(Protocol):
    """Prepared images [B, C, H, W] -> (features [B, dim], logits [B, classes] or None). The name has its weights."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class Extractor:
    """A network and the preparation of its images; made by `load_extractor`."""

    name: str
    dim: int
    device: torch.device
    preset: Preset
    network: Network
    shape: Shape | None  # the one shape of image that it reads; None: any height and width, one or three channels

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor] | Tensor) -> Extracted:
        """images: uint8 tensors [C, H, W] (or one [B, C, H, W]), or one float tensor [B, C, H, W] in [-1, 1].

        Raises ValueError, naming the image, for a shape or dtype that is not read, and for NaN or infinite pixels.
        """
        if isinstance(images, Tensor) and images.is_floating_point():
            if images.numel() and images.abs().max() > FAR:
                most = float(images.abs().max())
                raise ValueError(f"images: floats up to {most:g}; accepted are about -1 to 1 (grey levels as uint8)")
            images = quantise(images)
        self._check(images)
        with full_precision(self.device):
            features, logits = self.network(self._prepare(images))
        return Extracted(features.float().cpu(), None if logits is None else logits.float().cpu())

    def _check(self, images: Sequence[Tensor] | Tensor) -> None:
        if not len(images):
            raise ValueError("images: none; accepted: one or more")
        for k, image in enumerate(images):
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
                got = f"{str(image.dtype).removeprefix('torch.')} of shape {list(image.shape)}"
                raise ValueError(f"images: number {k} is {got}; accepted: uint8 [C, H, W] with 1 or 3 channels")
            if self.shape is not None and tuple(image.shape) != self.shape:
                raise ValueError(f"images: number {k} is {_by(image.shape)}; {self.name} reads {_by(self.shape)}")

    def _prepare(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Images of one shape are prepared together, whatever their order."""
        prepared: list[Tensor] = [torch.empty(0)] * len(images)
        shapes = [image.shape for image in images]
        for shape in dict.fromkeys(shapes):
            alike = [k for k, other in enumerate(shapes) if other == shape]
            levels = torch.stack([images[k] for k in alike]).to(self.device).float()
            for k, image in zip(alike, _to_range(self.preset, levels), strict=True):
                prepared[k] = image
        return torch.stack(prepared)


def load_extractor(spec: str | nn.Module, shape: Shape | None, device: str | torch.device = "cpu") -> Extractor:
    """The extractor for images of `shape` (channels, height, width; None: of several) that `spec` names.

    spec: a preset of `tools.presets`; a preset, a colon and the path of its weights; or a torch module of the user's
    that maps [B, C, H, W] in [-1, 1] to [B, dim], or its import path `package.module:attribute` (or that of a class
    or function that makes it). Raises ValueError for another name, for images that the preset does not read, and for
    weights that are not found.
    """
    if isinstance(spec, str):
        name, _, path = spec.partition(":")
        preset = PRESETS.get(name, _OWN)
        if preset is _OWN and not path:
            accepted = f"{', '.join(PRESETS)}; one of them, a colon and a path of weights; package.module:attribute"
            raise ValueError(f"features: {spec!r}; accepted: {accepted}")
    else:
        name, path, preset = type(spec).__name__, "", _OWN

    if shape is None and preset.size is None:
        raise ValueError(f"features: {name} reads images of one size, and these have several (inception-clean resizes)")
    if shape is not None and preset.size is not None and shape[0] not in (1, 3):
        raise ValueError(f"features: {name} reads images of 1 or 3 channels, not {_by(shape)}")

    device = torch.device(device)
    network = _own(spec, shape, device) if preset is _OWN else NETWORKS[preset.network](preset, path, shape, device)
    title = f"{network.name}|{preset.preparation(shape)}|u8|f32"
    return Extractor(title, network.dim, device, preset, network, shape if preset.size is None else None)


def quantise(images: Tensor) -> Tensor:
    """What a PNG would hold: floor(127.5 x + 128), clipped to 0 ... 255; uint8, the shape of `images`.

    Raises ValueError for NaN or infinite pixels.
    """
    bad = int((~images.isfinite().flatten(1).all(dim=1)).sum())
    if bad:
        raise ValueError(f"images: {bad} of {len(images)} have NaN or infinite pixels")
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)  # the cast floors what is not negative


def dequantise(levels: Tensor) -> Tensor:
    """Grey levels 0 ... 255 -> float32 in [-1, 1]."""
    return (levels.float() - 127.5) / 127.5


def _to_range(preset: Preset, levels: Tensor) -> Tensor:
    """Grey levels [B, C, H, W] (float) -> what the network reads."""
    if preset.size is not None:
        levels = resize(levels, preset.size, preset.filter, crop=preset.crop)
        levels = levels.expand(-1, 3, -1, -1)  # of grey images
    mean, deviation = (levels.new_tensor(values)[:, None, None] for values in RANGES[preset.range])
    return (levels - mean) / deviation


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class _Pixels:
    dim: int
    name: str = "pixels"

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        return images.flatten(1), None


@dataclass(frozen=True)
class _Digits:
    classifier: digits_classifier.DigitsClassifier
    name: str
    dim: int = digits_classifier.FEATURE_DIM

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.features(images)
        return features, self.classifier.last(features)


def _pixels(preset: Preset, path: str, shape: Shape | None, device: torch.device) -> Network:
    if path:
        raise ValueError(f"features: pixels has no weights, and {path!r} was given")
    assert shape is not None
    return _Pixels(shape[0] * shape[1] * shape[2])


def _digits(preset: Preset, path: str, shape: Shape | None, device: torch.device) -> Network:
    if shape != digits_classifier.IMAGE_SHAPE:
        raise ValueError(f"features: digits reads images of 1x8x8, not {_by(shape or ())} (pixels reads any)")
    classifier = digits_classifier.DigitsClassifier.load(path or digits_classifier.WEIGHTS)
    return _Digits(classifier.to(device), f"digits-{classifier.fingerprint()}")


def _inception(preset: Preset, path: str, shape: Shape | None, device: torch.device) -> Network:
    from tools import inception

    return inception.load(path, device)


def _vision(preset: Preset, path: str, shape: Shape | None, device: torch.device) -> Network:
    from tools import vision

    return vision.load(preset, path, device)


def _own(spec: str | nn.Module, shape: Shape | None, device: torch.device) -> Network:
    assert shape is not None
    if isinstance(spec, str):
        return imported.load(spec, shape, device)
    return imported.adapt(spec, type(spec).__qualname__, shape, device)


# (preset, path of weights or "", shape of the images, device) -> network
NETWORKS: dict[str, Callable[[Preset, str, Shape | None, torch.device], Network]] = {
    "clip": _vision,
    "digits": _digits,
    "dinov2": _vision,
    "inception": _inception,
    "pixels": _pixels,
}
