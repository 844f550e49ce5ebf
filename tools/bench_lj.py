"""LJ-13 at T = 2 annealed to T = 1.5 and 0.8 by Feynman-Kac correctors, with and without weights.

The experiment of Skreta et al. 2025 (arXiv 2503.02819), Table 3, from nothing: our own references by parallel tempering
(tools/lennard_jones.py), and a small equivariant denoiser of the T = 2 reference (tools/egnn.py). Theirs learns from
energies (DEM), and runs 50,000 particles and 1,000 steps: compare trends, not numbers.
"""

import json
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from samplers import karras_sigmas
from samplers.atomic import atomic_write
from samplers.denoiser import Denoiser
from samplers.feynman_kac import feynman_kac
from samplers.gaussian import Gaussian
from samplers.particles import Resampling
from samplers.start import start_particles
from samplers.targets import annealed
from samplers.weighted_path import Corrector
from tools.egnn import EquivariantDenoiser, train
from tools.lennard_jones import References, distances, lennard_jones, references

TRAINED = 2.0
ANNEALED = (1.5, 0.8)


@dataclass(frozen=True)
class Settings:
    """Sizes: of the references (ladders, tempering steps, burn-in), of the training, and of a run of particles.

    Steps matter: with 150 mean energies at T = 2, and of the trace form at 1.5, are 2 to 3 higher than with 450.
    """

    ladders: int = 128
    tempering: int = 24_000
    burn_in: int = 6_000
    hidden: int = 48
    training: int = 6_000
    batch: int = 256
    particles: int = 500
    steps: int = 450
    sigma_min: float = 0.01
    sigma_max: float = 4.0


@dataclass(frozen=True)
class Arm:
    """A way to anneal. tempered: noise of beta^-1/2, else as without annealing. threshold None: weights are ignored."""

    name: str
    form: Literal["score", "trace"]
    tempered: bool
    threshold: float | None
    ours: bool = False

    def corrector(self, beta: float) -> Corrector:
        """Euler-Maruyama and weights at a step's beginning, as published; or what a user gets without options."""
        if self.ours:
            return Corrector()
        return Corrector(
            form=self.form,
            zeta=beta**-0.5 if self.tempered else 1.0,
            proposal="euler_maruyama",
            rule="left",
            probes=1,
            resampling=Resampling(threshold=self.threshold or 0.0),
        )


PLAIN = Arm("no annealing", "score", False, None)
ARMS = (
    Arm("target score, no weights", "score", False, None),
    Arm("tempered noise, no weights", "score", True, None),
    Arm("target score, weights, resampled every step", "score", False, 1.0),
    Arm("tempered noise, weights, resampled every step", "score", True, 1.0),
    Arm("trace form, one probe, resampled at ESS 1/2", "trace", True, 0.5),
    Arm("without options: the trace form, multistep", "trace", True, 0.5, ours=True),
)
# Distance W2, energy W1, energy W2, mean and standard deviation of three seeds.
PUBLISHED = {
    (1.5, ARMS[0].name): ".168±.009 / 5.340±.054 / 6.210±.254",
    (1.5, ARMS[1].name): ".095±.006 / 2.154±.048 / 3.920±.258",
    (1.5, ARMS[2].name): ".083±.003 / 3.366±.083 / 3.386±.090",
    (1.5, ARMS[3].name): ".066±.002 / .765±.156 / .939±.171",
    (0.8, ARMS[0].name): ".189±.002 / 14.730±.029 / 15.556±.045",
    (0.8, ARMS[1].name): ".108±.007 / 6.487±.056 / 8.501±.283",
    (0.8, ARMS[2].name): ".048±.019 / 6.252±2.710 / 6.356±2.673",
    (0.8, ARMS[3].name): ".047±.006 / 7.016±.538 / 7.111±.535",
}
TRAINED_THERE = {1.5: ".268±.005 / 4.471±.105 / 5.211±.017", 0.8: ".103±.001 / 9.794±.100 / 9.804±.101"}


