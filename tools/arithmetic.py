"""Feature networks compute in float32 as written: no TF32, no bfloat16, no autocast, no kernels chosen by a race.

A user's training script may have allowed all of these; numbers that are to be compared must not depend on it, nor on
how many threads a process happened to have.
"""

import threading
from collections.abc import Callable, Iterator
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


class _Shared:
    """Settings of the whole process, which several threads may want at once: the first sets, the last puts back."""

    def __init__(self, make: Callable[[], Callable[[], None]]) -> None:
        self._make, self._lock, self._inside = make, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._put_back = self._make()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._put_back()


def _switch_off() -> Callable[[], None]:
    switches = _switches()
    before = [getattr(owner, name) for owner, name, _ in switches]

    def put_back() -> None:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)

    for owner, name, value in switches:
        setattr(owner, name, value)
    return put_back


def _take_one_thread() -> Callable[[], None]:
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scipy's threads are its own

    before, limits = torch.get_num_threads(), threadpool_limits(1)
    torch.set_num_threads(1)

    def put_back() -> None:
        limits.restore_original_limits()
        torch.set_num_threads(before)

    return put_back


_EXACT, _SINGLE = _Shared(_switch_off), _Shared(_take_one_thread)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within, float32 is float32 and cuDNN is deterministic; the caller's switches are put back afterwards."""
    with _EXACT, torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, sums on the CPU are taken in one order; with several threads it depends on their number, and so do the
    last bits of a covariance. A launcher gives each of its processes one thread, a shell gives all of them."""
    with _SINGLE:
        yield


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Within, samples and features have the same bits on one kind of device: full precision, on a CPU in one thread."""
    with full_precision(device), one_thread() if device.type == "cpu" else nullcontext():
        yield
