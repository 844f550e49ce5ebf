"""What a pass of a network needs, in bytes and in arithmetic, found on the meta device: nothing is computed or held.

Every tensor that an operation makes is followed from its birth to its death, gradients, what autograd saves and what a
checkpointed block computes again among them; workspaces inside a kernel are not seen. Attention is the fused kernel's,
which keeps no table of weights, as on any accelerator and on a CPU; autocast is imitated, for there is none on meta.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

# What autocast computes in low precision and in float32, of what diffusers' networks call; by the functions' names.
_LOW = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "matmul", "__matmul__", "bmm", "baddbmm", "addmm"}
_LOW |= {"einsum", "scaled_dot_product_attention"}
_FULL = {"layer_norm", "group_norm", "softmax"}
_ATTENTION = ("query", "key", "value")


@dataclass(frozen=True)
class Pass:
    """One pass over a batch: bytes beside weights and inputs, and FLOPs (2 for a multiplication and an addition).

    saved: alive when the forward is done, the output included. peak: the most that is alive at once, with the
    gradients of the weights where there is a backward. forward, backward: FLOPs; what is computed again counts as
    backward.
    """

    saved: int
    peak: int
    forward: int
    backward: int = 0


def measure(
    network: Any,
    call: Callable[[], Tensor],
    *,
    backward: bool,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    fused: bool = True,
    accumulated: bool = False,
    inputs: Iterable[Tensor] = (),
) -> Pass:
    """What `call`, a pass of a diffusers network on the meta device, needs; with its backward pass if asked.

    checkpointing: blocks keep what they were given, and are computed again. autocast: the dtype of the launch's mixed
    precision; None is none. fused: attention by a kernel that keeps no table, which cannot be differentiated twice.
    accumulated: the gradients of an earlier part of the batch are there. inputs: what is held anyway.
    """
    gradients = [torch.zeros_like(p) for p in network.parameters() if p.requires_grad and accumulated]
    for parameter, gradient in zip((p for p in network.parameters() if p.requires_grad), gradients, strict=False):
        parameter.grad = gradient
    live = _Live([*network.parameters(), *network.buffers(), *inputs, *gradients])
    live.now = live.peak = sum(gradient.nbytes for gradient in gradients)
    kernels = _Kernels(autocast, fused)
    if checkpointing:
        network.enable_gradient_checkpointing(
            partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), kernels))
        )
    try:
        with torch.set_grad_enabled(backward), live:
            with kernels:
                output = call()
            kernels.forget()
            saved, forward = live.now, live.flops
            if backward:
                loss = output.float().square().mean()
                del output
                loss.backward()
    finally:
        network.zero_grad(set_to_none=True)
        if checkpointing:
            network.disable_gradient_checkpointing()
    return Pass(saved, live.peak, forward, live.flops - forward)


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive: now, and the most at once; and FLOPs."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for made in tree_leaves(output):
            if isinstance(made, Tensor):
                self._follow(made.untyped_storage())
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, key, size).atexit = False

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Kernels(TorchFunctionMode):
    """Calls as an accelerator runs them: fused attention, and the dtypes of autocast."""

    def __init__(self, autocast: torch.dtype | None, fused: bool) -> None:
        super().__init__()
        self._fused = fused
        self._autocast, self._casts, self._again = autocast, dict[int, Tensor](), False

    def forget(self) -> None:
        """The forward is done: casts of weights live on only where a graph has them, and are not shared any more."""
        self._casts.clear()
        self._again = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self._autocast is not None and name in _LOW:
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs))
        elif self._autocast is not None and name in _FULL:
            args, kwargs = tree_map_only(Tensor, _full, (args, kwargs))
        if name == "scaled_dot_product_attention" and self._fused:
            query, key, value = (args[k] if k < len(args) else kwargs[part] for k, part in enumerate(_ATTENTION))
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor) -> Tensor:
        """Of weights that learn, one cast serves a forward pass."""
        assert self._autocast is not None
        if tensor.dtype != torch.float32:
            return tensor
        if self._again or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self._autocast)
        return self._casts.setdefault(id(tensor), tensor.to(self._autocast))


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
