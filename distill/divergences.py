"""f-divergences D_f(p || q) = E_q f(r), r = p / q, and the weights that they give distribution matching.

grad D_f = -E[h(r) (s_p - s_q) dx/dtheta] with h(r) = r^2 f''(r) (Xu et al. 2025, arXiv 2502.15681, Table 1):
a divergence enters training as one number per sample. p is the target, q the student. Where h grows with r, samples
that the student makes too rarely pull hardest and modes are covered; where it is bounded, modes are sought.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FDivergence:
    """f(r) and weight(r) = r^2 f''(r), elementwise on positive tensors; f(1) = 0.

    constant: the weight does not depend on r, so that no ratio has to be estimated.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    constant: bool = False


DIVERGENCES: dict[str, FDivergence] = {
    divergence.name: divergence
    for divergence in (
        FDivergence("reverse-kl", lambda r: -r.log(), torch.ones_like, constant=True),
        FDivergence("softened-reverse-kl", lambda r: (r + 1) * (0.5 + 0.5 / r).log(), lambda r: 1 / (1 + r)),
        FDivergence("jensen-shannon", lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (1 + r)),
        FDivergence("squared-hellinger", lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4),
        FDivergence("forward-kl", lambda r: r * r.log(), lambda r: r),
        FDivergence("jeffreys", lambda r: (r - 1) * r.log(), lambda r: 1 + r),
        FDivergence("neyman", lambda r: (1 - r) ** 2 / r, lambda r: 2 / r),
    )
}


def alpha(exponent: float) -> FDivergence:
    """The alpha-divergence with weight r^exponent: f = (1 - r^a) / (a (1 - a)), a = exponent.

    -1 is Neyman's, 0 reverse KL, 1/2 squared Hellinger, 1 forward KL, 2 Pearson's, up to constants. (a = (1 + alpha)/2
    in Amari's convention.) Raises ValueError for an exponent that is not finite.
    """
    a = float(exponent)
    if not math.isfinite(a):
        raise ValueError(f"exponent: {exponent}; accepted are finite numbers")
    if a == 0:
        return FDivergence("alpha(0)", lambda r: -r.log(), torch.ones_like, constant=True)
    if a == 1:
        return FDivergence("alpha(1)", lambda r: r * r.log(), lambda r: r)
    return FDivergence(f"alpha({a:g})", lambda r: (1 - r**a) / (a * (1 - a)), lambda r: r**a)


def named(name: str, exponent: float | None = None) -> FDivergence:
    """The divergence of that name; "alpha" needs an exponent, and only it takes one.

    Raises ValueError for another name, listing those that exist.
    """
    if name not in DIVERGENCES and name != "alpha":
        raise ValueError(f"divergence: {name!r}; accepted are {', '.join(DIVERGENCES)}, alpha")
    if (exponent is not None) != (name == "alpha"):
        raise ValueError(f"exponent: {exponent} does not go with {name} (alpha needs one, the others take none)")
    return DIVERGENCES[name] if exponent is None else alpha(exponent)
