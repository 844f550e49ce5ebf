"""From estimated ratios to the weights of a batch: clipping, and the two-stage normalisation (Xu et al. 2025).

Stage 1 divides r by its mean at that noise level: E_q r = 1 at every level, an estimate need not respect it. Stage 2
divides h(r) by its mean over the batch, so that no divergence changes the step size. Levels are binned in the index of
the Karras grid, where the student's levels are uniform; bins of equal width in sigma would put two thirds of them
into the first.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill.divergences import FDivergence
from samplers.schedules import karras_index

_FREE_LIMIT = 60.0  # of a ratio that is free up to a constant: what float32 can hold and add
LOG_RATIO_LIMIT = 10.0  # |ln r|: what is left of an estimate before it is exponentiated


class RatioWeight(nn.Module):
    """h(r) for a batch, [B], float32 or better, from log-ratios [B] at noise levels sigma [B]; never with a graph.

    clip: bounds of r, 0 < low < high. normalise: both stages, over the batches of all processes. bins: of the Karras
    index u(sigma) in [0, 1]. decay: of the running mean of a bin, 0 keeps the present batch only; the state is the
    buffer `means` [bins]. index: sigma [B] -> u [B]. total: the sum of a tensor over the processes. free: ln r is known
    up to a constant at each level only, as on a bridge, so that it is bounded after stage 1 has found that, not before.
    Raises ValueError for reversed bounds, and for a free ratio that is not normalised.
    """

    means: Tensor

    def __init__(
        self,
        divergence: FDivergence,
        clip: tuple[float, float] = (0.1, 20.0),
        normalise: bool = True,
        bins: int = 10,
        decay: float = 0.0,
        index: Callable[[Tensor], Tensor] = lambda sigma: karras_index(sigma, 0.002, 80.0),
        total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        free: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < clip[0] < clip[1]:
            raise ValueError(f"clip: {list(clip)} are not bounds low < high of a positive ratio")
        if free and not normalise:
            raise ValueError("normalise: False; a ratio that is free up to a constant needs it")
        self._free = free
        self.divergence, self.clip, self.normalise, self.decay = divergence, clip, normalise, decay
        self._index, self._total = index, total
        self.register_buffer("means", torch.ones(bins))

    def reset(self) -> None:
        """Forgets the running means: the target is another one."""
        self.means.fill_(1)

    @torch.no_grad()
    def forward(self, log_ratio: Tensor, sigma: Tensor) -> Tensor:
        log_ratio = log_ratio.detach().to(torch.promote_types(log_ratio.dtype, torch.float32))
        if self.divergence.constant:
            return torch.ones_like(log_ratio)
        if self._free:
            r = self._level(log_ratio.clamp(-_FREE_LIMIT, _FREE_LIMIT).exp(), sigma).clamp(*self.clip)
        else:
            r = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(*self.clip)
            if self.normalise:
                r = self._level(r, sigma)
        h = self.divergence.weight(r)
        return h / self._mean(h) if self.normalise else h

    def _level(self, r: Tensor, sigma: Tensor) -> Tensor:
        """Stage 1. Sums on a fixed shape: nothing waits for the device."""
        n = len(self.means)
        bins = (self._index(sigma.to(r.device)) * n).long().clamp(0, n - 1)
        sums = self.means.new_zeros(2, n).index_add_(1, bins, torch.stack([r, torch.ones_like(r)]).to(self.means))
        sums, counts = self._total(sums)
        mean = sums / counts.clamp_min(1)
        if self.decay:
            mean = torch.lerp(mean, self.means, self.decay)
        self.means.copy_(torch.where(counts > 0, mean, self.means))
        return r / self.means[bins].to(r)

    def _mean(self, h: Tensor) -> Tensor:
        """Stage 2: the mean over the batches of all processes, []."""
        total, count = self._total(torch.stack([h.sum(), h.new_full((), float(len(h)))]))
        return total / count


def weight_statistics(h: Tensor) -> dict[str, Tensor]:
    """Mean, max and effective sample size (sum h)^2 / (B sum h^2) in (0, 1] of a process's weights [B], each []."""
    return {
        "weight_mean": h.mean(),
        "weight_max": h.amax(),
        "weight_ess": h.sum() ** 2 / (len(h) * h.square().sum()),
    }
