"""What a Gaussian costs and is worth: the fit against the full covariance, a jump against a network, error by rank.

The samples are images with an amplitude of 1 / f, correlated colours and a contrast that falls from the middle, so that
no fixed basis is right. Seconds are the processor's, on one thread. Every fit has a process of its own; its peak is the
kernel's: the most resident memory in its life (VmHWM, Linux), less what was resident before its first sample, when the
same code had run once on small samples. Freed blocks above 1 MiB go back at once (mallopt), so that it is what was
alive. Batches of 64 and the work of making them are in it.
"""

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.bound import Reservoir, bound_of
from samplers.gaussian import Gaussian
from samplers.moments import BLOCK, Moments

BATCH = 64
TARGETS = {"time": 1 / 20, "memory": 3.0, "jump": 0.02}


class Cost(NamedTuple):
    """Of a fit. seconds: of every part; peak: bytes."""

    seconds: tuple[float, ...]
    peak: int


def images(n: int, size: int, channels: int, generator: torch.Generator) -> Tensor:
    """Images [n, channels, size, size], standard deviation about 0.5."""
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    amplitude = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / size)
    noise = torch.randn((n, channels, size, size), generator=generator)
    x = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude / amplitude.square().mean().sqrt(), s=(size, size))
    x = 0.8 * x + 0.6 * x[:, :1]
    place = torch.linspace(-1, 1, size)
    contrast = 1.5 - (place[:, None].square() + place[None].square()) / 2
    return 0.4 * contrast * x + 0.2 * place[:, None]


def stream(count: int, size: int, channels: int) -> Iterator[Tensor]:
    """The same `count` images every time, in batches."""
    generator = torch.Generator().manual_seed(0)
    for n in range(0, count, BATCH):
        yield images(min(BATCH, count - n), size, channels, generator)


def fit(method: str, size: int, channels: int, count: int, rank: int) -> Cost:
    """Fit in this process: seconds of the updates and of what follows, and the growth of resident memory.

    `incremental` is all that `Gaussian.fit` does, the samples kept for the bound and the bound included. What follows
    `full` is the eigendecomposition alone, in float32, the faster of the two
    precisions.
    """
    torch.set_num_threads(1)
    small = Moments((3, 8, 8), rank=4, method=method)
    for x in stream(2 * BATCH, 8, 3):
        small.update(x)
    bound_of(x[:8], small.gaussian(4))
    next(stream(BATCH, size, channels))
    base = _memory("VmRSS")

    moments, kept = Moments((channels, size, size), rank=rank, method=method), Reservoir()
    updates = 0.0
    for x in stream(count, size, channels):
        updates += _seconds(partial(moments.update, x))
        if method == "incremental":
            updates += _seconds(partial(kept.update, x))
    if method == "full":
        covariance = moments.state()["scatter"].float() / count
        last = _seconds(lambda: torch.linalg.eigh(covariance))
    else:
        last = _seconds(lambda: bound_of(kept.samples, moments.gaussian(rank)))
    return Cost((updates, last), _memory("VmHWM") - base)


