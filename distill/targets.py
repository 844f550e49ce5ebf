"""What the student is pulled towards: a denoiser that is never trained."""

from typing import Any

import torch
from torch import Tensor

from samplers import Denoiser


class Fixed:
    """The same denoiser from the first step to the last: the teacher."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return self.denoiser(x, sigma, cond)
