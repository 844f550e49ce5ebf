"""The `distill` command: reads a configuration and overrides, calls a function, and reports errors in one line.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import argparse
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from pydantic import ValidationError

from distill.config import COMMANDS, Encode, FitGaussian, Train
from distill.progress import Progress, is_first
from distill.sections import SolverName, TargetName

_DESCRIPTION = """One-step students of diffusion models.

  distill teach  --config configs/digits-teacher.yaml       train a small teacher
  distill train  --config configs/digits-reverse-kl.yaml    distil it into a one-step student
  distill degrade --config configs/digits-disback.yaml      record a path for DisBack (train does it if it is missing)
  distill sample RUN_OR_PIPELINE --out grid.png             look at samples
  distill export RUN FOLDER                                 write the student as a diffusers pipeline
  distill gaussian --data.name digits --out stats.safetensors    fit a Gaussian to data, to teleport with
  distill encode --pipeline FOLDER --prompts words.txt --out FOLDER    keep latents and embeddings, to train with

Every key of a configuration can be set on the command line: --optimizer.lr 1e-3.
"""


_DEGRADE = "Record how the teacher degrades to the first student, for `distill train` to walk back (DisBack)."


def main() -> None:
    """The entry point: exit code 0, or 2 after a one-line message."""
    command = None
    try:
        command, arguments = _parse(sys.argv[1:])
        _COMMANDS[command](arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("interrupted" + ("; continue with --resume" if command in COMMANDS else ""), 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DISTILL_TRACEBACK"):
            raise
        _fail(explain(error))
    except RuntimeError as error:
        if os.environ.get("DISTILL_TRACEBACK") or (message := _of_the_machine(error)) is None:
            raise
        _fail(message)
    finally:
        shared = sys.modules.get("distill.together")
        was_shared = shared is not None and shared.leave_group()
    if was_shared:
        # Gloo's threads outlive the group, which networks hold on to. One that lets go of a tensor while the
        # interpreter ends would abort a process that has done its work; multiprocessing ends its own in this way too.
        sys.stderr.flush()
        os._exit(0)


def explain(error: Exception) -> str:
    """An exception as one line: what, which value, what is accepted."""
    if isinstance(error, ValidationError):
        first, more = error.errors()[0], error.error_count() - 1
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] in ("value_error", "missing") else f" (got {first['input']!r})"
        return f"{key + ': ' if key else ''}{message}{value}{f'; and {more} more' if more else ''}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    return " ".join(str(error).split())


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description."""


class _Parser(ArgumentParser):
    """A parser whose errors are one line and name the nearest known key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        _fail(_one_line(str(ex or message), [action.dest for action in parser._actions]))


def _one_line(message: str, known: list[str]) -> str:
    """A message of jsonargparse, which has several lines, as one: the key, what is accepted, the value."""
    text = " ".join(message.split())
    union = (
        r"Does not validate against any of the Union subtypes.*? Errors: - (.*?)(?:\. Got value: \S+)?(?: \[type=.*?)?"
        r" - Expected a <class 'NoneType'>.* Given value: (.*)$"
    )
    text = re.sub(union, r"\1, or null. Got value: \2", text)
    text = re.sub(r"\[type=.*?For further information visit \S+?\.(?= |$)", "", text)
    text = re.sub(r"\d+ validation errors? for \S+ ", "", text).replace("typing.", "")
    text = re.sub(r'^.*?Parser key "([^"]+)":', r"\1:", text)
    unknown = re.search(r"option '([^']+)'|unrecognized arguments: (?:--)?(\S+)", text, re.IGNORECASE)
    if not unknown:
        return re.sub(r"\.?\s*\.? Got value", ". Got value", text)
    key = (unknown[1] or unknown[2]).partition("=")[0]
    near = difflib.get_close_matches(key, known, n=1)
    return f"{key}: unknown key" + (f"; the nearest known one is {near[0]}" if near else "")


def _of_the_machine(error: RuntimeError) -> str | None:
    """What to say of an error that is none of this library's: of too little memory, or of a launch that fell apart."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        why = " ".join(str(error).split()).partition(". ")[0]
        return f"{why}; memory.accumulation and memory.checkpointing need less, --dry-run tells how much"
    shared = sys.modules.get("distill.together")
    if shared is not None and shared.left_alone(error):
        return f"another process of the launch ended before this one ({' '.join(str(error).split())[:120]})"
    return None


