"""Features of a denoiser's encoder, read by hooks from any diffusers UNet or transformer.

The hooks exist only while a call is recorded, and can end the gradient's graph, or the call itself, at the last
tapped layer: a discriminator needs the encoder's graph or the encoder's output, never the decoder's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

_BLOCKS = ("joint_transformer_blocks", "transformer_blocks", "blocks")  # then perhaps single_transformer_blocks
Read = Callable[[Any, Tensor | None], Tensor]  # (output, hidden states that went in) -> features [B, C, ...]


class _Stop(Exception):
    """The last tapped layer has run."""


class Tap:
    """Where to read the features [B, C, ...] of a network.

    UNets (`down_blocks`, `mid_block`): level k is resolution k, before it is halved, and the last level the bottleneck
    (the middle block, at the lowest resolution). levels: None is all of them. Features are maps [B, C, H, W].
    Transformers (lists of blocks): level k is the output of block k; None is those at a quarter and a half of the
    depth. Features are the image's tokens [B, C, N]. Negative levels count from the end.
    Raises ValueError for a network of neither form, naming it, and for levels that it does not have.
    """

    def __init__(self, network: nn.Module, levels: Sequence[int] | None = None) -> None:
        layers, chosen = _layers(network)
        if levels is not None:
            wrong = [level for level in levels if not -len(layers) <= level < len(layers)]
            if wrong or not levels:
                raise ValueError(
                    f"levels: {list(levels)}; a {type(network).__name__} of this size has the levels 0 .. "
                    f"{len(layers) - 1} (or -{len(layers)} .. -1)"
                )
            chosen = sorted({level % len(layers) for level in levels})
        self._layers = [layers[level] for level in chosen]

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def record(self, end: Literal["graph", "call"] | None = None) -> Iterator[list[Tensor]]:
        """The features of the one call of the network inside, in the order of the levels.

        end "graph": after the last layer nothing is added to the gradient's graph until the block ends; "call": the
        network is left there, and so is the block; None: the call goes on as it would.
        """
        features: list[Tensor] = []
        grad = torch.is_grad_enabled()

        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            module, read = self._layers[len(features)]
            assert layer is module, "the tapped layers run once each, in their order"
            features.append(read(output, kwargs.get("hidden_states", args[0] if args else None)))
            if len(features) == len(self._layers):
                if end == "call":
                    raise _Stop
                if end == "graph":
                    torch.set_grad_enabled(False)

        handles = [module.register_forward_hook(hook, with_kwargs=True) for module, _ in self._layers]
        try:
            yield features
        except _Stop:
            pass
        finally:
            torch.set_grad_enabled(grad)
            for handle in handles:
                handle.remove()

    def encode(self, call: Callable[[], Any]) -> list[Tensor]:
        """The features of a call of the network, which is left after the last tapped layer."""
        with self.record(end="call") as features:
            call()
        return features


def _layers(network: nn.Module) -> tuple[list[tuple[nn.Module, Read]], list[int]]:
    """All layers that can be read, in the order in which they run, and those that are read if nobody says."""
    down = getattr(network, "down_blocks", None)
    if isinstance(down, nn.ModuleList) and len(down):
        layers: list[tuple[nn.Module, Read]] = [(block, _before_halving(block)) for block in down]
        middle = getattr(network, "mid_block", None)
        if middle is not None:
            layers[-1:] = [(middle, lambda output, _: output)]  # at the resolution of the last down block
        return layers, list(range(len(layers)))
    for name in _BLOCKS:
        blocks = getattr(network, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            both = [*blocks, *getattr(network, "single_transformer_blocks", [])]
            depth = len(both)
            return [(block, _tokens) for block in both], sorted({(depth - 1) // 4, (depth - 1) // 2})
    raise ValueError(
        f"discriminator: a {type(network).__name__} has no layers that are known here; known are UNets (down_blocks, "
        f"mid_block) and transformers ({', '.join(_BLOCKS)})"
    )


def _before_halving(block: nn.Module) -> Read:
    """A down block returns its output and every state on the way; the last but one is the deepest before halving."""
    halves = bool(getattr(block, "downsamplers", None))

    def read(output: Any, _: Tensor | None) -> Tensor:
        hidden, states = output[:2]
        return states[-2] if halves else hidden

    return read


def _tokens(output: Any, hidden: Tensor | None) -> Tensor:
    """The image's tokens [B, C, N] of a block's output: where that is a tuple, what has the shape that went in."""
    if not isinstance(output, Tensor):
        tensors = [part for part in output if isinstance(part, Tensor)]
        alike = [part for part in tensors if hidden is not None and part.shape == hidden.shape]
        output = (alike or tensors)[-1]
    return output.transpose(1, 2) if output.ndim == 3 else output  # a vector [B, C] has no tokens
