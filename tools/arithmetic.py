"""Feature networks compute in float32 as written: no TF32, no bfloat16, no autocast, no kernels chosen by a race.

A user's training script may have allowed all of these; numbers that are to be compared must not depend on it, nor on
how many threads a process happened to have.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


def _switches() -> list[tuple[Any, str, Any]]:
    """(object, attribute, value wanted). The older names of the precision switches fail once the newer were used."""
    backends: Any = torch.backends
    switches = [(backends.cudnn, "deterministic", True), (backends.cudnn, "benchmark", False)]
    if hasattr(backends, "fp32_precision"):
        parts = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
        return switches + [(part, "fp32_precision", "ieee") for part in parts]
    return [*switches, (backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within, float32 is float32 and cuDNN is deterministic; the caller's switches are put back afterwards."""
    switches = _switches()
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, sums on the CPU are taken in one order; with several threads it depends on their number, and so do the
    last bits of a covariance. A launcher gives each of its processes one thread, a shell gives all of them."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scipy's threads are its own

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Within, samples and features have the same bits on one kind of device: full precision, on a CPU in one thread."""
    with full_precision(device), one_thread() if device.type == "cpu" else nullcontext():
        yield
