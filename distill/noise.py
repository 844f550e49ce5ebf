"""Which samples a process works on, and at which noise levels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.methods import StudentNoise
from distill.sections import Fake, LogNormal
from samplers import SampleNoise
from samplers.schedules import karras_sigma

GENERATION = 1  # the stream of SampleNoise that images are made from; training draws from stream 0
TEACHER_SAMPLES = 2  # of the teacher's samples that a discriminator takes for real
DEGRADATION, PROBE = 3, 4  # of the first stage of DisBack, and of the batch that it is judged by
MISMATCH = 5  # of the samples whose law a mismatch is measured at
LATENTS, JUDGED = 6, 7  # of images as a VAE encodes them, and of which samples a Gaussian is judged by
SIMULATION = 9  # of which of its steps an update of a student trains
PARTICLES = 8  # of the weighted particles that an image is drawn from


@dataclass(frozen=True)
class Share:
    """A process's rows of every global batch: sample k is the same whatever the number of processes.

    Raises ValueError if the batch does not divide among the processes.
    """

    seed: int
    batch_size: int
    rank: int = 0
    processes: int = 1
    stream: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size: {self.batch_size} does not divide among {self.processes} processes")

    def numbers(self, batch: int, part: int = 0, parts: int = 1) -> range:
        """The global numbers of this process's samples in the batch number `batch`, or in one of equal parts of it.

        A part is the same samples whatever the number of processes: what is normalised over it is the same too.
        Raises ValueError where they do not divide into so many parts.
        """
        rows = self.batch_size // self.processes
        if rows % parts:
            raise ValueError(f"memory.accumulation: {rows} samples a process do not divide into {parts} parts")
        whole, size = self.batch_size // parts, rows // parts
        start = batch * self.batch_size + part * whole + self.rank * size
        return range(start, start + size)

    def noise(self, batch: int, part: int = 0, parts: int = 1) -> SampleNoise:
        """The streams of those samples."""
        return SampleNoise(self.seed, self.numbers(batch, part, parts), self.stream)


def student_level(u: Tensor, config: StudentNoise, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels [B] of the student's loss, from u in [0, 1)."""
    law = log_normal_level if config.name == "log-normal" else karras_level
    return law(u, config, sigma_min, sigma_max)


def karras_level(u: Tensor, config: StudentNoise, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels [B], uniform in the index of the Karras grid, from u in [0, 1), without the trimmed ends."""
    return karras_sigma(config.trim + (1 - 2 * config.trim) * u, sigma_min, sigma_max, config.rho)


def log_normal_level(u: Tensor, config: LogNormal | StudentNoise, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels [B], log-normal and truncated to the range, from u in [0, 1) by the inverse distribution."""
    low, high = _mass_below(config, sigma_min, sigma_max)
    z = torch.special.ndtri(low + (high - low) * u)
    return (config.mean + config.std * z).exp().clamp(sigma_min, sigma_max)  # against rounding at the ends


def check_log_normal(field: str, config: LogNormal | StudentNoise, sigma_min: float, sigma_max: float) -> None:
    """Raises ValueError where less than a thousandth of the distribution lies in the range: a slip of the pen."""
    low, high = _mass_below(config, sigma_min, sigma_max)
    if not high - low >= 1e-3:
        raise ValueError(
            f"{field}.mean, {field}.std: {config.mean}, {config.std} put less than a thousandth of the noise levels "
            f"into [{sigma_min:.6g}, {sigma_max:.6g}]; accepted are distributions of ln sigma that overlap with it"
        )


def _mass_below(config: LogNormal | StudentNoise, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64)
    low, high = torch.special.ndtr((ends.log() - config.mean) / config.std).tolist()
    return low, high


def uncovered(fake: Fake, noise: StudentNoise, sigma_min: float, sigma_max: float) -> float:
    """The share of the student's noise levels that lie above all but a thousandth of the fake score's."""
    if fake.levels == "student":
        return 0.0
    u = torch.tensor(0.999, dtype=torch.float64)
    top = log_normal_level(u, fake.noise, sigma_min, sigma_max)
    levels = student_level((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, noise, sigma_min, sigma_max)
    return float((levels > top).double().mean())


def check_range(low: float | None, high: float | None, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """A configured range, its open ends filled from the denoiser's; ValueError where it reaches outside."""
    chosen = (sigma_min if low is None else low, sigma_max if high is None else high)
    if not (sigma_min <= chosen[0] < chosen[1] <= sigma_max) or not math.isfinite(chosen[1]):
        raise ValueError(
            f"noise.sigma_min, noise.sigma_max: {chosen[0]:.6g}, {chosen[1]:.6g} is not a range inside the teacher's "
            f"[{sigma_min:.6g}, {sigma_max:.6g}]"
        )
    return chosen
