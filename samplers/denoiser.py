"""The one abstraction: a denoiser D(x, sigma) = E[x0 | x] for x = x0 + sigma * eps (Karras et al. 2022).

Everything else follows from it: the score is (D - x) / sigma^2 (Tweedie), the probability-flow ODE is
dx/dsigma = (x - D) / sigma, and a one-step student is a denoiser called once.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Denoiser(Protocol):
    """E[x0 | x] for x = x0 + sigma * eps.  x: [B, ...], sigma: [] or [B], result: like x.

    Any callable of this form is a denoiser. `cond` is opaque: whatever the denoiser is conditioned on.
    """

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor: ...


def expand(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [] or [B], shaped to broadcast against x [B, ...], in x's dtype and device."""
    if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) not in (1, len(x))):
        raise ValueError(f"sigma: has shape {list(sigma.shape)}; accepted are [] and [{len(x)}], one per sample")
    return sigma.to(x).reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma.to(x)


def score(denoiser: Denoiser, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
    """The score grad log p(x; sigma) = (D - x) / sigma^2, like x (Karras et al. 2022, eq. 3)."""
    return (denoiser(x, sigma, cond) - x) / expand(sigma, x) ** 2


class Guided:
    """Classifier-free guidance: D_u + scale * (D_c - D_u), both from one batch of 2B (Ho & Salimans 2022).

    scale: 1 is the conditional denoiser (and runs only that), 0 the unconditional one.
    uncond: the condition that stands for "none": like `cond`, with B rows or one row for all.
    interval: the noise levels [low, high] that are guided, the scale being 1 elsewhere (Kynkaanniemi et al. 2024);
    None is all. Where one sigma on the CPU lies outside, only the conditional prediction is computed.
    Publishes sigma_min and sigma_max where the denoiser does.
    """

    def __init__(
        self, denoiser: Denoiser, scale: float, uncond: Any, interval: tuple[float, float] | None = None
    ) -> None:
        self.denoiser, self.scale, self.uncond, self.interval = denoiser, scale, uncond, interval
        for name in ("sigma_min", "sigma_max"):
            if hasattr(denoiser, name):
                setattr(self, name, getattr(denoiser, name))

    def pair(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        """The conditional and the unconditional prediction, each like x."""
        both = join_conditions([cond, self.uncond], len(x))
        twice = torch.cat([x, x])
        sigmas = sigma.expand(len(x)).repeat(2) if sigma.ndim else sigma
        denoised, denoised_uncond = self.denoiser(twice, sigmas, both).chunk(2)
        return denoised, denoised_uncond

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        if self.scale == 1:
            return self.denoiser(x, sigma, cond)
        if self.interval is None:
            denoised, denoised_uncond = self.pair(x, sigma, cond)
            return torch.lerp(denoised_uncond, denoised, self.scale)
        low, high = self.interval
        inside = (sigma >= low) & (sigma <= high)
        if inside.device.type == "cpu" and not bool(inside.any()):
            return self.denoiser(x, sigma, cond)
        denoised, denoised_uncond = self.pair(x, sigma, cond)
        scale = torch.where(inside, self.scale, 1.0)
        return torch.lerp(denoised_uncond, denoised, expand(scale, x))


def join_conditions(conds: Sequence[Any], batch: int) -> Any:
    """The conditions of batches of the same size as one condition for all of them, in their order.

    Conditions are tensors [batch, ...], or dicts, lists and tuples of them (and of values that all share);
    a tensor of one row, or a bare number, stands for the whole batch.
    """
    first, others = conds[0], conds[1:]
    if isinstance(first, dict) and all(isinstance(c, dict) and c.keys() == first.keys() for c in others):
        return {key: join_conditions([c[key] for c in conds], batch) for key in first}
    if isinstance(first, list | tuple) and all(isinstance(c, list | tuple) and len(c) == len(first) for c in others):
        return type(first)(join_conditions(parts, batch) for parts in zip(*conds, strict=True))
    if isinstance(first, Tensor) and all(isinstance(c, Tensor | int | float) for c in others):
        # A number is filled in where it is needed: to copy it there would wait for all that the device still has to do.
        tensors = [c.to(first) if isinstance(c, Tensor) else first.new_full((), c) for c in conds]
        rows = [t.reshape(1) if t.ndim == 0 else t for t in tensors]
        if any(t.shape[1:] != rows[0].shape[1:] or len(t) not in (1, batch) for t in rows):
            shapes = " and ".join(str(list(t.shape)) for t in rows)
            raise ValueError(f"cond, uncond: have shapes {shapes}; accepted are {batch} rows, or 1, of equal shape")
        return torch.cat([t.expand(batch, *t.shape[1:]) for t in rows])
    for other in others:
        if type(first) is not type(other) or first != other:
            raise ValueError(f"uncond: {other!r} does not have the form of the condition {first!r}")
    return first


def repeat_conditions(cond: Any, times: int, batch: int) -> Any:
    """The condition of a batch as the condition of that batch, repeated: [times * batch, ...]."""
    joined = cond
    if isinstance(cond, dict):
        joined = {key: repeat_conditions(value, times, batch) for key, value in cond.items()}
    elif isinstance(cond, list | tuple):
        joined = type(cond)(repeat_conditions(value, times, batch) for value in cond)
    elif isinstance(cond, Tensor) and cond.ndim and len(cond) == batch:
        joined = torch.cat([cond] * times)
    return joined


def take_conditions(cond: Any, rows: slice, batch: int) -> Any:
    """Some rows of the condition of a batch; what all rows share is kept."""
    if isinstance(cond, dict):
        return {key: take_conditions(value, rows, batch) for key, value in cond.items()}
    if isinstance(cond, list | tuple):
        return type(cond)(take_conditions(value, rows, batch) for value in cond)
    return cond[rows] if isinstance(cond, Tensor) and cond.ndim and len(cond) == batch else cond
