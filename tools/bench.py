"""The benchmarks that README.md and BENCHMARKS.md quote: `python -m tools.bench`, or `make bench`.

Everything runs through the commands that users run, or the objects behind them. Finished parts are kept in --folder
and not run again.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from tools.bench_cost import cost_table
from tools.bench_digits import compare, digits, digits_table
from tools.bench_disback import ARMS, SETTINGS, SHORT, make
from tools.bench_disback_report import draw, mismatch_table
from tools.bench_disback_report import table as disback_table
from tools.bench_forty import forty_table
from tools.bench_gaussian import gaussian_tables
from tools.bench_intervals import interval_table
from tools.bench_lj import lj_table
from tools.bench_memory import memory_table
from tools.bench_metrics import metrics_tables
from tools.bench_optimum import draw_optima, optimum_rows, optimum_table, ratio_table
from tools.bench_particles import particles_tables
from tools.bench_particles_digits import cost_tables
from tools.bench_particles_digits import digits_tables as digits_particles
from tools.bench_steps import steps_table
from tools.bench_teleport import digits_tables, mixtures_table
from tools.bench_toys import coverage

DEMO = "configs/digits-reverse-kl.yaml"  # the student of `make demo`


def main() -> None:
    """Prints the tables that are asked for, all by default, each under its title."""
    parts: dict[str, tuple[str, Callable[[Path, list[int], list[int], int], str]]] = {
        "orders": ("Order of convergence on an exact mixture (float64, sigma 10 -> 0.1)", lambda *_: orders()),
        "optimum": ("The optimum of every divergence, exact and found", lambda folder, *_: _optimum(folder)),
        "ratio": ("The learned ratio against ln r: correlation, calibration slope", lambda *_: ratio_table()),
        "cost": ("Cost of an update, K = 5", lambda *_: cost_table()),
        "memory": ("Memory by family, measured and told", lambda *_: memory_table()),
        "digits": (
            "One-step students of the digits, by training seed",
            lambda folder, seeds, *_: _digits(folder, seeds),
        ),
        "steps": (
            "Students of several steps, and how long the same one is trained",
            lambda folder, seeds, _, jobs: steps_table(folder, seeds, jobs),
        ),
        "coverage": (
            "Coverage of modes, exact teacher",
            lambda folder, _, more, jobs: coverage(folder / "coverage", more, jobs),
        ),
        "disback": (
            "DisBack: time to a quality, and mismatch at the start",
            lambda folder, _, __, jobs: _disback(folder / "disback", jobs),
        ),
        "gaussian": ("Fitting a Gaussian, and one jump", lambda *_: gaussian_tables()),
        "teleport": (
            "Quality against evaluations, with and without teleportation",
            lambda folder, _, more, __: _teleport(folder, more),
        ),
        "particles": (
            "Feynman-Kac correctors on exact targets, and on the digits teacher",
            lambda folder, *_: _particles(folder),
        ),
        "lj": ("LJ-13 annealed, from scratch", lambda folder, seeds, *_: lj_table(folder / "lj", seeds)),
        "metrics": (
            "What the metrics cost beside the public tools (one thread, d = 2048)",
            lambda *_: metrics_tables(),
        ),
        "intervals": ("How often 95 % intervals hold the truth", lambda *_: interval_table()),
        "compare": ("The divergences on the digits", lambda folder, _, more, jobs: compare(folder, more, jobs)),
    }
    parser = argparse.ArgumentParser(prog="tools.bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; none is all of them")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where runs and results are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds of the demo's student")
    parser.add_argument("--more-seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of comparisons")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of coverage and compare")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in parts]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(parts)}")

    for part in arguments.parts or parts:
        title, make = parts[part]
        table = make(arguments.folder, arguments.seeds, arguments.more_seeds, arguments.jobs)
        print(f"## {title}\n\n{table}", flush=True)


def _optimum(folder: Path) -> str:
    rows = optimum_rows()
    draw_optima(rows, folder / "optimum.png")
    return optimum_table(rows) + f"\npicture: {folder / 'optimum.png'}\n"


def _teleport(folder: Path, seeds: list[int]) -> str:
    own = folder / "teleport"
    pictures = f"pictures: {own}/mixtures/*.png, {own}/digits/*.png\n"
    return "\n".join([mixtures_table(own / "mixtures", seeds), digits_tables(own / "digits", seeds, folder), pictures])


def _particles(folder: Path) -> str:
    exact = [particles_tables(), forty_table(3, 2048)]
    pictures = f"picture: {folder}/particles/particles-digits.png\n"
    return "\n".join([*exact, digits_particles(folder / "particles", folder), cost_tables(), pictures])


def _digits(folder: Path, seeds: list[int]) -> str:
    return digits_table(seeds, [digits(folder, seed, DEMO) for seed in seeds])


def _disback(folder: Path, jobs: int) -> str:
    teachers, seeds = range(8), range(2)
    tables = []
    for setting in SETTINGS.values():
        make(folder, setting, ARMS, teachers, seeds, jobs)
        tables.append(disback_table(folder, setting, ARMS, teachers, seeds))
    setting, fresh = SETTINGS["ring B"], range(8, 16)
    make(folder, setting, SHORT, fresh, seeds, jobs)
    tables.append(
        "a short first stage; " + disback_table(folder, setting, SHORT, fresh, seeds, [arm.name for arm in SHORT[:3]])
    )
    draw(folder, ARMS, teachers, seeds, folder / "disback.png")
    return "\n".join([*tables, mismatch_table(folder, teachers), f"picture: {folder / 'disback.png'}\n"])


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


if __name__ == "__main__":
    main()
