"""What the experiment of `tools.bench_disback` shows: times to a quality, gains with intervals, tables, a picture."""

import json
import math
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from distill.pictures import save_figure
from tools.bench_disback import MISMATCH_AT, SETTINGS, UPDATE, Arm, Run, Setting, result_file

SUSTAINED = 3  # looks in a row below the threshold: then it is reached, at the first of them


def reached(curve: Sequence[Sequence[float]], threshold: float, column: int) -> tuple[float, bool]:
    """When a quality is below the threshold for good, in updates (column 0) or passes (1), and whether it ever is;
    if not, the end. Between two looks the quality is taken to fall evenly."""
    for k in range(len(curve) - SUSTAINED + 1):
        if all(point[2] < threshold for point in curve[k : k + SUSTAINED]):
            if k == 0:
                return curve[0][column], True
            (a, qa), (b, qb) = ((curve[j][column], curve[j][2]) for j in (k - 1, k))
            return a + (b - a) * (qa - threshold) / (qa - qb), True
    return curve[-1][column], False


Times = dict[tuple[int, int], tuple[float, bool]]  # by teacher and seed


def best_times(
    folder: Path, setting: Setting, arm: Arm, teachers: Sequence[int], seeds: Sequence[int], column: int
) -> tuple[float, Times]:
    """The learning rate with the smallest geometric mean of the times, and those times."""

    def times(lr: float) -> Times:
        return {
            (teacher, seed): reached(
                json.loads(result_file(folder, Run(setting.name, arm, lr, teacher, seed)).read_text())["curve"],
                setting.threshold,
                column,
            )
            for teacher, seed in product(teachers, seeds)
        }

    by_rate = {lr: times(lr) for lr in setting.rates}
    return min(by_rate.items(), key=lambda item: statistics.fmean(math.log(max(t, 1)) for t, _ in item[1].values()))


def speed_up(times: Times, baseline: Times, draws: int = 4000) -> tuple[float, float, float]:
    """How many times faster, paired by teacher and seed: the geometric mean, and its 95 % interval by bootstrap over
    the teachers."""
    teachers = sorted({teacher for teacher, _ in times})
    gains = torch.tensor(
        [
            statistics.fmean(
                math.log(max(baseline[key][0], 1) / max(times[key][0], 1)) for key in times if key[0] == teacher
            )
            for teacher in teachers
        ]
    )
    drawn = torch.randint(len(teachers), (draws, len(teachers)), generator=torch.Generator().manual_seed(0))
    low, high = gains[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).exp().tolist()
    return math.exp(float(gains.mean())), low, high


def table(
    folder: Path,
    setting: Setting,
    arms: Sequence[Arm],
    teachers: Sequence[int],
    seeds: Sequence[int],
    baselines: Sequence[str] = ("DI", "DI-warm"),
) -> str:
    """A row for every arm: its rates, how many runs get there, times, and speed-ups over the baselines."""
    gains = " | ".join(f"x {name}" for name in baselines)
    lines = [
        f"{setting.name}: distance below {setting.threshold}, {len(teachers)} teachers x {len(seeds)} seeds",
        "",
        f"| arm | lr | reached | updates, median | {gains} | lr | with stage 1, median | {gains} |",
        "|:--|" + "--:|" * (5 + 2 * len(baselines)),
    ]
    found = {
        (arm.name, column): best_times(folder, setting, arm, teachers, seeds, column)
        for arm, column in product(arms, (0, 1))
    }
    for arm in arms:
        cells = [arm.name]
        for column in (0, 1):
            lr, times = found[arm.name, column]
            cells.append(f"{lr:g}")
            if column == 0:
                cells.append(f"{sum(ok for _, ok in times.values())}/{len(times)}")
            cells.append(f"{statistics.median(t for t, _ in times.values()) / (UPDATE if column else 1):.0f}")
            for baseline in baselines:
                gain, low, high = speed_up(times, found[baseline, column][1])
                cells.append("–" if arm.name == baseline else f"{gain:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mismatch_table(folder: Path, teachers: Sequence[int]) -> str:
    """Mismatches at the first student, mean over the teachers, by setting and noise level."""
    lines = [
        "| setting | score | " + " | ".join(f"sigma {s:g}" for s in MISMATCH_AT) + " |",
        "|:--|:--|" + "--:|" * len(MISMATCH_AT),
    ]
    for name, setting in SETTINGS.items():
        files = [folder / f"{setting.key}-mismatch-{teacher}.json" for teacher in teachers]
        rows = [json.loads(file.read_text()) for file in files]
        for score in rows[0]:
            means = [statistics.fmean(row[score][k] for row in rows) for k in range(len(MISMATCH_AT))]
            lines.append(f"| {name} | {score} | {' | '.join(f'{m:.2f}' for m in means)} |")
    return "\n".join(lines) + "\n"


def draw(folder: Path, arms: Sequence[Arm], teachers: Sequence[int], seeds: Sequence[int], path: Path) -> None:
    """Quality against cost with stage 1 counted: medians over the runs, each arm at its best rate; one panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(SETTINGS), 3.8), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(SETTINGS), squeeze=False)[0], SETTINGS.values(), strict=True):
        for k, arm in enumerate(arms):
            lr, _ = best_times(folder, setting, arm, teachers, seeds, 1)
            runs = [Run(setting.name, arm, lr, *pair) for pair in product(teachers, seeds)]
            curves = torch.tensor([json.loads(result_file(folder, run).read_text())["curve"] for run in runs])
            middle = curves.median(0).values
            axes.plot(middle[:, 1] / UPDATE, middle[:, 2], color=f"C{k}", label=f"{arm.name}, lr {lr:g}")
        axes.axhline(setting.threshold, color="grey", linestyle=":")
        axes.set_yscale("log")
        axes.set_title(setting.name)
        axes.set_xlabel("cost in updates, first stage counted")
        axes.set_ylabel("distance to the data")
        axes.legend(fontsize=7)
    save_figure(figure, path)
