"""Feynman-Kac correctors on targets that are known exactly: distances, log-evidence and modes, over several seeds.

Scores are exact, so what is left is the sampler's. `naive` moves along the same summed scores and looks at no weight;
`i.i.d.` is as many independent samples of the target.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from samplers import (
    Corrector,
    Gaussian,
    GaussianMixture,
    Resampling,
    Target,
    annealed,
    diagnose,
    feynman_kac,
    geometric_average,
    karras_sigmas,
    product,
    reward_tilted,
    start_particles,
)
from samplers.diagnosis import Diagnosis
from tools.exact_targets import (
    Grid,
    mixture_power,
    mode_error,
    on_grid,
    sliced_wasserstein,
    wasserstein_to_grid,
)

HIGH, LOW = 40.0, 0.02
ALWAYS = Resampling(threshold=1.0)
NEVER = Resampling(threshold=0.0)
NAIVE = Corrector(form="score", zeta=1.0, resampling=NEVER)  # its weights are not looked at
PAPER = Corrector(form="score", zeta=1.0, proposal="euler_maruyama", rule="left", resampling=ALWAYS)
SCORE, SCORE_2 = Corrector(form="score", zeta=1.0), Corrector(form="score", zeta=2.0)
DEFAULT = Corrector()


class Law(NamedTuple):
    """A target, and what it is exactly."""

    target: Target
    grid: Grid
    dim: int = 1

    def distance(self, x: Tensor, weights: Tensor) -> float:
        """2-Wasserstein on the line, sliced in the plane (against a fixed sample of the target of the same size)."""
        if self.dim == 1:
            return wasserstein_to_grid(x, weights, self.grid)
        return sliced_wasserstein(x, weights, self.grid.sample(len(x), torch.Generator().manual_seed(99)))


@dataclass(frozen=True)
class Figure:
    """A mean over seeds with its standard error."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


def mixture(weights: list[float], means: list[list[float]], deviations: list[float]) -> GaussianMixture:
    """Isotropic components, float64."""
    scales = torch.tensor(deviations, dtype=torch.float64)
    return GaussianMixture(torch.tensor(weights), torch.tensor(means, dtype=torch.float64), scales**2)


def lines() -> dict[str, Law]:
    """The one-dimensional targets. Everything (`wide`), two of its classes, and two experts."""
    wide = mixture([0.3, 0.4, 0.3], [[-4.0], [0.0], [3.0]], [0.7, 0.8, 0.7])
    classes = mixture([0.35, 0.65], [[0.0], [3.2]], [0.7, 0.5])
    first = mixture([0.3, 0.4, 0.3], [[-4.0], [0.0], [3.0]], [0.5, 0.8, 0.6])
    second = mixture([0.6, 0.4], [[-3.0], [2.0]], [1.2, 0.9])
    targets = {
        "guidance 2.5": geometric_average(wide, classes, 2.5),
        "guidance 7.5": geometric_average(wide, classes, 7.5),
        "product": product([first, second]),
        "annealed 3": annealed(first, 3.0),
        "annealed .5": annealed(first, 0.5),
    }
    return {name: Law(target, on_grid(target, 14.0, 20000)) for name, target in targets.items()}


def planes() -> dict[str, Law]:
    """The two-dimensional targets."""
    wide = mixture([1.0] * 4, [[-3.0, -3.0], [3.0, -2.5], [-2.5, 3.0], [3.0, 3.0]], [1.0, 1.1, 0.9, 1.0])
    classes = mixture([0.6, 0.4], [[3.0, 2.6], [-2.0, 2.8]], [0.7, 0.6])
    other = mixture([0.5, 0.3, 0.2], [[2.5, -1.0], [-1.0, 2.0], [3.0, 3.5]], [1.4, 1.2, 0.8])
    targets = {
        "2-D guidance 3": geometric_average(wide, classes, 3.0),
        "2-D product": product([classes, other]),
        "2-D annealed 2": annealed(wide, 2.0),
        "2-D guided product": product([wide, classes, other], [-1.0, 1.2, 0.8]),
    }
    return {name: Law(target, on_grid(target, 9.0, 400, 2), 2) for name, target in targets.items()}


