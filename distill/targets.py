"""What the student is pulled towards: a denoiser that is never trained."""

from typing import Any

from torch import Tensor

from samplers import Denoiser


class Fixed:
    """The same denoiser from the first step to the last: the teacher.

    Whether its call is part of a graph is the caller's choice: an adversary reads its encoder with one.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.denoiser(x, sigma, cond)
