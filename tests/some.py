"""Which of many alike cases a short run of the tests takes; all of them are CI's."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], quick: Collection[Any] | int = 1, ids: Any = None) -> list[Any]:
    """Parameters of a test, of which all are slow but `quick`: those cases, or so many that are spread evenly.

    A tuple is the parameters of one case. ids(case): its name.
    """
    cases = list(cases)
    if isinstance(quick, int):
        step = max(1, len(cases) // quick)
        quick = cases[::step][:quick]
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in quick else pytest.mark.slow,
            id=None if ids is None else ids(case),
        )
        for case in cases
    ]
