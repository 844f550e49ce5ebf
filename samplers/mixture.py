"""A Gaussian mixture in closed form at every noise level: the ground truth that samplers are tested against.

Noise of level sigma turns component N(mu, S) into N(mu, S + sigma^2 I), so the log-density, the posterior mean and
with it the denoiser are exact: D = sum_k w_k(x) [mu_k + S_k (S_k + sigma^2 I)^-1 (x - mu_k)].
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from samplers.denoiser import expand


class GaussianMixture:
    """sum_k weights_k N(means_k, covariances_k), called as a denoiser.

    weights: [K], positive, normalised here. means: [K, d]. covariances: [K, d, d] full, [K, d] variances, or [K]
    isotropic variances; 0 is allowed (point masses). The arithmetic is in the dtype of `means`; float64 is exact to
    rounding from sigma = 1e-6 to 1e6. Inputs x [B, ...] are flattened to d and results take x's shape and dtype.
    Raises ValueError for shapes that do not fit, weights <= 0, or a covariance that is not positive semi-definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        if means.ndim != 2 or not means.is_floating_point() or not bool(means.isfinite().all()):
            raise ValueError(f"means: are {means.dtype} of shape {list(means.shape)}; needed are finite floats [K, d]")
        k, d = means.shape
        if weights.shape != (k,) or not bool((weights > 0).all()) or not bool(weights.isfinite().all()):
            raise ValueError(f"weights: {weights.tolist()}; needed are {k} positive numbers")
        if not bool(covariances.isfinite().all()):
            raise ValueError("covariances: are not finite")
        if covariances.shape not in ((k, d, d), (k, d), (k,)):
            raise ValueError(
                f"covariances: have shape {list(covariances.shape)}; needed is {[k, d, d]}, {[k, d]} or {[k]}"
            )

        self.means = means
        self.log_weights = (weights / weights.sum()).to(means).log()
        self._basis: Tensor | None = None  # [K, d, d], eigenvectors in columns
        if covariances.ndim == 3:
            scale = covariances.abs().amax((1, 2), keepdim=True)
            slack = 10 * d * torch.finfo(covariances.dtype).eps * scale  # what rounding does to a matrix of rank < d
            if bool(((covariances - covariances.mT).abs() > slack).any()):
                raise ValueError("covariances: are not symmetric")
            values, vectors = torch.linalg.eigh(covariances.double())
            self._basis = vectors.to(means)
            values = torch.where((values < 0) & (values >= -slack[..., 0].double()), 0.0, values)
        else:
            values = covariances.double().reshape(k, -1)
        if bool((values < 0).any()):
            raise ValueError(f"covariances: have the negative eigenvalue {float(values.min()):.3g}")
        self._variances = values.to(means)  # [K, d], or [K, 1] where isotropic

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def standard_deviations(self) -> Tensor:
        """Of the components, averaged over their directions, [K]."""
        return self._variances.mean(1).sqrt()

    def to(self, device: torch.device | str) -> "GaussianMixture":
        """The same mixture on a device."""
        moved = copy.copy(self)
        for name in ("means", "log_weights", "_variances", "_basis"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device))
        return moved

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        """The posterior mean E[x0 | x], like x."""
        z, noise = self._whitened(x, sigma)
        posterior = (self.log_weights + self._log_components(z, noise)).softmax(-1)
        shift = self._variances / (self._variances + noise).clamp_min(torch.finfo(z.dtype).tiny) * z
        if self._basis is not None:
            shift = torch.einsum("kij,bkj->bki", self._basis, shift)
        denoised = torch.einsum("bk,bkd->bd", posterior, self.means + shift)
        denoised = denoised.reshape(x.shape).to(x.dtype)
        return torch.where(expand(sigma, x) > 0, denoised, x)  # without noise D = x, even for point masses

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0, cond: Any = None) -> Tensor:
        """log p(x; sigma) of the mixture with noise of level sigma, [B], in nats.

        Raises ValueError where there is no density: a singular covariance at sigma = 0.
        """
        z, noise = self._whitened(x, torch.as_tensor(sigma, dtype=self.means.dtype))
        if bool((self._variances + noise <= 0).any()):
            raise ValueError("sigma: 0 with a singular covariance; the mixture has no density there")
        return (self.log_weights + self._log_components(z, noise)).logsumexp(-1)

    def sample(self, n: int, sigma: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """n independent samples at noise level sigma, [n, d]."""
        component = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        eps = torch.randn((n, self.dim), generator=generator, dtype=self.means.dtype, device=self.means.device)
        return self.place(component, eps, sigma)

    def place(self, component: Tensor, eps: Tensor, sigma: float = 0.0) -> Tensor:
        """The points at noise level sigma, [n, d], that normal numbers eps [n, d] are in these components [n]."""
        x = (self._variances[component] + sigma**2).sqrt() * eps
        if self._basis is not None:
            for k in component.unique().tolist():  # a basis for each sample would be n d^2 numbers
                x[component == k] = x[component == k] @ self._basis[k].mT
        return self.means[component] + x

    def _whitened(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x - mu_k in the eigenbasis of component k, [B, K, d]; the noise variance, [B or 1, 1, 1]."""
        flat = x.reshape(len(x), -1).to(self.means)
        if flat.shape[1] != self.dim:
            raise ValueError(f"x: has {flat.shape[1]} numbers a sample; the mixture has dimension {self.dim}")
        z = flat[:, None] - self.means
        if self._basis is not None:
            z = torch.einsum("kij,bki->bkj", self._basis, z)
        noise = expand(sigma, flat) ** 2
        return z, noise[..., None] if noise.ndim else noise.reshape(1, 1, 1)

    def _log_components(self, z: Tensor, noise: Tensor) -> Tensor:
        """log N(x; mu_k, S_k + sigma^2 I), [B, K]."""
        variance = (self._variances + noise).expand(-1, -1, self.dim).clamp_min(torch.finfo(z.dtype).tiny)
        return -0.5 * (z**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
