"""What DisBack is worth: time to a quality, fixed before, of five ways to start, over fresh teachers.

Three settings: the ring of eight Gaussians with a teacher trained at low noise only (A: unreliable where the student
starts) and at EDM's noise levels (B), and the digits as vectors. A way to start ("arm") has its best learning rate of a
grid that all share. Time is counted in updates of the student, and in passes with the first stage included.
"""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill import toy
from distill.average import Average
from distill.data import digits
from distill.degradation import Degrader, Plateau, Recording, choose, mismatches, probe
from distill.losses import denoising_loss
from distill.methods import Degradation
from distill.mismatch import score_mismatch
from distill.nodes import Weights
from distill.noise import PROBE, log_normal_level
from distill.optim import Update, adamw, learning_rate, student_rate
from distill.sections import LogNormal, Optimizer
from distill.student import OneStep
from distill.targets import Backtracking, Fixed, Target, walk_of
from distill.trainer import Trainer, train, unweighted
from samplers import GaussianMixture, NetworkDenoiser, SampleNoise
from samplers.atomic import atomic_write
from tools.bench_toys import BatchShare
from tools.frechet import frechet_distance
from tools.modes import sliced_wasserstein
from tools.statistics import FeatureStatistics

LOW, HIGH = toy.SIGMA_MIN, toy.SIGMA_MAX
SIGMA_DATA, SIGMA_INIT = 0.5, 2.5
AVERAGE = 0.95  # decay of the student's weights, whose quality is looked at
EVERY = 5  # updates between two looks at the quality
LOOK = 2048  # samples that a look is at
MISMATCH_AT = (0.1, 0.3, 1.0)
UPDATE, STAGE_STEP, EXTRA = 8, 4, 1  # forward passes, a backward one counted twice; a score interpolation's further one


@dataclass(frozen=True)
class Setting:
    """Data, network and teacher; a student has reached it when its distance to the data is below `threshold`."""

    name: str
    data: Literal["ring", "digits"]
    noise: LogNormal  # of the teacher's training
    threshold: float
    hidden: int
    steps: int
    rates: tuple[float, ...]
    teacher_steps: int = 3000

    @property
    def key(self) -> str:
        """Its name, and a hash of all that a run's curve depends on besides."""
        values = {name: str(value) for name, value in asdict(self).items() if name not in ("threshold", "rates")}
        text = json.dumps([values, SIGMA_DATA, SIGMA_INIT, AVERAGE, EVERY, LOOK])
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".replace(" ", "")


RATES = (2e-4, 5e-4, 1e-3, 2e-3)
EDM_NOISE = LogNormal(mean=-1.2, std=1.2)
SETTINGS = {
    "ring A": Setting("ring A", "ring", LogNormal(mean=-2.0, std=0.7), 0.10, 96, 120, RATES),
    "ring B": Setting("ring B", "ring", EDM_NOISE, 0.10, 96, 120, RATES),
    "digits": Setting("digits", "digits", EDM_NOISE, 1.5, 128, 240, RATES[1:]),
}


@dataclass(frozen=True)
class Arm:
    """A way to start. target: as in a configuration. updates: of the path. stage: updates of stage 1 at most."""

    name: str
    target: str
    updates: int = 15
    stage: int = 100
    stage_lr: float = 1e-3
    stages: int | None = None
    nodes: int = 5
    schedule: Literal["constant", "cosine"] = "constant"  # of stage 1's learning rate

    @property
    def warm(self) -> bool:
        return self.target != "fixed"


ARMS = (
    Arm("DI", "fixed"),
    Arm("DI-warm", "warm"),
    Arm("nodes", "nodes"),
    Arm("weights", "weight-interpolation"),
    Arm("scores", "score-interpolation"),
)

_BRIEF: dict[str, Any] = {"stage": 6, "stage_lr": 4e-3, "schedule": "cosine"}
SHORT = (  # the best of a search for a small cost, on other teachers
    *ARMS[:2],
    Arm("DI-warm, short stage 1", "warm", **_BRIEF),
    Arm("scores, short stage 1", "score-interpolation", updates=5, **_BRIEF),
)


@dataclass(frozen=True)
class Run:
    """One student."""

    setting: str
    arm: Arm
    lr: float
    teacher: int
    seed: int

    @property
    def key(self) -> str:
        how = "-".join(str(value) for value in asdict(self.arm).values())
        return f"{SETTINGS[self.setting].key}-{how}-{self.lr:g}-{self.teacher}-{self.seed}".replace(" ", "")


