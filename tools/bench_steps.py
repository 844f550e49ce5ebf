"""Students of several steps on the digits: how long the same step is trained before another one is.

A fake score that follows all steps at once fits the mixture of what they make, and then it is that mixture which ends
at the teacher. So beside the samples (of the last step) the table has what each step makes, and all of it together.
"""

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from distill import data
from distill.generate import load_generator
from distill.noise import GENERATION
from samplers import SampleNoise
from tools.bench_digits import summaries, teacher, timed
from tools.frechet import frechet_distance
from tools.statistics import FeatureStatistics

ARMS = ((1, 1), (2, 1), (2, 25), (4, 1), (4, 5), (4, 25), (4, 100))  # steps, updates in a row that train the same
CONFIG = "configs/digits-four-steps.yaml"


def steps_table(
    folder: Path, seeds: Sequence[int], jobs: int = 1, arms: Sequence[tuple[int, int]] = ARMS, updates: int = 750
) -> str:
    """Trains every arm and seed from the first seed's teacher, and returns a row for every arm (minutes for each)."""
    source, own = folder / f"seed-{seeds[0]}/teacher", folder / "steps"
    tasks = list(product(arms, seeds))
    teacher(folder, seeds[0])

    def make(task: tuple[tuple[int, int], int]) -> None:
        (steps, hold), seed = task
        name = _name(steps, hold, seed)
        command = ("distill.cli", "train", "--config", CONFIG, f"--student.steps={steps}", f"--student.hold={hold}")
        more = (f"--seed={seed}", f"--teacher.path={source}", f"--run={own / name}", f"--steps={updates}", "--resume")
        timed(own, name, *command, *more)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(make, tasks))
    names = [_name(*arm, seed) for arm, seed in tasks]
    timed(own, "scores", "tools.fid", "score", *(f"{name}={own / name}" for name in names), "--out", f"{own}/scores")
    scores = summaries(own / "scores")
    lines = [
        "| steps | hold | FD | pixel FD | recall | pixel FD of what each step makes | of all together |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for steps, hold in arms:
        runs = [_name(steps, hold, seed) for seed in seeds]
        shown = [_spread([scores[run]["summary"][m].mean for run in runs]) for m in ("fd", "pixel_fd", "recall")]
        *each, together = zip(*(_pixel_distances(own / run) for run in runs), strict=True)
        steps_apart = ", ".join(f"{statistics.fmean(values):.2f}" for values in each)
        lines.append(f"| {steps} | {hold} | {' | '.join(shown)} | {steps_apart} | {_spread(together)} |")
    return "\n".join(lines) + "\n"


def _name(steps: int, hold: int, seed: int) -> str:
    return f"steps-{steps}-hold-{hold}-seed-{seed}"


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


@torch.no_grad()
def _pixel_distances(run: Path, count: int = 2000) -> list[float]:
    """The pixel FD to held-out digits of what each step of a run's student makes, and of all of it."""
    generator = load_generator(run)
    student = generator.student
    assert student is not None, "a run's generator has a student"
    numbers = torch.arange(count)
    made: list[Tensor] = []
    for step in range(1, len(student) + 1):
        noise = SampleNoise(0, range(count), GENERATION)
        made.append(student.rollout(noise.normal(generator.shape), numbers % 10, noise, step))
    held_out = _statistics(data.digits("held-out").images)
    return [frechet_distance(_statistics(x), held_out).value for x in (*made, torch.cat(made))]


def _statistics(images: Tensor) -> FeatureStatistics:
    found = FeatureStatistics(images[0].numel())
    found.update(images.flatten(1).double())
    return found
