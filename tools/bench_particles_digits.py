"""Feynman-Kac correctors on a trained network, the class-conditional digits teacher, as `distill sample` runs them.

Every image is drawn from its own particles. Accuracy is by a second classifier, which no reward knows. `one particle`
moves in the same way and has no weight to be drawn by: what everybody does.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from distill.folders import pipeline_folder
from distill.particles import ParticleGenerator, TargetChoice
from distill.pictures import side_by_side
from distill.teacher import Teacher
from samplers import (
    Conditioned,
    Corrector,
    Guided,
    Resampling,
    Target,
    ancestral,
    annealed,
    denoiser_from,
    diagnose,
    feynman_kac,
    geometric_average,
    karras_sigmas,
    sample,
    start_particles,
)
from samplers.particles import Particles
from samplers.resampling import LogWeights
from samplers.weighted_path import WeightedPath
from tools.bench_digits import teacher as train_teacher
from tools.bench_particles import NAIVE, NEVER, Figure
from tools.digits_classifier import DigitsClassifier, log_probability, train
from tools.digits_score import DigitsJudge

STEPS, PARTICLES = 50, 8
ALWAYS_SCORE = Corrector(form="score", resampling=Resampling(threshold=1.0))
METRICS = ("accuracy", "fd", "pixel_fd", "precision", "recall")
LEVELS = (20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.05)
PAIRS = ((3, 8), (1, 7))


def digits_tables(folder: Path, teachers: Path, seeds: int = 3, n: int = 200) -> str:
    """Quality of every target with and without weights, the noise of the trace, and the picture of the README."""
    train_teacher(teachers, 0)
    model = Teacher.load(pipeline_folder(teachers / "seed-0/teacher"))
    numbers, judge = DigitsJudge.load(), train(seed=1)
    lines = [
        f"Digits teacher, {STEPS} steps, {n} images, {seeds} seeds, against held-out digits",
        "",
        "| target | particles an image | " + " | ".join(METRICS) + " | lowest ESS |",
        "|:--|--:|" + "--:|" * (len(METRICS) + 1),
    ]
    for name, choice, guidance in arms():
        for particles in (1,) if name == MODEL else (1, PARTICLES):
            generator = generator_of(model, replace(choice, particles=particles), guidance)
            runs = [_judged(generator, seed, n, numbers, judge) for seed in range(seeds)]
            cells = [str(Figure([run[metric] for run in runs])) for metric in METRICS]
            lines.append(f"| {name} | {particles} | {' | '.join(cells)} | {generator.lowest_ess:.1f} |")
    draw_picture(model, folder / "particles-digits.png")
    return "\n".join([*lines, "", ratio_table(model), products_table(model, seeds, judge), noise_table(model)])


MODEL = "the model, by class"


def arms() -> list[tuple[str, TargetChoice, float]]:
    """Name, what to sample, the guidance of its base."""
    reward = TargetChoice("reward", reward=log_probability)
    return [
        (MODEL, TargetChoice("annealed"), 1.0),
        ("guidance 3", TargetChoice("guided"), 3.0),
        ("annealed 2", TargetChoice("annealed", beta=2.0), 1.0),
        ("no class, times p(class), black box", reward, 0.0),
        ("no class, times p(class), steered", replace(reward, steer=True), 0.0),
    ]


def generator_of(model: Teacher, choice: TargetChoice, guidance: float) -> ParticleGenerator:
    """As the command makes it; one particle moves along the sum of the scores, with the model's own noise."""
    sigmas = karras_sigmas(STEPS, model.sigma_min, model.sigma_max)
    corrector = Corrector() if choice.particles > 1 else NAIVE
    return ParticleGenerator(replace(model, guidance=guidance), choice, sigmas, torch.device("cpu"), corrector)


def _judged(
    generator: ParticleGenerator, seed: int, n: int, numbers: DigitsJudge, judge: DigitsClassifier
) -> dict[str, float]:
    images, labels = generator(seed, range(n)), generator.labels(range(n))
    assert labels is not None
    found = numbers(images, labels)
    accuracy = float((judge.predict(images) == labels).double().mean())
    return {"accuracy": accuracy, **{name: found[name] for name in METRICS[1:]}}


