"""How far scores are from a student's own: M(s, q) = E |s - s_q| / E |s_q| at noised samples of the student.

s_q is exact for the empirical law of many samples. (Our definition; the paper's could not be read.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.student import Student
from samplers import Denoiser, SampleNoise
from samplers.denoiser import expand, take_conditions

SAMPLES, JUDGED = 4096, 512


def empirical_denoiser(
    samples: Tensor, x: Tensor, sigma: float, labels: Tensor | None = None, of: Tensor | None = None
) -> Tensor:
    """E[x0 | x] for x0 uniform over samples [N, ...], at x [B, ...]; exact, like x.

    labels [N], of [B]: with them the law at a row of x is that of the samples with its label.
    """
    flat, points = samples.flatten(1).double(), x.flatten(1).double()
    logits = -torch.cdist(points, flat).square() / (2 * sigma**2)
    if labels is not None and of is not None:
        logits = logits.masked_fill(labels[None] != of[:, None], -torch.inf)
    return (logits.softmax(1) @ flat).to(x).reshape(x.shape)


@torch.no_grad()
def score_mismatch(
    denoisers: Mapping[str, Denoiser],
    student: Student,
    sigmas: Sequence[float],
    noise: SampleNoise,
    shape: tuple[int, ...],
    conditions: Callable[[SampleNoise, torch.device | str], Any] = lambda noise, device: None,
    device: torch.device | str = "cpu",
    rows: int = 256,
    judged: int = JUDGED,
) -> dict[str, list[float]]:
    """The mismatch of each denoiser at each noise level.

    The law is that of as many of the student's samples as `noise` has; the first `judged` of them are noised. Passes
    are over `rows` samples. In high dimensions and at low noise the empirical law is one of points: read a number
    beside that of the fake score, which knows the student best.
    """
    cond, z = conditions(noise, device), noise.normal(shape, device=device)

    def in_parts(call: Callable[[slice], Tensor], count: int) -> Tensor:
        return torch.cat([call(slice(k, min(k + rows, count))) for k in range(0, count, rows)])

    def of(part: slice) -> Any:
        return take_conditions(cond, part, len(z))

    labels = getattr(cond, "numbers", cond)  # prompts are told apart by their numbers, which are on the CPU
    labels = None if labels is None else labels.to(device)
    several = len(student) > 1  # one step draws nothing
    samples = in_parts(lambda part: student(z[part], of(part), noise[part] if several else None), len(z))
    judged = min(judged, len(samples))
    eps = noise.normal(shape, device=device)[:judged]
    results: dict[str, list[float]] = {name: [] for name in denoisers}
    for sigma in sigmas:
        level = torch.full((judged,), sigma, device=device)
        x = samples[:judged] + expand(level, eps) * eps
        exact = empirical_denoiser(samples, x, sigma, labels, None if labels is None else labels[:judged])
        length = (x - exact).flatten(1).norm(dim=1).mean()
        for name, denoiser in denoisers.items():
            denoised = in_parts(lambda part, d=denoiser, x=x, s=level: d(x[part], s[part], of(part)), judged)  # type: ignore[misc]
            results[name].append(float((denoised - exact).flatten(1).norm(dim=1).mean() / length))
    return results
