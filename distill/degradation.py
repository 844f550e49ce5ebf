"""DisBack's first stage: a copy of the teacher learns the samples of the first student, and is kept on the way.

Degradation Recording (arXiv 2408.15991, Algorithm 1): ordinary denoising on G0's samples, G0 frozen. Read backwards,
the networks on the way lead from one that fits the student to the teacher.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses import denoising_loss
from distill.methods import Degradation
from distill.noise import Share
from distill.optim import Update
from distill.student import Student
from distill.targets import score_difference
from samplers import Denoiser, SampleNoise
from samplers.denoiser import expand, take_conditions

GROWTH = math.sqrt(2)  # from one candidate's step to the next


class Plateau(nn.Module):
    """Whether a loss has stopped falling: `patience` looks in a row without a fall by `tolerance` of the best one.

    Its buffers are its state, for checkpoints.
    """

    state: Tensor  # the best loss, looks in vain, reached: float64

    def __init__(self, tolerance: float, patience: int) -> None:
        super().__init__()
        self._tolerance, self._patience = tolerance, patience
        self.register_buffer("state", torch.tensor([math.inf, 0.0, 0.0], dtype=torch.float64))

    @property
    def reached(self) -> bool:
        return bool(self.state[2])

    def look(self, loss: float) -> None:
        best, vain, reached = self.state.tolist()
        vain = 0.0 if loss < (1 - self._tolerance) * best else vain + 1
        self.state.copy_(torch.tensor([min(best, loss), vain, float(bool(reached) or vain >= self._patience)]))


@dataclass(frozen=True)
class Probe:
    """A fixed batch of the first student's noised samples: x0, eps [P, ...], sigma [P], judged in parts of `rows`."""

    x0: Tensor
    sigma: Tensor
    eps: Tensor
    cond: Any
    rows: int

    @property
    def x_sigma(self) -> Tensor:
        return self.x0 + expand(self.sigma, self.x0) * self.eps

    @torch.no_grad()
    def denoise(self, denoiser: Denoiser) -> Tensor:
        """D at all of it, [P, ...]."""
        x, n = self.x_sigma, len(self.x0)
        parts = [slice(k, k + self.rows) for k in range(0, n, self.rows)]
        return torch.cat([denoiser(x[part], self.sigma[part], take_conditions(self.cond, part, n)) for part in parts])

    def loss(self, denoised: Tensor, sigma_data: float) -> float:
        """The mean `denoising_loss` of a prediction."""
        return denoising_loss(
            lambda *_: denoised, self.x0, self.sigma, self.eps, self.cond, sigma_data
        ).mean().item()  # fmt: skip


def probe(
    student: Student,
    level: Callable[[Tensor], Tensor],
    noise: SampleNoise,
    shape: tuple[int, ...],
    conditions: Callable[[SampleNoise, torch.device | str], Any],
    rows: int,
    device: torch.device | str,
) -> Probe:
    """A probe of as many samples as `noise` has, their noise levels stratified over level(u), u in [0, 1)."""
    cond, z = conditions(noise, device), noise.normal(shape, device=device)
    parts = [slice(k, k + rows) for k in range(0, len(z), rows)]
    with torch.no_grad():
        x0 = torch.cat([student(z[part], take_conditions(cond, part, len(z)), noise[part]) for part in parts])
    u = (torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z)
    return Probe(x0, level(u).to(device), noise.normal(shape, device=device), cond, rows)


