"""Particles that attract and repel each other in a harmonic trap, and their Boltzmann laws by parallel tempering.

E = sum over ordered pairs of (1/r)^12 - 2 (1/r)^6, plus 1/2 sum |x_i - mean|^2, and p ~ exp(-E / T): the LJ-13 of
Boltzmann generators, of DEM and of Skreta et al. 2025 (arXiv 2503.02819). A pair counts twice: its well is 2 deep.
States are y [..., n - 1, 3], x = H y with H of orthonormal columns that sum to 0: the space without centre of mass has
no constraint in y, and normal noise in y is the mean-free noise of x.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from samplers.atomic import atomic_write

Energy = Callable[[Tensor], tuple[Tensor, Tensor]]
TEMPERATURES = (0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.8, 4.0)
KEPT = (0.8, 1.5, 2.0)


@cache
def helmert(n: int) -> Tensor:
    """H [n, n - 1], float64: orthonormal columns, each of sum 0."""
    ranks = torch.arange(1, n, dtype=torch.float64)
    rows = torch.arange(n, dtype=torch.float64)[:, None]
    columns = (rows < ranks).double() - ranks * (rows == ranks)
    return columns / (ranks * (ranks + 1)).sqrt()


@cache
def differences(n: int) -> Tensor:
    """[pairs, n - 1], float64: what takes y to x_i - x_j, for i < j."""
    i, j = torch.triu_indices(n, n, 1)
    return helmert(n)[i] - helmert(n)[j]


def positions(y: Tensor) -> Tensor:
    """x [..., n, 3] of mean 0 from y [..., n - 1, 3]."""
    return helmert(y.shape[-2] + 1).to(y) @ y


def coordinates(x: Tensor) -> Tensor:
    """y [..., n - 1, 3] from x [..., n, 3]; where the centre of mass is does not matter."""
    return helmert(x.shape[-2]).to(x).mT @ x


def distances(y: Tensor) -> Tensor:
    """Of all pairs, [..., n (n - 1) / 2]."""
    return (differences(y.shape[-2] + 1).to(y) @ y).norm(dim=-1)


def lennard_jones(y: Tensor) -> tuple[Tensor, Tensor]:
    """E [...] and its gradient [..., n - 1, 3] at y [..., n - 1, 3]."""
    difference = differences(y.shape[-2] + 1).to(y)
    between = difference @ y
    inverse = 1 / between.square().sum(-1)
    sixth = inverse**3
    energy = 2 * (sixth * (sixth - 2)).sum(-1) + 0.5 * y.square().sum((-2, -1))
    pull = 24 * inverse * sixth * (1 - sixth)
    return energy, difference.mT @ (pull[..., None] * between) + y


def icosahedron() -> Tensor:
    """y [12, 3], float64: the pair energy's global minimum for 13 particles, -2 * 44.3268 (Hoare & Pal 1971).

    A particle in the middle of an icosahedron, without the trap, which would press it together a little.
    """
    golden = (1 + 5**0.5) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    x = torch.tensor([(0.0, 0.0, 0.0), *[c[k:] + c[:k] for c in corners for k in range(3)]], dtype=torch.float64)
    y = coordinates(x)
    sixth = distances(y) ** -6  # sum (s^-12 sixth^2 - 2 s^-6 sixth) is least where s^6 is the ratio of these sums
    return y * (sixth.square().sum() / sixth.sum()) ** (1 / 6)


def gas(count: int, n: int, generator: torch.Generator, width: float = 2.0, apart: float = 0.8) -> Tensor:
    """y [count, n - 1, 3], float64: normal positions, of which those with a pair too close are drawn again."""
    kept: list[Tensor] = []
    while sum(map(len, kept)) < count:
        y = width * torch.randn((count, n - 1, 3), generator=generator, dtype=torch.float64)
        kept.append(y[distances(y).amin(-1) > apart])
    return torch.cat(kept)[:count]


class Replicas(NamedTuple):
    """y [temperatures, chains, ...] after a step, their energies, the share of accepted moves, [temperatures], and of
    accepted swaps, [temperatures - 1], since the burn-in (or of it, while it lasts)."""

    y: Tensor
    energy: Tensor
    accepted: Tensor
    swapped: Tensor


def parallel_tempering(
    energy: Energy,
    y: Tensor,
    temperatures: Sequence[float],
    steps: int,
    burn_in: int,
    generator: torch.Generator,
    *,
    step: float = 1e-3,
    swap_every: int = 5,
) -> Iterator[Replicas]:
    """MALA at every temperature and swaps of neighbours, from y [temperatures, chains, ...]; yields after each step.

    Ladders (a chain of every temperature) are independent. In the burn-in every temperature's step size seeks an
    acceptance of .57 (Roberts & Rosenthal 1998), and from then on it stays, so that the laws are exact.
    """
    levels = torch.tensor(temperatures, dtype=torch.float64)
    axes = tuple(range(2, y.ndim))
    per = (-1, 1, *[1] * len(axes))
    size, heat = torch.full_like(levels, step), levels.view(-1, 1)
    value, slope = energy(y)
    moves, swaps, since, tried = torch.zeros_like(levels), torch.zeros_like(levels[1:]), 0, torch.zeros_like(levels[1:])

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).log()

    for count in range(steps):
        if count == burn_in:
            moves, swaps, since, tried = moves * 0, swaps * 0, 0, tried * 0
        e = size.view(per)
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        proposed = y - e / levels.view(per) * slope + (2 * e).sqrt() * noise
        new_value, new_slope = energy(proposed)
        back = y - proposed + e / levels.view(per) * new_slope
        ratio = (
            (value - new_value) / heat + 0.5 * noise.square().sum(axes) - back.square().sum(axes) / (4 * size[:, None])
        )
        accept = uniform(ratio) < ratio
        mask = accept.view(*accept.shape, *[1] * len(axes))
        y, slope = torch.where(mask, proposed, y), torch.where(mask, new_slope, slope)
        value = torch.where(accept, new_value, value)
        moves, since = moves + accept.double().mean(1), since + 1
        if count < burn_in:
            size = size * ((accept.double().mean(1) - 0.57) * min(0.2, 10 / (count + 1) ** 0.5)).exp()

        if count % swap_every == 0 and len(levels) > 1:
            first = torch.arange(count // swap_every % 2, len(levels) - 1, 2)
            gain = (1 / heat[first] - 1 / heat[first + 1]) * (value[first] - value[first + 1])
            swap = uniform(gain) < gain
            places = torch.arange(len(levels))[:, None].expand_as(value).clone()
            places[first], places[first + 1] = places[first] + swap.long(), places[first + 1] - swap.long()
            index = places.view(*places.shape, *[1] * len(axes)).expand_as(y)
            y, slope, value = y.gather(0, index), slope.gather(0, index), value.gather(0, places)
            swaps[first] += swap.double().mean(1)
            tried[first] += 1
        yield Replicas(y, value, moves / since, swaps / tried.clamp_min(1))


class References(NamedTuple):
    """Samples of p ~ exp(-E / T) by temperature, [n, particles - 1, 3], float32: the first half from ladders that began
    as gas, the second from ladders that began at the minimum; report: what says that the two agree."""

    samples: dict[float, Tensor]
    report: str

    def halves(self, temperature: float) -> tuple[Tensor, Tensor]:
        first, second = self.samples[temperature].chunk(2)
        return first, second


def references(
    file: Path, *, ladders: int = 128, steps: int = 24_000, burn_in: int = 6_000, every: int = 40, seed: int = 0
) -> References:
    """LJ-13 at the temperatures of KEPT, made once and kept in a file, of this ladder and these numbers."""
    about = json.dumps({"temperatures": TEMPERATURES, "ladders": ladders, "steps": steps, "burn_in": burn_in} | {
        "every": every, "seed": seed
    })  # fmt: skip
    found = _load(file, about)
    if found is not None:
        return found
    generator = torch.Generator().manual_seed(seed)
    half = ladders // 2
    minimum = icosahedron().expand(len(TEMPERATURES), half, 12, 3)
    start = torch.cat([gas(len(TEMPERATURES) * half, 13, generator).view_as(minimum), minimum], 1)
    kept: list[Tensor] = []
    energies: list[Tensor] = []
    replicas = None
    for count, replicas in enumerate(parallel_tempering(lennard_jones, start, TEMPERATURES, steps, burn_in, generator)):
        if count >= burn_in and count % every == 0:
            kept.append(replicas.y[[TEMPERATURES.index(t) for t in KEPT]].float())
            energies.append(replicas.energy)
    assert replicas is not None
    report = equilibration(torch.stack(energies, 2), replicas)
    samples = {t: torch.stack([k[i] for k in kept], 1).flatten(0, 1) for i, t in enumerate(KEPT)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as out:
        out.write(save({str(t): s.contiguous() for t, s in samples.items()}, {"about": about, "report": report}))
    return References(samples, report)


def equilibration(energies: Tensor, replicas: Replicas) -> str:
    """A table of the two halves' mean energies [temperatures, ladders, kept]; errors are over independent ladders."""
    lines = [
        "| T | mean E, from gas | from the minimum | difference in standard errors | sd of E | independent samples "
        "| accepted | swapped with the next |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    swapped = [f"{s:.2f}" for s in replicas.swapped] + ["-"]
    for i, t in enumerate(TEMPERATURES):
        means = [half.mean(1) for half in energies[i].chunk(2)]
        errors = [float(m.std() / len(m) ** 0.5) for m in means]
        apart = float(means[0].mean() - means[1].mean()) / math.hypot(*errors)
        joint = torch.cat(means)
        independent = float(energies[i].var() / joint.var()) * len(joint)
        both = " | ".join(f"{float(m.mean()):.3f} +- {e:.3f}" for m, e in zip(means, errors, strict=True))
        lines.append(
            f"| {t:g} | {both} | {apart:+.1f} | {float(energies[i].std()):.2f} | {independent:.0f} "
            f"| {float(replicas.accepted[i]):.2f} | {swapped[i]} |"
        )
    return "\n".join(lines) + "\n"


def _load(file: Path, about: str) -> References | None:
    """What `references` wrote, if it is of these numbers."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("about") != about:
                return None
            return References({t: opened.get_tensor(str(t)) for t in KEPT}, metadata["report"])
    except SafetensorError as error:
        raise ValueError(f"references: {file} cannot be read ({error})") from error
