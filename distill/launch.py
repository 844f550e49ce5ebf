"""What the launcher of a run (`accelerate launch`, torchrun) asks for, refused where it is not here.

Networks run in float32 or bfloat16, on one process or many, replicated (DDP) or shared out (FSDP2), compiled or not.
"""

import os
from importlib.util import find_spec

import torch
from accelerate import Accelerator

from distill import sharding
from distill.config import FirstStage, Teach, Train
from distill.together import joined

_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
_KINDS = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "XLA": "a TPU"}  # accelerate's names
_ACCEPTED = "accepted are one process, DDP, and FSDP (--use_fsdp --fsdp_version 2)"
_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: weights stay on their device",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: memory.checkpointing of the configuration does it",
}


def launched(config: Teach | Train | FirstStage) -> Accelerator:
    """The accelerator of this process, as the launcher says.

    Raises ValueError where the launcher asks for something else than is supported or is here.
    """
    _check_environment()
    trackers = list(config.logging.trackers)
    for name in trackers:
        if find_spec(name) is None:
            raise ValueError(f"logging.trackers: {name} is not installed; `pip install {name}`, or leave it out")
    try:
        accelerator = joined(log_with=trackers or None, project_dir=config.run)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"accelerate launch: {' '.join(str(error).split())}") from error
    if accelerator.device.type == "mps":
        raise ValueError(
            "device: mps has no float64, which noise levels are computed in; accepted are other GPUs, and the CPU "
            "(ACCELERATE_USE_CPU=true)"
        )
    check_launch(accelerator, config)
    return accelerator


def check_launch(accelerator: Accelerator, config: Teach | Train | FirstStage) -> None:
    """Raises ValueError where a run cannot be what its configuration and its launch say together."""
    kind = accelerator.distributed_type.value
    if kind in _KINDS:
        raise ValueError(f"accelerate launch: {_KINDS[kind]} is not supported; {_ACCEPTED}")
    compiler = accelerator.state.dynamo_plugin.backend.value.lower()
    if compiler != "no" and compiler not in torch._dynamo.list_backends(None):
        known = ", ".join(["no", *torch._dynamo.list_backends()])
        raise ValueError(f"dynamo_backend: {compiler} is not installed; accepted are {known}")
    sharded = sharding.asked() and accelerator.num_processes > 1
    if isinstance(config, Teach) and sharded:
        raise ValueError(
            "accelerate launch: FSDP is for `distill train`; a teacher of `distill teach` is small, use DDP"
        )
    if isinstance(config, Train):
        check_networks(config, sharded, compiler != "no")


def check_networks(config: Train, sharded: bool, compiled: bool) -> None:
    """Raises ValueError where networks cannot be shared out by FSDP, or compiled, as a configuration has them."""
    if config.discriminator.features == "fake" and config.real.name != "none" and (sharded or compiled):
        how = "shared out by FSDP" if sharded else "compiled"
        raise ValueError(
            f"discriminator.features: fake; a fake score that is {how} cannot be read, accepted is teacher"
        )
    adapters = [f"{name}.lora.rank" for name in ("student", "fake") if getattr(config, name).lora.rank is not None]
    if adapters and sharded:
        raise ValueError(f"{adapters[0]}: adapters are not shared out by FSDP; accepted are other launches, or null")
    if config.memory.ema == "cpu" and (sharded or config.student.lora.rank is not None):
        why = "FSDP shares the average out" if sharded else "of adapters only they are averaged"
        raise ValueError(f"memory.ema: cpu; {why} already, accepted is device")


def _check_environment() -> None:
    """What can be known before accelerate sets up: some of it would end in a traceback there, or in nothing at all."""
    for variable, name in _OTHERS.items():
        if os.environ.get(variable, "false").lower() not in ("false", ""):
            raise ValueError(f"accelerate launch: {name} is not supported; {_ACCEPTED}")
    check_precision()
    parts = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if not parts.isdecimal() or int(parts) < 1:
        raise ValueError(f"gradient_accumulation_steps: {parts}; accepted are whole numbers from 1")
    if sharding.asked():
        number = os.environ.get("FSDP_VERSION", "1")
        if number != "2":
            raise ValueError(f"fsdp_version: {number}; accepted is 2")
        for variable, reason in _FSDP.items():
            if os.environ.get(variable, "false").lower() == "true":
                raise ValueError(f"{reason}; accepted is false")
    _check_devices()


def check_precision() -> None:
    """Raises ValueError for a mixed precision that the launcher asks for and no run has."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision: {precision}; accepted are no and bf16, which needs no scaling of losses")


def _check_devices() -> None:
    processes, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1 or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        return
    if not torch.accelerator.is_available():
        raise ValueError(
            f"num_processes: {processes}; there is no GPU here (ACCELERATE_USE_CPU=true lets processes share the CPU)"
        )
    found = torch.accelerator.device_count()
    if here > found:
        raise ValueError(f"num_processes: {here} on this machine; there are {found} GPUs here")
