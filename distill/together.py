"""Work that the processes of a launch share step by step: what goes wrong on one of them is said once, and ends all."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

PATIENCE = timedelta(hours=6)  # of processes that wait while one writes a checkpoint, or makes its last samples
T = TypeVar("T")


def joined(**settings: Any) -> Accelerator:
    """This process's place in the launch. A process that dies is the launcher's to see, not the others' by their wait.

    settings: more of accelerate's own. Raises what accelerate does where the launch cannot be.
    """
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **settings)


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
