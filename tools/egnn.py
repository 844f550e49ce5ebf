"""A small denoiser of identical particles that turns with them: E(3)-equivariant, and symmetric in the particles.

Satorras et al. 2021 (arXiv 2102.09844) with the preconditioning of Karras et al. 2022 (arXiv 2206.00364, Table 1), in
the coordinates y of `tools.lennard_jones`, without centre of mass. A pair has one message, not one each way: forces
between two particles are opposite, and half the arithmetic is saved. Distances are seen through bumps that are narrow
where particles touch.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import silu

from samplers.atomic import atomic_write
from samplers.denoiser import expand
from tools.lennard_jones import differences


class Layer(nn.Module):
    """One round of messages. Particles and pairs come first, [n, B, hidden], so that sums are one matrix product."""

    def __init__(self, hidden: int, radial: int) -> None:
        super().__init__()
        self.own, self.pair = nn.Linear(hidden, hidden), nn.Linear(radial, hidden, bias=False)
        self.message = nn.Linear(hidden, hidden)
        self.pull = nn.Linear(hidden, 1, bias=False)
        self.update = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        nn.init.normal_(self.pull.weight, std=1e-3)

    def forward(self, h: Tensor, radial: Tensor, touches: Tensor) -> tuple[Tensor, Tensor]:
        """The pull of each pair [pairs, B, 1] and new features; touches [pairs, n]: which particles a pair has."""
        seen = silu(_rows(touches, self.own(h)) + self.pair(radial))
        message = silu(self.message(seen))
        return self.pull(message), h + self.update(torch.cat([h, _rows(touches.mT, message)], -1))


class EquivariantDenoiser(nn.Module):
    """D(y, sigma) for y [B, n - 1, 3], sigma [] or [B]; sigma_data: a coordinate's standard deviation."""

    def __init__(self, n: int, sigma_data: float, *, hidden: int = 48, layers: int = 3, radial: int = 24) -> None:
        super().__init__()
        self.settings = {"n": n, "sigma_data": sigma_data, "hidden": hidden, "layers": layers, "radial": radial}
        self.sigma_data, self.bumps = sigma_data, radial
        self.level = nn.Sequential(nn.Linear(16, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.layers = nn.ModuleList(Layer(hidden, 2 * radial) for _ in range(layers))
        i, j = torch.triu_indices(n, n, 1)
        self.register_buffer("touches", torch.eye(n)[i] + torch.eye(n)[j], persistent=False)
        self.register_buffer("difference", differences(n).float(), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        v, data = expand(sigma, x) ** 2, self.sigma_data**2
        moved = self.network(x * (data / (v + data)).sqrt(), sigma)
        return data / (v + data) * x + (v / (v + data)).sqrt() * self.sigma_data * moved

    def network(self, y: Tensor, sigma: Tensor) -> Tensor:
        """F: how far layers move y [B, n - 1, 3], which is of standard deviation sigma_data."""
        difference, touches = self.get_buffer("difference").to(y), self.get_buffer("touches").to(y)
        phase = sigma.to(y).reshape(-1, 1).log() / 4 * torch.linspace(0.5, 6.0, 8).to(y)
        level = self.level(torch.cat([phase.sin(), phase.cos()], -1))
        h = level.expand(touches.shape[1], len(y), -1)
        begun = y.transpose(0, 1)
        place, first = begun, None
        for layer in self.layers:
            between = _rows(difference, place)
            r = (between.square().sum(-1, keepdim=True) + 1e-8).sqrt()
            seen = self._radial(r)
            first = seen if first is None else first
            pull, h = layer(h, torch.cat([first, seen], -1), touches)
            place = place + _rows(difference.mT, pull / (1 + r) * between)
        return (place - begun).transpose(0, 1)

    def _radial(self, r: Tensor) -> Tensor:
        """Bumps in exp(-r), whose spacing in r is finest where particles touch."""
        centres = torch.linspace(0.0, 0.7, self.bumps).to(r)
        return (-0.5 * ((torch.exp(-r) - centres) / (centres[1] - centres[0])) ** 2).exp()

    def save(self, file: Path, about: dict[str, Any]) -> None:
        """One safetensors file; about: what `load` gives back."""
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"settings": json.dumps(self.settings), "about": json.dumps(about)}
        with atomic_write(file) as out:
            out.write(save({k: v.contiguous() for k, v in self.state_dict().items()}, metadata))

    @classmethod
    def load(cls, file: Path) -> tuple[Self, dict[str, Any]]:
        """What `save` wrote. Raises ValueError, naming the file, for anything else."""
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                denoiser = cls(**json.loads(metadata["settings"]))
                denoiser.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
                return denoiser.eval().requires_grad_(False), json.loads(metadata["about"])
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"denoiser: {file} cannot be read as one ({error or type(error).__name__})") from error


def train(
    denoiser: EquivariantDenoiser,
    samples: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    batch: int = 256,
    rate: float = 2e-3,
    level: tuple[float, float] = (-1.2, 1.3),
    decay: float = 0.999,
) -> Iterator[float]:
    """Denoising score matching on samples [n, ...] in place; yields losses, and leaves averaged weights at the end.

    level: mean and standard deviation of ln sigma. The rate falls to 0 as a cosine, after 200 steps of warm-up.
    """
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=rate)
    average = {name: value.detach().clone() for name, value in denoiser.named_parameters()}
    data = denoiser.sigma_data**2
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x0 = samples[torch.randint(len(samples), (batch,), generator=generator)]
        sigma = (level[0] + level[1] * torch.randn(batch, generator=generator)).exp()
        noise = torch.randn(x0.shape, generator=generator)
        v = expand(sigma, x0) ** 2
        error = denoiser(x0 + v.sqrt() * noise, sigma) - x0
        loss = ((v + data) / (v * data) * error.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(decay, (1 + step) / (10 + step))
            for name, value in denoiser.named_parameters():
                average[name].lerp_(value, 1 - keep)
        yield float(loss.detach())
    with torch.no_grad():
        for name, value in denoiser.named_parameters():
            value.copy_(average[name])
    denoiser.eval().requires_grad_(False)


def _rows(matrix: Tensor, values: Tensor) -> Tensor:
    """matrix [m, n] times values [n, B, k], as one product of matrices."""
    return (matrix @ values.flatten(1)).unflatten(1, values.shape[1:])
