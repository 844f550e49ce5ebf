"""How many different samples a set holds: the Vendi score.

Friedman and Dieng 2023, "The Vendi score", def. 3.1: the exponential of the entropy of the eigenvalues of K / n; of
order q: Pasarkar and Dieng 2024, "Cousins of the Vendi score", eq. 2. Why fast: K = X X^T and X^T X have the same
eigenvalues but zeros, so the smaller of the two is decomposed, n x n or d x d.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from tools.gram import check_features, few, square
from tools.jackknife import BLOCKS, Estimate, jackknife, of_blocks

KERNELS = ("cosine", "linear")


def vendi_score(
    features: Tensor,
    q: float = 1.0,
    kernel: Literal["cosine", "linear"] = "cosine",
    *,
    blocks: Tensor | None = None,
    errors: bool = True,
) -> Estimate:
    """The effective number of different rows of features [N, d]: from 1 (all equal) to min(N, d), in float64.

    q: the order, 0 to infinity. 0 counts the rank (to float64 rounding), 1 is the Shannon entropy, infinity 1 / the
        largest eigenvalue; larger orders care less for what is rare.
    kernel: cosine, of rows made unit vectors; linear, of the rows as they are, with K divided by its trace.
    errors: by leaving out each of the `blocks` [N] (None: `block_of`), which decomposes ten more matrices. The score
        grows with N, so it is not debiased, and compares sets of equal size. Fewer than ten rows have no errors.

    Raises ValueError for another shape, values that are not finite, no rows, rows of zeros (cosine), nothing but
    zeros (linear), q below 0 or NaN, and an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: {kernel!r}; accepted are {', '.join(KERNELS)}")
    if not q >= 0:
        raise ValueError(f"q: {q}; accepted are orders from 0 to infinity")
    rows = _normed(features, kernel)
    n, d = rows.shape

    grouped = None if not errors or (blocks is None and n < BLOCKS) else of_blocks(blocks, n).to(rows.device)
    if n <= d:
        whole = square(rows)
        kept = [] if grouped is None else [grouped != b for b in range(BLOCKS)]
        matrices = (whole[keep][:, keep] for keep in kept)
    else:
        parts = [] if grouped is None else [square(rows[grouped == b].T) for b in range(BLOCKS)]
        whole = square(rows.T) if grouped is None else torch.stack(parts).sum(dim=0)
        matrices = (whole - part for part in parts)

    zero = len(whole) * torch.finfo(torch.float64).eps * float(whole.trace())
    value, left = _score(whole, q, zero), [_score(matrix, q, zero) for matrix in matrices]
    if not left or not all(left):  # the blocks that are left have rows of zeros only
        return Estimate(value)
    found = jackknife(value, left)
    assert found.interval is not None
    half = (found.interval[1] - found.interval[0]) / 2
    return Estimate(value, found.standard_error, None, (value - half, value + half), found.leave_one_out)


def _normed(features: Tensor, kernel: str) -> Tensor:
    """[N, d] float64: unit vectors, or rows over the largest of their values."""
    check_features("features", features, features.shape[-1] if features.ndim else 0)
    if not len(features):
        raise ValueError("features: 0 rows have no score (1 or more)")
    largest = features.abs().amax(dim=1, keepdim=True).double()
    zero = (largest[:, 0] == 0).nonzero()[:, 0]
    if kernel == "linear":
        if len(zero) == len(features):
            raise ValueError(f"features: all {len(zero)} rows are zero")
        return features.double() / largest.max()
    if len(zero):
        raise ValueError(f"features: {len(zero)} of {len(features)} rows are zero and have no direction: {few(zero)}")
    rows = features.double() / largest
    return rows / rows.norm(dim=1, keepdim=True)


def _score(matrix: Tensor, q: float, zero: float) -> float:
    """Of the eigenvalues above `zero`, which are rounding, over their sum; 0 where there are none."""
    eigenvalues = torch.linalg.eigvalsh(matrix)
    shares = eigenvalues[eigenvalues > zero]
    if not len(shares):
        return 0.0
    shares = shares / shares.sum()

    if q == 0:
        return float(len(shares))
    if q == math.inf:
        return 1 / float(shares.max())
    if q == 1:
        return math.exp(float(torch.special.entr(shares).sum()))
    if abs(q - 1) < 0.5:  # sum of shares^q = 1 + sum of shares (shares^(q - 1) - 1): exact as q nears 1
        total = torch.log1p((shares * torch.expm1((q - 1) * shares.log())).sum())
    else:
        largest = shares.max().log()  # out of the sum, or all of it would underflow for huge orders
        total = torch.logsumexp(q * (shares.log() - largest), dim=0)
        return math.exp(float(total) / (1 - q) + float(largest) * (q / (1 - q)))
    return math.exp(float(total) / (1 - q))
