"""Do the intervals cover what they say? Gaussians whose distances are known, drawn many times over.

The generated law is N(m, T S T) beside the reference N(0, S), with T positive definite: their Fréchet distance is
|m|^2 + tr S (T - 1)^2. The kernel distance of Gaussians is a polynomial of their moments. Student's t of 5 degrees of
freedom has the same moments and heavier tails, which an interval of ten blocks does not see. A repetition is a seed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tools.frechet import frechet_estimate
from tools.jackknife import Estimate, jackknife
from tools.pairwise import kernel_distance
from tools.statistics import FeatureStatistics

BAR = (0.92, 0.98)  # of 200 intervals that cover 95 % of the time, 95 % of all counts lie between
DEGREES = 5  # of Student's t


@dataclass(frozen=True)
class Law:
    """Normal with this mean [d] and the covariance root root^T [d, d]; with tails, multivariate Student's t."""

    mean: Tensor
    root: Tensor
    tails: bool = False

    @property
    def covariance(self) -> Tensor:
        return self.root @ self.root.T

    def draw(self, n: int, seed: int) -> Tensor:
        """[n, d], float64; one seed gives two laws the same noise."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(n, len(self.mean), generator=generator, dtype=torch.float64)
        if self.tails:
            chi = torch.randn(n, DEGREES, generator=generator, dtype=torch.float64).square().mean(dim=1, keepdim=True)
            noise = noise * ((DEGREES - 2) / DEGREES / chi).sqrt()
        return self.mean + noise @ self.root.T


@dataclass(frozen=True)
class Coverage:
    """How estimates of one truth lie around it; deviations and errors are in its unit."""

    truth: float
    covered: float  # share of the intervals with the truth inside
    plain_bias: float
    bias: float  # of the debiased values, or the plain ones where nothing is debiased
    plain_rmse: float
    rmse: float
    error: float  # the mean standard error that was stated
    warned: float  # share that carry a warning


def laws(dim: int, change: float = 0.3, seed: int = 1) -> tuple[Law, Law]:
    """A reference with the spectrum k^-1.3 of Inception's features, and a law T away, |T - 1| about `change`."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    scales = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.65
    noise = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    transport = torch.eye(dim, dtype=torch.float64) + change * noise @ noise.T
    mean = change / math.sqrt(dim) * torch.randn(dim, generator=generator, dtype=torch.float64)
    return Law(torch.zeros_like(mean), q * scales), Law(mean, transport @ (q * scales))


def true_frechet(reference: Law, law: Law) -> float:
    """From the singular values of the product of the roots."""
    cross = torch.linalg.svdvals(reference.root.T @ law.root).sum()
    squares = reference.root.square().sum() + law.root.square().sum()
    return float((reference.mean - law.mean).square().sum() + squares - 2 * cross)


def true_kernel_distance(a: Law, b: Law) -> float:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) of normal laws, k = (x.y/d + 1)^3."""
    return _mean_kernel(a, a) + _mean_kernel(b, b) - 2 * _mean_kernel(a, b)


def _mean_kernel(a: Law, b: Law) -> float:
    """By the first three moments of u = x.y, x and y independent: those of normal laws, contracted."""
    d, s1, s2 = len(a.mean), a.covariance, b.covariance
    first = a.mean @ b.mean
    spread = (s1 * s2).sum() + a.mean @ s2 @ a.mean + b.mean @ s1 @ b.mean
    second = first**2 + spread
    third = first**3 + 3 * first * spread + 6 * b.mean @ s1 @ s2 @ a.mean
    return float(1 + 3 * first / d + 3 * second / d**2 + third / d**3)


def coverage(truth: float, estimates: Sequence[Estimate]) -> Coverage:
    """Of estimates that have intervals."""
    middles = [e.value if e.debiased is None else e.debiased for e in estimates]
    plain = [e.value for e in estimates]
    intervals = [e.interval for e in estimates if e.interval is not None]
    assert len(intervals) == len(estimates)
    return Coverage(
        truth=truth,
        covered=statistics.fmean(low <= truth <= high for low, high in intervals),
        plain_bias=statistics.fmean(plain) - truth,
        bias=statistics.fmean(middles) - truth,
        plain_rmse=math.sqrt(statistics.fmean((v - truth) ** 2 for v in plain)),
        rmse=math.sqrt(statistics.fmean((v - truth) ** 2 for v in middles)),
        error=statistics.fmean(e.standard_error or 0.0 for e in estimates),
        warned=statistics.fmean(e.warning is not None for e in estimates),
    )


def frechet_coverage(reference: Law, law: Law, n: int, repetitions: int) -> Coverage:
    """Of the distance of n draws to the reference's exact moments."""
    moments = FeatureStatistics.of_moments(reference.mean.numpy(), reference.covariance.numpy())
    estimates = [frechet_estimate(law.draw(n, seed), moments) for seed in range(repetitions)]
    return coverage(true_frechet(reference, law), estimates)


