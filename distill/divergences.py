"""f-divergences D_f(p || q) = E_q f(r), r = p / q, and the weights that they give distribution matching.

grad D_f = -E[h(r) (s_p - s_q) dx/dtheta] with h(r) = r^2 f''(r) (Xu et al. 2025, arXiv 2502.15681):
a divergence enters training as one number per sample. p is the target, q the student.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FDivergence:
    """f(r) and weight(r) = r^2 f''(r), elementwise on positive tensors.

    constant: the weight does not depend on r, so that no ratio has to be estimated.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    constant: bool = False


DIVERGENCES: dict[str, FDivergence] = {
    "reverse-kl": FDivergence("reverse-kl", lambda r: -r.log(), torch.ones_like, constant=True),
}
