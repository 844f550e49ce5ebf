"""The integral of a denoiser's squared distance to a Gaussian's, which is the KL between their laws, point by point.

KL(p_sigma || q_sigma) = int_sigma^inf E_p |D_p - D_q|^2 v^-3 dv for two laws under the heat flow (de Bruijn's identity
for relative entropies; Verdu 2010, "Mismatched estimation and relative entropy"). `samplers.skip` judges by it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from samplers.denoiser import Denoiser
from samplers.gaussian import Gaussian

CONFIDENT = 1.645  # standard errors: one-sided 95 %


class KLIntegral:
    """The KL integral of every point down to the lowest level so far, in u = 1 / sigma^2: half of int |D - D_N|^2 du.

    Between two levels |D - D_N|^2 / u is taken for linear in u, which is exact where the difference falls as 1 / sigma
    or 1 / sigma^2; above the first level the difference is taken for constant, more than it is.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        gaussian: Gaussian,
        samples: Tensor | None,
        cond: Any,
        count: int,
        batch: int,
        generator: torch.Generator | None,
    ) -> None:
        self.denoiser, self.gaussian, self.samples, self.cond, self.batch = denoiser, gaussian, samples, cond, batch
        like = gaussian.mean if samples is None else samples
        device = like.device if generator is None else generator.device
        self.eps = torch.randn((count, *gaussian.shape), generator=generator, device=device, dtype=like.dtype).to(like)
        self.sigmas: list[float] = []
        self.squares: list[Tensor] = []  # |D - D_N|^2 [count] at each level
        self.errors: list[Tensor] = []  # (D - D_N) . (D - x0), of which the mean is the network's error, or nothing
        self.totals: list[Tensor] = []  # the integral down to each level [count]
        self.error_totals: list[Tensor] = []

    def extend(self, sigma: float) -> None:
        """Evaluate the next level."""
        squares, errors = [], []
        for part in torch.arange(len(self.eps)).split(self.batch):
            eps, cond = self.eps[part], _rows(self.cond, part, len(self.eps))
            if self.samples is None:
                x = self.gaussian.transport(eps, 1.0, sigma, cond, mode="marginal")
            else:
                x = self.samples[part] + sigma * eps
            level = torch.tensor(sigma, dtype=x.dtype, device=x.device)
            denoised = self.denoiser(x, level, cond)
            difference = (denoised - self.gaussian(x, sigma, cond)).flatten(1).double()
            squares.append(difference.square().sum(1).cpu())
            if self.samples is not None:
                errors.append((difference * (denoised - self.samples[part]).flatten(1).double()).sum(1).cpu())
        square = torch.cat(squares)
        if not bool(square.isfinite().all()):
            raise ValueError(f"denoiser: is not finite at sigma {sigma:.4g}")
        self.sigmas.append(sigma)
        self.squares.append(square)
        self.totals.append(self._total(self.squares, self.totals))
        if errors:
            self.errors.append(torch.cat(errors))
            self.error_totals.append(self._total(self.errors, self.error_totals))

    def _total(self, values: list[Tensor], totals: list[Tensor]) -> Tensor:
        if not totals:
            return values[0] / (2 * self.sigmas[0] ** 2)
        return totals[-1] + self.between(values, self.sigmas[-1], len(values) - 1)

    def between(self, values: list[Tensor], sigma: float, k: int) -> Tensor:
        """Of the interval from level k - 1 down to level k, the part above sigma, [count]."""
        a, b, u = (s**-2 for s in (self.sigmas[k - 1], self.sigmas[k], sigma))
        slope = (values[k] / b - values[k - 1] / a) / (b - a)
        start = values[k - 1] / a - slope * a
        return start * (u**2 - a**2) / 4 + slope * (u**3 - a**3) / 6

    def reached(self) -> float:
        """Of the lowest level so far: the mean and 1.645 standard errors."""
        return upper(self.totals[-1]) if self.totals else 0.0


def _rows(cond: Any, part: Tensor, count: int) -> Any:
    """The rows of a condition that belong to these points: of tensors with a row for each, or one for all."""
    if isinstance(cond, dict):
        return {name: _rows(value, part, count) for name, value in cond.items()}
    if not isinstance(cond, Tensor) or not cond.ndim:
        return cond
    if len(cond) not in (1, count):
        raise ValueError(f"cond: has {len(cond)} rows; accepted are {count}, one for each point, or 1")
    return cond[part.to(cond.device)] if len(cond) == count else cond.expand(len(part), *cond.shape[1:])


def upper(values: Tensor) -> float:
    """The mean and 1.645 standard errors."""
    mean, error = estimate(values)
    return mean + CONFIDENT * error


def estimate(values: Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))
