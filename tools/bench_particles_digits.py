"""Feynman-Kac correctors on a trained network: the class-conditional digits teacher, and what a step costs.

Every arm has a group of particles for each class, all of which are looked at, drawn by their weights. Accuracy is by a
second classifier, which no reward knows. `no weights` moves in the same way and looks at no weight.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distill.data import digits
from distill.particles import ParticleGenerator, TargetChoice
from distill.pictures import side_by_side
from distill.teacher import Teacher, pipeline_folder
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
from samplers.diagnosis import Diagnosis
from samplers.particles import Particles
from samplers.resampling import LogWeights, systematic
from samplers.weighted_path import WeightedPath
from tools.bench_digits import teacher as train_teacher
from tools.bench_particles import NEVER, Figure
from tools.digits_classifier import DigitsClassifier, log_probability, train
from tools.scores import Reference, score

STEPS, PARTICLES = 50, 64
ALWAYS_SCORE = Corrector(form="score", resampling=Resampling(threshold=1.0))
METRICS = ("accuracy", "fd", "pixel_fd", "precision", "recall", "spread")
LEVELS = (20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.05)


def digits_tables(folder: Path, teachers: Path, seeds: int = 3) -> str:
    """Quality of every target with and without weights, the noise of the trace, and the picture of the README."""
    train_teacher(teachers, 0)
    model = Teacher.load(pipeline_folder(teachers / "seed-0/teacher"))
    held_out = digits("held-out")
    reference, judge = Reference.of(held_out.images), train(seed=1)
    arms = _arms()
    lines = [
        f"Digits teacher, {STEPS} steps, {PARTICLES} particles for each of ten classes, {seeds} seeds; held-out digits "
        f"themselves: spread {_spread(held_out.images, _labels_of(held_out)):.3f}",
        "",
        "| target | " + " | ".join(METRICS) + " | lowest ESS | ancestors left |",
        "|:--|" + "--:|" * (len(METRICS) + 2),
    ]
    for name, (choice, guidance, weighted) in arms.items():
        runs = [_judged(model, choice, guidance, weighted, seed, reference, judge) for seed in range(seeds)]
        cells = [str(Figure([run[metric] for run in runs])) for metric in METRICS]
        low, left = (statistics.fmean(run[key] for run in runs) for key in ("ess", "ancestors"))
        lines.append(f"| {name} | {' | '.join(cells)} | {low:.1f} | {left:.1f} |")
    draw_picture(model, folder / "particles-digits.png")
    return "\n".join([*lines, "", products_table(model, seeds, judge), noise_table(model)])


def _arms() -> dict[str, tuple[TargetChoice, float, bool]]:
    """Name -> what to sample, the guidance of its base, whether weights are looked at."""
    reward = TargetChoice("reward", reward=log_probability, particles=PARTICLES)
    steered = TargetChoice("reward", reward=log_probability, steer=True, particles=PARTICLES)
    guided, cold = TargetChoice("guided", particles=PARTICLES), TargetChoice("annealed", beta=2.0, particles=PARTICLES)
    return {
        "the model, by class": (TargetChoice("annealed", particles=PARTICLES), 1.0, True),
        "guidance 3, no weights": (guided, 3.0, False),
        "guidance 3": (guided, 3.0, True),
        "annealed 2, no weights": (cold, 1.0, False),
        "annealed 2": (cold, 1.0, True),
        "no class, steered by log p(class), no weights": (steered, 0.0, False),
        "no class, times p(class), black box": (reward, 0.0, True),
        "no class, times p(class), steered": (steered, 0.0, True),
    }


def groups(
    model: Teacher, choice: TargetChoice, guidance: float, weighted: bool, seed: int, corrector: Corrector | None = None
) -> tuple[Diagnosis, Tensor]:
    """A run with a group for each class (one for a product), and its labels [groups K]."""
    own = replace(model, guidance=guidance)
    sigmas = karras_sigmas(STEPS, model.sigma_min, model.sigma_max)
    corrector = corrector or (Corrector() if weighted else Corrector(form="score", zeta=1.0, resampling=NEVER))
    generator = ParticleGenerator(own, choice, sigmas, torch.device("cpu"), corrector)
    n, k = 1 if choice.name == "product" else 10, choice.particles
    labels = torch.arange(n).repeat_interleave(k)
    target, noise = generator.target(labels), torch.Generator().manual_seed(seed)
    x, log_weights = start_particles(target, model.shape, float(sigmas[0]), k, groups=n, cond=labels, generator=noise)
    states = feynman_kac(target, x, sigmas, labels, noise, groups=n, log_weights=log_weights, corrector=corrector)
    return diagnose(states), labels


def _images(diagnosis: Diagnosis, weighted: bool, seed: int) -> Tensor:
    """All particles, each as often as its weight says."""
    weights = diagnosis.last.log_weights
    if not weighted:
        return diagnosis.last.x
    chosen = systematic(weights, torch.Generator().manual_seed(1000 + seed))
    return diagnosis.last.x[(chosen + torch.arange(len(chosen))[:, None] * chosen.shape[1]).flatten()]


def _judged(
    model: Teacher,
    choice: TargetChoice,
    guidance: float,
    weighted: bool,
    seed: int,
    reference: Reference,
    judge: DigitsClassifier,
) -> dict[str, float]:
    diagnosis, labels = groups(model, choice, guidance, weighted, seed)
    images = _images(diagnosis, weighted, seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    found = score(images[order], reference, labels[order])
    return {
        "accuracy": float((judge.predict(images) == labels).double().mean()),
        "fd": found.fd,
        "pixel_fd": found.pixel_fd,
        "precision": found.precision,
        "recall": found.recall,
        "spread": _spread(images, labels),
        "ess": float(diagnosis.ess.min()),
        "ancestors": float(diagnosis.unique_ancestors[-1].double().mean()),
    }


def _spread(images: Tensor, labels: Tensor) -> float:
    """The mean distance of a pixel from its class's mean, root mean square."""
    parts = [images[labels == c] - images[labels == c].mean(0) for c in labels.unique()]
    return float(torch.cat(parts).square().mean().sqrt())