def fit_table(
    size: int = 64, count: int = 10_000, rank: int = 256, large: int = 128, few: int = 2000, full: bool = True
) -> str:
    """Fits `count` images 3 x size x size both ways, and `few` 4 x large x large in one pass.

    full: whether to run the full covariance too (about six minutes and 6 GiB at the default size).
    """
    ways = [("incremental", size, 3, count)]
    ways += [("full", size, 3, count)] if full else []
    ways += [("incremental", large, 4, few)]
    costs = [_alone(fit, *way, rank) for way in ways]
    lines = [
        "| fit | d | samples | updates, s | eigenvectors, s | together, s | ratio | peak memory, MiB "
        f"| of (k + {BLOCK}) d floats |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    base = sum(costs[1].seconds) if full else float("nan")
    shares = []
    for (method, side, channels, n), cost in zip(ways, costs, strict=True):
        dim, seconds = channels * side**2, sum(cost.seconds)
        shares.append(cost.peak / (4 * (rank + BLOCK) * dim))
        ratio = f"{seconds / base:.3f}" if side == size and full else ""
        lines.append(
            f"| {method} | {dim:,} | {n:,} | {cost.seconds[0]:.1f} | {cost.seconds[1]:.1f} | {seconds:.1f} | {ratio} "
            f"| {cost.peak / 2**20:.0f} | {shares[-1]:.2f} |"
        )
    met = {"time": sum(costs[0].seconds) / base} if full else {}
    met["memory"] = shares[0]
    return "\n".join(lines) + f"\n\nk = {rank}. {_bars(met)}\n"


def jump_table(size: int = 64, batch: int = 64, rank: int = 256, repetitions: int = 9) -> str:
    """One jump against one forward pass of a small UNet with the same input, in turns; medians."""
    from diffusers import UNet2DModel

    dim, generator = 3 * size**2, torch.Generator().manual_seed(0)
    components = torch.linalg.qr(torch.randn((dim, rank), generator=generator))[0].mT.contiguous()
    variances = 0.25 * dim / torch.arange(2, rank + 2).double() ** 1.2
    gaussian = Gaussian(torch.zeros(3, size, size), components, variances, 0.01)
    unet = UNet2DModel(
        sample_size=size,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    x = 80 * torch.randn((batch, 3, size, size), generator=generator)
    work: dict[str, Callable[[], Any]] = {
        f"jump, rank {rank}": lambda: gaussian.transport(x, 80.0, 8.4),
        "forward pass of the UNet (32, 64)": lambda: unet(x, torch.full((batch,), 500)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    with _one_thread(), torch.no_grad():
        for n in range(repetitions + 1):
            for name, run in work.items():
                spent = _seconds(run)
                seconds[name] += [spent] if n else []
    jumps, forwards = seconds.values()
    ratio = statistics.median(a / b for a, b in zip(jumps, forwards, strict=True))
    lines = [f"| batch of {batch}, d = {dim:,} | ms |", "|:--|--:|"]
    lines += [f"| {name} | {1000 * statistics.median(spent):.1f} |" for name, spent in seconds.items()]
    return "\n".join(lines) + f"\n\n{repetitions} repetitions in turns. {_bars({'jump': ratio})}\n"


def rank_table(size: int = 32, count: int = 10_000, ranks: tuple[int, ...] = (256, 64, 32), starts: int = 64) -> str:
    """The error of a jump from sigma 80, against the jump of the full covariance: rms, relative to sigma.

    All in float64 but the fits' products; every Gaussian is of the same images.
    """
    sigmas = (20.0, 10.0, 5.0, 2.0, 1.0)
    whole = Moments((3, size, size), method="full")
    single = Moments((3, size, size), rank=ranks[0], method="incremental")
    for x in stream(count, size, 3):
        whole.update(x)
        single.update(x)
    exact = whole.gaussian(3 * size**2)
    x = exact.sample(starts, 80.0, generator=torch.Generator().manual_seed(1))

    gaussians = {f"exact, {k}, and rest": cut(exact, k) for k in ranks}
    gaussians |= {f"exact, {k}, nothing else": cut(exact, k, 0.0) for k in ranks}
    gaussians[f"incremental, {ranks[0]}, and rest"] = single.gaussian(ranks[0])
    lines = [
        "| directions | " + " | ".join(f"sigma {sigma:g}" for sigma in sigmas) + " |",
        "|:--|" + "--:|" * len(sigmas),
    ]
    truth = {sigma: exact.transport(x, 80.0, sigma) for sigma in sigmas}
    for name, gaussian in gaussians.items():
        errors = [(gaussian.transport(x, 80.0, s) - truth[s]).square().mean().sqrt() / s for s in sigmas]
        lines.append(f"| {name} | " + " | ".join(f"{float(e):.2e}" for e in errors) + " |")
    return "\n".join(lines) + f"\n\nd = {3 * size**2:,}, {count:,} images, 80 -> sigma.\n"


def cut(gaussian: Gaussian, rank: int, rest: float | None = None) -> Gaussian:
    """The top directions of a Gaussian of full rank; rest: of the others, their mean variance if nothing is said."""
    if rest is None:
        rest = float(gaussian.variances[rank:].mean())
    return Gaussian(gaussian.mean, gaussian.components[:rank], gaussian.variances[:rank], rest)


def gaussian_tables(full: bool = True) -> str:
    """All tables of this file; full: as in `fit_table`."""
    return "\n".join([fit_table(full=full), jump_table(), rank_table()])


def _bars(met: dict[str, float]) -> str:
    says = [f"{k} {v:.3g}, at most {TARGETS[k]:g}: {'yes' if v <= TARGETS[k] else 'no'}" for k, v in met.items()]
    return f"Targets: {'; '.join(says)}."


def _seconds(run: Callable[[], Any]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def _memory(field: str) -> int:
    """VmRSS, what is resident, or VmHWM, the most that ever was, in bytes; of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def _alone(work: Callable[..., Cost], *arguments: Any) -> Cost:
    """In a process of its own, so that nothing was resident before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _give_back) as pool:
        return pool.submit(work, *arguments).result()


def _give_back() -> None:
    """Without this glibc may keep up to 64 MiB of what was freed: its thresholds grow with the blocks that it sees."""
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    print(gaussian_tables())
