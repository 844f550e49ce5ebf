"""Networks whose weights are shared out among the processes (FSDP2): torch's `fully_shard`, as the launcher says.

Why not accelerate's `prepare`: it takes one network a run and its optimizer (here are three, one without), casts noise
levels and timesteps to bfloat16, and knows no FSDP on a CPU. What the launcher says is read as accelerate reads it.
"""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from accelerate import Accelerator
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


# Parts of a block that the network calls by themselves too: DiT's embedding of time and class, in its first block.
_CALLED_FROM_OUTSIDE = ("CombinedTimestepLabelEmbeddings",)


def asked() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def place(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Puts a module on the process's device, or its share of it where the launch shares networks out; in place.

    A sharded network stays itself: its keys, its `network` and how it is called are as before. Its parameters are
    sharded whenever it does not run. Every process must call it, and as often as the others.
    """
    if not asked() or accelerator.num_processes == 1:
        return module.to(accelerator.device)
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin()  # reads the launcher's environment
    # A network that learns nothing runs no backward pass, after which its weights would be let go.
    free = bool(plugin.reshard_after_forward) or not any(p.requires_grad for p in module.parameters())
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    parts = _parts(module, plugin)
    taken = {id(part) for part in parts}
    outside = [part for part in module.modules() if type(part).__name__ in _CALLED_FROM_OUTSIDE]
    for part in [part for part in outside if id(part) not in taken] + parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=free)
    fully_shard(module, mesh=mesh, reshard_after_forward=free)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether `place` has shared it out."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # costs a second to import; without it nothing is shared out
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _is_share(tensor: Tensor) -> "TypeGuard[DTensor]":
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, of the same storage; a plain tensor is all of it."""
    return tensor.to_local() if _is_share(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process, which all must call it; a plain tensor is itself."""
    return tensor.full_tensor() if _is_share(tensor) else tensor


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """A whole tensor as `own` is held: this process's share of it where `own` is one. No process talks to another."""
    if not _is_share(own) or tensor.shape != own.shape:
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    assert own.placements == (Shard(0),), "networks are shared out along the first dimension"
    chunks = tensor.chunk(own.device_mesh.size())
    rank = own.device_mesh.get_local_rank()
    share = chunks[rank] if rank < len(chunks) else tensor[:0]
    return DTensor.from_local(
        share.to(own.device), own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
    )


def state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that are its own, as it holds them: a network on a frozen base that others hold too names
    the base's keys in `shared_keys`, and they are left out."""
    shared: frozenset[str] = getattr(module, "shared_keys", frozenset())
    return {key: tensor for key, tensor in module.state_dict().items() if key not in shared}


def whole_state(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """`state` as whole tensors; those that were shared out are put together one by one, on the CPU.

    All processes must call it where `module` is sharded. keep: whether this one wants the result, or nothing.
    """
    return dict(wholes(state(module), keep))


def wholes(tensors: dict[str, Tensor], keep: bool = True) -> Iterator[tuple[str, Tensor]]:
    """As `whole_state`, of any tensors."""
    for key, tensor in tensors.items():
        found = whole(tensor.detach())
        if keep:
            yield key, found.cpu() if _is_share(tensor) else found


def _parts(module: nn.Module, plugin: Any) -> list[nn.Module]:
    """What is gathered by itself when it runs, inner parts first: by the launcher's policy if it names one; otherwise
    the network's blocks, and what its class says should stay together."""
    network = getattr(module, "network", module)
    inside = [part for part in network.modules() if part is not network and any(True for _ in part.parameters())]
    if plugin.min_num_params:
        # Parts that are large enough once their own large parts are taken out.
        large, taken = [], set[int]()
        for part in reversed(inside):
            left = {id(p): p.numel() for p in part.parameters() if id(p) not in taken}
            if sum(left.values()) >= plugin.min_num_params and _is_called(part):
                large.append(part)
                taken |= left.keys()
        return large
    names = set(plugin.transformer_cls_names_to_wrap or ())
    if names:
        found = [part for part in inside if type(part).__name__ in names]
        if not found:
            raise ValueError(
                f"fsdp_transformer_layer_cls_to_wrap: {', '.join(sorted(names))}; a {type(network).__name__} has "
                f"{', '.join(sorted({type(part).__name__ for part in inside}))}"
            )
        return [part for part in reversed(found) if _is_called(part)]
    names = set(getattr(network, "_no_split_modules", None) or ())
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    blocks = {id(block) for blocks in lists for block in blocks} | {id(getattr(network, "mid_block", None))}
    found = [part for part in inside if id(part) in blocks or type(part).__name__ in names]
    return [part for part in reversed(found) if _is_called(part)]


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward of its own; lists and dictionaries of modules have none."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def all_finite(accelerator: Accelerator, module: nn.Module) -> bool:
    """Whether all weights of a module are finite; the same answer on all processes, which all must ask for it."""
    own = state(module).keys()
    weights = [
        local(p.detach()) for key, p in module.state_dict(keep_vars=True).items() if key in own and _is_weight(p)
    ]
    weights = [weight for weight in weights if weight.numel()]
    norms = torch.stack(torch._foreach_norm(weights)) if weights else torch.zeros(1)
    harmed = (~norms.isfinite()).any().float().to(accelerator.device)
    return not bool(accelerator.reduce(harmed, reduction="sum"))


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)
