"""Benchmarks on the digits, through the commands that users run: the demo's student, and the divergences compared.

Finished parts are kept in a folder and not made again. Times are of one process beside whatever else runs.
"""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from tools.bench_toys import COMPARED
from tools.digits_score import METRICS
from tools.report import rows_of
from tools.results import read_results

BARS = {  # of the foundation: the student against its teacher
    "fd": ("FD, ratio to the teacher's", "at most", 1.25),
    "pixel_fd": ("pixel FD, ratio", "at most", 1.75),
    "recall": ("recall, ratio", "at least", 0.9),
    "class_entropy": ("class entropy", "at least", 0.98),
}
ADVERSARIAL_WEIGHT = 0.03


def timed(folder: Path, name: str, *command: str) -> float:
    """Runs a module of this project once, and returns the seconds it took; they are kept in folder/NAME.seconds."""
    record = folder / f"{name}.seconds"
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)
        record.write_text(str(time.monotonic() - started))
    return float(record.read_text())


def teacher(folder: Path, seed: int) -> float:
    """Trains the teacher of a seed, FOLDER/seed-SEED/teacher, and returns the seconds that took."""
    own = folder / f"seed-{seed}"
    command = ("distill.cli", "teach", "--config", "configs/digits-teacher.yaml", f"--seed={seed}")
    return timed(own, "teacher", *command, f"--run={own}/teacher", "--resume")


def summaries(folder: Path) -> dict[str, Any]:
    """By name: the mean and standard deviation of every metric over the draws of a folder of scores."""
    return {
        row.name: {
            "summary": {name: row.spread(*place) for name, place in METRICS.items()},
            "images_per_second": statistics.fmean(r.provenance["images_per_second"] for r in row.results),
            "nfe": row.results[0].nfe,
        }
        for row in rows_of(read_results([folder]))
    }


def digits(folder: Path, seed: int, config: str) -> dict[str, Any]:
    """Trains a teacher and its student, scores both, and returns their entries and the seconds each part took."""
    own = folder / f"seed-{seed}"
    seconds = {"teacher": teacher(folder, seed)}
    command = ("distill.cli", "train", "--config", config, f"--seed={seed}", f"--teacher.path={own}/teacher")
    seconds["student"] = timed(own, "student", *command, f"--run={own}/student", "--resume")
    scored = (f"teacher={own}/teacher", f"student={own}/student", "--out", f"{own}/scores")
    timed(own, "scores", "tools.fid", "score", *scored)
    return summaries(own / "scores") | {"seconds": seconds}


def digits_table(seeds: list[int], results: list[dict[str, Any]]) -> str:
    """A row for every network and seed, then every bar with its mean over the seeds and its worst seed."""
    lines = [
        "| seed | network | " + " | ".join(METRICS) + " | NFE | images/s | training, s |",
        "|--:|:--|" + "--:|" * (len(METRICS) + 3),
    ]
    for seed, result in zip(seeds, results, strict=True):
        for name in ("teacher", "student"):
            entry = result[name]
            numbers = [entry["summary"][metric] for metric in METRICS]
            cells = " | ".join(f"{value.mean:.3f} ± {value.spread:.3f}" for value in numbers)
            speed = entry["images_per_second"]
            lines.append(
                f"| {seed} | {name} | {cells} | {entry['nfe']} | {speed:.0f} | {result['seconds'][name]:.0f} |"
            )
    lines += ["", "| bar | mean over seeds | worst seed | bar | met |", "|:--|--:|--:|--:|:--|"]
    for metric, (title, direction, bar) in BARS.items():
        student = [result["student"]["summary"][metric].mean for result in results]
        taught = [result["teacher"]["summary"][metric].mean for result in results]
        relative = metric != "class_entropy"
        values = [s / t if relative else s for s, t in zip(student, taught, strict=True)]
        worst = max(values) if direction == "at most" else min(values)
        met = worst <= bar if direction == "at most" else worst >= bar
        lines.append(
            f"| {title} | {statistics.fmean(values):.3f} | {worst:.3f} | {direction} {bar} | {'yes' if met else 'no'} |"
        )
    return "\n".join(lines) + "\n"


ARMS = tuple((divergence, adversarial) for divergence in COMPARED for adversarial in (False, True))


def compare(
    folder: Path, seeds: Sequence[int], jobs: int = 1, steps: int = 120, arms: Sequence[tuple[str, bool]] = ARMS
) -> str:
    """Divergences with and without the adversarial term: students of each seed's own teacher and noise, as a table.

    All arms train the same discriminator for as many updates; reverse KL without the term, the first of the arms, makes
    no use of it and is the control.
    """

    def make(task: tuple[tuple[str, bool], int]) -> None:
        (divergence, adversarial), seed = task
        own, name = folder / f"seed-{seed}", arm_name(divergence, adversarial)
        command = ["distill.cli", "train", "--config", "configs/digits-f-distill.yaml", f"--seed={seed}"]
        command += [f"--teacher.path={own}/teacher", f"--run={own}/compare/{name}", f"--steps={steps}", "--resume"]
        command += [f"--divergence.name={divergence}", f"--adversarial_weight={ADVERSARIAL_WEIGHT * adversarial}"]
        timed(own / "compare", name, *command, f"--logging.sample_every={steps}")

    def score(seed: int) -> dict[str, Any]:
        own = folder / f"seed-{seed}/compare"
        names = [arm_name(*arm) for arm in arms]
        kept = own / f"scores-{len(names)}"
        scored = [f"{name}={own}/{name}" for name in names]
        timed(own, kept.name, "tools.fid", "score", *scored, "--out", str(kept))
        seconds = {name: float((own / f"{name}.seconds").read_text()) for name in names}
        return summaries(kept) | {"seconds": seconds}

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda seed: teacher(folder, seed), seeds))
        list(pool.map(make, product(arms, seeds)))
        return compare_table(list(pool.map(score, seeds)), arms)


def arm_name(divergence: str, adversarial: bool) -> str:
    return f"{divergence}-adversarial" if adversarial else divergence


def compare_table(results: list[dict[str, Any]], arms: Sequence[tuple[str, bool]] = ARMS) -> str:
    """Means over the seeds, and the difference from the control on the same seed, with its standard error."""
    shown = ("fd", "pixel_fd", "precision", "recall")
    lines = [
        "| divergence | adversarial | " + " | ".join(f"{m} | minus control" for m in shown) + " | s |",
        "|:--|:--|" + "--:|" * (2 * len(shown) + 1),
    ]
    for divergence, adversarial in sorted(arms, key=lambda arm: arm[1]):
        name, cells = arm_name(divergence, adversarial), []
        for metric in shown:
            values = [result[name]["summary"][metric].mean for result in results]
            control = [result["reverse-kl"]["summary"][metric].mean for result in results]
            differences = [a - b for a, b in zip(values, control, strict=True)]
            error = statistics.stdev(differences) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            cells += [f"{statistics.fmean(values):.3f}", f"{statistics.fmean(differences):+.3f} ± {error:.3f}"]
        seconds = statistics.fmean(result["seconds"][name] for result in results)
        lines.append(f"| {divergence} | {'yes' if adversarial else 'no'} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"
