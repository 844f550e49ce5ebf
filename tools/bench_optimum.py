"""The optimum of every divergence, and the learned ratio, against what is exact.

Optimum: p is two Gaussians on a line, the student x = m + s z, so that q, r, both scores and D_f(p || q) at one noise
level are known; D_f is minimised by quadrature, and by the trainer, with the exact ratio and score or with learned
ones. Ratio: a discriminator between two known mixtures, its logit against ln r.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import toy
from distill.adversary import Adversary, Comparison, FakeHeads, TeacherHeads
from distill.discriminator import Discriminator, log_ratio
from distill.divergences import DIVERGENCES, FDivergence, alpha
from distill.losses import denoising_loss
from distill.noise import log_normal_level
from distill.optim import Update, adamw, learning_rate
from distill.pictures import save_figure
from distill.real import RealMixture
from distill.sections import LogNormal, Optimizer, Toy
from distill.student import OneStep
from distill.taps import Tap
from distill.targets import Fixed
from distill.trainer import Trainer, train
from distill.weights import RatioWeight
from samplers import GaussianMixture, NetworkDenoiser
from tools.bench_toys import BatchShare

SIGMA = 0.6  # the noise level of the optimum
START = (1.0, 1.5)  # m and s of the first student
SHOWN: dict[str, FDivergence] = {**DIVERGENCES, "alpha(2)": alpha(2)}
SIGMAS = (0.1, 0.3, 1.0, 3.0)  # noise levels of the learned ratio


class ExactRatio:
    """An adversary that knows both laws; its one head is ln r. The student may move."""

    bridges = False

    def settle(self) -> None:
        pass

    def __init__(self, target: GaussianMixture, student: toy.AffineStudent) -> None:
        self.target, self.student = target, student

    @torch.no_grad()
    def compare(self, fake: Any, target: Any, x: Tensor, sigma: Tensor, cond: Any, adversarial: bool) -> Comparison:
        ln_r = self.target.log_density(x, sigma) - self.student.law().log_density(x, sigma)
        return Comparison(fake(x, sigma, cond), target(x, sigma, cond), ln_r[:, None])

    def learn(self, denoising: Callable[[], Tensor], *_: Any) -> Iterator[Tensor]:
        yield denoising().mean()


class ExactFake(nn.Module):
    """The exact denoiser of an affine student's law, as it stands; its parameter does nothing."""

    def __init__(self, student: toy.AffineStudent) -> None:
        super().__init__()
        self._law, self.nothing = student.law, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self._law()(x, sigma) + 0 * self.nothing


def exact_optimum(divergence: FDivergence, mixture: GaussianMixture, start: tuple[float, float] = START) -> list[float]:
    """The minimiser (m, s) of D_f(p || q) at noise level SIGMA, by quadrature, downhill from `start`."""
    from scipy.optimize import minimize

    x = torch.linspace(-30, 30, 12_001, dtype=torch.float64)
    log_p = mixture.log_density(x[:, None], SIGMA).double()

    def value(parameters: Any) -> tuple[float, Any]:
        m, log_s = torch.tensor(parameters, dtype=torch.float64, requires_grad=True).unbind()
        variance = log_s.exp() ** 2 + SIGMA**2
        log_q = -0.5 * ((x - m) ** 2 / variance + variance.log() + math.log(2 * math.pi))
        kept = (log_q > -300) & (log_p > -300)
        f = torch.trapezoid(log_q[kept].exp() * divergence.f((log_p - log_q)[kept].exp()), x[kept])
        gradient = torch.autograd.grad(f, [m, log_s])
        return float(f.detach()), [float(g) for g in gradient]

    found = minimize(value, [start[0], math.log(start[1])], jac=True, method="L-BFGS-B", options={"ftol": 1e-14})
    return [float(found.x[0]), math.exp(found.x[1])]


