"""Random numbers that belong to a sample: draw j of sample k depends on (seed, stream, k, j) only.

Why: the same sample then has the same noise in any batch, on any number of processes and after any restart.
Each sample owns a counter-based Philox stream (Salmon et al. 2011) keyed by (seed, k), so nothing is stored and
no two streams overlap. Numbers are drawn on the CPU and moved, so they do not depend on the device.
"""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, without waiting for what that still has to do.

    A GPU is given it from pinned memory: of any other it finishes its work before it takes more than 64 KB.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device=device, dtype=dtype, non_blocking=True)


class SampleNoise:
    """One random stream per sample of a batch; successive draws continue the streams.

    seed, indices, stream: whole numbers in [0, 2^64). Every draw has one row per index, in their order. `stream` keeps
    uses of one seed apart: what a student trained on is not what it is judged on.
    Raises ValueError for a number outside that range.
    """

    def __init__(self, seed: int, indices: Iterable[int], stream: int = 0) -> None:
        indices = list(indices)
        for name, number in [("seed", seed), ("stream", stream), *(("indices", index) for index in indices)]:
            if not 0 <= number < 2**64 or int(number) != number:
                raise ValueError(f"{name}: {number} is not a whole number in [0, 2^64)")
        keys = [np.array([seed, index], dtype=np.uint64) for index in indices]
        counter = np.array([0, 0, 0, stream], dtype=np.uint64)  # 2^192 blocks from the next stream
        self._streams = [np.random.Generator(np.random.Philox(key=key, counter=counter)) for key in keys]

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, rows: slice) -> "SampleNoise":
        """The streams of some samples; what is drawn from them is gone from these."""
        part = copy.copy(self)
        part._streams = self._streams[rows]
        return part

    def normal(
        self, shape: Iterable[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Standard normal numbers, [B, *shape]."""
        out = np.empty((len(self), *shape), dtype=np.float64 if dtype == torch.float64 else np.float32)
        for row, stream in zip(out, self._streams, strict=True):
            row[...] = stream.standard_normal(row.shape, dtype=out.dtype)
        return moved(torch.from_numpy(out), device, dtype)

    def uniform(self, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), [B], float64."""
        numbers = [s.random() for s in self._streams]
        return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)

    def integers(self, high: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform whole numbers in [0, high), [B], int64."""
        numbers = [int(s.integers(high)) for s in self._streams]
        return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def normal_like(x: Tensor, generator: torch.Generator | SampleNoise | None) -> Tensor:
    """Standard normal numbers of x's shape [B, ...], dtype and device."""
    if isinstance(generator, SampleNoise):
        if len(generator) != len(x):
            raise ValueError(f"generator: has {len(generator)} sample streams for a batch of {len(x)}")
        return generator.normal(x.shape[1:], x.dtype, x.device)
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
