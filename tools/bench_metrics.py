"""What the metrics cost beside the public tools, and how far each is from the truth, on the same features in one run.

Sets are made so that the truth is known: S2 = T S1 T has tr (S1 S2)^1/2 = tr S1 T, sets of fewer rows than features
have the singular values of their product. Seconds are the processor's, on one thread, the median of several runs where
they are cheap: time that other programs took is not in them, but for what it costs to share a cache.
"""

import contextlib
import io
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.linalg
import scipy.special
import torch
from cleanfid.fid import frechet_distance as cleanfid_frechet
from cleanfid.fid import kernel_distance as cleanfid_kernel
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor
from torchmetrics.image.fid import _compute_fid as torchmetrics_frechet

from tools.frechet import frechet_distance
from tools.pairwise import ASKED, density_coverage, kernel_distance, pairwise, precision_recall
from tools.statistics import FeatureStatistics
from tools.vendi import vendi_score

HEAD = (
    "| measured | ours, s | theirs, s | ratio | at least | met | our error | their error |",
    "|:--|--:|--:|--:|--:|:-:|--:|--:|",
)


@dataclass(frozen=True)
class Sizes:
    """Features, rows of each set, rows of the stream, and subsets of the public kernel distance."""

    dim: int = 2048
    rows: int = 4096
    stream: int = 8192
    subsets: int = 100
    repetitions: int = 3


@dataclass(frozen=True)
class Timed:
    """Seconds, and the number that came out; None where it raised."""

    seconds: float
    value: float | None


