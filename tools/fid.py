"""The `distill-fid` command: batches of evaluations, and what is made of their results.

Nothing heavy is imported before the arguments are known to be good, so `--help` and mistakes answer at once.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.cli import explain
from distill.progress import is_first
from tools.arguments import DIGITS, parser
from tools.manifest import DEFAULT_METRICS, Manifest, manifest_of, read_content, read_manifest

if TYPE_CHECKING:
    from tools.results import Result


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for what the user can put right."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(argv)
    try:
        return int(_COMMANDS[arguments.command](arguments, shlex.join(["distill-fid", *argv])) or 0)
    except KeyboardInterrupt:
        print("distill-fid: interrupted; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("DISTILL_TRACEBACK"):
            raise
        print(f"distill-fid: error: {explain(error)}", file=sys.stderr)
        return 2


def _stats(arguments: argparse.Namespace, _: str) -> None:
    if arguments.out.suffix != ".npz":
        raise ValueError(f"out: {arguments.out} is no .npz, by which statistics are known")
    _make_room(arguments.out)
    from tools.processes import own_device
    from tools.references import reference_statistics
    from tools.workers import say_line

    with tempfile.TemporaryDirectory() as spare:
        folder, device = arguments.cache or spare, _device(arguments.device) or own_device()
        sizes = arguments.chunk, arguments.batch
        statistics = reference_statistics(arguments.source, arguments.features, folder, device, *sizes, say_line)
        statistics.save(arguments.out)
    print(f"{statistics.count} images, {statistics.extractor}: {arguments.out}")


def _score(arguments: argparse.Namespace, command: str) -> None:
    features = _features(arguments.features, arguments.metrics)
    manifest = manifest_of(
        {
            "reference": arguments.reference,
            "features": features,
            "n": arguments.n,
            "seed": arguments.seed,
            "chunk": arguments.batch,
            "batch": arguments.batch,
            "matrix": {
                "source": _named(arguments.sources),
                "sampler": arguments.sampler,
                "steps": arguments.steps,
                "guidance": arguments.guidance,
                "teleport": arguments.teleport,
                "prompts": arguments.prompts,
                "draw": list(range(arguments.draws)),
            },
        },
        "score",
    )
    from tools.processes import run_batch
    from tools.report import markdown_table

    _can_be_folder(arguments.out)
    with tempfile.TemporaryDirectory() as spare:
        folder, device = arguments.out or Path(spare), _device(arguments.device)
        results = run_batch(manifest, folder, workers=arguments.workers, device=device, command=command)
        print(markdown_table(results), end="")


def _features(asked: Sequence[str], default: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """NAME=METRIC,... or NAME -> {name: metrics}."""
    features = {}
    for one in asked:
        name, equals, metrics = one.partition("=")
        features[name] = tuple(metrics.split(",")) if equals else tuple(default)
    return features


def _watch(arguments: argparse.Namespace, command: str) -> None:
    given = {name: getattr(arguments, name) for name in ("reference", "features", "n", "prompts")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.every <= 0:
        raise ValueError(f"every: {arguments.every}; accepted are positive seconds")
    if arguments.manifest is not None:
        if given:
            raise ValueError(f"{next(iter(given))}: {next(iter(given.values()))!r} and a manifest; accepted is one")
        content = read_content(arguments.manifest)
    else:
        features = _features(given.get("features", DIGITS), DEFAULT_METRICS)
        content = {"reference": given.get("reference", "digits"), "features": features, "n": given.get("n", 2000)}
        content["matrix"] = {"prompts": given.get("prompts")}
    from tools.processes import run_batch
    from tools.watch import watch

    def judge(manifest: Manifest, folder: Path) -> list[Path]:
        options: dict[str, Any] = {"workers": arguments.workers, "device": _device(arguments.device)}
        results = run_batch(manifest, folder, command=command, **options)
        return [folder / "results" / f"{result.key}.json" for result in results]

    watch(arguments.run, content, judge, once=arguments.once, every=arguments.every)


def _batch(arguments: argparse.Namespace, command: str) -> None:
    manifest = read_manifest(arguments.manifest)
    _can_be_folder(arguments.out)
    folder = arguments.out or Path("runs") / arguments.manifest.stem
    from tools.processes import run_batch

    options = {"workers": arguments.workers, "shard": arguments.shard, "command": command}
    executor = None if arguments.submitit is None else _submitit(arguments.submitit, folder)
    results = run_batch(manifest, folder, executor=executor, device=_device(arguments.device), **options)
    if is_first():  # of the processes of a launch
        _print_report(results)


def _submitit(parameters: str, folder: Path) -> Any:
    """An executor of submitit. Raises ValueError where it is not installed, and for parameters it does not know."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError("--submitit: needs submitit (pip install 'distill-diffusion[submitit]')") from error
    given = dict(pair.partition("=")[::2] for pair in parameters.split(",") if pair)
    numbers = {name: int(value) if value.isdigit() else value for name, value in given.items()}
    try:
        executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=numbers.pop("cluster", None))
        executor.update_parameters(**numbers)
    except Exception as error:
        raise ValueError(f"--submitit: {parameters}: {error}") from error
    return executor


