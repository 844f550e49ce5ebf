"""The `distill-fid` command: statistics of a folder, and a table of scores for folders, runs and pipelines.

Nothing heavy is imported before the arguments are known to be good, so `--help` and mistakes answer at once.
"""

import argparse
import math
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

    from tools.report import Entry
    from tools.scores import Reference
    from tools.sources import Source

EXTRACTOR_NAMES = ("digits", "pixels")  # of tools.features.EXTRACTORS, which needs torch
FEWEST = 4  # images: precision and recall look at the third neighbour


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage as well."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2, and one line on stderr, for what the user can put right."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "stats":
            return _stats(arguments)
        return _score(arguments, shlex.join(["distill-fid", *argv]))
    except (ValueError, OSError) as error:
        print(f"distill-fid: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="distill-fid", description="Judge samples: Fréchet distances, precision, recall, classes.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="stats | score")

    stats = commands.add_parser("stats", help="mean and covariance of a folder's features, as clean-fid's .npz")
    stats.add_argument("source", metavar="FOLDER", help="folder of images, or 'digits' (the embedded held-out half)")
    stats.add_argument("--features", choices=EXTRACTOR_NAMES, default="digits", help="extractor (default: digits)")
    stats.add_argument("--out", type=Path, required=True, help=".npz file to write")

    score = commands.add_parser("score", help="one table row for each source, over several draws")
    add = score.add_argument
    add("sources", nargs="+", metavar="[NAME=]SOURCE", help="run folder, diffusers pipeline folder, folder of "
        "images, or 'digits' (the training half: the floor)")  # fmt: skip
    add("--reference", default="digits", help="folder of images, or 'digits', the held-out half (default: digits)")
    add("--features", choices=EXTRACTOR_NAMES, default="digits", help="extractor of FD, precision and recall")
    add("--n", type=_whole(FEWEST), default=2000, help="samples in a draw (default: 2000)")
    add("--draws", type=_whole(1), default=3, help="independent draws of each source (default: 3)")
    add("--seed", type=_whole(0, 2**32 - 1), default=0, help="draw j uses seed + j (default: 0)")
    add("--steps", type=_whole(1), default=18, help="sampling steps of a teacher (default: 18)")
    add("--sampler", default="heun", help="how a teacher is sampled (default: heun)")
    add("--guidance", type=_finite, default=1.0, help="classifier-free guidance scale; 1 is none (default: 1)")
    add("--device", default="cpu", help="torch device that samples (default: cpu)")
    add("--out", type=Path, help="JSON file to write besides the table")
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


def _stats(arguments: argparse.Namespace) -> int:
    _existing(arguments.source)
    _make_room(arguments.out)
    from tools.features import EXTRACTORS
    from tools.scores import BATCH
    from tools.statistics import FeatureStatistics

    images = _reference_images(arguments.source)
    channels, height, width = images.shape[1:]
    extractor = EXTRACTORS[arguments.features]((channels, height, width))
    statistics = FeatureStatistics(extractor.dim)
    for batch in images.split(BATCH):
        statistics.update(extractor(batch))
    statistics.save(arguments.out)
    print(f"{statistics.count} images, {extractor.name}: {arguments.out}")
    return 0


def _score(arguments: argparse.Namespace, command: str) -> int:
    named = _named(arguments.sources)
    for path in (arguments.reference, *named.values()):
        _existing(path)
    if arguments.out is not None:
        _make_room(arguments.out)
    from tools.report import markdown_table, write_json
    from tools.scores import Reference

    _known_device(arguments.device)
    reference = Reference.of(_reference_images(arguments.reference), arguments.features)
    sources = {name: _source(path, arguments) for name, path in named.items()}  # all errors come before the work
    entries = [_entry(name, named[name], source, reference, arguments) for name, source in sources.items()]

    print(markdown_table(entries))
    print(
        f"FD: 100 x Fréchet distance / trace of the reference's covariance ({reference.features.name}); "
        f"pixel FD: {reference.pixels.name}, pixels in [-1, 1]; precision and recall: third neighbours; "
        f"reference: {arguments.reference}, {len(reference.rows)} images; mean ± standard deviation over draws."
    )
    if arguments.out is not None:
        asked = ("n", "draws", "seed", "steps", "sampler", "guidance", "device")
        settings = {key: getattr(arguments, key) for key in asked} | {
            "command": command,
            "reference": arguments.reference,
            "reference_images": len(reference.rows),
            "features": reference.features.name,
            "pixels": reference.pixels.name,
            "versions": {name: version(name) for name in ("distill-diffusion", "torch", "numpy", "scipy")}
            | {"python": platform.python_version()},
        }
        write_json(arguments.out, entries, settings)
    return 0


def _known_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second is torch's word for "built without CUDA"
        raise ValueError(f"device: {device!r} is not one of this machine ({str(error).splitlines()[0]})") from error


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


def _existing(path: str) -> None:
    if path != "digits" and not Path(path).is_dir():
        raise ValueError(f"source: {path!r} is not a folder, nor 'digits'")


def _reference_images(path: str) -> "Tensor":
    from distill.data import digits
    from tools.sources import image_folder

    return digits("held-out").images if path == "digits" else image_folder(path).images


def _source(path: str, arguments: argparse.Namespace) -> "Source":
    from distill.data import digits
    from tools.sources import Fixed, Generated, image_folder, is_generator

    if path == "digits":
        half = digits("train")
        return Fixed(half.images, half.labels)
    if not is_generator(path):
        return Fixed(image_folder(path).images)
    from distill.generate import load_generator

    generator = load_generator(
        path,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=arguments.guidance,
        device=arguments.device,
    )
    return Generated(generator)


def _entry(name: str, path: str, source: "Source", reference: "Reference", arguments: argparse.Namespace) -> "Entry":
    from tqdm import tqdm

    from tools.report import Entry
    from tools.scores import score

    total = arguments.n * arguments.draws
    scores, speeds = [], []
    with tqdm(total=total, desc=name, unit="img", disable=not sys.stderr.isatty(), leave=False) as bar:
        draws = source.draws(arguments.n, arguments.draws, arguments.seed, bar.update)
        for number, draw in enumerate(draws, 1):
            row = score(draw.images, reference, draw.labels)
            scores.append(row)
            took = ""
            if draw.seconds is not None:
                speeds.append(row.n / draw.seconds)
                took = f" in {draw.seconds:.1f} s"
            bar.write(f"{name}: draw {number}: {row.n} images{took}, FD {row.fd:.2f}", file=sys.stderr)
    n = scores[0].n
    if n * len(scores) < total:
        print(f"{name}: has images for {len(scores)} x {n}, not {arguments.draws} x {arguments.n}", file=sys.stderr)
    return Entry(name, path, tuple(scores), source.nfe, tuple(speeds))


def _make_room(out: Path) -> None:
    """Make the folder of `out` now, not after minutes of work. Raises ValueError when `out` is a folder."""
    if out.is_dir():
        raise ValueError(f"out: {out} is a folder, not a file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"out: cannot write into {out.parent}")


if __name__ == "__main__":
    sys.exit(main())