def metrics_tables(sizes: Sizes | None = None) -> str:
    """A row for every comparison, with its bar where there is one; about five minutes at full size."""
    sizes, threads = sizes or Sizes(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            rows = [row for part in (_frechet, _streaming, _kernel, _vendi, _together) for row in part(sizes)]
    finally:
        torch.set_num_threads(threads)
    title = f"d = {sizes.dim}; sets of {sizes.rows} rows, a stream of {sizes.stream}; errors are relative."
    return "\n".join([title, "", *HEAD, *rows]) + "\n"


def _frechet(sizes: Sizes) -> Iterator[str]:
    for name, (a, b, truth), bar in (
        ("well conditioned", _by_construction(sizes.dim, 50 * torch.arange(1, sizes.dim + 1).double() ** -1.3), 8.0),
        ("16 decades", _by_construction(sizes.dim, torch.logspace(0, -16, sizes.dim, dtype=torch.float64)), None),
        ("N = d / 2", _few_rows(sizes.dim), 25.0),
    ):
        tensors = a.mean, a.covariance, b.mean, b.covariance
        ours = timed(partial(_frechet_value, a, b), sizes.repetitions)
        theirs = timed(partial(cleanfid_frechet, *(x.numpy() for x in tensors)))
        yield row(f"Fréchet, {name}, clean-fid", ours, theirs, truth, bar)
        theirs = timed(partial(torchmetrics_frechet, *tensors))
        yield row(f"Fréchet, {name}, torchmetrics", ours, theirs, truth)


def _frechet_value(a: FeatureStatistics, b: FeatureStatistics) -> float:
    return frechet_distance(a, b).value


def _by_construction(d: int, spectrum: Tensor) -> tuple[FeatureStatistics, FeatureStatistics, float]:
    q = torch.linalg.qr(_normal(d, d, seed=1)).Q
    s1 = (q * spectrum) @ q.T
    t = _normal(d, d, seed=2) / math.sqrt(d)
    t = t @ t.T / 4 + torch.eye(d)
    s1, zero = (s1 + s1.T) / 2, torch.zeros(d, dtype=torch.float64)
    s2 = t @ s1 @ t
    s2 = (s2 + s2.T) / 2
    truth = float(s1.trace() + s2.trace() - 2 * (s1 * t).sum())
    return _of_moments(zero, s1), _of_moments(zero, s2), truth


def _of_moments(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    return FeatureStatistics.of_moments(mean.numpy(), covariance.numpy())


def _few_rows(d: int) -> tuple[FeatureStatistics, FeatureStatistics, float]:
    x, y = _normal(d // 2, d, seed=3), 1.2 * _normal(d // 2, d, seed=4) + 0.1
    a, b = ((rows - rows.mean(0)) / math.sqrt(len(rows) - 1) for rows in (x, y))
    cross = float(torch.linalg.svdvals(a @ b.T).sum())
    truth = float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()) - 2 * cross
    return _statistics(x, len(x)), _statistics(y, len(y)), truth


def _streaming(sizes: Sizes) -> Iterator[str]:
    features = _normal(sizes.stream, sizes.dim, seed=5).float()
    truth = float(np.linalg.norm(np.cov(features.double().numpy(), rowvar=False)))

    def a_product_for_each_batch() -> float:
        total, products, n = torch.zeros(sizes.dim).double(), torch.zeros(sizes.dim, sizes.dim).double(), len(features)
        for batch in features.split(64):
            rows = batch.double()
            total += rows.sum(dim=0)
            products += rows.T @ rows
        return float(((products - n * torch.outer(total / n, total / n)) / (n - 1)).norm())

    ours = timed(lambda: float(_statistics(features, 64).covariance.norm()), sizes.repetitions)
    yield row("covariance of batches of 64, a product each", ours, timed(a_product_for_each_batch), truth, 4.0)


def _kernel(sizes: Sizes) -> Iterator[str]:
    real, fake = _sets(sizes)
    ours = timed(lambda: kernel_distance(real, fake).value, sizes.repetitions)
    np.random.seed(0)  # noqa: NPY002 - clean-fid draws its subsets from the global state
    theirs = timed(partial(cleanfid_kernel, real.numpy(), fake.numpy(), num_subsets=sizes.subsets))
    exact = pairwise(real, fake, asked=["kd"], dtype=torch.float64).kernel_distance
    assert exact is not None
    yield row(f"kernel distance, {sizes.subsets} subsets of clean-fid", ours, theirs, exact.value, 5.0)


def _vendi(sizes: Sizes) -> Iterator[str]:
    for many, bar in ((sizes.rows, None), (2 * sizes.rows, 15.0)):
        features = _normal(many, sizes.dim, seed=8).abs().float()
        rows = torch.nn.functional.normalize(features.double(), dim=1)
        shares = torch.linalg.svdvals(rows).square() / many
        ours = timed(partial(_vendi_value, features), sizes.repetitions)
        theirs = timed(partial(_n_by_n, features))
        yield row(
            f"Vendi score, n x n, n = {many}", ours, theirs, math.exp(float(torch.special.entr(shares).sum())), bar
        )


def _vendi_value(features: Tensor) -> float:
    return vendi_score(features, errors=False).value


def _n_by_n(features: Tensor) -> float:
    """As the authors' program, in float64."""
    rows = torch.nn.functional.normalize(features.double(), dim=1).numpy()
    shares = scipy.linalg.eigvalsh(rows @ rows.T / len(rows)).clip(min=0)
    return math.exp(float(scipy.special.entr(shares).sum()))


def _together(sizes: Sizes) -> Iterator[str]:
    real, fake = _sets(sizes)

    def together() -> float:
        density = pairwise(real, fake, asked=ASKED).density
        assert density is not None
        return density.value

    def separately() -> float:
        kernel_distance(real, fake)
        precision_recall(real, fake)
        return density_coverage(real, fake).density

    theirs = timed(separately)
    assert theirs.value is not None
    yield row("kernel distance, P, R, D, C in one pass, in three", timed(together), theirs, theirs.value)


def timed(call: Callable[[], float | Tensor], repetitions: int = 1) -> Timed:
    """The median of the processor's seconds; what the call prints and warns is dropped."""
    seconds, value = [], None
    for _ in range(repetitions):
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            begun = time.process_time()
            try:
                value = float(call())
            except (TypeError, ValueError, np.linalg.LinAlgError):  # clean-fid with SciPy 1.18, for one
                value = None
            seconds.append(time.process_time() - begun)
    return Timed(statistics.median(seconds), value)


def row(name: str, ours: Timed, theirs: Timed, truth: float, bar: float | None = None) -> str:
    """A line of the table. A tool that raised has no ratio."""
    ratio = None if theirs.value is None else theirs.seconds / ours.seconds
    errors = ["raised" if t.value is None else f"{abs(t.value - truth) / abs(truth):.0e}" for t in (ours, theirs)]
    met = "" if bar is None else "yes" if ratio is not None and ratio >= bar else "no"
    cells = [name, f"{ours.seconds:.2f}", f"{theirs.seconds:.2f}", "" if ratio is None else f"{ratio:.1f}"]
    cells += ["" if bar is None else f"{bar:g}", met, *errors]
    return f"| {' | '.join(cells)} |"


def _sets(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Not negative, as the features of networks are."""
    shape = sizes.rows, sizes.dim
    return _normal(*shape, seed=6).abs().float(), (1.02 * _normal(*shape, seed=7).abs() + 0.01).float()


def _statistics(rows: Tensor, batch: int) -> FeatureStatistics:
    stream = FeatureStatistics(rows.shape[1])
    for part in rows.split(batch):
        stream.update(part)
    return stream


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


if __name__ == "__main__":
    print(metrics_tables())
