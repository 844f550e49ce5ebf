"""Work that the processes of a launch share step by step: what goes wrong on one of them is said once, and ends all."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

T = TypeVar("T")


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