def trained_optimum(divergence: FDivergence, learned: bool, seed: int = 0, steps: int = 600) -> list[float]:
    """(m, s) where the trainer ends: with the exact fake score and ratio, or with a network and its heads for both."""
    torch.manual_seed(seed)
    mixture = toy.two_modes()
    student = toy.AffineStudent(1, START[1])
    student.shift.data.fill_(START[0])
    rates, fake_rates = Optimizer(lr=0.02), Optimizer(lr=5e-3, betas=(0.0, 0.99))
    level = partial(torch.full_like, fill_value=SIGMA)
    fake: nn.Module = ExactFake(student)
    adversary: Adversary = ExactRatio(mixture, student)
    heads: Discriminator | None = None
    if learned:
        _, fake = toy.networks(mixture, Toy())
        tap = Tap(fake.network, (0, 1, 2))
        heads = heads_for(fake, tap, 1)
        adversary = FakeHeads(network=fake, tap=tap, heads=heads, train_heads=heads, reals=RealMixture(mixture))
    fake_steps = 3 if learned else 1
    trainer = Trainer(
        OneStep(student, 1.0),
        fake,
        Fixed(mixture),
        Update(adamw(student, rates), partial(learning_rate, rates, steps=steps)),
        Update(adamw(fake, fake_rates, heads), partial(learning_rate, fake_rates, steps=steps * fake_steps)),
        level,
        level,
        BatchShare(seed),  # type: ignore[arg-type]
        (1,),
        ratio_weight=RatioWeight(divergence, clip=(1e-4, 1e4), bins=1),  # at one level they only change the step size
        weighting=lambda x, denoised, sigma: torch.ones_like(sigma),
        adversary=adversary,
        fake_steps=fake_steps,
        sigma_data=getattr(fake, "sigma_data", 1.0),
    )
    tail = []
    for n, _ in enumerate(train(trainer, steps)):
        if n >= 0.9 * steps:
            tail.append((student.shift.item(), abs(student.scale.item())))
    return torch.tensor(tail).mean(0).tolist()


def heads_for(denoiser: nn.Module, tap: Tap, dim: int) -> Discriminator:
    """Untrained heads on a toy's denoiser."""
    with torch.no_grad():
        return Discriminator(tap.encode(lambda: denoiser(torch.zeros(1, dim), torch.ones(1))))


def optimum_rows(
    learned_seeds: tuple[int, ...] = (0, 1, 2),
) -> list[tuple[str, list[float], list[float], list[list[float]]]]:
    """(name, exact, found with the exact ratio, found with a learned one by seed) for every divergence."""
    mixture = toy.two_modes()
    return [
        (
            name,
            exact_optimum(divergence, mixture),
            trained_optimum(divergence, learned=False),
            [trained_optimum(divergence, learned=True, seed=seed) for seed in learned_seeds],
        )
        for name, divergence in SHOWN.items()
    ]


