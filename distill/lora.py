"""Adapters of low rank on a network whose own weights are shared: student and fake score for the memory of one teacher.

Every network is a tree of modules of its own, whose frozen parameters are the teacher's themselves. Nothing is switched
from call to call, so that recomputed activations, compiled graphs and several processes see one network each.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from distill.sections import Lora
from samplers import NetworkDenoiser

ADAPTER = "default"  # peft's name of a network's one adapter
M = TypeVar("M", bound=nn.Module)


def adapted(denoiser: NetworkDenoiser, config: Lora, seed: int) -> NetworkDenoiser:
    """A denoiser that shares the frozen weights of another, with adapters that begin as nothing (B = 0).

    Adapters are float32 in any precision of the weights; seed draws their A. `shared_keys` of the result are the keys
    of its state that are not its own. Raises ValueError for targets that the network does not have.
    """
    from peft import LoraConfig, inject_adapter_in_model

    modules = dict(denoiser.network.named_modules())
    names = [name for name, module in modules.items() if _is_target(name, module, config.targets)]
    idle = [t for t in config.targets if not any(_is_target(name, module, (t,)) for name, module in modules.items())]
    if idle or not names:
        raise ValueError(
            f"lora.targets: {idle or 'the linear layers of its blocks'}; a {type(denoiser.network).__name__} has no "
            "such layer"
        )
    rank = config.rank or 1
    own = shared_copy(denoiser, frozenset(denoiser.state_dict()))
    alpha: Any = config.alpha or rank  # a number
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, own.network, adapter_name=ADAPTER)
    for name, parameter in own.named_parameters():
        trained = ".lora_" in name
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
    own.shared_keys = frozenset(key for key in own.state_dict() if ".lora_" not in key)  # type: ignore[assignment]
    return own


def shared_copy(module: M, keys: frozenset[str] | None = None) -> M:
    """A copy of a module whose parameters and buffers under `keys` are the module's own; None: its `shared_keys`, which
    a network without adapters does not have."""
    shared: frozenset[str] = getattr(module, "shared_keys", frozenset()) if keys is None else keys
    state = module.state_dict(keep_vars=True)
    tensors = [tensor for key, tensor in state.items() if key in shared]
    if shared:  # constants that no state has
        tensors += [tensor for key, tensor in module.named_buffers() if key not in state]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _is_target(name: str, module: nn.Module, targets: tuple[str, ...]) -> bool:
    """Whether a layer is adapted: named at its end, or, where none is named, a linear one inside a list of blocks."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return False
    if targets:
        return any(name == target or name.endswith(f".{target}") for target in targets)
    return isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split(".")[:-1])