def lj_table(folder: Path, seeds: Sequence[int], settings: Settings | None = None) -> str:
    """Everything, what is in the folder not again: about 6 minutes of references, 10 of training, 14 for each seed."""
    settings, threads = settings or Settings(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        known = references(
            folder / "references.safetensors",
            ladders=settings.ladders,
            steps=settings.tempering,
            burn_in=settings.burn_in,
        )
        denoiser, about = trained(folder / "denoiser.safetensors", known.samples[TRAINED], settings)
        pairs = [(TRAINED, PLAIN), *((t, arm) for t in ANNEALED for arm in ARMS)]
        found: dict[tuple[float, str], list[dict[str, float]]] = {(t, arm.name): [] for t, arm in pairs}
        for seed in seeds:
            for t, arm in pairs:
                found[t, arm.name].append(run(folder, denoiser, known, t, arm, settings, seed))
    finally:
        torch.set_num_threads(threads)
    lines = [
        "References: parallel tempering; half of the ladders begin as gas, half at the minimum.",
        "",
        known.report,
        f"Denoiser: trained on {len(known.samples[TRAINED])} samples at T = 2 in {about['training']} steps of "
        f"{about['batch']}, loss {about['loss']:.4f}. Runs: {settings.particles} particles in one group, "
        f"{settings.steps} steps, sigma {settings.sigma_max:g} -> {settings.sigma_min:g}, seeds {list(seeds)}.",
        "",
        "| T | arm | distance W2 | energy W1 | energy W2 | mean E | above the reference | least ESS "
        "| first particles left | published: distance W2 / energy W1 / W2 |",
        "|--:|:--|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for t in (TRAINED, *ANNEALED):
        rows = [floor(known, t, settings.particles, seed) for seed in seeds]
        lines.append(_line(t, "floor: as many samples of one half of the reference", rows, ""))
        for (at, name), results in found.items():
            if at == t:
                lines.append(_line(t, name, results, PUBLISHED.get((t, name), "")))
        if t in TRAINED_THERE:
            lines.append(f"| {t:g} | published: DEM trained at this T | | | | | | | | {TRAINED_THERE[t]} |")
    return "\n".join(lines) + "\n"


def trained(file: Path, samples: Tensor, settings: Settings) -> tuple[EquivariantDenoiser, dict[str, Any]]:
    """The denoiser of samples [n, particles - 1, 3], trained once and kept in a file, and how it was trained."""
    wanted = {
        "training": settings.training,
        "batch": settings.batch,
        "hidden": settings.hidden,
        "samples": len(samples),
    }
    if file.is_file():
        kept, about = EquivariantDenoiser.load(file)
        if about | wanted == about:
            return kept, about
    with torch.random.fork_rng():
        torch.manual_seed(0)
        n, sigma_data = samples.shape[1] + 1, float(samples.square().mean().sqrt())
        denoiser = EquivariantDenoiser(n, sigma_data, hidden=settings.hidden)
    losses = train(denoiser, samples, settings.training, torch.Generator().manual_seed(0), batch=settings.batch)
    about = wanted | {"loss": statistics.fmean(list(losses)[-1000:])}
    denoiser.save(file, about)
    return denoiser, about


def anneal(denoiser: Denoiser, y: Tensor, beta: float, arm: Arm, settings: Settings, seed: int) -> dict[str, Any]:
    """Particles of q^beta for the denoiser of samples y [n, ...]: `y`, their `weights` (of sum 1), and how it went."""
    generator = torch.Generator().manual_seed(seed)
    shape, target = tuple(y.shape[1:]), annealed(denoiser, beta)
    nothing = (torch.zeros((0, math.prod(shape))), torch.zeros(0))
    gaussian = Gaussian(torch.zeros(shape), *nothing, float(y.square().mean()))
    particles, log_weights = start_particles(
        target, shape, settings.sigma_max, settings.particles, gaussians=gaussian, generator=generator
    )
    sigmas = karras_sigmas(settings.steps, settings.sigma_min, settings.sigma_max)
    begun, least, state = time.process_time(), float(settings.particles), None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="zeta: ", category=UserWarning)  # the published arm has no variance
        corrector = arm.corrector(beta)
        for state in feynman_kac(
            target, particles, sigmas, generator=generator, log_weights=log_weights, corrector=corrector
        ):
            least = min(least, float(state.ess.min()))
    assert state is not None
    weights = state.log_weights[0].softmax(0)
    if arm.threshold is None:
        weights, least = torch.full_like(weights, 1 / len(weights)), float(settings.particles)
    return {
        "y": state.x,
        "weights": weights,
        "ess": least,
        "ancestors": int(state.unique_ancestors[0]),
        "seconds": time.process_time() - begun,
    }


def run(
    folder: Path, denoiser: Denoiser, known: References, t: float, arm: Arm, settings: Settings, seed: int
) -> dict[str, float]:
    """An arm's scores at a temperature, kept in a file for these settings."""
    name = f"{t:g}-{arm.name.replace(' ', '-').replace(',', '').replace('/', '-')}-{seed}.json"
    file, about = folder / "runs" / name, asdict(settings)
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["settings"] == about:
            return kept["row"]
    ended = anneal(denoiser, known.samples[TRAINED], TRAINED / t, arm, settings, seed)
    row = scores(ended["y"], known.samples[t], ended["weights"])
    row |= {key: ended[key] for key in ("ess", "ancestors", "seconds")}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as out:
        out.write(json.dumps({"settings": about, "row": row}).encode())
    return row


def floor(known: References, t: float, count: int, seed: int) -> dict[str, float]:
    """What samples without error score: some of the first half of the reference against the second."""
    first, second = known.halves(t)
    chosen = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:count]
    return scores(first[chosen], second)