@dataclass
class Degrader:
    """Denoising score matching on the first student's samples; `step` is one update.

    student: G0, frozen. denoiser: a copy of the teacher, trained by `update`. level: u [B] in [0, 1) -> sigma [B].
    shape: of one sample. conditions(noise, device): of a batch. parts: a process's batch is computed in so many.
    """

    student: Student
    denoiser: Denoiser
    update: Update
    level: Callable[[Tensor], Tensor]
    share: Share
    shape: tuple[int, ...]
    conditions: Callable[[SampleNoise, torch.device | str], Any] = lambda noise, device: None
    sigma_data: float = 0.5
    device: torch.device | str = "cpu"
    parts: int = 1

    def step(self, n: int) -> dict[str, Tensor]:
        """Update number n (from 0); returns its metrics, each []. A function of n and the weights."""
        found: list[Tensor] = []
        self.update(self._losses(n, found), n)
        return {"loss": torch.stack(found).mean()}

    def _losses(self, n: int, found: list[Tensor]) -> Iterator[Tensor]:
        for p in range(self.parts):
            noise = self.share.noise(n, p, self.parts)
            cond = self.conditions(noise, self.device)
            with torch.no_grad():
                x0 = self.student(noise.normal(self.shape, device=self.device), cond, noise)
            sigma = self.level(noise.uniform()).to(self.device, non_blocking=True)
            eps = noise.normal(self.shape, device=self.device)
            with self.update.no_sync(p + 1 < self.parts):
                loss = denoising_loss(self.denoiser, x0, sigma, eps, cond, self.sigma_data).mean()
                found.append(loss.detach())
                yield loss / self.parts


@dataclass
class Recording:
    """A `Degrader` with its record; `step` is one update and what it leaves.

    network: the one that the degrader trains, itself. probed: what it is judged by. keep(done, prediction): takes up a
    candidate, the network as it is after `done` updates with its prediction at the probe. agree(loss): the same number
    on all processes. It is over when `plateau.reached`.
    """

    degrader: Degrader
    network: Denoiser
    probed: Probe
    plateau: Plateau
    check_every: int
    keep: Callable[[int, Tensor], None]
    agree: Callable[[float], float] = lambda loss: loss

    def step(self, n: int) -> dict[str, Tensor]:
        metrics = self.degrader.step(n)
        done = n + 1
        if done % self.check_every == 0:
            loss = self.probed.loss(self.probed.denoise(self.network), self.degrader.sigma_data)
            self.plateau.look(self.agree(loss))
        if is_candidate(done):
            self.record(done)
        return metrics

    def record(self, done: int) -> None:
        """Hands over the network as it is. Raises FloatingPointError where its prediction is not finite."""
        prediction = self.probed.denoise(self.network)
        if not bool(prediction.isfinite().all()):
            raise FloatingPointError(f"step {done}: a prediction of the network is not finite; stopped")
        self.keep(done, prediction)


def is_candidate(done: int) -> bool:
    """Whether a network is kept after that many updates: at rounded powers of the square root of 2."""
    nearest = round(math.log(done) / math.log(GROWTH))
    return any(round(GROWTH**k) == done for k in (nearest - 1, nearest, nearest + 1))


def mismatches(denoised: Sequence[Tensor], x_sigma: Tensor, sigma: Tensor) -> list[float]:
    """Of each of several predictions at a probe to the last one: sigma |s - s_last| over sigma |s_last|, of means."""
    pairs = [score_difference(prediction, denoised[-1], x_sigma, sigma).tolist() for prediction in denoised]
    return [difference / length for difference, length in pairs]


def choose(mismatch: Sequence[float], steps: Sequence[int], config: Degradation) -> list[int]:
    """Which of the recorded networks become nodes, as rising indices; the last one always does.

    mismatch, steps: of the teacher (step 0) first, then of every candidate. Spacing by mismatch: the nodes nearest to
    its even division from the teacher's to 0; by steps: nearest to an even division of the logarithm of the step. No
    network becomes two nodes, so there can be fewer than `nodes`.
    """
    last = len(steps) - 1
    if config.spacing == "mismatch":
        place = [1 - m / max(mismatch[0], 1e-12) for m in mismatch]
    else:
        place = [math.log1p(step) / math.log1p(steps[-1]) for step in steps]
    wanted = [k / config.nodes for k in range(1, config.nodes)]
    chosen = {min(range(1, last), key=lambda k: abs(place[k] - w)) for w in wanted} if last > 1 else set()
    return sorted(chosen | {last})
