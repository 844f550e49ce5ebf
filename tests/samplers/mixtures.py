"""Mixtures that resemble what image models learn, and the Gaussian of their exact moments.

The spectrum falls as 1 / i, a pixel's standard deviation is a half, the components' means carry a fifth of the variance
and their covariances differ: in each direction, and where `rotated` in the directions too, within bands of 32.
"""

from typing import Any

import torch
from torch import Tensor

from samplers import Gaussian, GaussianMixture

BAND = 32  # directions that a component's rotation mixes


def mixture_and_gaussian(
    d: int = 96, components: int = 12, *, rotated: bool = False, share: float = 0.2, seed: int = 0
) -> tuple[GaussianMixture, Gaussian]:
    """A mixture of equal weights, float64, and the Gaussian of its moments, of full rank. share: of the means."""
    generator = torch.Generator().manual_seed(seed)
    means, variances, bases = _parts(d, components, rotated, share, generator)
    centred = means - means.mean(0)
    covariance = _covariance(variances, bases) + centred.mT @ centred / components
    return _mixture(means, variances, bases), _gaussian(means.mean(0), covariance)


class Labelled:
    """A mixture for each class label: a denoiser with class labels as its condition, -1 for none (of them all)."""

    def __init__(self, d: int = 96, components: int = 8, classes: int = 4, *, rotated: bool = False, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        parts = [_parts(d, components, rotated, 0.1, generator) for _ in range(classes)]
        spectrum = d / 4 / torch.arange(1, d + 1, dtype=torch.float64)
        spectrum = spectrum / (1 / torch.arange(1, d + 1, dtype=torch.float64)).sum()
        shifts = (0.1 * spectrum).sqrt() * torch.randn((classes, d), generator=generator, dtype=torch.float64)
        parts = [(means + shift, *rest) for (means, *rest), shift in zip(parts, shifts, strict=True)]
        self.classes = [_mixture(*part) for part in parts]
        joined = [torch.cat(kind) for kind in zip(*parts, strict=True)]
        self.all = _mixture(*joined)
        means = torch.stack([part[0].mean(0) for part in parts])
        centred = torch.cat([part[0] - mean for part, mean in zip(parts, means, strict=True)])
        covariance = _covariance(*joined[1:]) + centred.mT @ centred / len(centred)
        self.gaussian = _gaussian(means, covariance, classes)
        average = means.mean(0)
        between = (means - average).mT @ (means - average) / classes
        self.unlabelled = _gaussian(average, covariance + between)  # of everything, without labels

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        labels = cond["class_labels"] if isinstance(cond, dict) else cond
        labels = labels.expand(len(x)) if len(labels) == 1 else labels
        out = torch.empty_like(x)
        for label, part in [(-1, self.all), *enumerate(self.classes)]:
            rows = labels == label
            if bool(rows.any()):
                out[rows] = part(x[rows], sigma[rows] if sigma.ndim else sigma)
        return out

    def sample(self, labels: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """One sample for each label [n], [n, d]."""
        drawn = [part.sample(len(labels), sigma, generator) for part in self.classes]
        return torch.stack(drawn)[labels, torch.arange(len(labels))]


def _parts(
    d: int, components: int, rotated: bool, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Means [K, d], variances [K, d] and directions [K, d, d], in columns, of the components."""
    spectrum = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    spectrum *= d / 4 / spectrum.sum()
    means = (share * spectrum).sqrt() * torch.randn((components, d), generator=generator, dtype=torch.float64)
    spread = torch.randn((components, d), generator=generator, dtype=torch.float64)
    variances = (1 - share) * spectrum * (0.5 * spread).exp()
    bases = torch.eye(d, dtype=torch.float64).repeat(components, 1, 1)
    if rotated:
        for band in range(0, d, BAND):
            size = min(BAND, d - band)
            turn = torch.randn((components, size, size), generator=generator, dtype=torch.float64)
            bases[:, band : band + size, band : band + size] = torch.linalg.qr(turn)[0]
    return means, variances, bases


def _covariance(variances: Tensor, bases: Tensor) -> Tensor:
    """Of the components, averaged, [d, d]."""
    return ((bases * variances[:, None]) @ bases.mT).mean(0)


def _mixture(means: Tensor, variances: Tensor, bases: Tensor) -> GaussianMixture:
    aligned = bool((bases == torch.eye(means.shape[1], dtype=torch.float64)).all())
    covariances = variances
    if not aligned:
        covariances = (bases * variances[:, None]) @ bases.mT
        covariances = (covariances + covariances.mT) / 2
    return GaussianMixture(torch.ones(len(means)), means, covariances)


def _gaussian(mean: Tensor, covariance: Tensor, n_classes: int | None = None) -> Gaussian:
    values, vectors = torch.linalg.eigh(covariance)
    return Gaussian(mean, vectors.mT.flip(0), values.flip(0), 0.0, n_classes=n_classes)
