"""Nodes on disk: what each storage keeps of a network, and what is refused of a path."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from distill import checkpoint
from distill.nodes import MANIFEST, DegradationPath, Node, Storage, Weights, decode, encode, fingerprint, write_node
from tests.distill.tiny import unet
from tests.truth import relative_error

RANK = 3
STORAGES = pytest.mark.parametrize("storage", get_args(Storage))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def teacher() -> Weights:
    """A wide, a tall, a square and a convolution's weight, one too small for the rank, a bias, a number, a counter."""
    shapes = {"wide": (6, 20), "tall": (20, 6), "square": (9, 9), "conv": (8, 4, 3, 3), "small": (2, 30), "bias": (7,)}
    weights = {name: normal(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    return weights | {"scale": torch.tensor(1.5), "counter": torch.tensor([3, 4])}


def moved(size: float = 0.1) -> Weights:
    """The teacher's weights after training: differences of about that size, and another counter."""
    weights = {k: t + size * normal(*t.shape, seed=50 + i) for i, (k, t) in enumerate(teacher().items())}
    return weights | {"counter": torch.tensor([5, -6])}


def stored_and_back(weights: Weights, storage: Storage, rank: int = RANK) -> Weights:
    return decode(encode(weights, teacher(), storage, rank), teacher())


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_full_copy_is_kept_bit_for_bit() -> None:
    assert same(stored_and_back(moved(), "full"), moved())


@pytest.mark.parametrize("size", [1e-6, 0.1, 1e6])
def test_half_keeps_differences_to_eleven_bits_of_the_largest_however_small_they_are(size: float) -> None:
    """Beside that only the rounding of the teacher's weight plus the difference, in float32."""
    weights, found = moved(size), stored_and_back(moved(size), "half")
    for key in weights.keys() - {"counter"}:
        delta = weights[key] - teacher()[key]
        allowed = 2**-11 * float(delta.abs().max()) + 2**-23 * float(weights[key].abs().max())
        assert float((found[key] - weights[key]).abs().max()) <= allowed, key
        if size == 0.1 and delta.ndim:
            assert not torch.equal(found[key], weights[key]), key  # it is an approximation
    assert torch.equal(found["counter"], weights["counter"])


def test_a_node_that_is_the_teacher_is_kept_exactly() -> None:
    for storage in get_args(Storage):
        assert same(stored_and_back(teacher(), storage), teacher())


def truncated(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by the singular value decomposition in float64."""
    u, s, v = torch.linalg.svd(delta.flatten(1).double(), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]).reshape(delta.shape)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_the_truncated_singular_value_decomposition(rank: int) -> None:
    weights, found = moved(), stored_and_back(moved(), "low-rank", rank)
    for key in ("wide", "tall", "square", "conv", "small"):
        delta = weights[key] - teacher()[key]
        fits = rank < min(len(delta), delta[0].numel())
        expected = truncated(delta, rank) if fits else delta
        assert relative_error(found[key] - teacher()[key], expected) < 2e-3, key  # of two factors in float16
        assert relative_error(expected, delta) > 0.1 or not fits, key
    half = stored_and_back(weights, "half")
    assert all(torch.equal(found[key], half[key]) for key in ("bias", "scale", "counter"))


def test_low_rank_keeps_a_difference_of_that_rank() -> None:
    weights = teacher()
    for k, key in enumerate(("wide", "tall", "square", "conv")):
        rows, columns = len(weights[key]), weights[key][0].numel()
        product = 0.1 * normal(rows, RANK, seed=2 * k) @ normal(RANK, columns, seed=2 * k + 1)
        weights[key] = weights[key] + product.reshape(weights[key].shape)
    found = stored_and_back(weights, "low-rank")
    for key in ("wide", "tall", "square", "conv"):
        assert relative_error(found[key] - teacher()[key], weights[key] - teacher()[key]) < 2e-3


@STORAGES
def test_other_precisions_come_back_as_they_were(storage: Storage) -> None:
    base = {"a": normal(6, 6).bfloat16(), "b": normal(5).double()}
    weights = {key: tensor + 0.25 for key, tensor in base.items()}
    found = decode(encode(weights, base, storage, 2), base)
    assert {key: t.dtype for key, t in found.items()} == {"a": torch.bfloat16, "b": torch.float64}
    assert all(relative_error(found[key], weights[key]) < 0.01 for key in base)


def test_what_is_stored_shares_no_memory_with_the_network_that_learns_on() -> None:
    """A full copy is serialised at once; the others are computed."""
    weights = moved()
    for storage in ("half", "low-rank"):
        stored = encode(weights, teacher(), storage, RANK)
        assert {t.data_ptr() for t in stored.values() if t.is_floating_point()}.isdisjoint(
            {t.data_ptr() for t in weights.values()}
        )


# A path in a folder


def record(folder: Path, storage: Storage = "full", count: int = 3, rank: int = 2) -> tuple[DegradationPath, nn.Module]:
    """A path of a tiny UNet whose node k is the teacher moved by k / 100."""
    folder.mkdir(exist_ok=True)
    network = unet()
    base, nodes = network.state_dict(), []
    for k in range(1, count + 1):
        file = folder / f"node-{k:03d}.safetensors"
        write_node(file, node(base, k), base, storage, rank)
        nodes.append(Node(file.name, 10 * k, 1 / k, checkpoint.sha256(file), file.stat().st_size))
    path = DegradationPath(folder, fingerprint(network), "student", storage, tuple(nodes))
    path.write()
    return path, network


def node(base: Weights, k: int) -> Weights:
    return {key: t + k / 100 * normal(*t.shape, seed=k) for key, t in base.items()}


@STORAGES
def test_a_path_is_read_as_it_was_written(tmp_path: Path, storage: Storage) -> None:
    path, network = record(tmp_path / "path", storage)
    base = network.state_dict()
    found = DegradationPath.read(str(tmp_path / "path"))
    assert found == path
    assert len(found) == 3
    found.check(path.teacher, path.student)
    for k in (1, 2, 3):
        assert same(found.weights(k, base), decode(encode(node(base, k), base, storage, 2), base))
    assert not list((tmp_path / "path").glob("*.tmp"))


def test_a_smaller_storage_is_smaller_on_the_disk(tmp_path: Path) -> None:
    sizes = {s: record(tmp_path / s, s, rank=1)[0].nodes[0].bytes for s in get_args(Storage)}
    numbers = sum(t.numel() for t in unet().parameters())
    assert sizes["full"] > 4 * numbers
    assert sizes["half"] < 0.75 * sizes["full"]
    assert sizes["low-rank"] < sizes["half"]


def read_error(folder: Path) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        DegradationPath.read(folder)
    return str(error.value)


def test_a_folder_without_a_manifest_is_no_path(tmp_path: Path) -> None:
    record(tmp_path / "path")
    (tmp_path / "path" / MANIFEST).unlink()
    for folder in (tmp_path / "path", tmp_path / "nowhere"):
        assert read_error(folder) == f"target.path: {folder} holds no degradation path (there is no {MANIFEST})"


def test_a_missing_node_is_named(tmp_path: Path) -> None:
    path, _ = record(tmp_path)
    (tmp_path / path.nodes[1].file).unlink()
    assert read_error(tmp_path) == f"target.path: {tmp_path / 'node-002.safetensors'} is missing"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def swap(file: Path) -> None:
    file.write_bytes((file.parent / "node-003.safetensors").read_bytes())


@pytest.mark.parametrize("harm", [cut, flip, swap])
def test_a_harmed_node_is_named(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    record(tmp_path)
    victim = tmp_path / "node-002.safetensors"
    harm(victim)
    assert read_error(tmp_path) == f"target.path: {victim} is truncated or not the node that was recorded"


BROKEN = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "no nodes": lambda text: json.dumps(json.loads(text) | {"nodes": []}),
    "nodes that are none": lambda text: json.dumps(json.loads(text) | {"nodes": [{"file": "a"}]}),
    "nodes of another form": lambda text: json.dumps(json.loads(text) | {"nodes": [3]}),
    "no teacher": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "teacher"}),
    "another format": lambda text: json.dumps(json.loads(text) | {"format": 2}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_manifest_is_named(tmp_path: Path, how: str) -> None:
    record(tmp_path)
    file = tmp_path / MANIFEST
    file.write_text(BROKEN[how](file.read_text()))
    assert read_error(tmp_path).startswith(f"{file}: is no manifest of a degradation path (")


def test_a_manifest_that_is_no_text_is_named(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert read_error(tmp_path).startswith(f"{tmp_path / MANIFEST}: is no manifest of a degradation path (")


def test_the_manifest_says_what_the_path_was_made_from(tmp_path: Path) -> None:
    path, _ = record(tmp_path, "half")
    content = json.loads((tmp_path / MANIFEST).read_text())
    assert (content["teacher"], content["student"], content["storage"]) == (path.teacher, "student", "half")
    assert content["nodes"] == [asdict(n) for n in path.nodes]
    assert str(tmp_path) not in (tmp_path / MANIFEST).read_text()  # the folder can be moved


def test_a_node_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """As where it is harmed after the path was read."""
    path, network = record(tmp_path)
    cut(tmp_path / "node-003.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"target.path: {tmp_path / 'node-003.safetensors'} cannot be read")):
        path.weights(3, network.state_dict())
    (tmp_path / "node-003.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape("node-003.safetensors cannot be read")):
        path.weights(3, network.state_dict())


@STORAGES
def test_a_node_of_another_network_is_refused(tmp_path: Path, storage: Storage) -> None:
    """Wider; with other labels; with fewer layers; with more."""
    path, network = record(tmp_path, storage)
    base = network.state_dict()
    less = dict(list(base.items())[:-1])
    others = [unet(channels=(16,)).state_dict(), unet(5).state_dict(), less, base | {"more": torch.zeros(2)}]
    for other in others:
        with pytest.raises(ValueError, match=r"node-002\.safetensors: does not fit this network: .*"):
            path.weights(2, other)


@pytest.mark.parametrize("storage", ["full", "half", "low-rank"])
def test_a_node_fits_a_network_of_the_same_number_of_weights_only_in_their_shape(storage: Storage) -> None:
    """A difference must not be reshaped into a weight that happens to have as many numbers."""
    base = {"a": normal(4, 6)}
    stored = encode({"a": normal(4, 6, seed=1)}, base, storage, 2)
    with pytest.raises(ValueError, match="does not fit this network: a"):
        decode(stored, {"a": normal(6, 4)})


def test_a_path_of_another_teacher_or_student_is_refused_and_named(tmp_path: Path) -> None:
    path, _ = record(tmp_path)
    for kind, prints in (("teacher", ("f" * 64, path.student)), ("student", (path.teacher, "e" * 64))):
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} was recorded with another {kind}"):
            path.check(*prints)


# Fingerprints


def test_a_fingerprint_changes_with_one_bit_of_one_weight() -> None:
    network = unet()
    before = fingerprint(network)
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert fingerprint(copy.deepcopy(network)) == before == fingerprint(unet())
    weight = network.conv_in.weight.detach().view(torch.int32).flatten()
    weight[7] ^= 1
    assert fingerprint(network) != before
    weight[7] ^= 1
    assert fingerprint(network) == before


def test_a_fingerprint_knows_facts_names_shapes_and_types() -> None:
    network = nn.Linear(2, 3)
    prints = [fingerprint(network), fingerprint(network, sigma=1.0), fingerprint(network, sigma=2.0)]
    reshaped, renamed, double = nn.Linear(2, 3), nn.Sequential(network), copy.deepcopy(network).double()
    reshaped.weight = nn.Parameter(network.weight.detach().reshape(2, 3))
    reshaped.bias = network.bias
    prints += [fingerprint(reshaped), fingerprint(renamed), fingerprint(double)]
    assert len(set(prints)) == len(prints)
    assert fingerprint(network, a=1, b=2) == fingerprint(network, b=2, a=1)


def test_a_fingerprint_is_of_values_not_of_how_they_lie_in_memory() -> None:
    network = nn.Linear(5, 4)
    before = fingerprint(network, sigma=1)
    network.weight = nn.Parameter(network.weight.detach().T.contiguous().T, requires_grad=False)
    assert not network.weight.is_contiguous()
    assert fingerprint(network.train(), sigma=1) == before
    network.register_buffer("counter", torch.tensor(0))
    assert fingerprint(network, sigma=1) != before


def test_another_rank_or_order_of_nodes_is_another_path(tmp_path: Path) -> None:
    path, _ = record(tmp_path)
    replace(path, nodes=path.nodes[::-1]).write()
    assert [n.file for n in DegradationPath.read(tmp_path).nodes] == [n.file for n in path.nodes[::-1]]
