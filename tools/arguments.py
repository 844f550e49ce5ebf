"""What `distill-fid` can be told: its commands and their options; nothing heavy is imported to answer --help."""

import argparse
import math
from pathlib import Path
from typing import Any, NoReturn

from tools.manifest import DEFAULT_METRICS, METRIC_NAMES
from tools.presets import PRESET_NAMES

COMMANDS = ("score", "batch", "watch", "report", "compare", "verify", "stats")
DIGITS = ("digits=relative-fd,precision,recall,class-entropy,class-accuracy", "pixels=fd")  # what `score` asks for

_DESCRIPTION = """Judge samples: distances with their errors, as batches of jobs that survive anything.

  distill-fid score teacher=runs/a student=runs/b            one table, now
  distill-fid batch manifest.yaml --workers 3                all points of a matrix, resumable, by any number of workers
  distill-fid watch runs/a --manifest manifest.yaml          the snapshots of a run as they appear, until it ends
  distill-fid report runs/eval --csv all.csv --plots plots   tables and pictures of what is there
  distill-fid compare A.json B.json                          a paired difference with its interval
  distill-fid verify RESULT.json                             whether a result still is what its inputs give
  distill-fid stats IMAGES --features inception-clean --out reference.npz
"""

_WORKERS = "processes of this machine; on a CPU each computes in one thread, so take one a core (default: 1)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage as well."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; its mistakes are one line and exit code 2."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = _Parser(prog="distill-fid", description=_DESCRIPTION, formatter_class=raw)
    commands = whole.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))

    stats = commands.add_parser("stats", help="mean and covariance of features, as clean-fid's .npz")
    stats.add_argument("source", metavar="SOURCE", help="images: a folder, zip, npz, safetensors, or 'digits'")
    stats.add_argument("--features", default="digits", help=f"extractor: {', '.join(PRESET_NAMES)} (default: digits)")
    stats.add_argument("--out", type=Path, required=True, help=".npz file to write")
    kept = "folder of a batch, whose chunks are shared; a killed run goes on (default: nothing is kept)"
    stats.add_argument("--cache", type=Path, metavar="FOLDER", help=kept)
    stats.add_argument(
        "--chunk", type=_whole(1), default=500, help="images kept at once, as the batch's (default: 500)"
    )
    stats.add_argument("--batch", type=_whole(1), default=100, help="images a network sees at once (default: 100)")
    stats.add_argument("--device", help="torch device (default: a CUDA device where there is one)")

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
    add("--workers", type=_whole(1), default=1, help=_WORKERS)
    add("--device", help="torch device (default: a CUDA device where there is one)")
    add("--out", type=Path, metavar="FOLDER", help="folder that keeps features and results (default: nothing is kept)")

    batch = commands.add_parser("batch", help="all jobs of a manifest; the same command continues a killed one")
    add = batch.add_argument
    add("manifest", type=Path, metavar="MANIFEST", help="YAML: reference, features, matrix (README.md)")
    add("--out", type=Path, metavar="FOLDER", help="folder of the batch (default: runs/NAME of the manifest)")
    add("--workers", type=_whole(1), default=1, help=_WORKERS)
    add(
        "--shard", type=_shard, default=(1, 1), metavar="i/n", help="only the jobs i, i + n, ..., from 1 (Slurm arrays)"
    )
    add("--submitit", metavar="KEY=VALUE,...", help="workers as jobs of a cluster, with submitit's parameters "
        "(cluster=slurm,timeout_min=60,slurm_partition=gpu)")  # fmt: skip
    add("--device", help="torch device (default: this process's CUDA device where there is one)")

    watch = commands.add_parser("watch", help="judge a run's snapshots (logging.keep_every) as they appear")
    add = watch.add_argument
    add("run", type=Path, metavar="RUN", help="run folder of distill train; results go to RUN/evaluation.jsonl")
    add("--manifest", type=Path, metavar="FILE", help="as of batch; its sources are the snapshots, whatever it names")
    add("--reference", help="without a manifest: images, or statistics (.npz) (default: digits)")
    add("--features", nargs="+", metavar="NAME[=METRIC,...]", help="without a manifest: as of score")
    add("--n", type=_whole(4), help="without a manifest: samples of a snapshot (default: 2000)")
    add("--prompts", metavar="FILE", help="without a manifest: prompts of text-to-image students")
    add("--once", action="store_true", help="judge what is there, and end")
    add("--every", type=_finite, default=30.0, metavar="SECONDS", help="between looks (default: 30)")
    add("--workers", type=_whole(1), default=1, help=_WORKERS)
    add("--device", help="torch device (default: a CUDA device where there is one)")

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
    return whole


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