def _fail(message: str, code: int = 2) -> NoReturn:
    """Tells what went wrong, in a launch once, and ends this process."""
    shared = sys.modules.get("distill.together")
    if is_first() if shared is None else shared.said_once(message):
        where = "" if is_first() else f"process {os.environ['RANK']}: "
        print(f"distill: error: {where}{message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _parse(arguments: list[str]) -> tuple[str, Namespace]:
    parser = _Parser(prog="distill", description=_DESCRIPTION, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=version("distill-diffusion"))
    commands = parser.add_subcommands(dest="subcommand", metavar="COMMAND")
    for name, schema in COMMANDS.items():
        sub = _Parser(description=_DEGRADE if name == "degrade" else schema.__doc__, allow_abbrev=False)
        sub.add_argument("--config", action="config", help="a YAML file; options after it override its keys")
        sub.add_argument("--resume", action="store_true", help="continue the run from its last checkpoint")
        if name == "train":
            sub.add_argument("--dry-run", action="store_true", help="say what the run would do, and stop")
            hardware = "for --dry-run: where else it might run, as 8xH100,bf16,fsdp (default: this launch)"
            sub.add_argument("--hardware", type=str, help=hardware)
        sub.add_class_arguments(schema, as_group=False)
        commands.add_subcommand(name, sub, help=sub.description)
    commands.add_subcommand("sample", _sample_parser(), help="Write a grid of samples of a run or a pipeline.")
    commands.add_subcommand("export", _export_parser(), help="Write a student as a diffusers pipeline folder.")
    commands.add_subcommand("gaussian", _schema_parser(FitGaussian), help="Fit a Gaussian to images, to teleport with.")
    commands.add_subcommand("encode", _schema_parser(Encode), help="Keep latents and embeddings, to train with.")
    _check_file(arguments)
    parsed = parser.parse_args(arguments)
    return parsed.subcommand, parsed[parsed.subcommand]


def _check_file(arguments: list[str]) -> None:
    """Says what is wrong with a configuration file as a whole, before its keys are looked at."""
    for option, value in pairwise([*arguments, ""]):
        name, _, joined = option.partition("=")
        if name != "--config":
            continue
        file = Path(joined or value)
        if not file.is_file():
            raise ValueError(f"--config: {file}: there is no such file")
        try:
            content = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config: {file}: is not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict):
            raise ValueError(f"--config: {file}: holds no keys")
        named = content.get("command")
        if named == "degrade":
            raise ValueError(f"--config: {file}: is the record of a path; `distill degrade` takes that of its run")
        known = (*COMMANDS, "gaussian", "encode")
        if isinstance(named, str) and named in known and named != arguments[0] and arguments[0] in known:
            if (arguments[0], named) == ("degrade", "train"):
                continue
            raise ValueError(f"--config: {file}: is for `distill {named}`, not for `distill {arguments[0]}`")


def _sample_parser() -> ArgumentParser:
    parser = _Parser(
        description="Write a grid of samples of runs of this library or pipeline folders of diffusers.",
        allow_abbrev=False,
    )
    parser.add_argument("sources", type=str, nargs="+", metavar="[NAME=]FOLDER", help="several are drawn side by side")
    parser.add_argument("--out", type=str, default="grid.png", help="the PNG to write")
    parser.add_argument("--n", type=int, default=80, help="how many samples, ten to a row")
    parser.add_argument("--seed", type=int, default=0, help="sample k depends on the seed and k only")
    parser.add_argument("--sampler", type=SolverName, help="for diffusion models (default heun)")
    parser.add_argument("--steps", type=int, help="of the sampler (default 18); a student has its own")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default 1: none)")
    parser.add_argument("--prompts", type=str, help="for models of words: a file of them (.txt, .csv, .jsonl)")
    parser.add_argument("--column", type=str, default="caption", help="of a .csv or .jsonl of prompts")
    parser.add_argument("--height", type=int, help="of a diffusion model's pictures, in pixels (default its own)")
    parser.add_argument("--width", type=int, help="as --height")
    parser.add_argument("--device", type=str, default="cpu", help="where the network runs")
    corrected = parser.add_argument_group("Feynman-Kac correctors: an exact target by weighted particles")
    corrected.add_argument("--target", type=TargetName, help="guided, annealed, product or reward")
    corrected.add_argument("--particles", type=int, help="of which each image is drawn (default 16)")
    corrected.add_argument("--beta", type=float, help="the power of annealed and product (default 1)")
    corrected.add_argument("--classes", type=int, nargs="+", help="whose laws a product multiplies: 3 8")
    corrected.add_argument("--reward", type=str, help="MODULE:FUNCTION of images and labels, in nats")
    corrected.add_argument("--scale", type=float, help="of the reward (default 1)")
    corrected.add_argument("--steer", action="store_true", help="by the reward's gradient too")
    return parser


