"""Inception, the network of the FID, from weight files that lie on this machine: found, checked, never downloaded.

Two kinds of file hold it: the TorchScript file that clean-fid, EDM and StyleGAN read (`layers` maps prepared images to
2048 features, `output` is the classifier), and the state dict that pytorch-fid, torchmetrics and torch-fidelity read,
for which the network is torchvision's with clean-fid's (pytorch-fid's) four kinds of changed block.
"""

import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.digest import digest_file

VARIABLE = "DISTILL_INCEPTION_WEIGHTS"
DIM = 2048
CLASSES = 1008

# First digits of the sha256: of the whole file for NVIDIA's, as many as the name holds for pytorch-fid's.
PUBLISHED = ("f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4", "6726825d")


@dataclass(frozen=True)
class Weights:
    """A weight file, and the sha256 of its bytes."""

    path: Path
    sha256: str

    @property
    def published(self) -> bool:
        return self.sha256.startswith(PUBLISHED)

    @property
    def name(self) -> str:
        """`inception-f58cb9b6`, or `inception-own-...` where the file is none of the published ones."""
        return f"inception-{'' if self.published else 'own-'}{self.sha256[:8]}"


@dataclass(frozen=True)
class Inception:
    """Prepared images [B, 3, 299, 299] -> features [B, 2048], and logits [B, 1008] where the file has a classifier.

    The logits are without the classifier's bias, as the Inception Score was published and is computed by all tools.
    """

    name: str
    trunk: Callable[[Tensor], Tensor]
    head: Tensor | None  # [classes, 2048]
    dim: int = DIM

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.trunk(images).flatten(1)
        if features.shape[1] != self.dim:
            raise ValueError(f"weights: {self.name} gives {features.shape[1]} features; accepted: {self.dim}")
        return features, None if self.head is None else features @ self.head.T


def load(path: str | None, device: torch.device) -> Inception:
    """The network from `path`, or from where `find_weights` finds it. Raises ValueError, naming file or places."""
    weights = find_weights(path)
    read = _torchscript if _is_torchscript(weights.path) else _state_dict
    trunk, head = read(weights.path, device)
    return Inception(weights.name, trunk, head)


def find_weights(explicit: str | Path | None = None) -> Weights:
    """The first weight file of: `explicit`, $DISTILL_INCEPTION_WEIGHTS, and the caches of the public tools.

    A file that the user names is taken as it is (and named by its own hash); one that lies in a cache, where anybody
    may have put it, only when it is a published one. Raises ValueError with every place that was searched.
    """
    for given, by in ((explicit, "given"), (os.environ.get(VARIABLE), f"${VARIABLE}")):
        if given:
            if not Path(given).is_file():
                raise ValueError(f"weights: {given} ({by}) is not a file; accepted: a .pt or .pth file of Inception")
            return Weights(Path(given), digest_file(given))

    searched = [f"${VARIABLE} (not set)"]
    for place in _caches():
        if place.is_file():
            weights = Weights(place, digest_file(place))
            if weights.published:
                return weights
            searched.append(f"{place} (not a published file: sha256 {weights.sha256[:8]}...)")
        else:
            searched.append(f"{place} (absent)")
    lines = "\n  ".join(searched)
    raise ValueError(f"weights: no Inception here; name a file as in inception-clean:PATH. Searched:\n  {lines}")


def _caches() -> list[Path]:
    """Where clean-fid, torch hub (pytorch-fid and torch-fidelity) and k-diffusion keep the network."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [
        Path(tempfile.gettempdir()) / "inception-2015-12-05.pt",
        hub / "pt_inception-2015-12-05-6726825d.pth",
        hub / "weights-inception-2015-12-05-6726825d.pth",
        xdg / "k-diffusion" / "inception-2015-12-05.pt",
    ]


def _is_torchscript(path: Path) -> bool:
    """By content, not by name: TorchScript archives carry their code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _torchscript(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    with warnings.catch_warnings():  # TorchScript is deprecated, and yet it is how this network is published
        warnings.filterwarnings("ignore", message=".*torch.jit.load")
        try:
            base: Any = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"weights: {path} cannot be read as TorchScript ({_first_line(error)})") from error
    if not hasattr(base, "layers"):
        raise ValueError(f"weights: {path} has no `layers`, the part of Inception behind its own resizing")

    def trunk(images: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False):  # fused after some calls: the same images would get other bits
            return base.layers(images)

    output = getattr(base, "output", None)
    return trunk, None if output is None else output.weight.detach()


def _state_dict(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    with torch.device("meta"):  # no random weights are drawn only to be replaced
        network: Any = _changed_inception()
    try:
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True), assign=True)
    except (RuntimeError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"weights: {path} holds neither TorchScript nor Inception's state dict "
                         f"({_first_line(error)})") from error  # fmt: skip
    head = network.fc.weight.detach()
    network.fc = nn.Identity()
    return network.eval().requires_grad_(False), head


def _changed_inception() -> nn.Module:
    """torchvision's Inception with the blocks in which TensorFlow's differs: how the pooling treats the border."""
    from cleanfid.inception_pytorch import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
    from torchvision.models import inception_v3

    network: nn.Module = inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
    for letter, channels, pooled in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
        setattr(network, f"Mixed_5{letter}", FIDInceptionA(channels, pool_features=pooled))
    for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        setattr(network, f"Mixed_6{letter}", FIDInceptionC(768, channels_7x7=width))
    network.Mixed_7b, network.Mixed_7c = FIDInceptionE_1(1280), FIDInceptionE_2(2048)
    return network


def _first_line(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else type(error).__name__
    )