def run(
    target: Target, dim: int, corrector: Corrector, steps: int, particles: int, seed: int, high: float = HIGH
) -> Diagnosis:
    """One group from its start at `high` to LOW, on a Karras grid, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, log_weights = start_particles(target, (dim,), high, particles, generator=generator, dtype=torch.float64)
    sigmas = karras_sigmas(steps, LOW, high)[:-1].double()
    return diagnose(feynman_kac(target, x, sigmas, generator=generator, log_weights=log_weights, corrector=corrector))


def weights_of(diagnosis: Diagnosis, corrector: Corrector) -> Tensor:
    """[N]; equal for the naive sampler."""
    weights = diagnosis.last.particles.weights.probabilities[0]
    return torch.full_like(weights, 1 / len(weights)) if corrector is NAIVE else weights


def particles_tables(seeds: int = 6, particles: int = 1024) -> str:
    """Every table, as Markdown."""
    parts = (
        forms_table(seeds, particles),
        steps_table(seeds, particles),
        dimensions_table(seeds, particles),
        late_table(seeds, particles),
        varying_table(seeds, particles),
        rewards_table(seeds, particles),
    )
    return "\n".join(parts)


def forms_table(seeds: int, particles: int, steps: int = 200) -> str:
    """The forms beside each other on the line, and the log-evidence of the default."""
    arms = {"naive": NAIVE, "score, zeta 1": SCORE, "score, zeta 2": SCORE_2, "default": DEFAULT}
    lines_ = [
        f"W2 to the exact density, {steps} steps, {particles} particles, {seeds} seeds",
        "",
        f"| target | {' | '.join(arms)} | i.i.d. | log-evidence of the default minus exact |",
        "|:--|" + "--:|" * (len(arms) + 2),
    ]
    for name, law in lines().items():
        cells, evidence = [], Figure([])
        for corrector in arms.values():
            runs = [run(law.target, 1, corrector, steps, particles, seed) for seed in range(seeds)]
            cells.append(str(Figure([law.distance(d.last.x, weights_of(d, corrector)) for d in runs])))
            evidence = Figure([float(d.last.log_evidence) - law.grid.log_normaliser for d in runs])
        lines_.append(f"| {name} | {' | '.join(cells)} | {_floor(law, particles)} | {evidence} |")
    return "\n".join(lines_) + "\n"


def steps_table(seeds: int, particles: int) -> str:
    """What a user gets without options against naive score scaling, on every target, at few and many steps."""
    counts = (50, 100, 200)
    lines_ = [
        f"Without options against naive score scaling, {particles} particles, {seeds} seeds: W2 (on the plane, sliced)",
        "",
        "| target | " + " | ".join(f"naive, {n} | default, {n}" for n in counts) + " | i.i.d. |",
        "|:--|" + "--:|" * (2 * len(counts) + 1),
    ]
    for name, law in {**lines(), **planes()}.items():
        cells = []
        for steps in counts:
            for corrector in (NAIVE, DEFAULT):
                runs = [run(law.target, law.dim, corrector, steps, particles, seed) for seed in range(seeds)]
                cells.append(str(Figure([law.distance(d.last.x, weights_of(d, corrector)) for d in runs])))
        lines_.append(f"| {name} | {' | '.join(cells)} | {_floor(law, particles)} |")
    return "\n".join(lines_) + "\n"


def dimensions_table(seeds: int, particles: int, steps: int = 100) -> str:
    """The square of a mixture of three modes in more and more dimensions."""
    arms = {
        "naive": NAIVE,
        "score, zeta 1": SCORE,
        "trace, one probe": DEFAULT,
        "trace, exact": Corrector(probes=None),
    }
    lines_ = [
        f"p^2 of three modes, {steps} steps, {particles} particles, {seeds} seeds: error of the modes' shares (unique "
        "ancestors)",
        "",
        f"| dimensions | {' | '.join(arms)} | i.i.d. |",
        "|--:|" + "--:|" * (len(arms) + 1),
    ]
    for dim in (2, 8, 32):
        generator = torch.Generator().manual_seed(dim)
        means = torch.randn((3, dim), generator=generator, dtype=torch.float64)
        means = 3.0 * means / means.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [1.1], [0.9]])
        deviations = [0.55, 0.5, 0.45]  # p^2 weighs a mode by weight^2 deviation^-d: the largest becomes the smallest
        base = mixture([0.5, 0.3, 0.2], means.tolist(), deviations)
        exact, _ = mixture_power(base, torch.tensor(deviations, dtype=torch.float64) ** 2, 2)
        many = torch.cdist(exact.sample(100_000, LOW, seeded(1)), means).argmin(1).bincount(minlength=3)
        modes = GaussianMixture((many + 1e-3) / len(many), means, torch.ones(3, dtype=torch.float64))
        cells = []
        for corrector in arms.values():
            runs = [run(annealed(base, 2.0), dim, corrector, steps, particles, seed) for seed in range(seeds)]
            errors = Figure([mode_error(d.last.x, weights_of(d, corrector), modes) for d in runs])
            left = statistics.fmean(float(d.last.unique_ancestors) for d in runs)
            cells.append(f"{errors} ({left:.0f})")
        floor = []
        for seed in range(seeds):
            x = exact.sample(particles, LOW, torch.Generator().manual_seed(seed))
            floor.append(mode_error(x, torch.ones(particles), modes))
        lines_.append(f"| {dim} | {' | '.join(cells)} | {Figure(floor)} |")
    return "\n".join(lines_) + "\n"


def late_table(seeds: int, particles: int) -> str:
    """Guidance 2.5 begun at sigma 4: plain noise against the product of the models' Gaussians."""
    law = lines()["guidance 2.5"]
    gaussians = [_gaussian_of(d) for d in law.target.denoisers]  # type: ignore[arg-type]
    kept: dict[str, list[float]] = {"plain noise, no weights": [], "Gaussian product, with weights": []}
    for seed in range(seeds):
        for name, models in zip(kept, (None, gaussians), strict=True):
            generator = torch.Generator().manual_seed(seed)
            x, log_weights = start_particles(
                law.target, (1,), 4.0, particles, gaussians=models, generator=generator, dtype=torch.float64
            )
            sigmas = karras_sigmas(100, LOW, 4.0)[:-1].double()
            first = None if models is None else log_weights
            last = diagnose(feynman_kac(law.target, x, sigmas, generator=generator, log_weights=first)).last
            kept[name].append(law.distance(last.x, last.particles.weights.probabilities[0]))
    cells = "; ".join(f"{name} {Figure(values)}" for name, values in kept.items())
    return f"Guidance 2.5 begun at sigma 4, 100 steps, W2: {cells}\n"


