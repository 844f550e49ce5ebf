"""The benchmarks that README.md and BENCHMARKS.md quote: `python -m tools.bench`, or `make bench`.

Everything runs through the commands that users run. Finished parts are kept in --folder and not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BARS = {  # of the foundation: the student against its teacher
    "fd": ("FD, ratio to the teacher's", "at most", 1.25),
    "pixel_fd": ("pixel FD, ratio", "at most", 1.75),
    "recall": ("recall, ratio", "at least", 0.9),
    "class_entropy": ("class entropy", "at least", 0.98),
}


def main() -> None:
    """Prints the convergence orders and the digits table over training seeds, with their bars."""
    parser = argparse.ArgumentParser(prog="tools.bench", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where runs and results are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    arguments = parser.parse_args()

    print("## Order of convergence on an exact mixture (float64, sigma 10 -> 0.1)\n\n" + orders())
    results = [digits(arguments.folder / f"seed-{seed}", seed) for seed in arguments.seeds]
    print("## One-step students of the digits, by training seed\n\n" + digits_table(arguments.seeds, results))


def orders() -> str:
    """Measured orders: the slope of the median error over 256 trajectories, from 128 to 256 steps, as a table."""
    import math

    import torch

    from samplers import SOLVERS, GaussianMixture, exponential_sigmas, sample

    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2, generator=generator, dtype=torch.float64) * 2
    mixture = GaussianMixture(torch.tensor([0.2, 0.3, 0.5]), means, torch.tensor([0.2, 0.1, 0.4], dtype=torch.float64))
    x = mixture.sample(256, sigma=10.0, generator=generator)

    def end(name: str, steps: int) -> torch.Tensor:
        sigmas = exponential_sigmas(steps + 1, 0.1, 10.0)[:-1]
        return sample(SOLVERS[name], mixture, x, sigmas)

    exact, counts = end("heun", 2048), (32, 64, 128, 256)
    lines = [
        "| solver | " + " | ".join(f"error, {n} steps" for n in counts) + " | order |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name in ("euler", "heun", "dpmpp_2m"):
        errors = [float((end(name, n) - exact).norm(dim=1).median()) for n in counts]
        order = math.log(errors[-2] / errors[-1]) / math.log(2)
        lines.append(f"| {name} | " + " | ".join(f"{e:.2e}" for e in errors) + f" | {order:.3f} |")
    return "\n".join(lines) + "\n"


def digits(folder: Path, seed: int) -> dict[str, Any]:
    """Trains a teacher and its student, scores both, and returns their summaries and the seconds each part took."""
    timings_file = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(timings_file.read_text()) if timings_file.is_file() else {}
    parts = {
        "teacher": ["distill.cli", "teach", "--config", "configs/digits-teacher.yaml", f"--seed={seed}",
                    f"--run={folder}/teacher", "--resume"],
        "student": ["distill.cli", "train", "--config", "configs/digits-reverse-kl.yaml", f"--seed={seed}",
                    f"--run={folder}/student", f"--teacher.path={folder}/teacher", "--resume"],
        "scores": ["tools.fid", "score", f"teacher={folder}/teacher", f"student={folder}/student",
                   "--out", f"{folder}/scores.json"],
    }  # fmt: skip
    for name, command in parts.items():
        if name in seconds:
            continue
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)
        seconds[name] = time.monotonic() - started
        timings_file.write_text(json.dumps(seconds))
    entries = json.loads((folder / "scores.json").read_text())["entries"]
    return {entry["name"]: entry for entry in entries} | {"seconds": seconds}


def digits_table(seeds: list[int], results: list[dict[str, Any]]) -> str:
    """A row for every network and seed, then every bar with its mean over the seeds and its worst seed."""
    metrics = ("fd", "pixel_fd", "precision", "recall", "class_entropy", "class_accuracy")
    lines = [
        "| seed | network | " + " | ".join(metrics) + " | NFE | images/s | training, s |",
        "|--:|:--|" + "--:|" * (len(metrics) + 3),
    ]
    for seed, result in zip(seeds, results, strict=True):
        for name in ("teacher", "student"):
            entry = result[name]
            numbers = [entry["summary"][metric] for metric in metrics]
            cells = " | ".join(f"{value['mean']:.3f} ± {value['std']:.3f}" for value in numbers)
            speed = statistics.fmean(entry["images_per_second"])
            lines.append(
                f"| {seed} | {name} | {cells} | {entry['nfe']} | {speed:.0f} | {result['seconds'][name]:.0f} |"
            )
    lines += ["", "| bar | mean over seeds | worst seed | bar | met |", "|:--|--:|--:|--:|:--|"]
    for metric, (title, direction, bar) in BARS.items():
        student = [result["student"]["summary"][metric]["mean"] for result in results]
        teacher = [result["teacher"]["summary"][metric]["mean"] for result in results]
        relative = metric != "class_entropy"
        values = [s / t if relative else s for s, t in zip(student, teacher, strict=True)]
        worst = max(values) if direction == "at most" else min(values)
        met = worst <= bar if direction == "at most" else worst >= bar
        lines.append(
            f"| {title} | {statistics.fmean(values):.3f} | {worst:.3f} | {direction} {bar} | {'yes' if met else 'no'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
