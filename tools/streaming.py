"""The metrics as torchmetrics `Metric`s: update in a training loop, compute at its end, the same number on any ranks.

`compute()` gives tensors, as torchmetrics does; `estimate()` the same with errors. Both gather from all ranks.
Why not torchmetrics' own FID: its sums lose digits far from 0, it rounds to the features' dtype, and a NaN can end the
process.
"""

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

from tools.classes import block_sums, score_of_sums
from tools.frechet import estimate_of_parts, frechet_distance
from tools.gram import check_features
from tools.jackknife import BLOCKS, Estimate, block_of
from tools.pairwise import ASKED, KNOWN, Pairwise, pairwise
from tools.statistics import FeatureStatistics
from tools.streamed_rows import Network, Numbers, StreamedRows
from tools.vendi import vendi_score

FOLD = 2048  # rows that wait for one product: a product for every 64 costs five times as much
FIELDS = {"kd": "kernel_distance", "clip-mmd": "mmd"}  # of Pairwise, where they are not called as what is asked


class FrechetMetric(StreamedRows):
    """The Fréchet distance of the rows that `update` is given to those with real=True, or to reference statistics.

    dim: of the features. network: maps what `update` is given to features [B, dim] (a module, a `load_extractor`, any
    function); None: it is given features. reset_real=False: `reset` keeps the real rows. States are float64 sums over
    ten jackknife blocks, 80 dim^2 bytes, which every rank gathers from all; errors=False: over one, 8 dim^2, and
    `estimate` knows no error. They are of rows minus the reference's mean; without a reference, a mean of 1e4
    deviations costs half the digits.
    """

    higher_is_better = False
    count: Tensor
    total: Tensor
    products: Tensor

    def __init__(
        self,
        dim: int,
        network: Network | None = None,
        reference: FeatureStatistics | None = None,
        reset_real: bool = True,
        errors: bool = True,
    ) -> None:
        super().__init__(dim, network)
        if reference is not None and reference.dim != dim:
            raise ValueError(f"reference: statistics of {reference.dim} features, not of {dim}")
        self.reference, self.reset_real = reference, reset_real
        self._centre = torch.zeros(dim, dtype=torch.float64) if reference is None else reference.mean
        self.blocks = BLOCKS if errors else 1
        groups = self.blocks + (reference is None)  # the last is that of the real rows
        self.add_state("count", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(groups, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(groups, dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Any, real: bool = False, numbers: Numbers | None = None) -> None:
        """Add a batch. numbers [B]: which samples these are, so that blocks do not depend on order or ranks.

        Raises ValueError for another shape, NaN or infinite values (saying which rows), and real=True beside a
        reference; nothing is added then.
        """
        if real and self.reference is not None:
            raise ValueError("real: True, but the reference is given; accepted is False")
        counted = self.count[self.blocks :] if real else self.count[: self.blocks]
        self.wait(x, real, numbers, int(counted.sum()) + self.seen(real))
        if sum(map(len, self.rows)) >= FOLD:
            self._fold()

    def compute(self) -> Tensor:
        """The distance, a float64 scalar. Raises ValueError for fewer than two rows of either set."""
        return torch.tensor(self._value(), dtype=torch.float64, device=self.device)

    def estimate(self) -> Estimate:
        """The distance debiased and with its error, as `frechet_estimate`. Raises ValueError as compute."""
        return self.gathered(self._estimate)

    def reset(self) -> None:
        """Forgets all rows, or all but the real ones."""
        self._fold()
        kept = {name: getattr(self, name)[self.blocks :].clone() for name in ("count", "total", "products")}
        super().reset()
        for name, value in kept.items() if not self.reset_real else ():
            getattr(self, name)[self.blocks :] = value

    @torch.no_grad()
    def _fold(self) -> None:
        rows, numbers = self.waiting()
        rows = rows - self._centre.to(rows.device)
        groups = torch.full_like(numbers, self.blocks)
        fake = numbers >= 0
        if fake.any():
            groups[fake] = block_of(numbers[fake].cpu()).to(groups.device) if self.blocks > 1 else 0
        for group in groups.unique().tolist():
            own = rows[groups == group]
            self.count[group] += len(own)
            self.total[group] += own.sum(dim=0)
            self.products[group].addmm_(own.T, own)
        self.clear()

    def _value(self) -> float:
        self._fold()
        return frechet_distance(self._statistics(slice(self.blocks)), self._real()).value

    def _estimate(self) -> Estimate:
        self._fold()
        counts = self.count[: self.blocks]
        if self.blocks == 1:
            return Estimate(self._value())
        if counts.min() < 1 or counts.sum() < 2 * BLOCKS:
            return Estimate(self._value(), warning=f"{int(counts.sum())} samples are too few for an error")
        return estimate_of_parts([self._statistics(slice(b, b + 1)) for b in range(BLOCKS)], self._real())

    def _real(self) -> FeatureStatistics:
        return self._statistics(slice(self.blocks, None)) if self.reference is None else self.reference

    def _statistics(self, groups: slice) -> FeatureStatistics:
        """Of the sums of some groups. What rounding leaves of a constant feature's variance, of either sign, is 0."""
        n = int(self.count[groups].sum())
        total, products = self.total[groups].sum(dim=0).cpu(), self.products[groups].sum(dim=0).cpu()
        if not n:
            return FeatureStatistics(self.dim)
        scatter = products - total[:, None] * (total / n)
        constant = scatter.diagonal() <= 1e-14 * products.diagonal()
        scatter[constant] = scatter[:, constant] = 0
        covariance = scatter / max(n - 1, 1)
        return FeatureStatistics.of_moments((self._centre + total / n).numpy(), covariance.numpy(), n)


class PairwiseMetric(StreamedRows):
    """Kernel distance, precision, recall, density, coverage of `pairwise`, as a dict of what is asked.

    reference [M, dim]: the real features; None: the rows with real=True. All rows are kept, in `dtype`, and gathered
    by every rank; they are measured in the order of their numbers.
    """

    def __init__(
        self,
        dim: int,
        network: Network | None = None,
        reference: Tensor | None = None,
        asked: Collection[str] = ASKED,
        k_manifold: int = 3,
        k_density: int = 5,
        dtype: torch.dtype = torch.float32,
        reset_real: bool = True,
    ) -> None:
        super().__init__(dim, network, dtype)
        if not asked or isinstance(asked, str) or set(asked) - set(KNOWN):
            raise ValueError(f"asked: {asked!r}; accepted are some of {', '.join(KNOWN)}")
        if reference is not None:
            check_features("reference", reference, dim)
            reference = reference.detach().to(dtype)
        self.reference, self.asked, self.reset_real = reference, tuple(asked), reset_real
        self.k_manifold, self.k_density = k_manifold, k_density

    def update(self, x: Any, real: bool = False, numbers: Numbers | None = None) -> None:
        """Add a batch; arguments and errors as FrechetMetric's."""
        if real and self.reference is not None:
            raise ValueError("real: True, but the reference is given; accepted is False")
        self.wait(x, real, numbers, self.seen(real))

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars by what was asked. Raises ValueError as `pairwise`."""
        found = self._estimate()
        values = {name: getattr(found, FIELDS.get(name, name)).value for name in self.asked}
        return {name: torch.tensor(v, dtype=torch.float64, device=self.device) for name, v in values.items()}

    def estimate(self) -> Pairwise:
        """The same with errors."""
        return self.gathered(self._estimate)

    def reset(self) -> None:
        """Forgets all rows, or all but the real ones."""
        rows, numbers = self.waiting()
        super().reset()
        if not self.reset_real:
            self.rows, self.numbers = [rows[numbers < 0]], [numbers[numbers < 0]]

    def _estimate(self) -> Pairwise:
        real, fake = (
            self.ordered(real=True)[0] if self.reference is None else self.reference,
            self.ordered(real=False),
        )
        return pairwise(
            real.to(self.device),
            fake[0],
            asked=self.asked,
            k_manifold=self.k_manifold,
            k_density=self.k_density,
            blocks=fake[1],
            dtype=self.kept,
        )


class VendiMetric(StreamedRows):
    """The Vendi score of order q of the rows that `update` is given. All are kept, in float32."""

    higher_is_better = True

    def __init__(
        self,
        dim: int,
        network: Network | None = None,
        q: float = 1.0,
        kernel: Literal["cosine", "linear"] = "cosine",
    ) -> None:
        super().__init__(dim, network, torch.float32)
        self.q, self.kernel = q, kernel

    def update(self, x: Any, real: bool = False, numbers: Numbers | None = None) -> None:
        """Add a batch, as FrechetMetric's; real rows, of which this is no measure, are passed by."""
        if not real:
            self.wait(x, real, numbers, self.seen(real))

    def compute(self) -> Tensor:
        """The score, a float64 scalar. Raises ValueError as `vendi_score`."""
        rows, _ = self.ordered(real=False)
        value = vendi_score(rows, self.q, self.kernel, errors=False).value
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def estimate(self) -> Estimate:
        """The score with its error."""
        return self.gathered(self._estimate)

    def _estimate(self) -> Estimate:
        rows, blocks = self.ordered(real=False)
        return vendi_score(rows, self.q, self.kernel, blocks=blocks)


class InceptionScoreMetric(StreamedRows):
    """The Inception Score of the logits that `update` is given, or that a network or `load_extractor` makes.

    States are float64 sums over ten jackknife blocks, 80 n_classes bytes.
    """

    higher_is_better = True
    reads = "logits"
    marginals: Tensor
    conditionals: Tensor
    count: Tensor

    def __init__(self, n_classes: int, network: Network | None = None) -> None:
        super().__init__(n_classes, network)
        self.add_state("marginals", torch.zeros(BLOCKS, n_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("conditionals", torch.zeros(BLOCKS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(BLOCKS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, x: Any, real: bool = False, numbers: Numbers | None = None) -> None:
        """Add a batch, as FrechetMetric's; real rows, of which this is no measure, are passed by."""
        if not real:
            self.wait(x, real, numbers, int(self.count.sum()) + self.seen(real))
            if sum(map(len, self.rows)) >= FOLD:
                self._fold()

    def compute(self) -> Tensor:
        """The score, a float64 scalar. Raises ValueError for no samples."""
        return torch.tensor(self._estimate().value, dtype=torch.float64, device=self.device)

    def estimate(self) -> Estimate:
        """The score with its error."""
        return self.gathered(self._estimate)

    def _fold(self) -> None:
        rows, numbers = self.waiting()
        sums = block_sums(rows, block_of(numbers.cpu()))
        for state, more in zip((self.marginals, self.conditionals, self.count), sums, strict=True):
            state += more
        self.clear()

    def _estimate(self) -> Estimate:
        self._fold()
        return score_of_sums(self.marginals, self.conditionals, self.count)