def scores(y: Tensor, reference: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """Distances between samples y [N, ...] with weights [N] and a reference [n, ...], of at most 10,000 for pairs.

    `above`: the weight of samples with an energy above all of the reference's. They are left out of what is said of
    energies, and only there: two particles that overlap in one sample of a thousand make those any number.
    """
    weights = torch.full((len(y),), 1 / len(y), dtype=torch.float64) if weights is None else weights.double()
    energy, known = lennard_jones(y.double())[0], lennard_jones(reference.double())[0]
    between = distances(y.double())
    some = reference[:: max(1, len(reference) // 10_000)].double()
    per_pair = (weights[:, None] / between.shape[1]).expand_as(between).flatten()
    inside = energy <= known.max()
    within = float(weights[inside].sum())
    row = {"above": float(weights[~inside].sum())}
    row["distance_w2"] = wasserstein(between.flatten(), distances(some).flatten(), 2, per_pair)
    if within > 0:
        energy, weights = energy[inside], weights[inside] / within
        row |= {f"energy_w{p}": wasserstein(energy, known, p, weights) for p in (1, 2)}
        row["energy"] = float((weights * energy).sum())
    return row


def wasserstein(a: Tensor, b: Tensor, p: int, weights: Tensor | None = None) -> float:
    """W_p of two samples of numbers, [n] with weights [n] of sum 1, and [m]: the distance of their quantiles."""
    weights = torch.full((len(a),), 1 / len(a)).to(a) if weights is None else weights
    order = a.argsort()
    a, b, reached = a[order], b.sort().values, weights[order].cumsum(0)
    reached_b = torch.arange(1, len(b) + 1).to(b) / len(b)
    ends = torch.cat([reached / reached[-1], reached_b]).sort().values
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    middle = 0.5 * (begins + ends)
    i = torch.searchsorted(reached / reached[-1], middle).clamp_max(len(a) - 1)
    j = torch.searchsorted(reached_b, middle).clamp_max(len(b) - 1)
    return float(((ends - begins) * (a[i] - b[j]).abs() ** p).sum() ** (1 / p))


def _line(t: float, name: str, rows: list[dict[str, float]], published: str) -> str:
    def spread(key: str, digits: int) -> str:
        values = [row[key] for row in rows if key in row]
        if not values:
            return ""
        sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{sd}"

    shown = [("distance_w2", 4), ("energy_w1", 2), ("energy_w2", 2), ("energy", 2), ("above", 4)]
    cells = [spread(key, digits) for key, digits in (*shown, ("ess", 0), ("ancestors", 0))]
    return f"| {t:g} | {name} | " + " | ".join(cells) + f" | {published} |"
