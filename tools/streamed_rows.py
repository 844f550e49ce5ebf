"""Rows of features on their way into a torchmetrics `Metric`: numbered, checked, gathered from all ranks.

Rows wait with the numbers of their samples, real ones as ~number, below 0, so that results depend on neither the order
nor the rank they came from. States keep their dtype, whatever becomes of the network's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from tools.features import Extracted
from tools.gram import check_features
from tools.jackknife import BLOCKS, block_of

Network = Callable[[Any], Tensor | Extracted]
Numbers = Sequence[int] | Tensor


class StreamedRows(Metric):
    """What the metrics share. `update` of a subclass calls `wait`; its `compute` reads `waiting` or `ordered`.

    dim: of the rows, which are kept in `dtype`. network: maps what `update` is given to rows [B, dim] (a module, a
    `load_extractor`, any function); None: it is given rows. Raises ValueError for dim below 1.
    """

    full_state_update = False
    is_differentiable = False
    reads: Literal["features", "logits"] = "features"
    rows: list[Tensor] | Tensor
    numbers: list[Tensor] | Tensor

    def __init__(self, dim: int, network: Network | None, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: {dim} is not a number of {self.reads} (1 or more)")
        self.dim, self.network, self.kept = dim, network, dtype
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")
        # NaN differs from NaN: MetricCollection would share the states of two metrics that look alike after one batch.
        self.add_state("alone", torch.tensor(torch.nan), dist_reduce_fx="sum")
        self.clear()
        self.train(False)

    def forward(self, *arguments: Any, **named: Any) -> None:
        """As update. One batch alone has no distance, so nothing is returned."""
        self.update(*arguments, **named)

    def reset(self) -> None:
        """Forgets all rows."""
        super().reset()
        self.clear()

    def train(self, mode: bool = True) -> "StreamedRows":
        """The network judges, so it stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> nn.Module:
        """Moves the states with the module, and never changes their dtype."""
        super()._apply(fn, exclude_state=tuple(self._defaults))
        for name in self._defaults:
            state = getattr(self, name)
            moved = [s.to(self.device) for s in state] if isinstance(state, list) else state.to(self.device)
            setattr(self, name, moved)
        return self

    @contextmanager
    def sync_context(
        self,
        dist_sync_fn: Callable | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable | None = None,
    ) -> Iterator[None]:
        """As torchmetrics', but an error inside does not leave this rank with the rows of all."""
        before = self._is_synced
        self.sync(dist_sync_fn, process_group, should_sync and not before, distributed_available)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and not before and should_unsync)

    def gathered(self, measure: Callable[[], Any]) -> Any:
        """What `measure` returns while this rank has the rows of all."""
        with self.sync_context(self.dist_sync_fn, should_sync=self.sync_on_compute):
            return measure()

    @torch.no_grad()
    def wait(self, x: Any, real: bool, numbers: Numbers | None, seen: int) -> None:
        """Appends a batch; without numbers it is what this rank sees next."""
        out = x if self.network is None else self.network(x)
        rows = getattr(out, self.reads) if isinstance(out, Extracted) else out
        if not isinstance(rows, Tensor):
            raise ValueError(f"{self.reads}: {type(rows).__name__} is not a tensor [B, {self.dim}]")
        check_features(self.reads, rows, self.dim)
        order = _numbers(numbers, len(rows), seen)
        assert isinstance(self.rows, list)
        assert isinstance(self.numbers, list)
        self.rows.append(rows.to(self.device, self.kept))
        self.numbers.append((~order if real else order).to(self.device))

    def clear(self) -> None:
        """No rows, but a tensor of them: a rank that has none must still take part when they are gathered."""
        self.rows = [torch.empty(0, self.dim, dtype=self.kept, device=self.device)]
        self.numbers = [torch.empty(0, dtype=torch.int64, device=self.device)]

    def waiting(self) -> tuple[Tensor, Tensor]:
        """Rows [N, dim] and their numbers [N]."""
        return dim_zero_cat(self.rows), dim_zero_cat(self.numbers)

    def ordered(self, real: bool) -> tuple[Tensor, Tensor | None]:
        """Rows by their numbers, whatever ranks they came from, and their blocks (None: too few to fill ten)."""
        rows, numbers = self.waiting()
        own = (numbers < 0) == real
        numbers, order = (~numbers[own] if real else numbers[own]).sort(stable=True)
        blocks = block_of(numbers.cpu()) if len(numbers) else numbers
        return rows[own][order], blocks if len(blocks.unique()) == BLOCKS else None

    def seen(self, real: bool) -> int:
        """How many rows wait."""
        return sum(int(((n < 0) == real).sum()) for n in self.numbers)


def _numbers(given: Numbers | None, count: int, seen: int) -> Tensor:
    """[count]: the numbers that were given, or the next, dealt among the ranks as DistributedSampler does."""
    if given is None:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)
        return torch.arange(seen, seen + count) * ranks + rank
    numbers = torch.as_tensor(given).cpu()
    if numbers.shape != (count,) or numbers.is_floating_point() or (count and numbers.min() < 0):
        raise ValueError(f"numbers: {numbers.dtype} of shape {list(numbers.shape)}; needed are {count} from 0")
    return numbers.long()
