"""Checkpoints that a kill at any moment cannot spoil: safetensors and JSON, moved into place when complete.

A checkpoint is a folder step-00000100 with one file per network, one for each optimizer, and state.json with the
SHA-256 of every file. It is written under another name, flushed to the disk, and renamed; what does not match its
sums is never loaded. Random numbers need no saving: they are functions of (seed, step). The files are the same however
many processes wrote them, whether they share the networks out or not: a run may go on in another launch.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from distill import sharding
from samplers.atomic import atomic_write

_OPTIMIZER = ".optimizer"


def save(
    folder: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, Optimizer],
    keep: int | None = 2,
    write: bool = True,
) -> Path:
    """Writes checkpoint `step` below `folder` and removes all but the newest `keep` (None: none); returns its folder.

    Where networks are shared out among processes all of them must call it, one of them with `write`; the others only
    give their shares. Raises OSError if it cannot be written; the earlier checkpoints are then as they were.
    """
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    if not write:
        for _ in _contents(modules, optimizers, keep=False):
            pass
        return final
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*.tmp"):  # by a run that was killed
        shutil.rmtree(left)
    temporary.mkdir()
    try:
        groups = {}
        for name, tensors, parameter_groups in _contents(modules, optimizers):
            _write_tensors(temporary / f"{name}.safetensors", tensors)
            if parameter_groups is not None:
                groups[name.removesuffix(_OPTIMIZER)] = parameter_groups
        sums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        state = {"step": step, "sha256": sums, "param_groups": groups}
        with atomic_write(temporary / "state.json") as file:
            file.write(json.dumps(state, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in [] if keep is None else _folders(folder)[keep:]:
        shutil.rmtree(old)
    return final


def _contents(
    modules: dict[str, nn.Module], optimizers: dict[str, Optimizer], keep: bool = True
) -> Iterator[tuple[str, dict[str, Tensor], list[dict[str, Any]] | None]]:
    """Name, whole tensors and parameter groups of each file, one after the other: one is in memory at a time."""
    for name, module in modules.items():
        yield name, sharding.whole_state(module, keep), None
    for name, optimizer in optimizers.items():
        tensors, groups = _flatten(optimizer.state_dict())
        yield f"{name}{_OPTIMIZER}", dict(sharding.wholes(tensors, keep)), groups


def newest(folder: Path) -> Path | None:
    """The newest checkpoint below `folder` that is complete and unharmed; None if there is none."""
    return next((checkpoint for checkpoint in _folders(folder) if is_whole(checkpoint)), None)


def identity(checkpoint: Path) -> str:
    """What tells a whole checkpoint from others: the SHA-256 of what it says of its files."""
    return sha256(checkpoint / "state.json")


def load(checkpoint: Path, modules: dict[str, nn.Module], optimizers: dict[str, Optimizer]) -> int:
    """Restores networks and optimizers in place, bit for bit; returns the step.

    Raises ValueError, naming the file, where a key or a shape does not fit.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    for name, module in modules.items():
        own = sharding.state(module)
        tensors = _read(checkpoint / f"{name}.safetensors", own)
        shares = {key: sharding.like(tensor, own[key]) for key, tensor in tensors.items()}
        module.load_state_dict(shares, strict=len(own) == len(module.state_dict()))  # _read has compared the keys
    for name, optimizer in optimizers.items():
        file = checkpoint / f"{name}{_OPTIMIZER}.safetensors"
        if name not in state["param_groups"]:
            raise ValueError(f"{file}: is not in this checkpoint")
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbered = {str(number): parameter for number, parameter in enumerate(parameters)}
        tensors = {
            key: sharding.like(tensor, numbered.get(key.split(".", 1)[0], tensor))
            for key, tensor in _read(file).items()
        }
        optimizer.load_state_dict(_unflatten(tensors, state["param_groups"][name]))
    return int(state["step"])


def load_weights(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The weights of one network of a checkpoint."""
    return _read(checkpoint / f"{name}.safetensors")


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete and unharmed."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        sums = state["sha256"]
        return {"step", "param_groups"} <= state.keys() and all(
            sha256(checkpoint / name) == value for name, value in sums.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _read(path: Path, like: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a file; ValueError where it is not there, or its keys and shapes are not those of `like`."""
    if not path.is_file():
        raise ValueError(f"{path}: is not in this checkpoint")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wanted = {key: tuple(tensor.shape) for key, tensor in (tensors if like is None else like).items()}
    wrong = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{path}: does not fit this network: {key} is {shapes.get(key, 'missing')} in the file and "
            f"{wanted.get(key, 'missing')} in the network; {len(wrong)} keys differ"
        )
    return tensors


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from error
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as named tensors, and its parameter groups, which are JSON."""
    tensors = {
        f"{parameter}.{key}": torch.as_tensor(value)
        for parameter, entries in state["state"].items()
        for key, value in entries.items()
    }
    return tensors, state["param_groups"]


def _unflatten(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, key = name.split(".", 1)
        state.setdefault(int(parameter), {})[key] = tensor
    return {"state": state, "param_groups": groups}
