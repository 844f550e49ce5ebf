"""Checkpoints: whole or not there, and restored bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from distill import checkpoint
from tests.distill.tiny import unet


def trained(seed: int, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A real network and its AdamW after a few updates."""
    network = unet(None, seed).requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.0, 0.99), fused=True)
    for _ in range(steps):
        update(network, optimizer)
    return network, optimizer


def update(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    network(x, timestep=torch.zeros(2)).sample.square().sum().backward()
    optimizer.step()


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_restored_pair_goes_on_bit_for_bit(tmp_path: Path) -> None:
    network, optimizer = trained(0)
    saved = checkpoint.save(tmp_path, 3, {"a": network}, {"a": optimizer})
    assert saved == tmp_path / "step-00000003"
    other, other_optimizer = trained(1, steps=1)
    assert not equal(network, other)
    assert checkpoint.load(saved, {"a": other}, {"a": other_optimizer}) == 3
    assert equal(network, other)
    for _ in range(2):
        update(network, optimizer)
        update(other, other_optimizer)
    assert equal(network, other)
    weights = checkpoint.load_weights(saved, "a")
    assert weights.keys() == network.state_dict().keys()


def test_the_last_two_are_kept_and_leftovers_swept(tmp_path: Path) -> None:
    network, optimizer = trained(0, steps=1)
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / ".step-00000001.tmp").mkdir(parents=True)
    (tmp_path / ".step-00000001.tmp" / "a.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) is None
    for step in (2, 9, 10):
        checkpoint.save(tmp_path, step, {"a": network}, {"a": optimizer})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000010"
    checkpoint.save(tmp_path, 10, {"a": network}, {"a": optimizer})  # the same step again
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000010"


@pytest.mark.parametrize("name", ["a.safetensors", "a.optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["truncated", "one bit", "missing", "empty"])
def test_a_harmed_checkpoint_is_never_loaded(tmp_path: Path, name: str, harm: str) -> None:
    network, optimizer = trained(0, steps=1)
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"a": network}, {"a": optimizer})
    file = tmp_path / "step-00000002" / name
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "one bit" and name != "state.json":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        file.write_bytes(b"" if harm == "empty" else content[: len(content) // 2])
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"sha256": 3}', '{"sha256": {}, "step": 1}'])
def test_a_state_that_is_none_is_not_loaded(tmp_path: Path, content: str) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "state.json").write_text(content)
    assert checkpoint.newest(tmp_path) is None


def test_what_does_not_fit_raises_and_names_the_key(tmp_path: Path) -> None:
    network, optimizer = trained(0, steps=1)
    saved = checkpoint.save(tmp_path, 1, {"a": network}, {"a": optimizer})
    with pytest.raises(ValueError, match=r"a\.safetensors: does not fit .* class_embedding\.weight is missing"):
        checkpoint.load(saved, {"a": unet(10)}, {})
    with pytest.raises(ValueError, match=r"a\.safetensors: does not fit .*\(8.* in the file and \(16.* in the network"):
        checkpoint.load(saved, {"a": unet(None, channels=(16,))}, {})
    with pytest.raises(ValueError, match=r"b\.safetensors: is not in this checkpoint"):
        checkpoint.load(saved, {"b": network}, {})
    with pytest.raises(ValueError, match=r"b\.optimizer\.safetensors: is not in this checkpoint"):
        checkpoint.load(saved, {}, {"b": optimizer})


def test_a_folder_that_cannot_be_written_harms_nothing(tmp_path: Path) -> None:
    network, optimizer = trained(0, steps=1)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="file"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, {"a": network}, {"a": optimizer})
    assert (tmp_path / "file").read_text() == "precious"


def test_the_state_is_readable(tmp_path: Path) -> None:
    network, optimizer = trained(0, steps=1)
    state = json.loads((checkpoint.save(tmp_path, 4, {"a": network}, {"a": optimizer}) / "state.json").read_text())
    assert state["step"] == 4
    assert sorted(state["sha256"]) == ["a.optimizer.safetensors", "a.safetensors"]
    assert state["param_groups"]["a"][0]["betas"] == [0.0, 0.99]
