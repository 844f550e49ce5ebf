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
_IMAGE_FIRST = ("CogV", "ConsisID", "Glm", "HiDream", "Hunyuan", "Mochi")  # blocks that return (image, text)
# (block, output, hidden states that went in, image tokens of the last joint block) -> features [B, C, ...]
Read = Callable[[nn.Module, Any, Tensor | None, int | None], Tensor]


class _Stop(Exception):
    """The last tapped layer has run."""


class Tap:
    """Where to read the features [B, C, ...] of a network.

    UNets (`down_blocks`, `mid_block`): level k is resolution k, before it is halved where the block tells (those of
    UNet1DModel do not), and the last level the bottleneck (the middle block, at the lowest resolution). levels: None
    is all of them. Features are maps [B, C, H, W].
    Transformers (lists of blocks): level k is the output of block k; None is those at a quarter and a half of the
    depth. Features are the image's tokens [B, C, N]. Negative levels count from the end.
    Raises ValueError for a network of neither form, naming it, and for levels that it does not have.
    """

    def __init__(self, network: nn.Module, levels: Sequence[int] | None = None) -> None:
        layers, chosen, self._joint = _layers(network)
        if levels is not None:
            wrong = [level for level in levels if not -len(layers) <= level < len(layers)]
            if wrong or not levels:
                raise ValueError(
                    f"discriminator.levels: {list(levels)}; a {type(network).__name__} of this size has levels 0 .. "
                    f"{len(layers) - 1} (or -{len(layers)} .. -1)"
                )
            chosen = sorted({level % len(layers) for level in levels})
        self._layers = [layers[level] for level in chosen]

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def record(self, end: Callable[[list[Tensor]], None] | Literal["call"] | None = None) -> Iterator[list[Tensor]]:
        """The features of the one call of the network inside, in the order of the levels.

        end: None, the call goes on as it would; "call", the network is left after the last layer, and so is the block;
        a function, it is given the features there, which are then forgotten, and what follows has no graph.
        """
        features: list[Tensor] = []
        image_tokens: list[int] = []
        grad, seen, ending = torch.is_grad_enabled(), 0, False

        def count(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            image_tokens.append(_image(layer, output, _went_in(args, kwargs)).shape[1])

        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal seen, ending
            if ending:
                return  # a layer that runs again for a backward pass
            assert seen < len(self._layers), "one call of the network is recorded"
            module, read = self._layers[seen]
            assert layer is module, "the tapped layers run once each, in their order"
            features.append(read(layer, output, _went_in(args, kwargs), image_tokens[0] if image_tokens else None))
            seen += 1
            if seen == len(self._layers):
                if end == "call":
                    raise _Stop
                if callable(end):
                    ending = True
                    end(features)
                    ending = False
                    features.clear()
                    torch.set_grad_enabled(False)

        handles = [] if self._joint is None else [self._joint.register_forward_hook(count, with_kwargs=True)]
        handles += [module.register_forward_hook(hook, with_kwargs=True) for module, _ in self._layers]
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


Layers = list[tuple[nn.Module, Read]]


def _layers(network: nn.Module) -> tuple[Layers, list[int], nn.Module | None]:
    """All layers that can be read, in the order in which they run; those that are read if nobody says; and the last
    block that keeps image and text apart, where others follow."""
    down = getattr(network, "down_blocks", None)
    if isinstance(down, nn.ModuleList) and len(down) and not isinstance(down[0], nn.ModuleList):
        layers: Layers = [(block, _before_halving) for block in down]
        middle = getattr(network, "mid_block", None)
        if middle is not None:
            layers[-1:] = [(middle, lambda _, output, *__: output)]  # at the resolution of the last down block
        return layers, list(range(len(layers))), None
    for name in _BLOCKS:
        blocks = getattr(network, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks) and not isinstance(blocks[0], nn.ModuleList):
            single = list(getattr(network, "single_transformer_blocks", []))
            depth = len(blocks) + len(single)
            every: Layers = [(block, _tokens) for block in (*blocks, *single)]
            return every, sorted({(depth - 1) // 4, (depth - 1) // 2}), blocks[-1] if single else None
    raise ValueError(
        f"discriminator: a {type(network).__name__} has no layers that are known here; known are UNets (down_blocks, "
        f"mid_block) and transformers ({', '.join(_BLOCKS)})"
    )


def _went_in(args: Any, kwargs: Any) -> Tensor | None:
    """The hidden states that a block was given."""
    return kwargs.get("hidden_states", args[0] if args else None)


def _before_halving(block: nn.Module, output: Any, *_: Any) -> Tensor:
    """A down block returns its output and the states on the way: the deepest before halving."""
    if not isinstance(output, tuple):
        raise ValueError(f"discriminator: a {type(block).__name__} returns no states to read its resolution from")
    hidden, states = output[:2]
    if not getattr(block, "downsamplers", None):
        return hidden
    return states[-2] if states[-1] is hidden else states[-1]  # some list the halved one, some do not


def _tokens(block: nn.Module, output: Any, hidden: Tensor | None, image_tokens: int | None) -> Tensor:
    """The image's tokens [B, C, N] of a block's output; where they are joined to the text's, they come last."""
    tokens = _image(block, output, hidden)
    if tokens.ndim != 3:
        return tokens  # a vector [B, C] has no tokens
    if isinstance(output, Tensor) and image_tokens is not None:
        tokens = tokens[:, -image_tokens:]
    return tokens.transpose(1, 2)


def _image(block: nn.Module, output: Any, hidden: Tensor | None) -> Tensor:
    """Of a tuple, what has the shape of the hidden states that went in; if image and text do, by the block's order."""
    if isinstance(output, Tensor):
        return output
    tensors = [part for part in output if isinstance(part, Tensor)]
    alike = [part for part in tensors if hidden is not None and part.shape == hidden.shape] or tensors
    return alike[0 if type(block).__name__.startswith(_IMAGE_FIRST) else -1]
