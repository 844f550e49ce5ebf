"""Can this Fréchet distance be trusted? The nasty inputs of `conformance_cases`, put to any implementation.

`python -m tools.conformance --against clean-fid torchmetrics my_package.metrics:fid` prints a table. An implementation
is a function (mu1, sigma1, mu2, sigma2) -> float or (features, features) -> float of numpy arrays.

Why a process for every case: one NaN hangs clean-fid for ever and ends the process that called torchmetrics.
"""

import argparse
import contextlib
import inspect
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from tools.conformance_cases import CASES, Array, Problem
from tools.frechet import frechet_distance
from tools.statistics import FeatureStatistics

TIME_LIMIT = 20.0  # seconds; the slowest case takes an implementation that works 0.1
STARTING = 120.0  # seconds until the process is there and has imported the implementation


@dataclass(frozen=True)
class Implementation:
    """What is judged: a function of two sets of features, of two pairs of moments, or both. Others import it by name.

    imports: modules that it needs, imported before the clock starts.
    """

    features: Callable[[Array, Array], Any] | None = None
    moments: Callable[[Array, Array, Array, Array], Any] | None = None
    imports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.features is None and self.moments is None:
            raise ValueError("implementation: neither a function of features nor one of moments")


@dataclass(frozen=True)
class Outcome:
    """passed None: not asked, since the case has only moments and the implementation reads only features.

    verdict: "ok" and "refused" pass; "wrong", "negative", "not a number", "accepted", "raised", "crashed", "hung" do
    not. error: relative to the truth, absolute where that is 0. note: what it said, or what ended it.
    """

    case: str
    passed: bool | None
    verdict: str
    value: float | None = None
    error: float | None = None
    seconds: float | None = None
    note: str = ""


def check(
    against: str | Implementation = "ours", cases: Collection[str] | None = None, time_limit: float = TIME_LIMIT
) -> list[Outcome]:
    """Puts every case (None: all) to the implementation, each in a process of its own that ends at the time limit [s].

    against: an Implementation, a name in IMPLEMENTATIONS, or "package.module:function", of four parameters (moments) or
    of two (features). Raises ValueError for a name or case that does not exist.
    """
    if unknown := [case for case in cases or () if case not in CASES]:
        raise ValueError(f"cases: {unknown[0]!r} is not one of {', '.join(CASES)}")
    if not time_limit > 0:
        raise ValueError(f"time_limit: {time_limit} is not a number of seconds above 0")
    implementation = implementation_of(against) if isinstance(against, str) else against
    for function in (implementation.features, implementation.moments):
        _check_importable(function)
    return [_ask(implementation, case, time_limit) for case in (CASES if cases is None else cases)]


def _check_importable(function: Callable | None) -> None:
    """Raises ValueError for a function that another process cannot find by its name, as a lambda or a local one."""
    if function is None:
        return
    found: Any = sys.modules.get(getattr(function, "__module__", ""))
    for part in getattr(function, "__qualname__", "?").split("."):
        found = getattr(found, part, None)
    if found is not function:
        raise ValueError(f"against: no other process can import this function ({function!r})")


def implementation_of(name: str) -> Implementation:
    """One of IMPLEMENTATIONS, or a function by its import path. Raises ValueError when there is none."""
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        accepted = f"{', '.join(IMPLEMENTATIONS)} or package.module:function"
        raise ValueError(f"against: {name!r} is not there ({error}); accepted are {accepted}") from error
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if len(needed) not in (2, 4):
        raise ValueError(f"against: {name} takes {len(needed)} arguments; needed are 2 (features) or 4 (moments)")
    return Implementation(features=function) if len(needed) == 2 else Implementation(moments=function)


def judge(problem: Problem, value: Any) -> tuple[str, float | None, float | None]:
    """Verdict, value and error of a number that came back."""
    if np.ndim(value) or np.iscomplexobj(value) or not math.isfinite(value := float(value)):
        return "not a number", None, None
    if problem.truth is None:
        return "accepted", value, None
    difference = abs(value - problem.truth)
    error = difference / problem.truth if problem.truth else difference
    if difference <= problem.relative * problem.truth + problem.absolute and value >= 0:
        return "ok", value, error
    return ("negative" if value < 0 else "wrong"), value, error


def _ask(implementation: Implementation, case: str, time_limit: float) -> Outcome:
    context = _processes(implementation.imports)
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, implementation, case), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(STARTING):
            return Outcome(case, False, "hung", note=f"not imported after {STARTING:g} s")
        ours.recv()
        if not ours.poll(time_limit):
            return Outcome(case, False, "hung", seconds=time_limit, note=f"no answer after {time_limit:g} s")
        return ours.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        return Outcome(case, False, "crashed", note=signal.Signals(-code).name if code < 0 else f"exit {code}")
    finally:
        ours.close()
        process.kill()
        process.join()