def varying_table(seeds: int, particles: int, steps: int = 200) -> str:
    """Guidance that rises as sigma falls, w = 1 + 1.5 / (1 + (sigma / 1.5)^2)."""
    final = lines()["guidance 2.5"]
    wide, classes = final.target.denoisers

    def scale(sigma: float) -> float:
        return 1 + 1.5 / (1 + (sigma / 1.5) ** 2)

    target = geometric_average(wide, classes, scale)
    law = Law(target, on_grid(target, 14.0, 20000))
    values: dict[str, list[float]] = {"naive": [], "with the term": []}
    for seed in range(seeds):
        for name, corrector in zip(values, (NAIVE, DEFAULT), strict=True):
            d = run(target, 1, corrector, steps, particles, seed)
            values[name].append(law.distance(d.last.x, weights_of(d, corrector)))
    cells = "; ".join(f"{name} {Figure(v)}" for name, v in values.items())
    return f"Guidance 1 -> 2.5 as sigma falls, {steps} steps, W2: {cells}; i.i.d. {_floor(law, particles)}\n"


def rewards_table(seeds: int, particles: int, steps: int = 200) -> str:
    """A quadratic reward under three schedules of its scale, as a black box and by its gradient."""
    base = lines()["product"].target.denoisers[0]
    schedules: dict[str, Callable[[float], float]] = {
        "constant": lambda sigma: 1.0,
        "1 / (1 + sigma^2)": lambda sigma: 1 / (1 + sigma**2),
        "1 - sigma / 40": lambda sigma: 1 - sigma / 40,
    }

    def reward(x: Tensor) -> Tensor:
        return -0.5 * (x[:, 0] - 1.0) ** 2

    lines_ = [
        f"exp(-(x - 1)^2 / 2) times a mixture, {steps} steps, {particles} particles, {seeds} seeds: W2",
        "",
        "| schedule | by the gradient, no weights | by the gradient | black box | i.i.d. |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name, scale in schedules.items():
        cells = []
        for gradient, weighted in ((True, False), (True, True), (False, True)):
            target = reward_tilted(base, reward, scale, gradient=gradient)
            law = Law(target, on_grid(target, 14.0, 20000))
            corrector = DEFAULT if weighted else NAIVE
            runs = [run(target, 1, corrector, steps, particles, seed) for seed in range(seeds)]
            cells.append(str(Figure([law.distance(d.last.x, weights_of(d, corrector)) for d in runs])))
        lines_.append(f"| {name} | {' | '.join(cells)} | {_floor(law, particles)} |")
    return "\n".join(lines_) + "\n"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _floor(law: Law, particles: int, repeats: int = 6) -> Figure:
    weights = torch.full((particles,), 1 / particles, dtype=torch.float64)
    return Figure([law.distance(law.grid.sample(particles, seeded(s)), weights) for s in range(repeats)])


def _gaussian_of(denoiser: GaussianMixture) -> Gaussian:
    """The Gaussian of a mixture's moments on the line."""
    shares = denoiser.log_weights.exp()
    mean = (shares[:, None] * denoiser.means).sum(0)
    spread = (shares[:, None] * (denoiser.standard_deviations[:, None] ** 2 + (denoiser.means - mean) ** 2)).sum(0)
    return Gaussian(mean, torch.ones((1, 1), dtype=torch.float64), spread, 0.0)
