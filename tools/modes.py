"""How well samples cover the modes of a known mixture."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers import GaussianMixture

NEAR = 4.0  # standard deviations within which a sample belongs to a mode
COVERED = 0.25  # share of its due that a mode must get


@dataclass(frozen=True)
class ModeScore:
    """covered: modes that get at least a quarter of their due. kl: of the samples' shares of the modes from their
    weights, in nats. near: share of samples within 4 standard deviations of a mode. spread: their standard deviation
    around their modes, over the modes' own. wasserstein: sliced 2-Wasserstein distance to the mixture.
    """

    covered: int
    kl: float
    near: float
    spread: float
    wasserstein: float


def mode_score(samples: Tensor, mixture: GaussianMixture, seed: int = 0) -> ModeScore:
    """Judges samples [N, d] against a mixture of isotropic Gaussians.

    A sample counts for the nearest mode. The distance is to N samples of the mixture, drawn by `seed`; with 20,000 on
    each side its floor is about 0.02 for the ring and the grid. Raises ValueError for samples of another
    dimension or not finite.
    """
    if samples.ndim != 2 or samples.shape[1] != mixture.dim or not bool(samples.isfinite().all()):
        raise ValueError(f"samples: shape {list(samples.shape)}; needed are finite rows [N, {mixture.dim}]")
    distance, mode = torch.cdist(samples.double(), mixture.means.double()).min(1)
    std = mixture.standard_deviations.double()[mode]
    near = distance <= NEAR * std
    weights = mixture.log_weights.double().exp()

    share = torch.bincount(mode, minlength=len(weights)).double() / len(samples)
    good = torch.bincount(mode[near], minlength=len(weights)).double() / len(samples)
    kl = torch.special.xlogy(share, share / weights).sum()
    spread = ((distance[near] / std[near]) ** 2 / mixture.dim).mean().sqrt()
    generator = torch.Generator().manual_seed(seed)
    reference = mixture.sample(len(samples), generator=generator)
    return ModeScore(
        int((good >= COVERED * weights).sum()),
        float(kl),
        float(near.double().mean()),
        float(spread),
        sliced_wasserstein(samples, reference, generator),
    )


def sliced_wasserstein(a: Tensor, b: Tensor, generator: torch.Generator | None = None, slices: int = 100) -> float:
    """The root mean square over random directions of the 2-Wasserstein distance of projections of a, b [N, d]."""
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"a, b: shapes {list(a.shape)}, {list(b.shape)}; needed are two sets of as many rows [N, d]")
    directions = torch.nn.functional.normalize(torch.randn(slices, a.shape[1], generator=generator), dim=1)
    lines = [(x.double() @ directions.T.double()).sort(0).values for x in (a, b)]
    return float((lines[0] - lines[1]).square().mean().sqrt())
