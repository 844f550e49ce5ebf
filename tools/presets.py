"""Presets: how the public tools bring an image to a feature network, one line each.

Most of the disagreement between published FIDs is in these lines: the same Inception, fed by two of these filters,
differs by more than two good models do. Images come in grey levels 0 ... 255 of a PNG; a preset resizes them, repeats
a grey channel three times, and maps the levels to the range of its network. This file needs no torch: the command
line lists the names without loading any.
"""

from dataclasses import dataclass

Shape = tuple[int, int, int]  # channels, height, width

# (level - mean) / deviation; one number for all channels, or one for each of red, green, blue
RANGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "x/128-1": ((128.0,), (128.0,)),
    "x/127.5-1": ((127.5,), (127.5,)),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "clip": (
        (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255),
        (0.26862954 * 255, 0.26130258 * 255, 0.27577711 * 255),
    ),
}


@dataclass(frozen=True)
class Preset:
    """Which network, and how images are prepared for it."""

    network: str  # a key of `tools.features.NETWORKS`
    range: str  # a key of `RANGES`
    size: int | None = None  # side of the square that the network reads, in pixels; None: images as they are
    filter: str = "none"  # a key of `tools.resize.FILTERS`, where there is a size
    crop: bool = False  # the short side becomes `size` and the middle is kept; otherwise both sides become `size`
    repository: str = ""  # where the published weights lie, for networks of the Hugging Face hub

    def preparation(self, shape: Shape | None) -> str:
        """What is done to an image, as it stands in the extractor's name."""
        if self.size is None:
            assert shape is not None
            return f"{'x'.join(map(str, shape))} {self.range}"
        return f"{self.size}x{self.size} {self.filter}{' crop' if self.crop else ''} {self.range}"


_DINOV2 = "facebook/dinov2-large"
_CLIP_B, _CLIP_L = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14-336"

PRESETS: dict[str, Preset] = {
    "digits": Preset("digits", "x/127.5-1"),
    "pixels": Preset("pixels", "x/127.5-1"),
    # clean-fid, mode "clean"
    "inception-clean": Preset("inception", "x/128-1", 299, "pil-bicubic"),
    # TensorFlow's FID, ADM, EDM, StyleGAN, torch-fidelity; clean-fid, mode "legacy_tensorflow"; torchmetrics < 1.8
    "inception-tf1": Preset("inception", "x/128-1", 299, "tf1-bilinear"),
    # pytorch-fid; clean-fid, mode "legacy_pytorch"
    "inception-pytorch": Preset("inception", "x/127.5-1", 299, "torch-bilinear"),
    # torchmetrics >= 1.8
    "inception-torchmetrics": Preset("inception", "x/128-1", 299, "torch-bilinear-antialias"),
    # EDM2's FD-DINOv2
    "dinov2-edm2": Preset("dinov2", "imagenet", 224, "torch-bicubic-antialias", repository=_DINOV2),
    # dgm-eval
    "dinov2-dgm": Preset("dinov2", "imagenet", 224, "pil-bicubic-u8", repository=_DINOV2),
    # CMMD as published (JAX), and its port to PyTorch, which lost the antialiasing
    "clip-cmmd": Preset("clip", "clip", 336, "torch-bicubic-antialias", repository=_CLIP_L),
    "clip-cmmd-pytorch": Preset("clip", "clip", 336, "torch-bicubic", repository=_CLIP_L),
    # clean-fid's CLIP-FID
    "clip-clean": Preset("clip", "clip", 224, "pil-bicubic-u8", crop=True, repository=_CLIP_B),
}
PRESET_NAMES = tuple(PRESETS)