def _labels_of(data: object) -> Tensor:
    labels = getattr(data, "labels", None)
    assert isinstance(labels, Tensor)
    return labels


def products_table(model: Teacher, seeds: int, judge: DigitsClassifier) -> str:
    """Products of two classes: how far both are there, by the second classifier, in nats."""
    lines = [
        "| product of classes | weights | mean of log p(a) + log p(b) | spread | ancestors left |",
        "|:--|:--|--:|--:|--:|",
    ]
    for pair in ((3, 8), (1, 7), (4, 9)):
        choice = TargetChoice("product", classes=pair, particles=2 * PARTICLES)
        for weighted in (False, True):
            both, spread, left = [], [], []
            for seed in range(seeds):
                diagnosis, labels = groups(model, choice, 1.0, weighted, seed)
                images = _images(diagnosis, weighted, seed)
                both.append(float(judge(images).log_softmax(1)[:, list(pair)].sum(1).mean()))
                spread.append(_spread(images, labels))
                left.append(float(diagnosis.unique_ancestors[-1]))
            cells = f"{Figure(both)} | {Figure(spread)} | {Figure(left)}"
            lines.append(f"| {pair[0]} and {pair[1]} | {'yes' if weighted else 'no'} | {cells} |")
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


def _rates(target: Target, x: Tensor, sigma: float, probes: int | None, repeats: int) -> Tensor:
    """[repeats, B]."""
    generator = torch.Generator().manual_seed(5)
    corrector = Corrector(probes=probes)
    fresh = [WeightedPath(target, corrector, None, generator, 1) for _ in range(repeats)]
    return torch.stack([steps.evaluate(x, sigma).rate for steps in fresh])


def draw_picture(model: Teacher, path: Path) -> None:
    """Naive and corrected side by side: guidance 3, the product of 3 and 8, and the reward."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    arms = _arms()
    for name in ("guidance 3, no weights", "guidance 3"):
        choice, guidance, weighted = arms[name]
        rows.append((name, _first(groups(model, choice, guidance, weighted, 0)[0], weighted)))
    product = TargetChoice("product", classes=(3, 8), particles=PARTICLES)
    for weighted in (False, True):
        images = _images(groups(model, product, 1.0, weighted, 0)[0], weighted, 0)
        rows.append((f"3 times 8{'' if weighted else ', no weights'}", images[:60]))
    side_by_side(rows, path)


def _first(diagnosis: Diagnosis, weighted: bool, each: int = 6) -> Tensor:
    """`each` images of every class, a column for a class."""
    images = _images(diagnosis, weighted, 0)
    by_class = images.reshape(10, -1, *images.shape[1:])
    return by_class[:, :: by_class.shape[1] // each][:, :each].transpose(0, 1).flatten(0, 1)


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
    labels, null = torch.arange(8), torch.tensor([10])
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