def optimum_table(rows: list[tuple[str, list[float], list[float], list[list[float]]]]) -> str:
    """A row for every divergence: (m, s) exact, found, and found with learned ratio and score."""
    lines = [
        "| divergence | exact m, s | trainer, exact ratio | learned ratio and score, mean | worst error |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name, exact, found, learned in rows:
        mean = torch.tensor(learned).mean(0).tolist()
        worst = max(abs(a - b) for pair in learned for a, b in zip(pair, exact, strict=True))
        cells = [", ".join(f"{v:.3f}" for v in pair) for pair in (exact, found, mean)]
        lines.append(f"| {name} | {' | '.join(cells)} | {worst:.3f} |")
    return "\n".join(lines) + "\n"


def draw_optima(rows: list[tuple[str, list[float], list[float], list[list[float]]]], path: Path) -> None:
    """The (m, s) plane: exact optima as crosses, those found as rings and dots; above it the densities, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    densities, plane = figure.subplots(1, 2)
    x = torch.linspace(-5, 6, 400)
    p = toy.two_modes().log_density(x[:, None], SIGMA).exp()
    densities.fill_between(x.numpy(), p.numpy(), color="lightgrey", label="p")
    for k, (name, exact, found, learned) in enumerate(rows):
        color = f"C{k}"
        q = torch.distributions.Normal(exact[0], math.hypot(exact[1], SIGMA)).log_prob(x).exp()
        densities.plot(x.numpy(), q.numpy(), color=color, linewidth=1)
        plane.plot(*exact, "x", color=color, markersize=10, label=name)
        plane.plot(*found, "o", color=color, markersize=9, fillstyle="none")
        for pair in learned:
            plane.plot(*pair, ".", color=color)
    densities.set_title(f"target and its best Gaussians, at noise level {SIGMA}")
    plane.set_title("x exact, o trainer with exact ratio, . learned")
    plane.set_xlabel("m")
    plane.set_ylabel("s")
    plane.legend(fontsize=7)
    save_figure(figure, path)


def two_laws() -> tuple[GaussianMixture, GaussianMixture]:
    """p: the ring. q: a narrower student of it that has lost half of the weight of four modes."""
    p = toy.ring()
    weights = torch.tensor([1.0, 0.5] * 4)
    return p, GaussianMixture(weights, 0.9 * p.means, torch.full((8,), 0.09))


def learned_ratio(
    features: str, steps: int = 1500, seed: int = 0, batch: int = 256
) -> list[tuple[float, float, float]]:
    """(sigma, correlation, slope of ln r on the logit) of a discriminator between two known laws.

    features: "fake", heads on a denoiser that learns q beside them; "teacher", on one that was trained on p before.
    Judged at 20,000 samples, half of each law, at every level.
    """
    torch.manual_seed(seed)
    p, q = two_laws()
    _, denoiser = toy.networks(p, Toy())
    level = partial(log_normal_level, config=LogNormal(mean=-1.0, std=1.5), sigma_min=0.05, sigma_max=5.0)
    if features == "teacher":
        _pretrain(denoiser, p, level, seed, batch)
    tap = Tap(denoiser.network, (0, 1, 2))
    heads = heads_for(denoiser, tap, p.dim)
    shared = {"network": denoiser, "tap": tap, "heads": heads, "train_heads": heads, "reals": RealMixture(p)}
    adversary = TeacherHeads(**shared, level=level) if features == "teacher" else FakeHeads(**shared)  # type: ignore[arg-type]
    rates = Optimizer(lr=5e-3, betas=(0.0, 0.99))
    optimizer = adamw(heads, rates) if features == "teacher" else adamw(denoiser, rates, heads)
    update = Update(optimizer, partial(learning_rate, rates, steps=steps))
    samples, share = RealMixture(q), BatchShare(seed, batch)
    for n in range(steps):
        noise: Any = share.noise(n)
        x0, sigma, eps = samples(noise, None), level(noise.uniform()), noise.normal((p.dim,))
        denoising: Callable[[], Tensor] = partial(torch.zeros, 1, requires_grad=True)
        if features == "fake":
            denoising = partial(denoising_loss, denoiser, x0, sigma, eps, None, denoiser.sigma_data)
        update(adversary.learn(denoising, x0, sigma, None, noise, {}), n)

    generator, rows = torch.Generator().manual_seed(1000 + seed), []
    for value in SIGMAS:
        x = torch.cat([law.sample(10_000, value, generator) for law in (p, q)])
        sigma = torch.full((len(x),), value)
        with torch.no_grad():
            logit = log_ratio(heads(tap.encode(partial(denoiser, x, sigma)))).double()
        exact = (p.log_density(x, sigma) - q.log_density(x, sigma)).double()
        table = torch.stack([logit, exact])
        covariance = table.cov()
        rows.append((value, float(table.corrcoef()[0, 1]), float(covariance[0, 1] / covariance[0, 0])))
    return rows


def _pretrain(
    denoiser: NetworkDenoiser, law: GaussianMixture, level: Callable[[Tensor], Tensor], seed: int, batch: int
) -> None:
    """A teacher of the law: denoising score matching, then frozen."""
    rates, samples, share, steps = Optimizer(lr=5e-3), RealMixture(law), BatchShare(seed + 10**6, batch), 1000
    update = Update(adamw(denoiser, rates), partial(learning_rate, rates, steps=steps))
    for n in range(steps):
        noise: Any = share.noise(n)
        x0, sigma, eps = samples(noise, None), level(noise.uniform()), noise.normal((law.dim,))
        update(denoising_loss(denoiser, x0, sigma, eps, None, denoiser.sigma_data).mean(), n)
    denoiser.requires_grad_(False)


def ratio_table(seeds: tuple[int, ...] = (0, 1, 2)) -> str:
    """Correlation and calibration slope by noise level, mean and worst of the seeds, for both places of the heads."""
    lines = ["| heads on | " + " | ".join(f"sigma {s}" for s in SIGMAS) + " |", "|:--|" + "--:|" * len(SIGMAS)]
    for features in ("teacher", "fake"):
        runs = torch.tensor([learned_ratio(features, seed=seed) for seed in seeds])
        mean, low, high = runs.mean(0), runs.min(0).values, runs.max(0).values
        cells = [
            f"{mean[k, 1]:.3f} (worst {low[k, 1]:.3f}), {mean[k, 2]:.2f} ({low[k, 2]:.2f} .. {high[k, 2]:.2f})"
            for k in range(len(SIGMAS))
        ]
        lines.append(f"| {features} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
