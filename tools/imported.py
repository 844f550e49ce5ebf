"""A feature network of the user's own: any torch module from images to vectors, as it is or by its import path."""

import hashlib
import inspect
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.presets import Shape


@dataclass(frozen=True)
class Imported:
    """Images [B, C, H, W] in [-1, 1] -> features [B, dim], without logits."""

    name: str
    dim: int
    module: nn.Module

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        return self.module(images), None


def load(spec: str, shape: Shape, device: torch.device) -> Imported:
    """The module that `package.module:attribute` names, or what the class or function there makes without arguments.

    Raises ValueError when it cannot be imported, is no module, or is one that `adapt` refuses.
    """
    module, _, attribute = spec.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features: {spec} cannot be imported ({error}); is it on PYTHONPATH?") from error
    network = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(network, nn.Module):
        raise ValueError(f"features: {spec} is {type(network).__name__}; accepted: a torch module, or what makes one")
    return adapt(network, spec, shape, device)


def adapt(network: nn.Module, title: str, shape: Shape, device: torch.device) -> Imported:
    """`network` itself, moved to `device` and put into evaluation mode.

    Its name is `title` with a hash of its weights, its structure and the source files of its classes. Raises
    ValueError when it does not map images of `shape` to one vector each.
    """
    network = network.to(device).eval()
    try:
        with torch.no_grad():
            probe = network(torch.zeros(2, *shape, device=device))
    except Exception as error:  # whatever the user's module raises at a shape that it does not read
        said = " ".join(str(error).split())
        raise ValueError(f"features: {title} cannot read {[2, *shape]} ({type(error).__name__}: {said})") from error
    if not isinstance(probe, Tensor) or probe.ndim != 2 or len(probe) != 2 or not probe.is_floating_point():
        got = list(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__
        raise ValueError(f"features: {title} maps {[2, *shape]} to {got}; accepted: floats of shape [2, dim]")
    return Imported(f"{title}-{_fingerprint(network)}", probe.shape[1], network)


def _fingerprint(network: nn.Module) -> str:
    """Eight hex digits: weights, structure, and the files of all classes that are not torch's own."""
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    classes = {type(part) for part in network.modules() if not type(part).__module__.startswith("torch.")}
    for source in sorted({inspect.getfile(each) for each in classes}):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:8]
