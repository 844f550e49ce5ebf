"""Toys: mixtures of Gaussians as exact teachers, and small networks for their students, in seconds on a CPU.

Everything but the networks is known in closed form: the denoiser, the density at every noise level, the modes.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.data import Images
from distill.sections import Toy
from samplers import GaussianMixture, NetworkDenoiser
from samplers.adapters import EDM
from samplers.atomic import atomic_folder

SIGMA_MIN, SIGMA_MAX = 0.02, 20.0


def two_modes() -> GaussianMixture:
    """0.3 N(-2, 0.5^2) + 0.7 N(2, 0.5^2) on a line."""
    return GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-2.0], [2.0]]), torch.tensor([0.25, 0.25]))


def ring() -> GaussianMixture:
    """Eight modes N(., 0.2^2), alike, on a circle of radius 2."""
    angle = torch.arange(8) * (math.pi / 4)
    return GaussianMixture(torch.ones(8), 2 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((8,), 0.04))


def grid() -> GaussianMixture:
    """Twenty-five modes N(., 0.1^2), alike, at the whole numbers from -2 to 2."""
    line = torch.arange(-2.0, 3.0)
    return GaussianMixture(torch.ones(25), torch.cartesian_prod(line, line), torch.full((25,), 0.01))


MIXTURES: dict[str, Callable[[], GaussianMixture]] = {"two-modes": two_modes, "ring": ring, "grid": grid}


class ToyNetwork(nn.Module):
    """A residual perceptron in the form of a diffusers model: (sample [B, d], timestep [B]) -> ([B, d],).

    Its last layer starts at 0. `blocks` are what a discriminator can read.
    """

    def __init__(self, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, hidden)
        self.time = nn.Linear(2 * _FREQUENCIES, hidden)
        self.blocks = nn.ModuleList(_Layer(hidden) for _ in range(layers))
        self.leave = nn.Linear(hidden, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        phase = timestep[:, None] * 2.0 ** torch.arange(_FREQUENCIES, device=sample.device)
        hidden = self.enter(sample) + self.time(torch.cat([phase.sin(), phase.cos()], 1))
        for block in self.blocks:
            hidden = block(hidden)
        return (self.leave(hidden),)


_FREQUENCIES = 4


class _Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layers(hidden)


class ToyStudent(nn.Module):
    """A denoiser that is good for one step: x = spread z + scale F(z) for z = x / sigma, and F = 0 at the start."""

    def __init__(self, dim: int, config: Toy, scale: float) -> None:
        super().__init__()
        self.network = ToyNetwork(dim, config.hidden, config.layers)
        self.spread, self.scale = config.spread, scale

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        z = x / sigma
        return self.spread * z + self.scale * self.network(z, z.new_zeros(len(z)))[0]


class AffineStudent(nn.Module):
    """The same with x = m + s z: its law is N(m, s^2) at every moment."""

    def __init__(self, dim: int, spread: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(dim, dtype=dtype))
        self.scale = nn.Parameter(torch.tensor(spread, dtype=dtype))

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.shift + self.scale * x / sigma

    def law(self) -> GaussianMixture:
        """The exact law of its samples, as it stands."""
        shift, scale = self.shift.detach(), self.scale.detach()
        return GaussianMixture(torch.ones(1), shift[None], scale[None] ** 2)


def networks(mixture: GaussianMixture, config: Toy) -> tuple[nn.Module, NetworkDenoiser]:
    """An untrained student, and an untrained fake score preconditioned for the mixture's standard deviation."""
    scale = standard_deviation(mixture)
    student = AffineStudent(mixture.dim, config.spread) if config.affine else ToyStudent(mixture.dim, config, scale)
    return student, denoiser(mixture.dim, config.hidden, config.layers, scale)


def denoiser(dim: int, hidden: int, layers: int, sigma_data: float) -> NetworkDenoiser:
    """An untrained denoiser of points [B, dim]."""
    coordinates = EDM(sigma_data, SIGMA_MIN, SIGMA_MAX, boundary=0.0, scale=0.25, sign=1.0)
    return NetworkDenoiser(ToyNetwork(dim, hidden, layers), coordinates)


def points(mixture: GaussianMixture, seed: int, count: int = 20_000) -> Images:
    """Samples of a mixture as a set to train on, [count, d], in the place of images."""
    return Images(mixture.sample(count, generator=torch.Generator().manual_seed(seed)))


def standard_deviation(mixture: GaussianMixture) -> float:
    """Of a mixture's coordinates, around their means and averaged over them."""
    samples = mixture.sample(20_000, generator=torch.Generator().manual_seed(0))
    return float(samples.var(0).mean().sqrt())


_FILES = ("toy.json", "toy.safetensors")


def save_denoiser(folder: Path, network: NetworkDenoiser, mixture: str, config: Toy) -> None:
    """Writes the network of a toy that `distill teach` has trained, complete or not at all.

    Raises ValueError where `folder` holds anything else.
    """
    if folder.exists() and sorted(p.name for p in folder.iterdir()) != sorted(_FILES):
        raise ValueError(f"{folder}: holds something that is no toy's network; choose another folder")
    facts = {"mixture": mixture, "hidden": config.hidden, "layers": config.layers, "sigma_data": network.sigma_data}
    with atomic_folder(folder) as draft:
        (draft / _FILES[0]).write_text(json.dumps(facts, indent=1))
        save_file({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, draft / _FILES[1])


def teacher_folder(path: str | Path) -> Path:
    """The folder of a toy's network: `path`, or `path`/model where `path` is a run of `distill teach`."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / _FILES[0]).is_file():
            return folder
    raise ValueError(f"teacher.path: {path} holds no network of a toy (there is no {_FILES[0]})")


def load_denoiser(path: str | Path, mixture: str) -> NetworkDenoiser:
    """The frozen network of a toy, from a run of `distill teach` or its folder `model`.

    Raises ValueError where there is none, it is of another mixture, or cannot be read.
    """
    folder = teacher_folder(path)
    try:
        facts = json.loads((folder / _FILES[0]).read_text())
        known, hidden, layers, scale = (facts[k] for k in ("mixture", "hidden", "layers", "sigma_data"))
        network = denoiser(MIXTURES[known]().dim, hidden, layers, scale)
        network.load_state_dict(load_file(folder / _FILES[1]), strict=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"teacher.path: {folder} cannot be read ({' '.join(str(error).split())})") from error
    if known != mixture:
        raise ValueError(f"teacher.path: {folder} has learned the {known}, not teacher.name: {mixture}")
    return network.requires_grad_(False).eval()