def _export_parser() -> ArgumentParser:
    parser = _Parser(
        description="Write the student of a run as a diffusers pipeline folder with a model card.", allow_abbrev=False
    )
    parser.add_argument("run", type=str, help="the run folder of `distill train`")
    parser.add_argument("folder", type=str, help="the folder to write")
    parser.add_argument("--base", type=str, help="the teacher's pipeline, if it is not where the run found it")
    parser.add_argument("--lora", action="store_true", help="of a student with adapters: a stock LoRA file of them")
    return parser


def _schema_parser(schema: type[FitGaussian] | type[Encode]) -> ArgumentParser:
    parser = _Parser(description=inspect.getdoc(schema), formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file; options after it override its keys")
    parser.add_class_arguments(schema, as_group=False)
    return parser


def _experiment(command: str, arguments: Namespace) -> None:
    """`distill teach`, `distill degrade` and `distill train`."""
    values = arguments.as_dict()
    resume, dry_run = values.pop("resume"), values.pop("dry_run", False)
    hardware = values.pop("hardware", None)
    values.pop("config", None)
    if command == "degrade":
        _degrade(values, resume)
        return
    config = COMMANDS[values["command"]].model_validate(values)

    if dry_run:
        from distill.hardware import Hardware
        from distill.plan import plan

        for line in plan(config, Hardware.parse(hardware) if hardware else None):  # type: ignore[arg-type]
            _say(line)
        return

    if hardware is not None:
        raise ValueError(f"--hardware: {hardware}; only --dry-run has a use for it")
    if config.command == "train":
        from distill.plan import notices

        for line in notices(config):
            _say(line)
    from distill import experiment

    function = {"teach": experiment.teach, "train": experiment.train}[config.command]
    with Progress(config.steps) as progress:
        folder = function(config, resume, progress)  # type: ignore[operator]
    _say(f"{folder}")
    _say(f"pictures: {Path(config.run) / 'samples'} and {Path(config.run) / 'curves.png'}")


def _degrade(values: dict[str, object], resume: bool) -> None:
    config = Train.model_validate(values)
    if config.target.name == "fixed":
        raise ValueError(
            "target.name: fixed has no path to record; accepted are warm, nodes, weight-interpolation and "
            "score-interpolation"
        )
    from distill.disback import degrade

    path = degrade(config, resume)
    _say(f"{path.folder}: {len(path)} nodes, {sum(node.bytes for node in path.nodes):,} bytes ({path.storage})")
    for k, node in enumerate(path.nodes, start=1):
        _say(f"node {k}: {node.step} updates, mismatch to the last {node.mismatch:.3f}")


def _sample(arguments: Namespace) -> None:
    """`distill sample`."""
    from distill.sample import sample

    for line in sample(arguments):
        _say(line)


def _export(arguments: Namespace) -> None:
    """`distill export`."""
    from distill.export import export_lora, export_student

    if arguments.lora and arguments.base is not None:
        raise ValueError(f"--base: {arguments.base}; a LoRA file holds nothing of the teacher, accepted is one of both")
    if arguments.lora:
        written = export_lora(arguments.run, arguments.folder)
    else:
        written = f"a {export_student(arguments.run, arguments.folder, arguments.base)}"
    _say(f"{arguments.folder}: {written}; how to run it is in its README.md")


def _gaussian(arguments: Namespace) -> None:
    """`distill gaussian`."""
    values = arguments.as_dict()
    values.pop("config", None)
    config = FitGaussian.model_validate(values)

    from distill.gaussian import describe, fit_gaussian

    gaussian = fit_gaussian(config)
    if gaussian is not None:  # on the first process
        for line in (f"{config.out}:", *describe(gaussian, config.tolerance)):
            _say(line)


def _encode(arguments: Namespace) -> None:
    """`distill encode`."""
    values = arguments.as_dict()
    values.pop("config", None)
    config = Encode.model_validate(values)

    from distill.encode import encode

    encoded = encode(config)
    tensors = ", ".join(f"{name} {shape}" for name, shape in encoded.facts["tensors"].items())
    size = sum(entry["bytes"] for entry in encoded.facts["files"].values())
    _say(f"{config.out}: {len(encoded)} rows of {tensors}; {len(encoded.facts['files'])} files, {size:,} bytes")


def _say(line: str) -> None:
    if is_first():
        print(line)


_COMMANDS: dict[str, Callable[[Namespace], None]] = {name: partial(_experiment, name) for name in COMMANDS} | {
    "sample": _sample,
    "export": _export,
    "gaussian": _gaussian,
    "encode": _encode,
}

if __name__ == "__main__":
    main()
