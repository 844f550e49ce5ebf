"""Class means and pooled covariance of a stream of samples: the whole matrix, or its top eigenvectors in one pass.

Rows less the point mean - sqrt(n / (n + m)) (mean - mean before) have as Gram matrix what these m of a class add to
the scatter of the n before (Chan, Golub & LeVeque 1983, eq. 2.1, without its extra row). Up to 4,096 dimensions it is
added to a matrix; above, the rows lie under S V^T of what was before, and both are cut back to their top singular
vectors through their small Gram matrix (incremental SVD: Brand 2002, Ross et al. 2008). So is merging.
"""

import math
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor

from samplers.gaussian import Gaussian, nats_times_count

FULL_DIM = 4096  # up to here the whole covariance is kept
RANK = 256  # directions that are asked for above, if nothing is said
BLOCK = 512  # rows that are folded at once
_STRIP = 4096  # columns, or _FEW rows, that are copied at once
_FEW = 64


class Moments:
    """Streaming moments of samples [B, *shape], with class labels [B] if n_classes is given; can be merged.

    rank: how many directions may be asked for above 4,096 dimensions (default 256); a quarter more are kept. Memory
    there: 1.25 rank + block rows of d numbers, and four times 1.25 rank while the Gaussian is made. Means are in
    float64, products in the samples' dtype, float32 at least. `method` names the way: "full" or "incremental".
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
        self.capacity = min(self.dim, max(1, math.ceil(1.25 * (RANK if rank is None else rank))))
        self.counts = torch.zeros(n_classes or 1, dtype=torch.int64)
        self._means = torch.zeros(n_classes or 1, self.dim, dtype=torch.float64)
        self._trace = 0.0
        self._scatter: Tensor | None = None  # [d, d] float64, of the full way
        self._rows: Tensor | None = None  # first the kept rows S V^T of the incremental way, then the pending ones
        self._labels = torch.zeros(0, dtype=torch.int64)
        self._kept = self._pending = 0
        self.low, self.high = math.inf, -math.inf  # the smallest and the largest number so far

    @property
    def count(self) -> int:
        """How many samples were seen."""
        return int(self.counts.sum()) + self._pending

    def update(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Add samples [B, *shape], on any device. Nothing is added when this raises.

        Raises ValueError for another shape, labels that do not fit, values that are not finite, which it names by the
        sample's number in the stream (from 0), and values so large that their squares are not finite.
        """
        if x.ndim != len(self.shape) + 1 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"batches: hold {list(x.shape[1:])} a sample, after {list(self.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"batches: are {x.dtype}; needed are floating-point numbers")
        labels = self._checked(labels, len(x))
        if not len(x):
            return
        rows = x.detach().reshape(len(x), self.dim)
        dtype = torch.promote_types(x.dtype, torch.float32 if self._rows is None else self._rows.dtype)
        low, high = self._check_values(rows, dtype)
        self.low, self.high = min(self.low, low), max(self.high, high)

        buffer = self._buffer(dtype)
        while len(rows):
            at = self._kept + self._pending
            part = rows[: len(buffer) - at]
            buffer[at : at + len(part)] = part
            self._labels[self._pending : self._pending + len(part)] = labels[: len(part)]
            self._pending += len(part)
            rows, labels = rows[len(part) :], labels[len(part) :]
            if at + len(part) == len(buffer):
                self._fold()

    def merge(self, other: "Moments") -> None:
        """Add what `other` has seen, which is left as it is but for its pending rows, folded now.

        Raises ValueError for moments of another shape, number of classes or method.
        """
        ours, theirs = ((m.shape, m.n_classes, m.method) for m in (self, other))
        if ours != theirs:
            raise ValueError(f"merge: moments of {theirs} do not go with those of {ours} (shape, classes, method)")
        self._fold()
        other._fold()
        n, m = self.counts.double()[:, None], other.counts.double()[:, None]
        both = (n + m).clamp_min(1)
        delta = other._means - self._means
        shifts = ((n * m / both).sqrt() * delta)[((n > 0) & (m > 0))[:, 0]]  # what the means' distance adds
        self._means += delta * (m / both)
        self.counts += other.counts
        self._trace += other._trace + float(shifts.square().sum())
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if other._scatter is not None:
            scatter = shifts.mT @ shifts
            scatter += other._scatter
            self._scatter = scatter if self._scatter is None else self._scatter.add_(scatter)
        if other._rows is not None and self.method == "incremental":
            dtype = (
                other._rows.dtype if self._rows is None else torch.promote_types(self._rows.dtype, other._rows.dtype)
            )
            for rows in (other._rows[: other._kept].clone(), shifts):
                for part in rows.split(self.block):
                    self._buffer(dtype)[self._kept : self._kept + len(part)] = part
                    self._add(len(part))

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for another process or a file; `from_state` takes it back."""
        self._fold()
        scatter = self._scatter if self._rows is None or self.method == "full" else self._rows[: self._kept]
        settings = torch.tensor([self.n_classes or 0, self.capacity, self.block, int(self.method == "full")])
        return {
            "shape": torch.tensor(self.shape),
            "settings": settings,
            "counts": self.counts.clone(),
            "means": self._means.clone(),
            "scatter": torch.zeros(0, self.dim) if scatter is None else scatter.clone(),
            "trace": torch.tensor(self._trace, dtype=torch.float64),
            "extremes": torch.tensor([self.low, self.high], dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The moments that `state` wrote down. Raises ValueError for anything else."""
        missing = {"shape", "settings", "counts", "means", "scatter", "trace", "extremes"} - set(state)
        if missing:
            raise ValueError(f"state: lacks {', '.join(sorted(missing))}; it is not one of moments")
        n_classes, capacity, block, full = state["settings"].tolist()
        moments = cls(state["shape"].tolist(), n_classes or None, block=block, method=("incremental", "full")[full])
        scatter = state["scatter"]
        if state["means"].shape != moments._means.shape or scatter.ndim != 2 or scatter.shape[1] != moments.dim:
            raise ValueError(f"state: its tensors do not fit samples of {list(moments.shape)}")
        moments.capacity = capacity
        moments.counts, moments._means = state["counts"].clone(), state["means"].clone()
        moments._trace = float(state["trace"])
        moments.low, moments.high = state["extremes"].tolist()
        if len(scatter) and full:
            moments._scatter = scatter.clone()
        elif len(scatter):
            moments._buffer(scatter.dtype)[: len(scatter)] = scatter
            moments._kept = len(scatter)
        return moments

    def gaussian(
        self, rank: int | None = None, tolerance: float = 0.05, facts: dict[str, Any] | None = None
    ) -> Gaussian:
        """The Gaussian of all that was seen, its covariance divided by N - K, K the number of classes.

        rank None keeps as few directions as cost a tenth of the tolerance (in nats) at the lowest noise level at which
        so many samples are enough for the tolerance at all: below, no jump could be certified. The smallest and the
        largest number of the samples are added to the facts, as `extremes`.
        Raises ValueError for fewer than K + 1 samples or a class without any, and a rank above what they span.
        """
        if not tolerance > 0:
            raise ValueError(f"tolerance: {tolerance} nats is not positive")
        if rank is not None and rank < 0:
            raise ValueError(f"rank: {rank} is negative")
        self._fold()
        empty = (self.counts == 0).nonzero()[:, 0].tolist()
        if empty and self.n_classes is not None:
            raise ValueError(f"batches: hold no sample of class {empty[0]} of 0 .. {self.n_classes - 1}")
        freedom = self.count - len(self.counts)
        if freedom < 1:
            raise ValueError(
                f"batches: hold {self.count} samples, too few for a covariance; needed are {len(self.counts) + 1}"
            )
        variances, vectors, basis = self._eigen(freedom)
        total = self._trace / freedom
        if rank is None:
            rank = _rank(variances, total, self.dim, freedom, len(self.counts), tolerance)
        elif rank > len(variances):
            kept = f", and {self.capacity} are kept" if self.method == "incremental" else ""
            raise ValueError(f"rank: {rank}; these {self.count} samples span {len(variances)} directions{kept}")
        components = vectors[:, :rank].mT
        components = components.contiguous() if basis is None else components.to(basis) @ basis.mT
        left = self.dim - rank
        rest = max(0.0, total - float(variances[:rank].sum())) / left if left else 0.0
        mean = self._means.reshape(-1, *self.shape) if self.n_classes else self._means.reshape(self.shape)
        return Gaussian(
            mean.to(components.dtype, copy=True),
            components,
            variances[:rank].clone(),
            rest,
            n_classes=self.n_classes,
            count=self.count,
            facts={"extremes": [self.low, self.high]} | (facts or {}),
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

    def _check_values(self, rows: Tensor, dtype: torch.dtype) -> tuple[float, float]:
        """The smallest and the largest number."""
        low, high = (float(v) for v in torch.aminmax(rows))  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = (~torch.isfinite(rows)).any(1).nonzero()[:, 0].tolist()
            first = ", ".join(str(self.count + i) for i in bad[:3])
            raise ValueError(
                f"batches: {len(bad)} of {len(rows)} samples are not finite, at number {first} of the stream"
            )
        largest = max(-low, high)
        if largest > (limit := math.sqrt(torch.finfo(dtype).max / self.dim) / 1e4):
            raise ValueError(f"batches: hold {largest:.3g}; sums of squares of {dtype} are finite up to {limit:.0g}")
        return low, high

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        """Where rows are kept and wait, at least of this dtype."""
        size = self.block + (self.capacity if self.method == "incremental" else 0)
        if self._rows is None or len(self._rows) < size:
            kept, self._rows = self._rows, torch.empty((size, self.dim), dtype=dtype)
            self._labels = torch.zeros(size, dtype=torch.int64)
            if kept is not None:
                self._rows = self._rows.to(torch.promote_types(kept.dtype, dtype))
                self._rows[: self._kept] = kept[: self._kept]
        self._rows = self._rows.to(torch.promote_types(self._rows.dtype, dtype))
        return self._rows

    def _fold(self) -> None:
        """Take the pending rows into means and scatter."""
        if not self._pending:
            return
        assert self._rows is not None
        rows, labels = self._rows[self._kept : self._kept + self._pending], self._labels[: self._pending]
        for c in labels.unique().tolist():
            members = (labels == c).nonzero()[:, 0]
            own = rows if len(members) == len(rows) else rows[members]
            n, m = int(self.counts[c]), len(members)
            # In strips, because a sum in float64 copies what it sums.
            mean = torch.stack([part.sum(0, dtype=torch.float64) for part in own.split(_FEW)]).sum(0) / m
            delta = mean - self._means[c]
            self._means[c] += delta * (m / (n + m))
            self.counts[c] += m
            point = mean - math.sqrt(n / (n + m)) * delta
            high = point.to(own.dtype)  # in two parts, so that a large mean costs no digits
            own.sub_(high).sub_((point - high).to(own.dtype))
            if own is not rows:
                rows[members] = own
        self._pending, pending = 0, self._pending
        self._trace += self._add(pending)

    def _add(self, count: int) -> float:
        """Take so many centred rows after the kept ones into the scatter; the sum of their squares."""
        assert self._rows is not None
        rows = self._rows[: self._kept + count]
        if self.method == "full":
            product = rows.mT @ rows
            squares = float(product.diagonal().sum(dtype=torch.float64))
            self._scatter = product.double() if self._scatter is None else self._scatter.add_(product)
            return squares

        gram = (rows @ rows.mT).double()
        squares = float(gram.diagonal()[self._kept :].sum())
        values, vectors = torch.linalg.eigh(gram)
        self._kept = min(self.capacity, int((values > values[-1] * len(rows) * 1e-15).sum()))
        rotation = vectors[:, len(rows) - self._kept :].flip(1).mT.to(rows)
        for strip in rows.split(_STRIP, dim=1):  # in place
            strip[: self._kept] = rotation @ strip
        return squares

    def _eigen(self, freedom: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Variances [k], float64, falling, of all that is kept and not rounding; their directions are the columns of
        vectors [m, k], in an orthonormal basis [d, m] if there is one."""
        basis = None
        if self.method == "full":
            scatter = self._scatter
        elif self._rows is None or not self._kept:
            scatter = torch.zeros(0, 0, dtype=torch.float64)
            basis = torch.zeros(self.dim, 0)
        else:
            self._rows = self._rows[: self._kept].clone()  # room for what follows: no row waits
            # Not by the Gram matrix: divided by small singular values, its vectors would not be orthogonal.
            basis, upper = torch.linalg.qr(self._rows.mT)
            scatter = upper.double() @ upper.double().mT
        assert scatter is not None
        values, vectors = torch.linalg.eigh(scatter / freedom)
        values, vectors = values.flip(0), vectors.flip(1)
        # What lies below the rounding of the products (full) or of the rows is noise.
        noise = 1e-9 if basis is None else {torch.float32: 1e-12}.get(basis.dtype, 1e-14)
        k = min(freedom, int((values > values[:1].clamp_min(0) * noise).sum()))
        return values[:k], vectors[:, :k], basis


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