def _processes(imports: Collection[str]) -> Any:
    """Where processes come from: forks of a server that has imported what is slow to; the first call decides what."""
    if os.name != "posix":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.conformance_cases", "tools.frechet", *imports])
    forkserver.ensure_running()
    return context


def _answer(pipe: Connection, judged: Implementation, case: str) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # LAPACK and clean-fid print
        os.dup2(silence, stream)
    for module in judged.imports:
        import_module(module)
    pipe.send("ready")
    pipe.send(answer(judged, case))


def answer(judged: Implementation, case: str) -> Outcome:
    """One case in this process, which may hang or end it."""
    problem, begin = CASES[case](), time.perf_counter()
    try:
        if problem.features is not None and judged.features is not None:
            result = judged.features(*problem.features)
        elif judged.moments is not None:
            result = judged.moments(*problem.given_moments())
        else:
            return Outcome(case, None, "not asked")
        verdict, value, error = judge(problem, result)
    except Exception as refusal:
        note = f"{type(refusal).__name__}: {' '.join(str(refusal).split())}"
        verdict = "refused" if problem.truth is None else "raised"
        return Outcome(case, verdict == "refused", verdict, seconds=time.perf_counter() - begin, note=note)
    return Outcome(case, verdict == "ok", verdict, value, error, time.perf_counter() - begin)


def _ours_of_features(x: Array, y: Array) -> float:
    sets = []
    for rows in (x, y):
        sets.append(FeatureStatistics(rows.shape[1]))
        sets[-1].update(rows)
    return frechet_distance(*sets).value


def _ours_of_moments(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    return frechet_distance(FeatureStatistics.of_moments(mu1, sigma1), FeatureStatistics.of_moments(mu2, sigma2)).value


def _clean_fid(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> Any:
    from cleanfid.fid import frechet_distance as theirs

    return theirs(mu1, sigma1, mu2, sigma2)


def _torchmetrics_of_features(x: Array, y: Array) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = torch.nn.Identity()
    features.num_features = torch.tensor(x.shape[1])
    metric = FrechetInceptionDistance(feature=features)
    metric.update(_tensor(x), real=True)
    metric.update(_tensor(y), real=False)
    return float(metric.compute())


def _torchmetrics_of_moments(*moments: Array) -> float:
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(*map(_tensor, moments)))


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


IMPLEMENTATIONS = {
    "ours": Implementation(_ours_of_features, _ours_of_moments),
    "clean-fid": Implementation(moments=_clean_fid, imports=("cleanfid.fid",)),
    "torchmetrics": Implementation(
        _torchmetrics_of_features, _torchmetrics_of_moments, imports=("torchmetrics.image.fid",)
    ),
}


def conformance_table(outcomes: dict[str, list[Outcome]]) -> str:
    """Markdown: a row for every case, a column for every implementation, and how many passed."""
    lines = [f"| case | {' | '.join(outcomes)} |", "| --- |" + " --- |" * len(outcomes)]
    for row in zip(*outcomes.values(), strict=True):
        lines.append(f"| {row[0].case} | {' | '.join(map(_cell, row))} |")
    passed = [
        f"{sum(o.passed is True for o in c)} of {sum(o.passed is not None for o in c)}" for c in outcomes.values()
    ]
    return "\n".join([*lines, f"| passed | {' | '.join(passed)} |\n"])


def _cell(outcome: Outcome) -> str:
    text = outcome.verdict if outcome.passed is not False else f"**{outcome.verdict}**"
    if outcome.error is not None:
        text += f" ({outcome.error:.0e})"
    elif outcome.verdict in ("raised", "crashed"):
        text += f" ({outcome.note.partition(':')[0]})"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; exit status 1 when the first implementation fails a case, 2 for a name that does not exist."""
    parser = argparse.ArgumentParser(prog="tools.conformance", description=__doc__)
    names = ", ".join(IMPLEMENTATIONS)
    parser.add_argument("--against", nargs="+", default=["ours"], metavar="NAME", help=f"{names} or MODULE:FUNCTION")
    parser.add_argument("--case", nargs="+", metavar="CASE", help="only these (default: all)")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT, help="seconds a case (default %(default)s)")
    parser.add_argument("--notes", action="store_true", help="print what every failed case said, too")
    given = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    try:
        _processes([module for name in given.against for module in implementation_of(name).imports])
        outcomes = {name: check(name, given.case, given.time_limit) for name in given.against}
    except ValueError as error:
        parser.error(str(error))
    print(conformance_table(outcomes), flush=True)
    if given.notes:
        failed = [(name, o) for name, all_of_it in outcomes.items() for o in all_of_it if o.passed is False]
        print("\n".join(f"{name}, {o.case}: {o.verdict}, {o.value}, {o.note}" for name, o in failed))
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(any(o.passed is False for o in outcomes[given.against[0]]))


if __name__ == "__main__":
    main()
