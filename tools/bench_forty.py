"""The paper's mixture of forty modes, annealed: its own recipe and ours at equal evaluations."""

import statistics

import torch
from torch import Tensor

from samplers import GaussianMixture, annealed
from tools.bench_particles import DEFAULT, LOW, NAIVE, PAPER, SCORE_2, Figure, run, seeded, weights_of
from tools.exact_targets import mixture_power, mode_error, sliced_wasserstein


def forty_table(seeds: int, particles: int) -> str:
    """The paper's mixture of forty modes at inverse temperature 3, its recipe and ours at equal evaluations."""
    generator = torch.Generator().manual_seed(0)
    means = ((torch.rand((40, 2), generator=generator) - 0.5) * 80).double()
    lines_ = [
        f"40 modes in [-40, 40]^2, beta = 3, {particles} particles, {seeds} seeds, 600 evaluations each (a product "
        "with a probe counts as two)",
        "",
        "| modes' deviation | sampler | steps | sliced W2 | error of the modes' shares | unique ancestors |",
        "|--:|:--|--:|--:|--:|--:|",
    ]
    arms = {
        "naive": (NAIVE, 600),
        "paper's recipe: target score, systematic every step": (PAPER, 600),
        "score form, zeta 2, ESS": (SCORE_2, 600),
        "without options (trace form, ESS)": (DEFAULT, 200),
    }
    for deviation in (2.127, 1.313):
        variances = torch.full((40,), deviation**2, dtype=torch.float64)
        base = GaussianMixture(torch.ones(40), means, variances)
        exact, _ = mixture_power(base, variances, 3)
        modes = GaussianMixture(torch.ones(40), means, variances / 3)
        shares = _shares(exact, means)
        modes.log_weights = shares.clamp_min(1e-12).log()
        floor = [_forty(exact, modes, exact.sample(particles, LOW, seeded(50 + s)), None) for s in range(seeds)]
        lines_.append(f"| {deviation} | i.i.d. | | {_pair(floor)} | {particles} |")
        for name, (corrector, steps) in arms.items():
            runs = [run(annealed(base, 3.0), 2, corrector, steps, particles, seed, high=80.0) for seed in range(seeds)]
            found = [_forty(exact, modes, d.last.x, weights_of(d, corrector)) for d in runs]
            left = statistics.fmean(float(d.last.unique_ancestors) for d in runs)
            lines_.append(f"| {deviation} | {name} | {steps} | {_pair(found)} | {left:.0f} |")
    return "\n".join(lines_) + "\n"


def _forty(exact: GaussianMixture, modes: GaussianMixture, x: Tensor, weights: Tensor | None) -> tuple[float, float]:
    weights = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if weights is None else weights
    reference = exact.sample(len(x), LOW, seeded(7))
    return sliced_wasserstein(x, weights, reference), mode_error(x, weights, modes)


def _pair(values: list[tuple[float, float]]) -> str:
    return " | ".join(str(Figure(v)) for v in zip(*values, strict=True))


def _shares(exact: GaussianMixture, means: Tensor) -> Tensor:
    """The weight of a mixture's components by the nearest of these means."""
    nearest = torch.cdist(exact.means, means).argmin(1)
    return torch.zeros(len(means), dtype=torch.float64).index_add_(0, nearest, exact.log_weights.exp())
