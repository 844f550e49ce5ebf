"""How a diffusers network is called: most alike, those that sample tokens with their places beside them.

A denoiser's state is a picture [B, C, h, w] for every network; here it is folded into tokens and unfolded again.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

PACKED = ("FluxTransformer2DModel",)  # tokens of 2 x 2 pixels; their timestep is in [0, 1]


def is_packed(network: Any) -> bool:
    """Whether a network's input is tokens [B, (h / 2) (w / 2), 4 C]. Wrappers that keep its class do not hide it."""
    return any(kind.__name__ in PACKED for kind in type(network).__mro__)


def state_channels(network: Any) -> int:
    """The channels C of the states [B, C, h, w] that a network predicts for."""
    return network.config.in_channels // (4 if is_packed(network) else 1)


def predict(network: Any, x: Tensor, timestep: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What a network predicts for x [B, C, h, w] at timestep [B], given its other arguments: [B, C', h, w].

    Raises ValueError for a picture of odd height or width where tokens are of 2 x 2.
    """
    if not is_packed(network):
        return network(x, timestep=timestep, return_dict=False, **arguments)[0]
    h, w = x.shape[-2:]
    if h % 2 or w % 2:
        raise ValueError(f"x: {list(x.shape)}; a {type(network).__name__} takes even heights and widths")
    texts = arguments["encoder_hidden_states"]
    tokens = network(
        rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        timestep=timestep / 1000,
        txt_ids=texts.new_zeros(texts.shape[1], 3),
        img_ids=_places(h // 2, w // 2, x),
        return_dict=False,
        **arguments,
    )[0]
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h // 2, p=2, q=2)


def _places(h: int, w: int, like: Tensor) -> Tensor:
    """The row and the column of every token, [h w, 3]; the first entry is of no use to pictures."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (h, w))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    return torch.cat([grid.new_zeros(h * w, 1), grid], 1)