def ring() -> GaussianMixture:
    """Eight modes N(., 0.05^2) on a circle of radius 0.7: standard deviation 0.5."""
    angle = torch.arange(8) * (math.pi / 4)
    return GaussianMixture(torch.ones(8), 0.7 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.0025))


def data_points(setting: Setting) -> Tensor:
    """What a teacher learns, [N, d]."""
    if setting.data == "ring":
        return ring().sample(20_000, generator=torch.Generator().manual_seed(0))
    return digits("train").images.flatten(1)


def quality(setting: Setting) -> Callable[[Tensor], float]:
    """The distance of samples [N, d] to the data: sliced W2 to the ring, squared Fréchet for the digits."""
    if setting.data == "ring":
        reference = ring().sample(LOOK, generator=torch.Generator().manual_seed(1))
        return lambda x: sliced_wasserstein(x, reference, torch.Generator().manual_seed(2), slices=50)
    held_out = FeatureStatistics(64)
    held_out.update(digits("held-out").images.flatten(1))

    def distance(x: Tensor) -> float:
        statistics_of = FeatureStatistics(64)
        statistics_of.update(x)
        return frechet_distance(statistics_of, held_out).value

    return distance


def dimension(denoiser: NetworkDenoiser) -> int:
    """Of a toy's points."""
    assert isinstance(denoiser.network, toy.ToyNetwork)
    return denoiser.network.enter.in_features


def make_teacher(setting: Setting, seed: int) -> NetworkDenoiser:
    """Denoising score matching, and an average of the weights."""
    torch.manual_seed(1000 + seed)
    points = data_points(setting)
    network = toy.denoiser(points.shape[1], setting.hidden, 3, SIGMA_DATA)
    average = copy.deepcopy(network)
    follow = Average(average, network, 0.998)
    rates = Optimizer(lr=2e-3)
    update = Update(adamw(network, rates), partial(learning_rate, rates, steps=setting.teacher_steps))
    level = partial(log_normal_level, config=setting.noise, sigma_min=LOW, sigma_max=HIGH)
    for n in range(setting.teacher_steps):
        noise: Any = BatchShare(10_000 + seed).noise(n)
        x0 = points[(noise.uniform() * len(points)).long()]
        sigma, eps = level(noise.uniform()), noise.normal(points.shape[1:])
        update(denoising_loss(network, x0, sigma, eps, None, SIGMA_DATA).mean(), n)
        follow(n)
    return average.requires_grad_(False).eval()


def record(teacher: NetworkDenoiser, arm: Arm, seed: int) -> tuple[list[Weights], int]:
    """Stage 1: the weights of the nodes, and its cost in passes."""
    network, shape = copy.deepcopy(teacher).requires_grad_(True), (dimension(teacher),)
    config = Degradation(
        optimizer=Optimizer(lr=arm.stage_lr, betas=(0.0, 0.999), schedule=arm.schedule),
        steps=arm.stage,
        nodes=arm.nodes,
    )
    update = Update(adamw(network, config.optimizer), partial(learning_rate, config.optimizer, steps=arm.stage))
    level = partial(log_normal_level, config=EDM_NOISE, sigma_min=LOW, sigma_max=HIGH)
    student = OneStep(teacher, SIGMA_INIT)
    probed = probe(student, level, SampleNoise(seed, range(256), PROBE), shape, lambda *_: None, 256, "cpu")
    plateau, kept, denoised = Plateau(config.tolerance, config.patience), [], []

    def keep(done: int, prediction: Tensor) -> None:
        kept.append((done, {key: value.clone() for key, value in network.state_dict().items()}))
        denoised.append(prediction)

    degrader = Degrader(student, network, update, level, BatchShare(20_000 + seed), shape, sigma_data=SIGMA_DATA)  # type: ignore[arg-type]
    recording = Recording(degrader, network, probed, plateau, config.check_every, keep)
    recording.record(0)
    done = 0
    for done, _ in enumerate(train(recording, config.steps), start=1):  # noqa: B007
        if plateau.reached:
            break
    if kept[-1][0] != done:
        recording.record(done)
    looks = 1 + len(kept) + done // config.check_every  # the probe's samples, and what was said of them
    passes = STAGE_STEP * done + looks
    chosen = choose(mismatches(denoised, probed.x_sigma, probed.sigma), [step for step, _ in kept], config)
    return [kept[k][1] for k in chosen], passes


def target_of(arm: Arm, teacher: NetworkDenoiser, nodes: list[Weights]) -> Target:
    """As `distill.disback.target`, of nodes in memory."""
    if arm.target in ("fixed", "warm"):
        return Fixed(teacher)
    network = copy.deepcopy(teacher)
    network.load_state_dict(nodes[-1])
    walk = walk_of(arm.target, network, lambda k: nodes[k - 1], len(nodes), teacher.state_dict(), teacher)
    return Backtracking(walk, teacher, arm.updates, arm.stages)


