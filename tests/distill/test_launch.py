"""What a launcher may ask for: bfloat16, compiled networks; refused where it is not supported or not here."""

from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from distill.config import Teach, Train
from distill.launch import check_launch, launched
from distill.together import PATIENCE
from tests.distill.runs import FSDP, forked
from tests.distill.sharded_ranks import Learner
from tests.distill.tiny import TEACH, TRAIN, write_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_processes_wait_for_hours() -> None:
    """The library's own limit is ten minutes on GPUs, in which a large checkpoint is not written."""
    handler = launched(train()).init_handler
    assert handler is not None
    assert handler.timeout == PATIENCE >= timedelta(hours=1)
    assert "backend" not in handler.to_kwargs()  # which is the device's


def train(**changes: Any) -> Train:
    return Train.model_validate(TRAIN | changes)


REAL = {"real": {"name": "teacher"}, "discriminator": {"features": "fake"}}
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported; accepted are one process, DDP"),
    "Megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
    "tensor parallel": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism configuration is not supported"),
    "fp16": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16; accepted are no and bf16"),
    "fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision: fp8"),
    "FSDP 1": ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 1; accepted is 2"),
    "offload": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
        "fsdp_offload_params",
    ),
    "checkpointing": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
        "memory.checkpointing",
    ),
    "devices": ({"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "64"}, "num_processes: 64"),
    "compiler": ({"ACCELERATE_DYNAMO_BACKEND": "tensorrt"}, "dynamo_backend: tensorrt is not installed; accepted"),
    "no compiler": ({"ACCELERATE_DYNAMO_BACKEND": "ninductor"}, "accelerate launch: 'NINDUCTOR' is not a valid"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_or_not_here_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    variables, message = REFUSED[name]
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        launched(train())


@pytest.mark.skipif(find_spec("wandb") is not None, reason="it is installed here")
def test_a_tracker_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match=r"logging.trackers: wandb is not installed; `pip install wandb`"):
        launched(train(logging={"trackers": ["wandb"]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (REAL, "discriminator.features: fake; a fake score that is compiled cannot be read, accepted is teacher"),
        ({"memory": {"ema": "cpu"}, "student": {"lora": {"rank": 2}}}, "memory.ema: cpu; of adapters only they are"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    accelerator = Accelerator(cpu=True, dynamo_backend="aot_eager")
    with pytest.raises(ValueError, match=message):
        check_launch(accelerator, train(**changes))
    check_launch(accelerator, train())
    check_launch(accelerator, Teach.model_validate(TEACH))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("train", REAL, "distill: error: discriminator.features: fake; a fake score that is shared out by FSDP cannot"),
        ("train", {"memory": {"ema": "cpu"}}, "distill: error: memory.ema: cpu; FSDP shares the average out already"),
        ("train", {"student": {"lora": {"rank": 2}}}, "distill: error: student.lora.rank: adapters are not shared out"),
        ("teach", {}, "distill: error: accelerate launch: FSDP is for `distill train`"),
    ],
)
def test_what_networks_that_are_shared_out_cannot_do_is_refused_once(
    place: Path, command: str, changes: dict[str, Any], message: str
) -> None:
    config = write_config(place, TRAIN if command == "train" else TEACH, **changes)
    text = forked(place, command, "--config", config, "--run", "refused", kind=FSDP)
    assert text.count(message) == 1, text
    assert not (place / "refused").exists()


def seen_dtypes(network: nn.Module, call: Any) -> set[torch.dtype]:
    """Of what the convolutions inside a network return."""
    seen: set[torch.dtype] = set()
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    call()
    for hook in hooks:
        hook.remove()
    return seen


def test_bfloat16_is_inside_the_network_and_nowhere_else() -> None:
    """Convolutions in bfloat16; predictions, losses, gradients, weights, moments and the average in float32."""
    learner = Learner(Accelerator(cpu=True, mixed_precision="bf16"), seed=0)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found: list[Tensor] = []
    labels = torch.arange(4)
    assert seen_dtypes(learner.network, lambda: found.append(learner.denoiser(x, torch.ones(4), labels))) == {
        torch.bfloat16
    }
    exact = type(learner.network).forward(learner.network, x, torch.ones(4), labels)
    error = float(((found[0] - exact).norm() / exact.norm()).detach())
    assert 1e-5 < error < 1e-2  # bfloat16 has 8 bits
    gradients: set[torch.dtype] = set()
    for parameter in learner.network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.add(p.grad.dtype))  # type: ignore[union-attr, func-returns-value]
    loss = next(iter(learner.losses(0)))
    assert found[0].dtype == loss.dtype == torch.float32
    learner.learn(range(2))
    assert gradients == {torch.float32}
    moments = {t.dtype for entry in learner.update.optimizer.state.values() for t in entry.values()}
    weights = {p.dtype for module in learner.modules.values() for p in module.parameters()}
    assert moments == weights == {torch.float32}


@pytest.mark.slow
def test_compiled_networks_learn_what_others_do() -> None:
    """To rounding; keys and previews are those of a plain network."""
    plain = Learner(Accelerator(cpu=True), seed=0)
    plain.learn(range(2))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.utils.counters.clear()
    compiled = Learner(Accelerator(cpu=True, dynamo_backend="aot_eager"), seed=0)
    compiled.learn(range(2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled.network.state_dict().keys() == plain.network.state_dict().keys()
    for a, b in zip(plain.average.module.parameters(), compiled.average.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.picture(), plain.picture(), rtol=1e-3, atol=1e-4)
