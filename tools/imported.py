"""A feature network of the user's own: any torch module from images to vectors, as it is or by its import path."""

import copy
import hashlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

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
    try:
        network = found() if callable(found) and not isinstance(found, nn.Module) else found
    except Exception as error:  # whatever the user's factory raises, for want of arguments most often
        raise ValueError(
            f"features: {spec}() fails ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"features: {spec} is {type(network).__name__}; accepted: a torch module, or what makes one")
    return adapt(network, spec, shape, device, _source(import_module(module)))


def adapt(network: nn.Module, title: str, shape: Shape, device: torch.device, source: bytes = b"") -> Imported:
    """`network` itself, moved to `device` and put into evaluation mode. source: of what made it.

    Its name is `title` with a hash of its weights and buffers, its structure, the source of its classes and of its
    maker, and what it makes of fixed noise. Raises ValueError when it does not map images of `shape` to a vector each.
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
    return Imported(f"{title}-{_fingerprint(network, shape, source)}", probe.shape[1], network)


def _fingerprint(network: nn.Module, shape: Shape, source: bytes) -> str:
    """Eight hex digits of the weights, the structure, the sources, and of what it makes of two fixed images."""
    digest = hashlib.sha256(repr(network).encode() + source)
    for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()]):  # also those not saved
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    classes = {type(part) for part in network.modules() if not type(part).__module__.startswith("torch.")}
    for part_source in sorted(map(_source, classes)):
        digest.update(part_source)
    digest.update(_answer(network, shape))
    return digest.hexdigest()[:8]


def _answer(network: nn.Module, shape: Shape) -> bytes:
    """Features of fixed noise, which know every number that is no weight: an attribute, a closure, another file's code.

    In float64, and rounded, so that they are those of any machine; of networks that cannot, as they are.
    """
    images = 2 * torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    ways = (
        lambda: copy.deepcopy(network).cpu().double()(images),
        lambda: network(images.float().to(next(_tensors(network), images).device)),  # where float32 is written inside
    )
    for way in ways:
        try:
            with torch.no_grad():
                features = way().cpu().double().nan_to_num()
        except Exception:  # the user's own, at these images; it is met again at others like them
            continue
        scale = 10.0 ** math.floor(math.log10(float(features.abs().max()) or 1.0))
        return (features / scale * 1e4).round().to(torch.int64).numpy().tobytes()
    return b""


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _source(what: Any) -> bytes:
    """The file of a class or module; of what was typed at a prompt, and has none, its functions' code."""
    try:
        return Path(inspect.getfile(what)).read_bytes()
    except (TypeError, OSError):
        codes = [f.__code__ for _, f in sorted(vars(what).items()) if inspect.isfunction(f)]
        return b"".join(code.co_code for code in codes)