def run_student(run: Run, teacher: NetworkDenoiser) -> dict[str, Any]:
    """Trains a student and follows its quality: [updates, passes, distance] every few updates."""
    setting, arm = SETTINGS[run.setting], run.arm
    nodes, passes = record(teacher, arm, run.seed) if arm.warm else ([], 0)
    student, fake = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    if nodes:
        fake.load_state_dict(nodes[-1])
    rates = Optimizer(lr=run.lr, betas=(0.0, 0.999), schedule="constant")
    target, shape = target_of(arm, teacher, nodes), (dimension(teacher),)
    level = partial(log_normal_level, config=EDM_NOISE, sigma_min=LOW, sigma_max=HIGH)
    average = copy.deepcopy(student).requires_grad_(False)
    one_step = OneStep(average, SIGMA_INIT)
    trainer = Trainer(
        OneStep(student, SIGMA_INIT),
        fake,
        target,
        Update(adamw(student, rates), partial(student_rate, rates, steps=setting.steps)),
        Update(adamw(fake, rates), partial(learning_rate, rates, steps=setting.steps)),
        level,
        level,
        BatchShare(30_000 + 100 * run.teacher + run.seed),  # type: ignore[arg-type]
        shape,
        weighting=unweighted,
        sigma_data=SIGMA_DATA,
        average=Average(average, student, AVERAGE),
    )
    judge = quality(setting)
    z = torch.randn(LOOK, *shape, generator=torch.Generator().manual_seed(3))

    def look() -> float:
        with torch.no_grad():
            return judge(one_step(z))

    curve = [(0, passes, look())]
    for done, _ in enumerate(train(trainer, setting.steps), start=1):
        passes += UPDATE + (EXTRA if arm.target == "score-interpolation" and not target.final else 0)
        if done % EVERY == 0:
            curve.append((done, passes, look()))
    return {"curve": curve}


def start_mismatch(setting: Setting, teacher: NetworkDenoiser, seed: int) -> dict[str, list[float]]:
    """At the first student: of the teacher, of the first node to be a target, and of the one that fits."""
    nodes, _ = record(teacher, ARMS[2], seed)
    denoisers: dict[str, Any] = {"teacher": teacher}
    for name, k in (("first node", -2), ("last node", -1)):
        denoisers[name] = copy.deepcopy(teacher)
        denoisers[name].load_state_dict(nodes[k])
    noise: Any = BatchShare(40_000 + seed, 4096).noise(0)
    shape = (dimension(teacher),)
    return score_mismatch(denoisers, OneStep(teacher, SIGMA_INIT), MISMATCH_AT, noise, shape, rows=4096)


def of_teacher(setting: Setting, teacher: int, runs: Sequence[Run], folder: Path) -> int:
    """Makes what is missing of one teacher: itself, its students, its mismatches. A result is one JSON file."""
    torch.set_num_threads(1)
    todo = [run for run in runs if not result_file(folder, run).is_file()]
    mismatch_file = folder / f"{setting.key}-mismatch-{teacher}.json"
    if not todo and mismatch_file.is_file():
        return 0
    network = make_teacher(setting, teacher)
    if not mismatch_file.is_file():
        _write(mismatch_file, start_mismatch(setting, network, 0))
    for run in todo:
        begun = time.perf_counter()
        _write(result_file(folder, run), run_student(run, network) | {"seconds": time.perf_counter() - begun})
    return len(todo)


def result_file(folder: Path, run: Run) -> Path:
    """Where the curve of a run is kept."""
    return folder / f"{run.key}.json"


def _write(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode())


def all_runs(setting: Setting, arms: Sequence[Arm], teachers: Iterable[int], seeds: Iterable[int]) -> list[Run]:
    return [Run(setting.name, *chosen) for chosen in product(arms, setting.rates, teachers, seeds)]


def make(
    folder: Path, setting: Setting, arms: Sequence[Arm], teachers: Sequence[int], seeds: Sequence[int], jobs: int = 1
) -> None:
    """Makes every run that `folder` does not hold yet, `jobs` teachers at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = all_runs(setting, arms, teachers, seeds)
    with ProcessPoolExecutor(jobs) as pool:
        parts = [
            pool.submit(of_teacher, setting, teacher, [r for r in runs if r.teacher == teacher], folder)
            for teacher in teachers
        ]
        for part in as_completed(parts):
            part.result()
