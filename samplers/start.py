"""Where the particles of a Feynman-Kac corrector begin: the product of Gaussians that stand for the denoisers' laws.

prod_i N(mu_i, S_i + v I)^b_i is the Gaussian N(P^-1 sum P_i mu_i, P^-1) with P_i = b_i (S_i + v I)^-1, P = sum P_i, at
any noise level, so that a start can also be late (teleportation). What differs from the target is in the log-weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samplers.gaussian import Gaussian
from samplers.noise import normal_like
from samplers.solvers import Generator
from samplers.targets import Conditioned, Target


def start_particles(
    target: Target,
    shape: Sequence[int],
    sigma: float,
    particles: int,
    *,
    groups: int = 1,
    gaussians: Gaussian | Sequence[Gaussian] | None = None,
    cond: Any = None,
    generator: Generator = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Particles [groups * particles, *shape] at noise level sigma, and their log-weights [groups, particles].

    gaussians: of each denoiser's data, or one for all (with class means, each term's own are taken); None is data of no
    variance at 0, right only where sigma is far above the data. The log-weights are sum b_i log q_i - log N, with a
    denoiser's `log_density` where it has one, and its Gaussian's elsewhere: then they are a constant, and the
    log-evidence of a run from here is that of the whole target. Tilts are weighed by `feynman_kac`.
    Raises ValueError for another number of Gaussians, a shape that is not theirs, and where P is not positive definite.
    """
    if particles < 1 or groups < 1 or not 0 < sigma < math.inf:
        raise ValueError(f"particles, groups, sigma: {particles}, {groups}, {sigma}; needed are positive numbers")
    exponents, n = target.exponents_at(sigma), groups * particles
    models = _models(target, tuple(shape), gaussians)
    x = torch.empty((n, *shape), dtype=dtype, device=device)
    conds = [d.cond if isinstance(d, Conditioned) else cond for d in target.denoisers]
    means = [g.mean_of(x.double(), c) for g, c in zip(models, conds, strict=True)]
    mean, joint = gaussian_product(models, exponents, sigma, means)

    noise = normal_like(x, generator).flatten(1)
    spread = (joint.variances[None].sqrt(), torch.full((1, 1), joint.rest, dtype=torch.float64).sqrt())
    offset = joint.apply((spread[0].to(device), spread[1].to(device), noise.double()))
    x = (mean + offset).reshape(n, *shape).to(dtype)
    logs = log_densities(target, x, sigma, gaussians, cond)
    log_weights = (torch.tensor(exponents, dtype=torch.float64, device=logs.device)[:, None] * logs).sum(0)
    log_weights = log_weights - joint.log_density(offset.reshape(n, *shape), 0.0)
    return x, log_weights.reshape(groups, particles)


def log_densities(
    target: Target, x: Tensor, sigma: float, gaussians: Gaussian | Sequence[Gaussian] | None = None, cond: Any = None
) -> Tensor:
    """log q_i(x; sigma) of each denoiser, [terms, B], float64: its own `log_density`, or its Gaussian's."""
    logs = []
    for denoiser, gaussian in zip(target.denoisers, _models(target, tuple(x.shape[1:]), gaussians), strict=True):
        own = denoiser.cond if isinstance(denoiser, Conditioned) else cond
        known: Any = denoiser if hasattr(denoiser, "log_density") else gaussian
        logs.append(known.log_density(x.double(), sigma, own).double())
    return torch.stack(logs)


def gaussian_product(
    gaussians: Sequence[Gaussian], exponents: Sequence[float], sigma: float, means: Sequence[Tensor]
) -> tuple[Tensor, Gaussian]:
    """prod_i N(mu_i, S_i + sigma^2 I)^b_i, normalised: its mean [B or 1, d] and a Gaussian of mean 0, in float64.

    The arithmetic is in the span of all components, and a multiple of the identity outside. means: [B or 1, d] each.
    Raises ValueError where the product is no Gaussian (exponents below 0 of a law that is narrower than the others).
    """
    first = gaussians[0]
    device = means[0].device
    distinct = list({id(g): g for g in gaussians}.values())
    basis = first.components.double().to(device)
    if len(distinct) > 1:
        basis = torch.cat([g.components.double().to(device) for g in distinct])
        basis = torch.linalg.qr(basis.mT).Q.mT if len(basis) else basis
    precision = torch.zeros((len(basis), len(basis)), dtype=torch.float64, device=device)
    outside, pulled, pulled_outside = 0.0, basis.new_zeros((1, len(basis))), basis.new_zeros((1, first.dim))
    for gaussian, b, mean in zip(gaussians, exponents, means, strict=True):
        # S_i + v I in the basis: rest_i + v everywhere, and own directions on top.
        turned = gaussian.components.double().to(device) @ basis.mT
        level = gaussian.rest + sigma**2 if gaussian.rank < gaussian.dim else sigma**2
        own = turned.mT @ ((gaussian.variances.to(device) + sigma**2 - level)[:, None] * turned)
        inverse = b * torch.linalg.inv(own + level * torch.eye(len(basis)).to(own))
        within = mean.double() @ basis.mT
        across = mean.double() - within @ basis
        precision, pulled = precision + inverse, pulled + within @ inverse
        outside, pulled_outside = outside + b / level, pulled_outside + b / level * across
    values, vectors = torch.linalg.eigh(0.5 * (precision + precision.mT))
    if bool((values <= 0).any()) or (len(basis) < first.dim and not outside > 0):
        worst = min([outside, *values.tolist()])
        raise ValueError(
            f"exponents: {list(exponents)} give a product at sigma {sigma:.4g} that is no density: a direction has the "
            f"precision {worst:.3g}; begin at a higher level, or lower the exponents' size"
        )
    mean = pulled @ (vectors / values) @ vectors.mT @ basis
    if len(basis) < first.dim:
        mean = mean + pulled_outside / outside
    rest = 1 / outside if len(basis) < first.dim else 0.0
    order = values.argsort()  # variances fall
    components = (vectors.mT @ basis)[order]
    joint = Gaussian(torch.zeros(first.shape, dtype=torch.float64, device=device), components, 1 / values[order], rest)
    return mean, joint


def _models(target: Target, shape: tuple[int, ...], gaussians: Gaussian | Sequence[Gaussian] | None) -> list[Gaussian]:
    """A Gaussian for each denoiser."""
    count, d = len(target.denoisers), math.prod(shape)
    if gaussians is None:
        nothing = Gaussian(torch.zeros(shape).double(), torch.zeros((0, d)).double(), torch.zeros(0).double(), 0.0)
        return [nothing] * count
    models = [gaussians] * count if isinstance(gaussians, Gaussian) else list(gaussians)
    if len(models) != count:
        raise ValueError(f"gaussians: are {len(models)}; needed is one for all, or one for each of {count} denoisers")
    for model in models:
        if model.shape != shape:
            raise ValueError(f"gaussians: are of {list(model.shape)} a sample; the particles are {list(shape)}")
    return models