def kernel_coverage(reference: Law, law: Law, n: int, repetitions: int) -> Coverage:
    """Of the kernel distance of n draws of each law."""
    pairs = ((reference.draw(n, seed), law.draw(n, repetitions + seed)) for seed in range(repetitions))
    return coverage(true_kernel_distance(reference, law), [kernel_distance(x, y) for x, y in pairs])


def difference_coverage(reference: Law, a: Law, b: Law, n: int, repetitions: int) -> tuple[Coverage, Coverage]:
    """Of the Fréchet distance of b minus that of a, on the same noise: by the difference's own jackknife, and as if its
    two errors were independent."""
    moments = FeatureStatistics.of_moments(reference.mean.numpy(), reference.covariance.numpy())
    paired, apart = [], []
    for seed in range(repetitions):
        one, other = (frechet_estimate(law.draw(n, seed), moments) for law in (a, b))
        assert one.leave_one_out is not None
        assert other.leave_one_out is not None
        left = [y - x for x, y in zip(one.leave_one_out, other.leave_one_out, strict=True)]
        paired.append(jackknife(other.value - one.value, left))
        apart.append(_as_if_independent(paired[-1], one, other))
    truth = true_frechet(reference, b) - true_frechet(reference, a)
    return coverage(truth, paired), coverage(truth, apart)


def _as_if_independent(difference: Estimate, one: Estimate, other: Estimate) -> Estimate:
    assert difference.debiased is not None
    error = math.hypot(one.standard_error or 0.0, other.standard_error or 0.0)
    half = 1.96 * error
    return replace(difference, standard_error=error, interval=(difference.debiased - half, difference.debiased + half))


def interval_table(dim: int = 64, repetitions: int = 200) -> str:
    """Markdown: what every interval covered, beside bias and error; about three minutes at full size."""
    lines = [
        "| measured | d | N / d | truth | plain bias | bias | plain error | error | stated | warned | covered | met |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|:-:|",
    ]
    for d, ratios in ((dim, (4, 8, 16, 32)), (2 * dim, (4, 8))):
        reference, law = laws(d)
        for ratio in ratios:
            found = frechet_coverage(reference, law, ratio * d, repetitions)
            lines.append(_line("Fréchet", d, ratio, found, ratio >= 8))

    reference, law = laws(dim)
    heavy = frechet_coverage(reference, replace(law, tails=True), 16 * dim, repetitions)
    lines.append(_line("Fréchet, Student's t", dim, 16, heavy, False))
    paired, apart = difference_coverage(reference, law, laws(dim, change=0.33)[1], 16 * dim, repetitions)
    lines.append(_line("Fréchet, B - A on the same noise", dim, 16, paired, True))
    lines.append(_line("the same, as if independent", dim, 16, apart, False))
    for ratio in (8, 16):
        found = kernel_coverage(reference, law, ratio * dim, repetitions)
        lines.append(_line("kernel distance", dim, ratio, found, True))

    about = f"{repetitions} repetitions; bias and error (root mean square) without and with debiasing; met: 92 to 98 %"
    return "\n".join([*lines, "", about]) + "\n"


def _line(name: str, d: int, ratio: int, found: Coverage, judged: bool) -> str:
    numbers = (found.truth, found.plain_bias, found.bias, found.plain_rmse, found.rmse, found.error)
    met = ("yes" if BAR[0] <= found.covered <= BAR[1] else "no") if judged else ""
    cells = [name, str(d), str(ratio), *(f"{number:.3g}" for number in numbers)]
    return f"| {' | '.join(cells)} | {found.warned:.0%} | {found.covered:.1%} | {met} |"


if __name__ == "__main__":
    print(interval_table())
