"""Class means and pooled covariance of a stream of samples: the whole matrix, or its top eigenvectors in one pass.

Every block of rows becomes rows whose Gram matrix is its share of the scatter: the rows less their own class mean, and
sqrt(n m / (n + m)) (mean - mean before) for each class (Chan, Golub & LeVeque 1983, eq. 2.1). Up to 4,096 dimensions
they are added to a matrix; above, they are stacked under S V^T of what was before, and the stack is cut back to its
top singular vectors through its small Gram matrix (incremental SVD: Brand 2002, Ross et al. 2008). So is merging.
"""

import math
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor

from samplers.gaussian import Gaussian, nats_times_count

FULL_DIM = 4096  # up to here the whole covariance is kept
CAPACITY = 256  # directions that are kept above
BLOCK = 512  # rows that are folded at once


class Moments:
    """Streaming moments of samples [B, *shape], with class labels [B] if n_classes is given; can be merged.

    rank: directions kept above 4,096 dimensions (default 256, and a quarter more while the stream lasts). Memory there:
    about (capacity + block) d numbers and a temporary copy of the kept ones. Sums of means and squares are in float64;
    products in the samples' dtype, float32 at least. `method` names the way: "full" or "incremental".
    Raises ValueError for shapes, ranks or labels that do not fit.
    """

    def __init__(
        self,
        shape: Iterable[int],
        n_classes: int | None = None,
        *,
        rank: int | None = None,
        block: int = BLOCK,
        method: str | None = None,
    ) -> None:
        self.shape, self.n_classes, self.block = tuple(int(n) for n in shape), n_classes, block
        self.dim = math.prod(self.shape)
        if self.dim < 1 or (n_classes is not None and n_classes < 1) or block < 1:
            raise ValueError(f"shape, n_classes, block: {list(self.shape)}, {n_classes}, {block}; all are at least 1")
        if rank is not None and not 0 <= rank <= self.dim:
            raise ValueError(f"rank: {rank} is not in 0 .. {self.dim}, the size of a sample")
        if method not in (None, "full", "incremental"):
            raise ValueError(f"method: {method!r}; accepted are full and incremental")
        self.method = method or ("full" if self.dim <= FULL_DIM else "incremental")
        self.capacity = min(self.dim, CAPACITY if rank is None else max(1, math.ceil(1.25 * rank)))
        self.counts = torch.zeros(n_classes or 1, dtype=torch.int64)
        self._means = torch.zeros(n_classes or 1, self.dim, dtype=torch.float64)
        self._scatter: Tensor | None = None  # [d, d] float64, or the rows S V^T [capacity or less, d]
        self._trace = 0.0
        self._pending: list[Tensor] = []
        self._pending_labels: list[Tensor] = []
        self._rows = self._seen = 0

    @property
    def count(self) -> int:
        """How many samples were seen."""
        return self._seen

    def update(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Add samples [B, *shape], on any device. Nothing is added when this raises.

        Raises ValueError for another shape, labels that do not fit, and values that are not finite, which it names by
        the sample's number in the stream.
        """
        if x.ndim != len(self.shape) + 1 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"batches: hold {list(x.shape[1:])} a sample, after {list(self.shape)}")
        rows = x.detach().reshape(len(x), self.dim)
        if not rows.is_floating_point():
            raise ValueError(f"batches: are {x.dtype}; needed are floating-point numbers")
        bad = (~torch.isfinite(rows.sum(1))).nonzero()  # a sum is finite only if its terms are
        bad = bad[(~torch.isfinite(rows[bad[:, 0]])).any(1)] if len(bad) else bad
        if len(bad):
            first = ", ".join(str(self._seen + int(i)) for i in bad[:3, 0])
            raise ValueError(f"batches: {len(bad)} of {len(x)} samples are not finite, at number {first} of the stream")
        labels = self._checked(labels, len(x))

        rows = rows.to("cpu", torch.promote_types(x.dtype, torch.float32))
        for part, named in zip(rows.split(self.block), labels.split(self.block), strict=True):
            while len(part):
                taken = self.block - self._rows
                self._pending.append(part[:taken].clone())
                self._pending_labels.append(named[:taken])
                self._rows += len(part[:taken])
                part, named = part[taken:], named[taken:]
                if self._rows == self.block:
                    self._fold()
        self._seen += len(x)

    def merge(self, other: "Moments") -> None:
        """Add what `other` has seen, which is left as it is but for its pending rows, folded now.

        Raises ValueError for moments of another shape, number of classes or method.
        """
        ours, theirs = ((m.shape, m.n_classes, m.method) for m in (self, other))
        if ours != theirs:
            raise ValueError(f"merge: moments of {theirs} do not go with those of {ours} (shape, classes, method)")
        self._fold()
        other._fold()
        if other._scatter is None:
            return
        extra = [self._shift(c, other._means[c], int(other.counts[c])) for c in range(len(self.counts))]
        shifts = torch.stack([row for row in extra if row is not None]) if any(e is not None for e in extra) else None
        self._trace += other._trace + (0.0 if shifts is None else float(shifts.square().sum()))
        if self.method == "full":
            between = 0 if shifts is None else shifts.mT @ shifts
            self._scatter = other._scatter + between + (0 if self._scatter is None else self._scatter)
        else:
            kept = [] if self._scatter is None else [self._scatter]
            rows = torch.cat([*kept, other._scatter, *([] if shifts is None else [shifts.to(other._scatter)])])
            self._scatter = self._cut(rows, _gram(rows))
        self._seen += other._seen

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for another process or a file; `from_state` takes it back."""
        self._fold()
        scatter = self._scatter if self._scatter is not None else torch.zeros(0, self.dim)
        settings = torch.tensor([self.n_classes or 0, self.capacity, self.block, int(self.method == "full")])
        return {
            "shape": torch.tensor(self.shape),
            "settings": settings,
            "counts": self.counts.clone(),
            "means": self._means.clone(),
            "scatter": scatter.clone(),
            "trace": torch.tensor(self._trace, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The moments that `state` wrote down."""
        n_classes, capacity, block, full = state["settings"].tolist()
        shape = state["shape"].tolist()
        moments = cls(shape, n_classes or None, block=block, method="full" if full else "incremental")
        moments.capacity = capacity
        moments.counts, moments._means = state["counts"].clone(), state["means"].clone()
        moments._scatter = state["scatter"].clone() if len(state["scatter"]) else None
        moments._trace, moments._seen = float(state["trace"]), int(state["counts"].sum())
        return moments

    def gaussian(
        self, rank: int | None = None, tolerance: float = 0.05, facts: dict[str, Any] | None = None
    ) -> Gaussian:
        """The Gaussian of all that was seen, its covariance divided by N - K, K the number of classes.

        rank None keeps as few directions as cost a tenth of the tolerance (in nats) at the lowest noise level at which
        so many samples are enough for the tolerance at all: below, no jump could be certified.
        Raises ValueError for fewer than K + 1 samples or a class without any, and a rank above what they span.
        """
        self._fold()
        if not tolerance > 0:
            raise ValueError(f"tolerance: {tolerance} nats is not positive")
        empty = (self.counts == 0).nonzero()[:, 0].tolist()
        if empty and self.n_classes is not None:
            raise ValueError(f"batches: hold no sample of class {empty[0]} of 0 .. {self.n_classes - 1}")
        freedom = int(self.counts.sum()) - len(self.counts)
        if freedom < 1 or self._scatter is None:
            raise ValueError(
                f"batches: hold {self._seen} samples, too few for a covariance; needed are {len(self.counts) + 1}"
            )
        variances, components = self._eigen(freedom)
        total = self._trace / freedom
        if rank is None:
            rank = _rank(variances, total, self.dim, freedom, len(self.counts), tolerance)
        elif rank > len(variances):
            raise ValueError(f"rank: {rank}; these {self._seen} samples span {len(variances)} directions")
        left = self.dim - rank
        rest = max(0.0, total - float(variances[:rank].sum())) / left if left else 0.0
        mean = self._means.reshape(-1, *self.shape) if self.n_classes else self._means.reshape(self.shape)
        return Gaussian(
            mean.to(components.dtype),
            components[:rank].contiguous(),
            variances[:rank].clone(),
            rest,
            n_classes=self.n_classes,
            count=self._seen,
            facts=facts,
        )

    def _checked(self, labels: Tensor | None, batch: int) -> Tensor:
        if self.n_classes is None:
            if labels is not None:
                raise ValueError("labels: are given, but n_classes is not")
            return torch.zeros(batch, dtype=torch.int64)
        if labels is None or labels.shape != (batch,) or labels.is_floating_point():
            given = "none" if labels is None else f"{labels.dtype} of shape {list(labels.shape)}"
            raise ValueError(f"labels: {given}; needed are whole numbers [{batch}]")
        labels = labels.to("cpu", torch.int64)
        if bool(((labels < 0) | (labels >= self.n_classes)).any()):
            raise ValueError(f"labels: {labels.tolist()[:8]} are not all in 0 .. {self.n_classes - 1}")
        return labels

    def _shift(self, c: int, mean: Tensor, m: int) -> Tensor | None:
        """Take m samples of this mean [d] into class c; the row that their mean adds to the scatter, if any."""
        n = int(self.counts[c])
        delta = mean - self._means[c]
        self.counts[c] += m
        if not m:
            return None
        self._means[c] += delta * (m / (n + m))
        return delta * math.sqrt(n * m / (n + m)) if n else None

    def _fold(self) -> None:
        """Take the pending rows into means and scatter."""
        if not self._rows:
            return
        kept = [] if self.method == "full" or self._scatter is None else [self._scatter]
        rows, labels = torch.cat([*kept, *self._pending]), torch.cat(self._pending_labels)
        self._pending, self._pending_labels, self._rows = [], [], 0
        self._scatter = None if kept else self._scatter
        before = len(kept[0]) if kept else 0
        kept.clear()

        own, extra = rows[before:], []
        for c in labels.unique().tolist():
            members = (labels == c).nonzero()[:, 0]
            mean = own[members].sum(0, dtype=torch.float64) / len(members)
            high = mean.to(own.dtype)  # in two parts, so that a large mean costs no digits
            low = (mean - high).to(own.dtype)
            if len(members) == len(own):
                own.sub_(high).sub_(low)
            else:
                own[members] = own[members].sub_(high).sub_(low)
            shift = self._shift(c, mean, len(members))
            if shift is not None:
                extra.append(shift.to(own.dtype))
        if extra:
            rows = torch.cat([rows, torch.stack(extra)])

        if self.method == "full":
            product = (rows.mT @ rows).double()
            self._trace += float(product.diagonal().sum())
            self._scatter = product if self._scatter is None else self._scatter.add_(product)
        else:
            gram = _gram(rows)
            self._trace += float(gram.diagonal()[before:].sum())
            self._scatter = self._cut(rows, gram)

    def _cut(self, rows: Tensor, gram: Tensor) -> Tensor:
        """S V^T of the top singular vectors of rows [m, d], given their Gram matrix [m, m]: [capacity or less, d]."""
        values, vectors = torch.linalg.eigh(gram)
        keep = min(self.capacity, int((values > values[-1] * len(rows) * 1e-15).sum()))
        return vectors[:, -keep:].flip(1).mT.to(rows) @ rows if keep else rows[:0]

    def _eigen(self, freedom: int) -> tuple[Tensor, Tensor]:
        """Variances [k], float64, falling, and their directions [k, d], for all that is kept and not rounding."""
        assert self._scatter is not None
        if self.method == "full":
            values, vectors = torch.linalg.eigh(self._scatter / freedom)
            values, directions = values.flip(0), vectors.flip(1).mT
        else:
            values, vectors = torch.linalg.eigh(_gram(self._scatter) / freedom)
            values = values.flip(0)
            directions = vectors.flip(1).mT.to(self._scatter) @ self._scatter
        # Products in float32 leave their rounding in the scatter: directions below it are noise.
        exact = self._scatter.dtype == torch.float64 and self.method == "incremental"
        k = min(freedom, int((values > values[0].clamp_min(0) * (1e-14 if exact else 1e-9)).sum()))
        if self.method == "incremental":
            directions = directions[:k] / (values[:k, None] * freedom).sqrt().to(directions)
        return values[:k], directions[:k]


def _gram(rows: Tensor) -> Tensor:
    return (rows @ rows.mT).double()


def _rank(variances: Tensor, total: float, dim: int, freedom: int, n_classes: int, tolerance: float) -> int:
    """The automatic rank: a tenth of the tolerance, at the lowest noise level that so many samples can bear."""
    rest = max(0.0, total - float(variances.sum())) / (dim - len(variances)) if dim > len(variances) else 0.0
    low, high = (math.log(math.sqrt(total / dim + 1e-300) * scale) for scale in (1e-4, 1e6))
    for _ in range(60):  # bisection: the cost falls with sigma
        middle = (low + high) / 2
        cost = nats_times_count(variances, rest, dim, n_classes, math.exp(middle)) / freedom
        low, high = (low, middle) if cost <= tolerance else (middle, high)
    noise = math.exp(2 * high)

    # KL between the Gaussian of all variances and that with the smaller ones replaced by their mean, exactly.
    sums = torch.cat([variances.new_zeros(1), variances.cumsum(0)])
    logs = torch.cat([variances.new_zeros(1), (variances + noise).log().cumsum(0)])
    kept = torch.arange(len(variances) + 1)
    left = (dim - kept).clamp_min(1)
    spread = ((total - sums).clamp_min(0) / left + noise).log() * (dim - kept)
    smaller = logs[-1] - logs + (dim - len(variances)) * math.log(rest + noise)
    small = (spread - smaller) / 2 <= tolerance / 10
    return int(kept[small][0]) if bool(small.any()) else len(variances)
