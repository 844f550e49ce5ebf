"""Quality against evaluations, with and without Gaussian teleportation: exact mixtures and the trained digits teacher.

All arms start from the same noise. The error is the root mean square distance of a number of a sample to the exact
probability-flow ODE of the same start (fine Heun); on the digits, Fréchet distances and recall besides.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data import digits
from distill.folders import pipeline_folder
from distill.noise import GENERATION
from distill.pictures import save_figure
from distill.teacher import Teacher
from samplers import (
    Denoiser,
    Gaussian,
    GaussianMixture,
    SampleNoise,
    Solver,
    State,
    bound_of,
    choose_sigma_skip,
    dpmpp_2m,
    euler,
    gaussian_exponential,
    heun,
    karras_sigmas,
    sample,
    teleported,
)
from samplers.atomic import atomic_write
from samplers.solvers import Generator
from tools.bench_digits import teacher as train_teacher
from tools.digits_score import DigitsJudge

EVALUATIONS = (4, 6, 8, 10, 15, 20, 35)
SAVING = ((6, 4), (10, 6), (15, 10), (20, 10), (35, 20))  # plain against teleported: 33 to 50 % fewer
TOLERANCE = 0.05


def unipc(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, cond: Any = None, generator: Generator = None
) -> Iterator[State]:
    """diffusers' UniPC (Zhao et al. 2023, order 2) on any noise levels, as a Solver; the schedule ends in 0.

    Its flow form takes levels as they are: t = sigma / (1 + sigma), and states (1 - t) x.
    """
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    t = sigmas / (1 + sigmas)
    scheduler.set_timesteps(sigmas=t[:-1].numpy())
    scheduler.set_begin_index(0)
    state = (1 - t[0]) * x
    for step, timestep in enumerate(scheduler.timesteps):
        denoised = denoiser((state / (1 - t[step])).to(x.dtype), sigmas[step].to(x.dtype), cond)
        state = scheduler.step((state - denoised) / t[step], timestep, state, return_dict=False)[0]
        yield State((state / (1 - t[step + 1])).to(x.dtype), sigmas[step + 1], denoised, step)


@dataclass(frozen=True)
class Case:
    """A denoiser with its Gaussian and the level to jump to; start(n, seed) gives x at sigma_max and conditions."""

    name: str
    denoiser: Denoiser
    gaussian: Gaussian
    sigma_skip: float
    sigma_min: float
    sigma_max: float
    start: Callable[[int, int], tuple[Tensor, Any]]


def arms(gaussian: Gaussian) -> dict[str, Solver]:
    """The solvers that are compared, by name."""
    own = partial(gaussian_exponential, gaussian=gaussian)
    return {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "unipc": unipc, "gaussian": own}


def end(case: Case, name: str, jump: bool, evaluations: int, x: Tensor, cond: Any) -> Tensor:
    """What an arm makes of x with so many evaluations at most (Heun takes an odd number)."""
    steps = (evaluations + 1) // 2 if name == "heun" else evaluations
    solver = arms(case.gaussian)[name]
    sigmas = karras_sigmas(steps, case.sigma_min, case.sigma_skip if jump else case.sigma_max)
    if jump:
        solver = teleported(solver, case.gaussian, case.sigma_skip)
        sigmas = torch.cat([torch.tensor([case.sigma_max], dtype=sigmas.dtype), sigmas])
    return sample(solver, case.denoiser, x, sigmas, cond)


def measure(
    folder: Path, case: Case, seed: int, n: int, judge: DigitsJudge | None, scored: int, fine: int
) -> list[dict[str, Any]]:
    """Every arm at every number of evaluations, from the same n (for errors) and `scored` (for scores) starts; kept."""
    rows = []
    exact: Tensor | None = None
    every = [*product(arms(case.gaussian), (False, True), EVALUATIONS), ("dpmpp_2m", False, 16)]
    for name, jump, evaluations in every:
        way = f"from-{case.sigma_skip:.4g}" if jump else "plain"
        file = folder / f"{case.name}-{seed}-{name}-{way}-{evaluations}.json"
        if not file.is_file():
            x, cond = case.start(max(n, scored), seed)
            if exact is None:
                finest = karras_sigmas(fine, case.sigma_min, case.sigma_max)
                exact = sample(heun, case.denoiser, x[:n], finest, None if cond is None else cond[:n])
            made = end(case, name, jump, evaluations, x, cond)
            errors = (made[:n] - exact).flatten(1).square().mean(1).sqrt()
            row: dict[str, Any] = {"solver": name, "jump": jump, "nfe": evaluations, "seed": seed}
            row |= {"error": float(errors.square().mean().sqrt()), "median": float(errors.median())}
            if judge is not None:
                assert cond is not None
                judged = judge(made[:scored], cond[:scored])
                row |= {name: judged[name] for name in ("fd", "pixel_fd", "recall")}
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as out:
                out.write(json.dumps(row).encode())
        rows.append(json.loads(file.read_text()))
    return rows


def image_like(dim: int, components: int, rotated: bool, seed: int, share: float = 0.2) -> GaussianMixture:
    """A mixture whose spectrum is that of images, 1 / i with a standard deviation of .5, float32.

    The means carry a share of the variance and every component varies its own; `rotated`: in its own basis, within
    bands of 32 directions. The Gaussian then leaves about as much of the score unexplained as in CIFAR-10's network.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = 1 / torch.arange(1, dim + 1, dtype=torch.float64)
    spectrum *= dim * 0.25 / spectrum.sum()
    means = torch.randn(components, dim, generator=generator, dtype=torch.float64) * (spectrum * share).sqrt()
    spread = torch.randn(components, dim, generator=generator, dtype=torch.float64)
    variances = spectrum * (1 - share) * (0.5 * spread).exp()
    if rotated:
        bands = torch.randn(components, dim // 32, 32, 32, generator=generator, dtype=torch.float64)
        turn = torch.linalg.qr(bands).Q
        blocks = turn @ (variances.reshape(components, dim // 32, 32, 1) * turn.mT)
        variances = torch.stack([torch.block_diag(*of) for of in (blocks + blocks.mT) / 2])
    return GaussianMixture(torch.ones(components), means.float(), variances.float())


def mixture_case(dim: int, components: int, rotated: bool, seed: int) -> Case:
    """An exact mixture, with the Gaussian of 20,000 of its samples and the level that its certificate gives."""
    mixture = image_like(dim, components, rotated, seed)
    generator = torch.Generator().manual_seed(seed)
    gaussian = Gaussian.fit(mixture.sample(20_000, generator=generator).split(1000))
    held_out = mixture.sample(256, generator=generator)
    skip = choose_sigma_skip(mixture, gaussian, TOLERANCE, samples=held_out, generator=generator)

    def start(n: int, seed: int) -> tuple[Tensor, None]:
        return 80 * torch.randn(n, dim, generator=torch.Generator().manual_seed(1000 + seed)), None

    name = f"{'rotated' if rotated else 'aligned'}-{dim}"
    return Case(name, mixture, gaussian, skip.sigma_skip, 0.002, 80.0, start)


def digits_case(path: Path, guidance: float) -> Case:
    """The digits teacher at a guidance scale, with its class means; the level is that of the model-free bound."""
    teacher = replace(Teacher.load(pipeline_folder(path)), guidance=guidance)
    images = digits("train")
    assert images.labels is not None
    gaussian = Gaussian.fit([(images.images, images.labels)], n_classes=10)
    sigma_skip = bound_of(images.images, gaussian, images.labels).sigma_skip(TOLERANCE)

    def start(n: int, seed: int) -> tuple[Tensor, Tensor]:
        z = SampleNoise(seed, range(n), GENERATION).normal(teacher.shape)
        return teacher.sigma_max * z, torch.arange(n) % 10

    name = f"digits-guidance-{guidance:g}"
    return Case(name, teacher.guided, gaussian, sigma_skip, teacher.sigma_min, teacher.sigma_max, start)


CASES = ((384, 24, False), (768, 64, False), (384, 24, True), (768, 24, True))


def mixtures_table(folder: Path, seeds: Iterable[int], n: int = 48, fine: int = 80) -> str:
    """The errors on exact mixtures, a mixture for each seed; a table of each case and its picture."""
    parts = []
    for dim, components, rotated in CASES:
        rows, levels = [], []
        for seed in seeds:
            case = mixture_case(dim, components, rotated, seed)
            levels.append(case.sigma_skip)
            rows += measure(folder, case, seed, n, None, 0, fine)
        title = f"{case.name}: sigma 80 -> {min(levels):.2f} to {max(levels):.2f}"
        parts += [error_table(rows, title), saving_table(rows, ("error",))]
        draw(rows, ("error",), folder / f"{case.name}.png")
    return "\n".join(parts)


def digits_tables(folder: Path, seeds: Sequence[int], teachers: Path, n: int = 100, scored: int = 300) -> str:
    """Errors, distances and recall on the digits teacher (seed 0) without and with guidance, by seeds of the noise."""
    train_teacher(teachers, 0)
    held_out = digits("held-out")
    judge = DigitsJudge.load()
    parts = []
    for guidance in (1.0, 2.0):
        case = digits_case(teachers / "seed-0/teacher", guidance)
        rows = [row for seed in seeds for row in measure(folder, case, seed, n, judge, scored, 80)]
        parts.append(error_table(rows, f"{case.name}: sigma {case.sigma_max:g} -> {case.sigma_skip:.2f}"))
        parts.append(residual_table(case, held_out.images, held_out.labels))
        parts += [error_table(rows, name, name) for name in ("fd", "pixel_fd", "recall")]
        parts.append(saving_table(rows, ("error", "fd", "pixel_fd", "recall")))
        draw(rows, ("error", "fd", "pixel_fd", "recall"), folder / f"{case.name}.png")
    return "\n".join(parts)


@torch.no_grad()
def residual_table(case: Case, x0: Tensor, cond: Tensor | None) -> str:
    """What the network adds to the Gaussian's denoiser, by noise level, at noised held-out data x0 [N, ...].

    unexplained: its share of the score. rms: a number of it. affine: the share of its square that is a mean (of each
    class) and a linear map of x, which another Gaussian could take. own error: the share that is the network's error,
    E (D - D_N) . (D - x0), rather than the data's shape.
    """
    generator = torch.Generator().manual_seed(0)
    lines = ["| sigma | unexplained | rms | affine | own error |", "|--:|--:|--:|--:|--:|"]
    groups = torch.zeros(len(x0), dtype=torch.int64) if cond is None else cond
    for sigma in (20.0, 10.0, 5.0, 2.5, 1.2, 0.6, 0.3, 0.15, 0.07):
        level = torch.tensor(sigma)
        x = x0 + level * torch.randn(x0.shape, generator=generator)
        denoised = case.denoiser(x, level, cond)
        difference = (denoised - case.gaussian(x, level, cond)).flatten(1)
        square = float(difference.square().sum(1).mean())
        share = square / float((denoised - x).flatten(1).square().sum(1).mean())
        error = float((difference * (denoised - x0).flatten(1)).sum(1).mean()) / square
        z, left = (_within(rows, groups) for rows in (x.flatten(1), difference))
        left = left - z @ torch.linalg.lstsq(z, left).solution
        freedom = len(x0) / (len(x0) - z.shape[1] - len(groups.unique()))
        affine = 1 - float(left.square().sum(1).mean()) * freedom / square
        root = math.sqrt(square / difference.shape[1])
        lines.append(f"| {sigma:g} | {share:.5f} | {root:.4f} | {affine:.2f} | {error:.2f} |")
    return "\n".join(lines) + "\n"


def _within(rows: Tensor, groups: Tensor) -> Tensor:
    """Rows [N, d] less the mean of their group [N]."""
    means = torch.stack([rows[groups == group].mean(0) for group in groups.unique()])
    return rows - means[torch.searchsorted(groups.unique(), groups)]


def error_table(rows: list[dict[str, Any]], title: str, metric: str = "error") -> str:
    """A row for every arm, a column for every number of evaluations; means over seeds ± standard errors."""
    lines = [f"| {title} | " + " | ".join(map(str, EVALUATIONS)) + " |", "|:--|" + "--:|" * len(EVALUATIONS)]
    for name, jump in dict.fromkeys((row["solver"], row["jump"]) for row in rows):
        cells = [_cell(_by_seed(rows, name, jump, nfe, metric).values()) for nfe in EVALUATIONS]
        lines.append(f"| {name}{' + teleport' if jump else ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def saving_table(rows: list[dict[str, Any]], metrics: Sequence[str]) -> str:
    """Teleported with fewer evaluations less plain with more, paired by seed: mean ± standard error."""
    pairs = " | ".join(f"{few} for {many}" for many, few in SAVING)
    lines = [f"| teleported less plain, evaluations | {pairs} |", "|:--|" + "--:|" * len(SAVING)]
    for metric in metrics:
        for name in dict.fromkeys(row["solver"] for row in rows):
            cells = []
            for many, few in SAVING:
                plain = _by_seed(rows, name, False, many, metric)
                jumped = _by_seed(rows, name, True, few, metric)
                cells.append(_cell([jumped[seed] - plain[seed] for seed in plain], "+"))
            lines.append(f"| {name}, {metric} | {' | '.join(cells)} |")
    for metric, kind in (("error", "root mean square"), ("median", "median")):
        ours, theirs = _by_seed(rows, "gaussian", True, 8, metric), _by_seed(rows, "dpmpp_2m", False, 16, metric)
        ratio = _cell([ours[seed] / theirs[seed] for seed in ours])
        lines += ["", f"{kind} error of gaussian + teleport at 8 evaluations over that of dpmpp_2m at 16: {ratio}"]
    return "\n".join(lines) + "\n"


def _by_seed(rows: list[dict[str, Any]], name: str, jump: bool, nfe: int, metric: str) -> dict[int, float]:
    return {r["seed"]: r[metric] for r in rows if (r["solver"], r["jump"], r["nfe"]) == (name, jump, nfe)}


def _cell(values: Iterable[float], sign: str = "") -> str:
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):{sign}.4f} ± {error:.4f}"


def draw(rows: list[dict[str, Any]], metrics: Sequence[str], path: Path) -> None:
    """One panel for every metric: it against evaluations, plain dashed and teleported drawn through."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(metrics), 3.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for k, name in enumerate(dict.fromkeys(row["solver"] for row in rows)):
            for jump in (False, True):
                values = [statistics.fmean(_by_seed(rows, name, jump, nfe, metric).values()) for nfe in EVALUATIONS]
                label = f"{name} + teleport" if jump else name
                axes.plot(EVALUATIONS, values, "-" if jump else "--", color=f"C{k}", marker=".", label=label)
        axes.set_xscale("log")
        axes.set_yscale("linear" if metric == "recall" else "log")
        axes.set_xticks(EVALUATIONS, map(str, EVALUATIONS))
        axes.minorticks_off()
        axes.set_xlabel("network evaluations")
        axes.set_title(metric)
    axes.legend(fontsize="x-small")
    save_figure(figure, path)
