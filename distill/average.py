"""The running average of a network's weights, on the device, shared out like the network, or in the host's memory.

In the host's memory it costs the device nothing but a copy of the weights to it in each update (4 bytes a weight over
the bus; the host holds 8), and the arithmetic runs on a thread of its own, while the next update goes on.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from distill import sharding


class Average:
    """average <- decay average + (1 - decay) network, after every update; the buffers are the network's.

    The decay ramps up as (step + 1) / (step + 10), step from 0, so that a short run does not remember its start.
    module: where the average is kept, a network of the same form: on the network's device, shared out as it is, or
    anywhere on the CPU with where = "cpu". Weights that both hold as one (a frozen base) are left alone.
    """

    def __init__(
        self, module: nn.Module, network: nn.Module, decay: float, where: Literal["device", "cpu"] = "device"
    ) -> None:
        self.module, self.network, self.decay = module, network, decay
        self._apart = where == "cpu"
        self._pending: Future[None] | None = None
        if self._apart:
            module.cpu()
            self._sent, self._sent_buffers = (
                [torch.empty_like(current, device="cpu", pin_memory=current.is_cuda) for _, current in pairs]
                for pairs in (self._pairs(), self._buffers())
            )
            self._thread = ThreadPoolExecutor(1, "average")
            module.register_state_dict_pre_hook(lambda *_: self.settle())  # what reads it, reads it whole

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Takes up the network as it is after update `step`, from 0."""
        decay = min(self.decay, (step + 1) / (step + 10))
        if not self._apart:
            for kept, current in self._buffers():
                kept.copy_(current)
            pairs = [(sharding.local(kept), sharding.local(current)) for kept, current in self._pairs()]
            torch._foreach_lerp_([kept for kept, _ in pairs], [current for _, current in pairs], 1 - decay)
            return
        self.settle()
        pairs = [*self._pairs(), *self._buffers()]
        for sent, (_, current) in zip([*self._sent, *self._sent_buffers], pairs, strict=True):
            sent.copy_(current, non_blocking=True)
        arrived = None
        if pairs and pairs[0][1].is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending = self._thread.submit(self._take, decay, arrived)

    def settle(self) -> None:
        """Waits until the average has taken up the last update that it was told of."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @contextmanager
    def shown(self) -> Iterator[nn.Module]:
        """A network with the average's weights that can run on the device: the average itself; or, where that is kept
        apart, the trained network, whose own weights wait outside and come back bit for bit."""
        if not self._apart:
            yield self.module
            return
        self.settle()
        pairs = self._pairs()
        with torch.no_grad():
            for sent, (kept, current) in zip(self._sent, pairs, strict=True):
                sent.copy_(current)
                current.copy_(kept)
        try:
            yield self.network
        finally:
            with torch.no_grad():
                for sent, (_, current) in zip(self._sent, pairs, strict=True):
                    current.copy_(sent)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.module.parameters(), self.network.parameters(), strict=True)
        return [(kept, current) for kept, current in pairs if kept is not current]

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self.module.buffers(), self.network.buffers(), strict=True)
        return [(kept, current) for kept, current in pairs if kept is not current]

    @torch.no_grad()
    def _take(self, decay: float, arrived: "torch.cuda.Event | None") -> None:
        if arrived is not None:
            arrived.synchronize()
        torch._foreach_lerp_([kept for kept, _ in self._pairs()], self._sent, 1 - decay)
        for (kept, _), sent in zip(self._buffers(), self._sent_buffers, strict=True):
            kept.copy_(sent)
