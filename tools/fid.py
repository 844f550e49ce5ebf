"""The `distill-fid` command: batches of evaluations, and what is made of their results.

Nothing heavy is imported before the arguments are known to be good, so `--help` and mistakes answer at once.
"""

import argparse
import math
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distill.progress import is_first
from tools.manifest import DEFAULT_METRICS, METRIC_NAMES, manifest_of, read_manifest
from tools.presets import PRESET_NAMES

if TYPE_CHECKING:
    from tools.results import Result

DIGITS = ("digits=relative-fd,precision,recall,class-entropy,class-accuracy", "pixels=fd")  # what `score` asks for

_DESCRIPTION = """Judge samples: distances with their errors, as batches of jobs that survive anything.

  distill-fid score teacher=runs/a student=runs/b            one table, now
  distill-fid batch manifest.yaml --workers 3                all points of a matrix, resumable, by any number of workers
  distill-fid report runs/eval --csv all.csv --plots plots   tables and pictures of what is there
  distill-fid compare A.json B.json                          a paired difference with its interval
  distill-fid verify RESULT.json                             whether a result still is what its inputs give
  distill-fid stats IMAGES --features inception-clean --out reference.npz
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage as well."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for what the user can put right."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
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
        print(f"distill-fid: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="distill-fid", description=_DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(_COMMANDS))

    stats = commands.add_parser("stats", help="mean and covariance of features, as clean-fid's .npz")
    stats.add_argument("source", metavar="SOURCE", help="images: a folder, zip, npz, safetensors, or 'digits'")
    stats.add_argument("--features", default="digits", help=f"extractor: {', '.join(PRESET_NAMES)} (default: digits)")
    stats.add_argument("--out", type=Path, required=True, help=".npz file to write")

    score = commands.add_parser("score", help="one table row for each source, over several draws")
    add = score.add_argument
    add("sources", nargs="+", metavar="[NAME=]SOURCE", help="run folder, diffusers pipeline folder, student, folder or "
        "archive of images, or 'digits' (the training half: the floor)")  # fmt: skip
    add("--reference", default="digits", help="images, or statistics (.npz); 'digits' is the held-out half (default)")
    add("--features", nargs="+", default=DIGITS, metavar="NAME[=METRIC,...]", help="extractors with their metrics "
        f"(default: {' '.join(DIGITS)})")  # fmt: skip
    add("--metrics", nargs="+", default=DEFAULT_METRICS, metavar="METRIC", help="of extractors without their own: "
        f"{', '.join(METRIC_NAMES)}, vendi@ORDER (default: {' '.join(DEFAULT_METRICS)})")  # fmt: skip
    add("--n", type=_whole(4), default=2000, help="samples in a draw (default: 2000)")
    add("--draws", type=_whole(1), default=3, help="independent draws of each source (default: 3)")
    add("--seed", type=_whole(0, 2**32 - 1), default=0, help="draw j uses seed + j (default: 0)")
    add("--steps", type=_whole(1), default=18, help="sampling steps of a diffusion model (default: 18)")
    add("--sampler", default="heun", help="how a diffusion model is sampled (default: heun)")
    add("--guidance", type=_finite, default=1.0, help="classifier-free guidance scale; 1 is none (default: 1)")
    add("--teleport", metavar="FILE", help="a Gaussian (distill gaussian) to skip the noisy steps with")
    add("--prompts", metavar="FILE", help="prompts of text-to-image pipelines, one a line")
    add("--batch", type=_whole(1), default=500, help="samples that a network sees at once (default: 500)")
    add("--device", help="torch device (default: a CUDA device where there is one)")
    add("--out", type=Path, metavar="FOLDER", help="folder that keeps features and results (default: nothing is kept)")

    batch = commands.add_parser("batch", help="all jobs of a manifest; the same command continues a killed one")
    add = batch.add_argument
    add("manifest", type=Path, metavar="MANIFEST", help="YAML: reference, features, matrix (README.md)")
    add("--out", type=Path, metavar="FOLDER", help="folder of the batch (default: runs/NAME of the manifest)")
    add("--workers", type=_whole(1), default=1, help="processes of this machine (default: 1)")
    add(
        "--shard", type=_shard, default=(1, 1), metavar="i/n", help="only the jobs i, i + n, ..., from 1 (Slurm arrays)"
    )
    add("--submitit", metavar="KEY=VALUE,...", help="workers as jobs of a cluster, with submitit's parameters "
        "(cluster=slurm,timeout_min=60,slurm_partition=gpu)")  # fmt: skip
    add("--device", help="torch device (default: this process's CUDA device where there is one)")

    report = commands.add_parser("report", help="Markdown of results, CSV and pictures on request")
    add = report.add_argument
    add("results", nargs="+", type=Path, metavar="RESULT", help="result files, folders of batches")
    add("--list", action="store_true", help="which file is which point")
    add("--csv", type=Path, metavar="FILE", help="every number with its error, one a line")
    add("--markdown", type=Path, metavar="FILE", help="the table that is printed")
    add("--plots", type=Path, metavar="FOLDER", help="pictures of each metric against the evaluations")

    verify = commands.add_parser("verify", help="recompute a result's keys and values; exit code 1 if one differs")
    verify.add_argument("result", type=Path, metavar="RESULT.json")
    verify.add_argument("--recompute", action="store_true", help="from the inputs, not from the features kept")
    verify.add_argument("--device", help="torch device (default: a CUDA device where there is one)")

    compare = commands.add_parser("compare", help="the difference B - A with its interval, paired where it can be")
    compare.add_argument("a", type=Path, metavar="A.json")
    compare.add_argument("b", type=Path, metavar="B.json")
    return parser


def _whole(least: int, most: int = 2**31 - 1) -> Any:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _shard(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 1 <= i <= n")
    return int(number), int(of)


def _stats(arguments: argparse.Namespace, _: str) -> None:
    if arguments.out.suffix != ".npz":
        raise ValueError(f"out: {arguments.out} is no .npz, by which statistics are known")
    _make_room(arguments.out)
    from tools.features import load_extractor
    from tools.sources import open_source
    from tools.statistics import FeatureStatistics

    source = open_source("digits:held-out" if arguments.source == "digits" else arguments.source)
    if source.count is None:
        raise ValueError(f"source: {arguments.source} makes images; accepted are images that exist")
    extractor = load_extractor(arguments.features, source.shape)
    statistics = FeatureStatistics(extractor.dim, extractor.name)
    for start in range(0, source.count, 500):
        samples = source.read(0, range(start, min(start + 500, source.count)))
        statistics.update(extractor(samples.images).features)
    statistics.save(arguments.out)
    print(f"{statistics.count} images, {extractor.name}: {arguments.out}")


def _score(arguments: argparse.Namespace, command: str) -> None:
    features = {}
    for asked in arguments.features:
        name, equals, metrics = asked.partition("=")
        features[name] = tuple(metrics.split(",")) if equals else tuple(arguments.metrics)
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
    from tools.report import markdown_table
    from tools.workers import run_batch

    _can_be_folder(arguments.out)
    with tempfile.TemporaryDirectory() as spare:
        folder, device = arguments.out or Path(spare), _device(arguments.device)
        print(markdown_table(run_batch(manifest, folder, device=device, command=command)), end="")


def _batch(arguments: argparse.Namespace, command: str) -> None:
    manifest = read_manifest(arguments.manifest)
    _can_be_folder(arguments.out)
    folder = arguments.out or Path("runs") / arguments.manifest.stem
    from tools.workers import run_batch

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
