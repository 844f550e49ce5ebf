"""A degradation path on disk: score networks between the teacher and one that fits the first student.

A node is one safetensors file with the score network only: a full copy, or its difference to the teacher in float16
or of low rank. manifest.json says what the path was made from, and the SHA-256 of every node; it is written last, so
a folder without one is no path.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from distill import checkpoint, sharding
from samplers.atomic import atomic_write

MANIFEST = "manifest.json"
Storage = Literal["full", "half", "low-rank"]
Weights = dict[str, Tensor]
_FORMAT = 1


@dataclass(frozen=True)
class Node:
    """step: updates of stage 1 before it was kept. mismatch: to the last node, at noised samples of the student."""

    file: str
    step: int
    mismatch: float
    sha256: str
    bytes: int


@dataclass(frozen=True)
class DegradationPath:
    """The nodes in the order in which they were recorded: the last one fits the first student. Node 0, the teacher, is
    not among them.

    teacher, student: `fingerprint` of what the path was made from.
    """

    folder: Path
    teacher: str
    student: str
    storage: Storage
    nodes: tuple[Node, ...]

    def __len__(self) -> int:
        return len(self.nodes)

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The path in a folder. Raises ValueError where there is none, or a node is missing or harmed, naming it."""
        folder = Path(folder)
        file = folder / MANIFEST
        if not file.is_file():
            raise ValueError(f"target.path: {folder} holds no degradation path (there is no {MANIFEST})")
        try:
            manifest = json.loads(file.read_text())
            if manifest["format"] != _FORMAT or not manifest["nodes"]:
                raise ValueError(f"format {manifest['format']}, {len(manifest['nodes'])} nodes")
            nodes = tuple(Node(**node) for node in manifest["nodes"])
            path = cls(folder, manifest["teacher"], manifest["student"], manifest["storage"], nodes)
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: is no manifest of a degradation path ({error})") from error
        for node in nodes:
            if not (folder / node.file).is_file():
                raise ValueError(f"target.path: {folder / node.file} is missing")
            if checkpoint.sha256(folder / node.file) != node.sha256:
                raise ValueError(f"target.path: {folder / node.file} is truncated or not the node that was recorded")
        if len({node.sha256 for node in nodes}) < len(nodes):
            raise ValueError(f"target.path: two nodes of {folder} are the same network")
        return path

    @property
    def identity(self) -> str:
        """The SHA-256 of its nodes' own."""
        return hashlib.sha256("".join(node.sha256 for node in self.nodes).encode()).hexdigest()

    def write(self) -> None:
        """Writes the manifest, which makes a folder of nodes a path."""
        content = {"format": _FORMAT, **{k: v for k, v in asdict(self).items() if k != "folder"}}
        with atomic_write(self.folder / MANIFEST) as file:
            file.write(json.dumps(content, indent=1).encode())

    def check(self, teacher: str, student: str) -> None:
        """Raises ValueError where a run has another teacher, or another first student."""
        for kind, recorded, own in (("teacher", self.teacher, teacher), ("student", self.student, student)):
            if recorded != own:
                raise ValueError(
                    f"target.path: {self.folder} was recorded with another {kind} (SHA-256 {recorded[:12]}) than this "
                    f"run's ({own[:12]}); record this run's with `distill degrade`"
                )

    def weights(self, index: int, teacher: Weights) -> Weights:
        """The weights of node `index`, 1 .. N. teacher: the teacher's, whose keys and shapes they must have."""
        file = self.folder / self.nodes[index - 1].file
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"target.path: {file} cannot be read ({error})") from error
        return decode(tensors, teacher, str(file))


def write_node(file: Path, weights: Weights, teacher: Weights, storage: Storage, rank: int) -> None:
    """Writes a node under a temporary name and moves it into place."""
    with atomic_write(file) as opened:
        opened.write(save(encode(weights, teacher, storage, rank)))


def encode(weights: Weights, teacher: Weights, storage: Storage, rank: int) -> Weights:
    """Weights as they are stored; `teacher` is what differences are taken to.

    half: the difference over its largest entry, in float16, so that its relative error is 2^-11 however small it is.
    low-rank: the best approximation of rank `rank` to the difference of every weight of two or more dimensions, as a
    matrix of its outputs by the rest; the others as half.
    """
    if storage == "full":
        return {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    stored: Weights = {}
    for key, tensor in weights.items():
        if not tensor.is_floating_point():
            stored[key] = tensor.detach().cpu().contiguous()
            continue
        delta = tensor.detach().float().cpu() - teacher[key].detach().float().cpu()
        if storage == "low-rank" and delta.ndim >= 2 and rank < min(len(delta), delta[0].numel()):
            matrix = delta.flatten(1).double()
            narrow = len(matrix) <= matrix.shape[1]
            gram = matrix @ matrix.T if narrow else matrix.T @ matrix
            basis = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
            left, right = (basis, basis.T @ matrix) if narrow else (matrix @ basis, basis.T)
            stored |= _half(f"{key}|left", left.float()) | _half(f"{key}|right", right.float())
        else:
            stored |= _half(f"{key}|delta", delta)
    return stored


def decode(stored: Weights, teacher: Weights, name: str = "node") -> Weights:
    """Weights from what was stored. Raises ValueError where they have not the keys and shapes of `teacher`."""
    weights: Weights = {}
    for key in {k.split("|")[0]: None for k in stored}:
        if key in stored:
            weights[key] = stored[key]
        elif key in teacher:
            parts = {k: _whole(f"{key}|{k}", stored) for k in ("delta", "left", "right") if f"{key}|{k}" in stored}
            base = teacher[key].detach().cpu()
            delta = parts["delta"] if "delta" in parts else parts["left"] @ parts["right"]
            if delta.shape != (base.shape if "delta" in parts else base.flatten(1).shape):
                raise ValueError(f"target.path: {name}: does not fit this network: {key}")
            weights[key] = (base.float() + delta.reshape(base.shape)).to(base.dtype)
        else:
            weights[key] = torch.empty(0)
    wrong = sorted(
        k for k in weights.keys() | teacher.keys() if k not in weights or k not in teacher
        or weights[k].shape != teacher[k].shape
    )  # fmt: skip
    if wrong:
        raise ValueError(
            f"target.path: {name}: does not fit this network: {wrong[0]} and {len(wrong) - 1} more keys differ"
        )
    return weights


def _half(key: str, tensor: Tensor) -> Weights:
    scale = tensor.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return {key: (tensor / scale).half().contiguous(), f"{key}|scale": scale}


def _whole(key: str, stored: Weights) -> Tensor:
    return stored[key].float() * stored[f"{key}|scale"]


def load_own(network: nn.Module, weights: Weights) -> None:
    """Loads weights that have the keys of `sharding.state(network)`: all but those of a base that others hold too."""
    own = sharding.state(network).keys()
    if weights.keys() != own:
        wrong = sorted(weights.keys() ^ own)
        raise ValueError(f"target.path: does not fit this network: {wrong[0]} and {len(wrong) - 1} more keys differ")
    network.load_state_dict(weights, strict=len(own) == len(network.state_dict()))


def fingerprint(module: nn.Module, **facts: Any) -> str:
    """The SHA-256 of a module's weights and of facts about its use, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key, tensor in sorted(module.state_dict().items()):
        raw = tensor.detach().cpu().contiguous()
        digest.update(f"{key} {raw.dtype} {list(raw.shape)}".encode())
        digest.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
