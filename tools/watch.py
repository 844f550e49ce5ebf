"""The snapshots of a run, judged as they appear: a job of its own beside the training, which need not wait for it.

`distill train` with `logging.keep_every` leaves RUN/snapshots/step-00001000/ ...; here each becomes a source of a batch
in RUN/evaluation, whose results are lines of RUN/evaluation.jsonl, and a curve in RUN/evaluation.png. What is judged
already is not judged again, unless it is another one now, so that the same command continues.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill import checkpoint
from distill.run import read_record
from samplers.atomic import atomic_write
from tools.digest import digest_json
from tools.manifest import Manifest, manifest_of

RESULTS, FOLDER, CURVE = "evaluation.jsonl", "evaluation", "evaluation.png"

Line = dict[str, Any]
Judge = Callable[[Manifest, Path], list[Path]]  # (manifest, folder) -> files of results


def watch(
    run: Path,
    content: Mapping[str, Any],
    judge: Judge,
    *,
    once: bool = False,
    every: float = 30.0,
    say: Callable[[str], None] = print,
) -> list[Line]:
    """Judges the snapshots of a run until it has ended, or those that are there if `once`; returns all lines.

    content: a manifest's fields; its sources are the snapshots, whatever it names. judge: does a batch. every: seconds
    between looks. Raises ValueError for a folder that is no run, one whose evaluation has other settings, and, after
    everything else is done, for snapshots that could not be judged, naming them.
    """
    record = read_record(run)
    if record.get("command") != "train":
        raise ValueError(f"run: {run} is no run folder of `distill train`")
    every_n = record.get("logging", {}).get("keep_every")
    if every_n is None and not _snapshots(run):
        raise ValueError(f"run: {run} keeps no snapshots; logging.keep_every says how often it would")
    settings = digest_json(_for_snapshot(content, "settings", run).model_dump(mode="json") | {"matrix": _axes(content)})
    lines, failed = _read(run / RESULTS, settings), dict[int, str]()
    while True:
        ended = once or _ended(run, int(record["steps"]))  # before the look: what is kept last is seen
        done = {line["step"]: line.get("snapshot") for line in lines}
        for step, folder in _snapshots(run).items():
            snapshot = checkpoint.identity(folder)  # a resumed run makes the last ones again, on a GPU to rounding
            if step in failed or (step in done and done[step] in (None, snapshot)):
                continue
            try:
                files = judge(_for_snapshot(content, folder.name, folder), run / FOLDER)
            except ValueError as error:
                failed[step] = f"{folder.name}: {error}"
                say(failed[step])
                continue
            told = {"step": step, "settings": settings, "snapshot": snapshot}
            lines = [line for line in lines if line["step"] != step]
            lines += [told | json.loads(file.read_text()) for file in files]
            lines.sort(key=lambda line: line["step"])
            _write(run / RESULTS, lines)
            _draw(lines, run / CURVE)
            say(f"{folder.name}: {', '.join(_told(line) for line in lines if line['step'] == step)}")
        if ended:
            break
        time.sleep(every)
    if failed:
        raise ValueError(f"{len(failed)} snapshots could not be judged; the first: {next(iter(failed.values()))}")
    return lines


def _snapshots(run: Path) -> dict[int, Path]:
    """By their steps. A folder that is being written has another name."""
    found = sorted((run / "snapshots").glob("step-*"))
    return {int(folder.name.removeprefix("step-")): folder for folder in found}


def _ended(run: Path, steps: int) -> bool:
    """Whether the last checkpoint is there, which is written after the last snapshot."""
    return (run / "checkpoints" / f"step-{steps:08d}" / "state.json").is_file()


def _for_snapshot(content: Mapping[str, Any], name: str, path: Path) -> Manifest:
    return manifest_of(dict(content) | {"matrix": _axes(content) | {"source": {name: str(path)}}}, "watch")


def _axes(content: Mapping[str, Any]) -> dict[str, Any]:
    matrix = content.get("matrix") or {}
    return {axis: values for axis, values in matrix.items() if axis != "source"}


def _read(file: Path, settings: str) -> list[Line]:
    """The lines of an earlier watch. Raises ValueError where it judged by other settings."""
    if not file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines() if line]
        others = [line["step"] for line in lines if line["settings"] != settings]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is not what `distill-fid watch` writes ({error})") from error
    if others:
        raise ValueError(f"{file}: step {others[0]} was judged by other settings; move the file away to begin anew")
    return lines


def _write(file: Path, lines: list[Line]) -> None:
    """The file whole, or as it was."""
    with atomic_write(file) as opened:
        opened.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())


def _told(line: Line) -> str:
    return ", ".join(
        f"{space} {metric} {estimate['value']:.4g}"
        for space, metrics in line["values"].items()
        for metric, estimate in metrics.items()
    )


def _draw(lines: list[Line], file: Path) -> None:
    """A panel for every metric against the updates; bars are 95 % intervals, draws are points of their own."""
    from matplotlib.figure import Figure

    from distill.pictures import save_figure

    names = list(
        dict.fromkeys((space, metric) for line in lines for space, of in line["values"].items() for metric in of)
    )
    figure = Figure(figsize=(5, 2.2 * len(names)), layout="constrained")
    for axis, (space, metric) in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        points = [
            (line["step"], line["values"][space][metric]) for line in lines if metric in line["values"].get(space, {})
        ]
        for step, estimate in points:
            if estimate["interval"] is not None:
                axis.plot([step, step], estimate["interval"], color="C0", alpha=0.4)
        axis.plot([step for step, _ in points], [estimate["value"] for _, estimate in points], "o-", markersize=3)
        axis.set(xlabel="updates of the student", ylabel=f"{space} {metric}")
    save_figure(figure, file)
