"""Students: a denoiser called once on pure noise, or a few times with fresh noise in between."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.noise import SIMULATION
from samplers import Denoiser, SampleNoise


class Student:
    """x = start z; at each level but the last, x0 = D(x, sigma) and x = x0 + noise eps; D at the last is the sample.

    sigmas: the levels, falling; noises: standard deviations of the noise after each but the last (`distill.stock`
    says which a stock pipeline has). z [B, ...] is standard normal; the results are like z.
    """

    def __init__(self, denoiser: Denoiser, sigmas: Sequence[float], start: float, noises: Sequence[float] = ()) -> None:
        if len(noises) != len(sigmas) - 1:
            raise ValueError(f"noises: {len(noises)} for {len(sigmas)} levels; needed is one after each but the last")
        if any(after >= before for before, after in pairwise(sigmas)):
            raise ValueError(f"sigmas: {list(sigmas)}; accepted are levels that fall")
        self.denoiser, self.sigmas, self.start, self.noises = denoiser, tuple(sigmas), start, tuple(noises)

    def __len__(self) -> int:
        return len(self.sigmas)

    def __call__(self, z: Tensor, cond: Any = None, noise: SampleNoise | None = None) -> Tensor:
        """Samples. noise: the samples' streams, which several steps draw from."""
        return self.rollout(z, cond, noise, len(self))

    def rollout(self, z: Tensor, cond: Any, noise: SampleNoise | None, count: int) -> Tensor:
        """What step number `count` (from 1) predicts after those before it, which have no graph: backward simulation
        (Yin et al. 2024, DMD2), in which a student is trained on its own inputs."""
        if count > 1 and noise is None:
            raise ValueError(f"noise: None; a student of {len(self)} steps draws from the samples' streams")
        x = self.start * z
        with torch.no_grad():
            for sigma, deviation in zip(self.sigmas[: count - 1], self.noises, strict=False):
                assert noise is not None
                x = self._predict(x, sigma, cond) + deviation * noise.normal(z.shape[1:], z.dtype, z.device)
        return self._predict(x, self.sigmas[count - 1], cond)

    def trained_step(self, seed: int, update: int, hold: int, begins_last: bool = False) -> int:
        """Which step an update trains, from 1, the same on all processes: each for `hold` updates, then the next of a
        random order of all. begins_last: the first is the last step, whose samples are the student's.

        Why not another one at every update (DMD2): the fake score then fits the mixture of what all steps make, and so
        only that mixture is led to the teacher, while each step may be as far from it as the others make up for.
        """
        turn, place = divmod(update // hold, len(self))
        numbers = range(turn * len(self), (turn + 1) * len(self))
        places = SampleNoise(seed, numbers, SIMULATION).uniform()
        if begins_last and turn == 0:
            places[-1] = -1.0
        return 1 + int(places.argsort()[place])

    def _predict(self, x: Tensor, sigma: float, cond: Any) -> Tensor:
        return self.denoiser(x, x.new_full((), sigma), cond)


class OneStep(Student):
    """x = D(sigma_init z, sigma_init): a denoiser called once, on pure noise.

    z [B, ...] is standard normal; the result is like z. Raises ValueError for a sigma_init outside the range that the
    denoiser publishes.
    """

    def __init__(self, denoiser: Denoiser, sigma_init: float) -> None:
        low, high = getattr(denoiser, "sigma_min", 0.0), getattr(denoiser, "sigma_max", float("inf"))
        if not low <= sigma_init <= high:
            raise ValueError(f"student.sigma_init: {sigma_init} is outside the teacher's range [{low:.6g}, {high:.6g}]")
        super().__init__(denoiser, [sigma_init], sigma_init)
