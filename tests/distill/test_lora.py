"""Adapters: three networks on one copy of the base's weights, which nothing moves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill import checkpoint, sharding
from distill.lora import adapted, shared_copy
from distill.nodes import load_own
from distill.sections import Lora
from distill.teacher import Teacher
from tests.distill import families, tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return Teacher.load(families.save("sd15", tmp_path_factory.mktemp("sd15") / "teacher"))


def predict(denoiser: nn.Module, teacher: Teacher) -> torch.Tensor:
    assert teacher.words is not None
    x = 2 * torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.words.condition({k: v.expand(2, *v.shape[1:]) for k, v in teacher.words.null.items()})
    return denoiser(x, torch.tensor([0.5, 3.0]), cond)


def storages(*modules: nn.Module) -> dict[int, int]:
    """Bytes of every storage that these modules hold, each counted once."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def disturb(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_three_networks_hold_the_base_once(teacher: Teacher) -> None:
    """Measured in bytes of distinct storages: the base's, and the adapters' of each."""
    networks = [adapted(teacher.denoiser, Lora(rank=2), seed) for seed in range(2)]
    networks.append(shared_copy(networks[0]).requires_grad_(False))
    base = sum(storages(teacher.denoiser).values())
    adapters = sum(p.numel() * 4 for key, p in networks[0].state_dict().items() if ".lora_" in key)
    assert sum(storages(teacher.denoiser, *networks).values()) == base + 3 * adapters
    assert adapters < base / 2


def test_adapters_begin_as_nothing_and_learn_alone(teacher: Teacher) -> None:
    expected = predict(teacher.denoiser, teacher)
    student, fake = (adapted(teacher.denoiser, Lora(rank=2), seed) for seed in range(2))
    assert torch.equal(predict(student, teacher), expected)
    predict(student, teacher).square().sum().backward()
    assert all(p.requires_grad == (".lora_" in name) for name, p in student.named_parameters())
    assert any(bool(p.grad.any()) for p in student.parameters() if p.grad is not None)
    assert all(p.grad is None for p in teacher.denoiser.parameters())

    disturb(student)
    assert not torch.allclose(predict(student, teacher), expected, atol=1e-3)
    assert torch.equal(predict(fake, teacher), expected)
    assert torch.equal(predict(teacher.denoiser, teacher), expected)


def test_an_adapter_is_the_low_rank_sum_that_it_is_said_to_be(teacher: Teacher) -> None:
    """Against W + alpha / rank B A written into a copy of the base's layer."""
    config = Lora(rank=2, alpha=6.0, targets=("to_q",))
    student = adapted(teacher.denoiser, config, 0)
    disturb(student)
    merged = teacher.clone().requires_grad_(False)
    layers = dict(student.network.named_modules())
    for name, layer in merged.network.named_modules():
        if name.endswith("to_q"):
            low = layers[name]
            layer.weight.data += 3.0 * low.lora_B["default"].weight.data @ low.lora_A["default"].weight.data
    found = predict(student, teacher)
    assert torch.allclose(found, predict(merged, teacher), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, predict(teacher.denoiser, teacher), atol=1e-3)


def test_their_checkpoints_hold_adapters_only(teacher: Teacher, tmp_path: Path) -> None:
    student, other = (adapted(teacher.denoiser, Lora(rank=2), seed) for seed in range(2))
    disturb(student)
    made = checkpoint.save(tmp_path, 3, {"student": student}, {})
    assert all(".lora_" in key for key in checkpoint.load_weights(made, "student"))
    before = predict(teacher.denoiser, teacher)
    assert checkpoint.load(made, {"student": other}, {}) == 3
    assert torch.equal(predict(other, teacher), predict(student, teacher))
    assert torch.equal(predict(teacher.denoiser, teacher), before)
    with pytest.raises(ValueError, match="does not fit this network"):
        load_own(other, dict(list(sharding.state(student).items())[1:]))


def test_a_base_in_half_precision_has_adapters_in_single(teacher: Teacher, tmp_path: Path) -> None:
    low = Teacher.load(families.save("sd15", tmp_path / "teacher"))
    low.denoiser.to(torch.bfloat16)
    student = adapted(low.denoiser, Lora(rank=2), 0)
    dtypes = {".lora_" in name: p.dtype for name, p in student.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    found = predict(student, low)
    assert found.dtype == torch.float32
    assert torch.equal(found, predict(low.denoiser, low))
    assert torch.allclose(found, predict(teacher.denoiser, teacher), atol=0.15)  # eight bits of mantissa


@pytest.mark.parametrize(("targets", "named"), [(("to_nowhere",), "'to_nowhere'"), (("to_q.weight",), "'to_q.weight'")])
def test_targets_that_are_not_there_are_named(teacher: Teacher, targets: Any, named: str) -> None:
    with pytest.raises(ValueError, match=rf"lora\.targets: \[{named}\]; a UNet2DConditionModel has no such layer"):
        adapted(teacher.denoiser, Lora(rank=2, targets=targets), 0)


def test_convolutions_may_be_adapted(tmp_path: Path) -> None:
    teacher = Teacher.load(tiny.save_teacher(tmp_path / "teacher"))
    student = adapted(teacher.denoiser, Lora(rank=2, targets=("conv1", "conv2")), 0)
    x, labels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    assert torch.equal(student(x, torch.tensor(2.0), labels), teacher.denoiser(x, torch.tensor(2.0), labels))
    disturb(student)
    assert not torch.equal(student(x, torch.tensor(2.0), labels), teacher.denoiser(x, torch.tensor(2.0), labels))
