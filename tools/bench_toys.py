"""Coverage of modes, converged, on exact targets: every divergence, with and without the adversarial term.

Everything but the divergence's use of the ratio is the same in all arms: the discriminator is trained in each, also
where h = 1 and no adversarial term makes nothing of it (the control). One process and one thread a run.
"""

import copy
import json
import math
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import toy
from distill.adversary import FakeHeads
from distill.average import Average
from distill.discriminator import Discriminator
from distill.divergences import DIVERGENCES
from distill.methods import StudentNoise
from distill.noise import karras_level, log_normal_level
from distill.optim import Update, adamw, learning_rate, student_rate
from distill.real import RealMixture
from distill.sections import LogNormal, Optimizer, Toy
from distill.student import OneStep
from distill.taps import Tap
from distill.targets import Fixed
from distill.trainer import Trainer, train
from distill.weights import RatioWeight
from samplers.atomic import atomic_write
from samplers.schedules import karras_index
from tools.modes import mode_score

COMPARED = ("reverse-kl", "jensen-shannon", "squared-hellinger", "forward-kl")
SPREADS = {"narrow": 0.3, "wide": 3.0}
ADVERSARIAL_WEIGHT = 0.1
LOW, HIGH = 0.05, 5.0  # noise levels


class BatchNoise:
    """The interface of SampleNoise from one torch generator: at this size the samples' own streams would cost most."""

    def __init__(self, seed: int, batch: int, size: int) -> None:
        self._generator, self._size = torch.Generator().manual_seed((seed << 32) + batch), size

    def __len__(self) -> int:
        return self._size

    def normal(self, shape: Iterable[int], dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        return torch.randn(self._size, *shape, generator=self._generator, dtype=dtype)

    def uniform(self, device: Any = "cpu") -> Tensor:
        return torch.rand(self._size, generator=self._generator, dtype=torch.float64)


@dataclass(frozen=True)
class BatchShare:
    """The interface of Share for one process."""

    seed: int
    size: int = 256

    def noise(self, batch: int, part: int = 0, parts: int = 1) -> BatchNoise:
        assert (part, parts) == (0, 1), "a batch of one part"
        return BatchNoise(self.seed, batch, self.size)


@dataclass(frozen=True)
class Arm:
    """One run: the mixture, the divergence, the adversarial term and the first student, trained `steps` updates."""

    mixture: str
    divergence: str
    adversarial: bool
    start: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        term = "adversarial" if self.adversarial else "plain"
        return f"{self.mixture}-{self.start}-{self.divergence}-{term}-{self.seed}"


def toy_trainer(arm: Arm) -> tuple[Trainer, OneStep]:
    """The trainer of a run, and its averaged student."""
    torch.manual_seed(arm.seed)
    mixture = toy.MIXTURES[arm.mixture]()
    student, fake = toy.networks(mixture, Toy(spread=SPREADS[arm.start]))
    average = copy.deepcopy(student).requires_grad_(False)
    tap = Tap(fake.network, (0, 1, 2))
    with torch.no_grad():
        heads = Discriminator(tap.encode(lambda: fake(torch.zeros(1, mixture.dim), torch.ones(1))))
    rates, fake_rates = (Optimizer(lr=lr, betas=(0.0, 0.99)) for lr in (5e-3, 1e-2))
    divergence, fake_steps = DIVERGENCES[arm.divergence], 2
    trainer = Trainer(
        OneStep(student, 1.0),
        fake,
        Fixed(mixture),
        Update(adamw(student, rates), partial(student_rate, rates, steps=arm.steps)),
        Update(adamw(fake, fake_rates, heads), partial(learning_rate, fake_rates, steps=arm.steps * fake_steps)),
        partial(karras_level, config=StudentNoise(), sigma_min=LOW, sigma_max=HIGH),
        partial(log_normal_level, config=LogNormal(mean=-1.0, std=1.5), sigma_min=LOW, sigma_max=HIGH),
        BatchShare(arm.seed),  # type: ignore[arg-type]
        (mixture.dim,),
        ratio_weight=None
        if divergence.constant
        else RatioWeight(divergence, index=partial(karras_index, sigma_min=LOW, sigma_max=HIGH)),
        adversary=FakeHeads(network=fake, tap=tap, heads=heads, train_heads=heads, reals=RealMixture(mixture)),
        adversarial_weight=ADVERSARIAL_WEIGHT if arm.adversarial else 0.0,
        fake_steps=fake_steps,
        sigma_data=fake.sigma_data,
        average=Average(average, student, 0.995),
    )
    return trainer, OneStep(average, 1.0)


def run_arm(arm: Arm) -> dict[str, Any]:
    """Trains and judges one run: its mode score, weights and seconds."""
    torch.set_num_threads(1)
    trainer, student = toy_trainer(arm)
    begun = time.perf_counter()
    for last in train(trainer, arm.steps):  # noqa: B007
        pass
    seconds = time.perf_counter() - begun
    mixture = toy.MIXTURES[arm.mixture]()
    with torch.no_grad():
        samples = student(torch.randn(20_000, mixture.dim, generator=torch.Generator().manual_seed(10**6 + arm.seed)))
    weights = {name: float(last[name]) for name in ("gap", "weight_max", "weight_ess")}
    return asdict(arm) | asdict(mode_score(samples, mixture)) | weights | {"seconds": seconds}


def coverage(folder: Path, seeds: Iterable[int], jobs: int, steps: int = 1200) -> str:
    """Makes every run that `folder` does not hold yet, `jobs` at a time; the table has means and standard errors."""
    arms = [
        Arm(mixture, divergence, adversarial, start, seed, steps)
        for seed, mixture, start, divergence, adversarial in product(
            seeds, ("ring", "grid"), SPREADS, COMPARED, (False, True)
        )
    ]
    folder.mkdir(parents=True, exist_ok=True)
    missing = [arm for arm in arms if not (folder / f"{arm.name}.json").is_file()]
    with ProcessPoolExecutor(jobs) as pool:
        running = {pool.submit(run_arm, arm): arm for arm in missing}
        for future in as_completed(running):
            with atomic_write(folder / f"{running[future].name}.json") as file:
                file.write(json.dumps(future.result(), indent=1).encode())
    return coverage_table([json.loads((folder / f"{arm.name}.json").read_text()) for arm in arms])


_COLUMNS = (("covered", ".1f"), ("kl", ".3f"), ("near", ".3f"), ("spread", ".2f"), ("wasserstein", ".3f"))


def coverage_table(results: list[dict[str, Any]]) -> str:
    """A row for every arm."""
    lines = [
        "| target | first student | divergence | adversarial | modes covered | mode KL | near a mode | spread | SW2 "
        "| ESS | s |",
        "|:--|:--|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["mixture"], result["start"], result["divergence"], "yes" if result["adversarial"] else "no")
        groups.setdefault(key, []).append(result)
    for key in sorted(groups, key=lambda k: (k[0] != "ring", k[1], k[3], COMPARED.index(k[2]))):
        rows = groups[key]
        cells = [_cell([row[name] for row in rows], form) for name, form in _COLUMNS]
        cells += [f"{statistics.fmean(row[name] for row in rows):.2f}" for name in ("weight_ess", "seconds")]
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], form: str) -> str:
    """Mean ± standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):{form}} ± {error:{form}}"
