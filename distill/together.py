"""Work that the processes of a launch share step by step: what goes wrong on one of them is said once, and ends all."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

PATIENCE = timedelta(hours=6)  # of processes that wait while one writes a checkpoint, or makes its last samples
_SECONDS = timedelta(seconds=5)  # that a process waits for what the first one says before it says its own
_FAILED = "distill/failed"
T = TypeVar("T")


def joined(**settings: Any) -> Accelerator:
    """This process's place in the launch. A process that dies is the launcher's to see, not the others' by their wait.

    settings: more of accelerate's own. Raises what accelerate does where the launch cannot be.
    """
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **settings)


def leave_group() -> bool:
    """Ends this process's part in torch's process group; returns whether there was one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    distributed.destroy_process_group()
    return True


def said_once(message: str) -> bool:
    """Whether this process is the one that tells the user what ended it: the first process tells what ended that, any
    other what did not end the first."""
    rank, distributed = os.environ.get("RANK", "0"), torch.distributed
    if not distributed.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"  # what is wrong with a launch is alike on a machine
    try:
        store = distributed.distributed_c10d._get_default_store()
        if rank != "0":
            store.wait([_FAILED], _SECONDS)
            told = store.get(_FAILED).decode()
            store.set(f"{_FAILED}/{rank}", "heard")
            return told != message
        store.set(_FAILED, message)
        others = [f"{_FAILED}/{k}" for k in range(1, distributed.get_world_size())]
        store.wait(others, _SECONDS / 2)  # the store may end with this process
    except RuntimeError:  # the first process goes on, or was killed; or the others do
        pass
    return True


def left_alone(error: RuntimeError) -> bool:
    """Whether an error is that of a process whose launch has lost another one."""
    distributed = torch.distributed
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    kinds = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    return isinstance(error, kinds) or any(word in str(error) for word in ("gloo", "Connection closed by peer"))


def together(work: Callable[[Any], T], given: Any, accelerator: Accelerator, only_first: bool = False) -> T | None:
    """work(given), on all processes or the first only; what goes wrong on one of them is raised on all."""
    result, failure = None, None
    try:
        if accelerator.is_main_process or not only_first:
            result = work(given)
    except (ValueError, OSError) as error:
        if accelerator.num_processes == 1:
            raise
        failure = str(error)
    failures = [f for f in gather_object([failure]) if f is not None] if accelerator.num_processes > 1 else []
    if failures:
        raise ValueError(failures[0])
    return result