def products_table(model: Teacher, seeds: int, judge: DigitsClassifier, n: int = 60) -> str:
    """Products of two classes: how far both are there, by the second classifier, in nats."""
    lines = [
        f"Products of two classes, {n} images a seed: mean of log p(a) + log p(b) by the second classifier",
        "",
        f"| classes | one particle | {PARTICLES} particles |",
        "|:--|--:|--:|",
    ]
    for pair in PAIRS:
        cells = []
        for particles in (1, PARTICLES):
            generator = generator_of(model, TargetChoice("product", classes=pair, particles=particles), 1.0)
            images = [generator(seed, range(n)) for seed in range(seeds)]
            both = [float(judge(x).log_softmax(1)[:, list(pair)].sum(1).mean()) for x in images]
            cells.append(str(Figure(both)))
        lines.append(f"| {pair[0]} and {pair[1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def noise_table(model: Teacher, particles: int = 32, repeats: int = 4) -> str:
    """What one step of 50 adds to the log-weights of annealing by 2, by level.

    Its spread among particles that the exact trace explains, and what independent probes add to it.
    """
    label = torch.tensor([3])
    target = annealed(Conditioned(model.denoiser, label), 2.0)
    sigmas = karras_sigmas(STEPS, model.sigma_min, model.sigma_max)
    noise = torch.Generator().manual_seed(0)
    x, _ = start_particles(target, model.shape, float(sigmas[0]), particles, generator=noise)
    run = Corrector(resampling=NEVER)
    states = list(feynman_kac(target, x, sigmas, generator=noise, corrector=run))
    counts = (1, 4, 16)
    lines = [
        "| sigma | exact trace | " + " | ".join(f"noise of {n} probe{'s' if n > 1 else ''}" for n in counts) + " |",
        "|--:|--:|" + "--:|" * len(counts),
    ]
    shown = {min(range(len(states) - 1), key=lambda k: abs(float(states[k].sigma) - level)) for level in LEVELS}
    for k in range(len(states) - 2):
        if k not in shown:
            continue
        sigma, dv = float(states[k].sigma), float(states[k].sigma ** 2 - states[k + 1].sigma ** 2)
        exact = _rates(target, states[k].x, sigma, None, 1)[0]
        cells = [f"{float((dv * exact).std()):.3f}"]
        for n in counts:
            errors = _rates(target, states[k].x, sigma, n, repeats) - exact
            errors = errors - errors.mean(1, keepdim=True)  # what all share does not matter
            cells.append(f"{float((dv * errors).square().mean().sqrt()):.3f}")
        lines.append(f"| {sigma:.3g} | {' | '.join(cells)} |")
    whole = []
    for n in counts:
        noise = torch.Generator().manual_seed(1)
        x, _ = start_particles(target, model.shape, float(sigmas[0]), particles, generator=noise)
        corrector = Corrector(probes=n, resampling=NEVER)
        last = diagnose(feynman_kac(target, x, sigmas, generator=noise, corrector=corrector)).last
        whole.append(f"{n} probe{'s' if n > 1 else ''} {float(last.log_weights.std()):.2f}")
    title = "Standard deviation of a step's log-weights, annealed 2, class 3, in nats"
    return "\n".join([title, "", *lines, "", f"of a whole run without resampling: {', '.join(whole)}"]) + "\n"


@torch.no_grad()
def ratio_table(model: Teacher, n: int = 100, steps: int = 100) -> str:
    """log q_c / q_u of the network's two laws at samples of guidance 1 and 3, carried along their paths (Ito).

    Where q_u is the mean of ten classes' laws it is at most log 10 = 2.30 nats, at every noise level.
    """
    labels, sigmas = torch.arange(n) % 10, karras_sigmas(steps, model.sigma_min, model.sigma_max)[:-1]
    both = Guided(model.denoiser, 2.0, model.null_label)
    lines = ["| guidance | log q_c / q_u at sigma 3 | 1 | 0.3 | at the end | its spread |", "|--:|--:|--:|--:|--:|--:|"]
    for w in (1.0, 3.0):
        generator = torch.Generator().manual_seed(0)
        x = sigmas[0] * torch.randn((n, *model.shape), generator=generator)
        ratio, cells, levels = torch.zeros(n, dtype=torch.float64), [], [3.0, 1.0, 0.3]
        for sigma, sigma_next in pairwise(sigmas):
            cond, uncond = both.pair(x, sigma, labels)
            v, v_next = sigma**2, sigma_next**2
            noise = torch.randn(x.shape, generator=generator)
            moved = torch.lerp(torch.lerp(uncond, cond, w), x, v_next / v) + (v_next * (1 - v_next / v)).sqrt() * noise
            ours, theirs = ((d - x).flatten(1).double() / v for d in (cond, uncond))
            drift = 0.5 * (v - v_next) * (ours.square().sum(1) - theirs.square().sum(1))
            # the factor of the kernels' ratio leaves little of the error of finitely many steps
            ratio += v / v_next * (((ours - theirs) * (moved - x).flatten(1)).sum(1) - drift)
            x = moved
            if levels and float(sigma_next) <= levels[0]:
                cells.append(f"{float(ratio.mean()):.2f}")
                levels.pop(0)
        lines.append(f"| {w:g} | {' | '.join(cells)} | {float(ratio.mean()):.2f} | {float(ratio.std()):.2f} |")
    return "\n".join(lines) + "\n"


def _rates(target: Target, x: Tensor, sigma: float, probes: int | None, repeats: int) -> Tensor:
    """[repeats, B]."""
    generator = torch.Generator().manual_seed(5)
    corrector = Corrector(probes=probes)
    fresh = [WeightedPath(target, corrector, None, generator, 1) for _ in range(repeats)]
    return torch.stack([steps.evaluate(x, sigma).rate for steps in fresh])


def draw_picture(model: Teacher, path: Path, n: int = 50) -> None:
    """One particle and several, side by side: guidance 3, and the product of 3 and 8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    product = TargetChoice("product", classes=(3, 8))
    for name, choice, guidance in (("guidance 3", TargetChoice("guided"), 3.0), ("3 times 8", product, 1.0)):
        for particles in (1, PARTICLES):
            generator = generator_of(model, replace(choice, particles=particles), guidance)
            title = f"{name}, {particles} particle{'s' if particles > 1 else ''}"
            rows.append((title, generator(0, range(n))))
    side_by_side(rows, path)


def cost_tables(repeats: int = 7) -> str:
    """A corrected step against a plain guided one on a UNet, and resampling against copying the particles."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32, block_out_channels=(64, 128, 128), norm_num_groups=8, num_class_embeds=11, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval().requires_grad_(False)  # fmt: skip
    denoiser = denoiser_from(network, DDPMScheduler())
    labels, null = torch.full((8,), 3), torch.tensor([10])
    x, sigmas = 10 * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), karras_sigmas(3, 0.1, 10.0)
    guided = Guided(denoiser, 3.0, 10)
    target = geometric_average(Conditioned(denoiser, null), denoiser, 3.0)

    def plain() -> None:
        sample(ancestral, guided, x, sigmas, labels, torch.Generator().manual_seed(0))

    def corrected() -> None:
        for _ in feynman_kac(target, x, sigmas, labels, torch.Generator().manual_seed(0), corrector=ALWAYS_SCORE):
            pass

    ratios = [_seconds(corrected) / _seconds(plain) for _ in range(repeats)]
    k, d = 4096, 12288
    particles = torch.randn(k, d)
    weights = LogWeights(torch.randn(1, k, generator=torch.Generator().manual_seed(0)).double())
    swarm, resampling = Particles.begin(weights, 1.0), Resampling(threshold=1.0)

    def resample() -> None:
        _, index = swarm.resample(resampling, torch.Generator().manual_seed(0), 1.0)
        assert index is not None
        particles[index]

    index = torch.randint(k, (k,)).sort().values
    gathers = [_seconds(resample) / _seconds(lambda: particles[index]) for _ in range(repeats)]
    return (
        f"A corrected step (score form, resampling every step) over a plain guided one, UNet of "
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters at 32 x 32, batch 8: "
        f"{statistics.median(ratios):.3f} (median of {repeats} pairs)\n"
        f"Resampling {k:,} particles of {d:,} numbers over one gather of them: {statistics.median(gathers):.3f}\n"
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
