"""The discriminator: one small head for each layer of features; its logits estimate ln r = ln p / q.

At the optimum of softplus(fake) + softplus(-real), samples of p being real, a logit is ln p / q at the noise level of
its sample. Heads as in f-distill (Xu et al. 2025) and DMD2 (Yin et al. 2024): strided convolutions, then one number.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.weights import LOG_RATIO_LIMIT

_SMALL = 4  # height and width from which a map is read as a whole


class Head(nn.Module):
    """Features [B, C, ...] -> logits [B, outputs].

    Maps [B, C, H, W] are halved by convolutions down to 4 pixels and read whole; tokens [B, C, N] pass through a layer,
    normalised over all of them, and are averaged; vectors [B, C] pass through a layer. `example` is a batch of features
    of the size to come.
    """

    def __init__(self, example: Tensor, outputs: int = 1) -> None:
        super().__init__()
        channels, size = example.shape[1], example.shape[2:]
        layers: list[nn.Module] = []
        if len(size) == 2:
            height, width = size
            while min(height, width) > _SMALL:
                layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), _norm(channels), nn.SiLU()]
                height, width = height // 2, width // 2
            layers += [nn.Conv2d(channels, channels, (height, width)), nn.Flatten()]
        elif len(size) == 1:
            layers += [nn.Conv1d(channels, channels, 1), _norm(channels), nn.SiLU(), nn.AdaptiveAvgPool1d(1)]
            layers += [nn.Flatten(), nn.Linear(channels, channels)]
        elif len(size) == 0:
            layers += [nn.Linear(channels, channels)]
        else:
            raise ValueError(
                f"discriminator: features of shape {list(example.shape)}; read are [B, C], [B, C, N], maps"
            )
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Linear(channels, outputs))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]  # ln r = 0: no opinion before training
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def _norm(channels: int) -> nn.Module:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class Discriminator(nn.Module):
    """Logits [B, heads] of a list of features, one head for each; `examples` are features of the sizes to come.

    ratios: several ratios are estimated side by side, by as many outputs of each head: logits [B, heads, ratios].
    """

    def __init__(self, examples: Sequence[Tensor], ratios: int = 1) -> None:
        super().__init__()
        self.ratios = ratios
        self.heads = nn.ModuleList(Head(example, ratios) for example in examples)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        dtype = next(self.parameters()).dtype
        logits = torch.stack([head(f.to(dtype)) for head, f in zip(self.heads, features, strict=True)], dim=1)
        return logits[..., 0] if self.ratios == 1 else logits


def log_ratio(logits: Tensor) -> Tensor:
    """ln r, [B], from logits [B, heads]: their mean, within +-10."""
    return logits.mean(1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No parameter of these modules gets a gradient from what is computed inside; their inputs may."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