def _report(arguments: argparse.Namespace, _: str) -> None:
    for file in (arguments.csv, arguments.markdown):
        if file is not None:
            _make_room(file)
    _can_be_folder(arguments.plots)
    from samplers.atomic import atomic_write
    from tools.report import csv_table, markdown_table, plot_quality
    from tools.results import read_results

    results = read_results(arguments.results)
    for result in results if arguments.list else ():
        print(f"{result.key}.json: {result.title}")
    _print_report(results)
    texts = ((arguments.csv, csv_table), (arguments.markdown, markdown_table))
    for file, table in texts:
        if file is not None:
            with atomic_write(file) as opened:
                opened.write(table(results).encode())
    if arguments.plots is not None:
        pictures = plot_quality(results, arguments.plots)
        for picture in pictures:
            print(picture)
        if not pictures:
            print("plots: none, no source has two numbers of evaluations", file=sys.stderr)


def _print_report(results: "list[Result]") -> None:
    from tools.report import markdown_table

    print(markdown_table(results), end="")


def _verify(arguments: argparse.Namespace, _: str) -> int:
    from tools.verification import verify

    outcomes = []
    for good, said in verify(arguments.result, _device(arguments.device), arguments.recompute):
        print(said if good else f"NOT VERIFIED: {said}", flush=True)
        outcomes.append(good)
    return 0 if all(outcomes) else 1


def _compare(arguments: argparse.Namespace, _: str) -> None:
    from tools.report import difference_table
    from tools.results import Result, compare

    a, b = Result.load(arguments.a), Result.load(arguments.b)
    print(difference_table(compare(a, b), a.title, b.title), end="")


_COMMANDS = {
    "score": _score,
    "batch": _batch,
    "watch": _watch,
    "report": _report,
    "compare": _compare,
    "verify": _verify,
    "stats": _stats,
}


def _device(name: str | None) -> str | None:
    if name is not None:
        from distill.generate import usable_device

        usable_device(name)
    return name


def _named(sources: list[str]) -> dict[str, str]:
    """NAME=PATH or PATH -> {name: path}; a path that exists as written has no name in it."""
    named: dict[str, str] = {}
    for source in sources:
        name, equals, path = source.partition("=")
        if not equals or Path(source).exists():
            name, path = Path(source).resolve().name, source
        if not name or not path:
            raise ValueError(f"source: {source!r} is not NAME=PATH")
        if name in named:
            raise ValueError(f"source: two are called {name!r}; write NAME=PATH to tell them apart")
        named[name] = path
    return named


def _can_be_folder(out: Path | None) -> None:
    """Raises ValueError when `out` is a file."""
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, not a folder to write into")


def _make_room(out: Path) -> None:
    """Make the folder of `out` now, not after minutes of work. Raises ValueError when `out` is a folder."""
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder, not a file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"out: cannot write into {out.parent}")


if __name__ == "__main__":
    sys.exit(main())
