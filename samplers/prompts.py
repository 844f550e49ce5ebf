"""A diffusers pipeline's prompts and classes as denoisers, its latents as pictures: for our own loops and targets.

All prompts of one pipeline share one denoiser of its network, so that a `Target` of several asks it once a step. Texts
go through the pipeline's own encoders, as in its call; nothing is drawn, stepped or downloaded.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from samplers.adapters import NetworkDenoiser, coordinates_of
from samplers.network_call import is_packed, state_channels
from samplers.noise import moved
from samplers.targets import Conditioned

Prompt = str | int | Mapping[str, Tensor] | None

_EMBEDS, _POOLED, _MASK = "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"
GUIDANCE_EMBEDDING = 3.5  # what a pipeline of Flux feeds a guidance-distilled network


class Kind(NamedTuple):
    """What a kind of pipeline has: its network, and the embeddings of a prompt (none: classes, or no condition).

    shifted: its latents are decoded from z = latents / scaling_factor + shift_factor; elsewhere without the shift.
    encoders: how many text encoders it cannot do without; some have one more.
    """

    network: str
    embeddings: tuple[str, ...] = ()
    shifted: bool = False
    encoders: int = 1

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that words cannot be embedded without."""
        numbers = ("", "_2")[: self.encoders] if self.embeddings else ()
        return tuple(f"{part}{number}" for number in numbers for part in ("text_encoder", "tokenizer"))


PIPELINES = {
    "DDIMPipeline": Kind("unet"),
    "DDPMPipeline": Kind("unet"),
    "DiTPipeline": Kind("transformer"),
    "FluxPipeline": Kind("transformer", (_EMBEDS, _POOLED), shifted=True, encoders=2),
    "PixArtAlphaPipeline": Kind("transformer", (_EMBEDS, _MASK)),
    "PixArtSigmaPipeline": Kind("transformer", (_EMBEDS, _MASK)),
    "StableDiffusion3Pipeline": Kind("transformer", (_EMBEDS, _POOLED), shifted=True, encoders=2),
    "StableDiffusionPipeline": Kind("unet", (_EMBEDS,)),
    "StableDiffusionXLPipeline": Kind("unet", (_EMBEDS, _POOLED), encoders=2),
}


_DENOISERS: WeakKeyDictionary[Any, tuple[Any, NetworkDenoiser]] = WeakKeyDictionary()


def prompted(pipe: Any, prompt: Prompt = None, *, height: int | None = None, width: int | None = None) -> Conditioned:
    """The denoiser of a pipeline's samples under a prompt; `samplers.denoiser_from(pipe, prompt)` is this.

    prompt: words; a class label, for DiT and class-conditional UNets; the pipeline's embeddings by the names of its
    arguments, each of one row; None is what the pipeline itself guides away from: the unconditional law (the embedding
    of "", or the zeros of SDXL). height, width: of the picture, in pixels, which SDXL is told (None: the pipeline's
    own).
    Raises ValueError for a pipeline that is not supported, and for a prompt that it cannot be given.
    """
    name, kind = _kind(pipe)
    denoiser = denoiser_of(pipe)
    if not kind.embeddings:
        return Conditioned(denoiser, _label(name, denoiser.network, prompt))
    return Conditioned(denoiser, condition(pipe, embed(pipe, prompt), height=height, width=width))


def denoiser_of(pipe: Any) -> NetworkDenoiser:
    """The denoiser of a pipeline's network: one, as long as it has the same network and scheduler.

    Raises ValueError for a pipeline that is not supported.
    """
    name, kind = _kind(pipe)
    network = getattr(pipe, kind.network)
    if network.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"time_cond_proj_dim: this {name}'s network is fed a guidance scale; accepted are those of laws"
        )
    kept = _DENOISERS.get(pipe)
    if kept is None or kept[0] is not pipe.scheduler or kept[1].network is not network:
        kept = _DENOISERS[pipe] = pipe.scheduler, NetworkDenoiser(network, coordinates_of(pipe.scheduler))
    return kept[1]


def condition(
    pipe: Any,
    embeddings: Mapping[str, Tensor],
    *,
    height: int | None = None,
    width: int | None = None,
    guidance_embedding: float = GUIDANCE_EMBEDDING,
) -> dict[str, Any]:
    """What a pipeline's network is given for the embeddings of B prompts, by the names of the pipeline's arguments.

    prompt_embeds [B, L, C], pooled_prompt_embeds [B, C], prompt_attention_mask [B, L]; the result is on the pipeline's
    device. guidance_embedding: what a guidance-distilled network (Flux) is fed.
    """
    name, kind = _kind(pipe)
    network = getattr(pipe, kind.network)
    found = {key: moved(value, pipe._execution_device) for key, value in embeddings.items()}
    texts = found[_EMBEDS]
    cond: dict[str, Any] = {"encoder_hidden_states": texts}
    if name == "StableDiffusionXLPipeline":
        size = _pixels(pipe, height, width)
        # original size, corner of the crop, size of the target: what its call defaults to
        ids = _rows([*size, 0, 0, *size], texts)
        cond["added_cond_kwargs"] = {"text_embeds": found[_POOLED], "time_ids": ids}
    elif name.startswith("PixArt"):
        cond["encoder_attention_mask"] = found[_MASK]
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if network.use_additional_conditions:
            h, w = _pixels(pipe, height, width)
            sizes = {"resolution": _rows([h, w], texts), "aspect_ratio": _rows([h / w], texts)}
        cond["added_cond_kwargs"] = sizes
    elif _POOLED in found:
        cond["pooled_projections"] = found[_POOLED]
    if network.config.get("guidance_embeds"):
        cond["guidance"] = _rows([guidance_embedding], texts).float()[:, 0]
    return cond


def _rows(values: list[Any], like: Tensor) -> Tensor:
    """The same values for each of B prompts, [B, n]; made where they are needed, so that nothing waits for a copy."""
    return torch.stack([like.new_full((len(like),), value) for value in values], 1)


def latent_shape(pipe: Any, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """[C, h, w] of what a pipeline samples, latents or pixels, for pictures of height x width pixels (None: its own).

    Raises ValueError for a size that the pipeline cannot make.
    """
    name, kind = _kind(pipe)
    network = getattr(pipe, kind.network)
    if kind.embeddings:
        h, w = (v // pipe.vae_scale_factor for v in _pixels(pipe, height, width))
        return state_channels(network), h, w
    h, w = _pair(network.config.sample_size)
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1) if getattr(pipe, "vae", None) is not None else 1
    if (height or h * factor, width or w * factor) != (h * factor, w * factor):
        raise ValueError(f"height, width: {height}, {width}; {name} makes pictures of {h * factor} x {w * factor} only")
    return network.config.in_channels, h, w


@torch.no_grad()
def decode(pipe: Any, x: Tensor) -> Tensor:
    """A pipeline's samples x [B, C, h, w], at sigma = 0, as pictures [B, 3, H, W] in [-1, 1]; pixels are as they are.

    As the pipeline decodes: by its VAE with its scaling, in the VAE's precision. Nothing is clamped.
    """
    name, kind = _kind(pipe)
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return x
    check_scaling(vae.config, kind)
    config, dtype = vae.config, vae.dtype
    overflows = dtype == torch.float16 and bool(config.get("force_upcast"))
    latents = x.to(device=pipe._execution_device, dtype=torch.float32 if overflows else dtype)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if name == "StableDiffusionXLPipeline" and mean is not None and std is not None:
        mean, std = (torch.tensor(v).reshape(1, -1, 1, 1).to(latents) for v in (mean, std))
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor
    if kind.shifted:
        latents = latents + config.shift_factor
    if not overflows:
        return vae.decode(latents, return_dict=False)[0]
    vae.to(torch.float32)
    try:
        return vae.decode(latents, return_dict=False)[0]
    finally:
        vae.to(dtype)


def check_scaling(config: Any, kind: Kind) -> None:
    """Raises ValueError where the configuration of a pipeline's VAE does not say what its latents are scaled by."""
    for key in ("scaling_factor", *(("shift_factor",) if kind.shifted else ())):
        if config.get(key) is None:
            raise ValueError(f"vae: its config.json says no {key}, by which the pipeline's latents are decoded")


def kind_of(pipe: Any) -> Kind:
    """What is known of a pipeline's kind. Raises ValueError, naming it, for one that is not supported."""
    return _kind(pipe)[1]


def name_of(pipe: Any) -> str:
    """The pipeline's class, or the supported one that it is derived from. Raises ValueError as `kind_of`."""
    return _kind(pipe)[0]


def _kind(pipe: Any) -> tuple[str, Kind]:
    for cls in type(pipe).__mro__:
        if cls.__name__ in PIPELINES:
            return cls.__name__, PIPELINES[cls.__name__]
    raise ValueError(f"pipe: {type(pipe).__name__} is not supported; supported are {', '.join(PIPELINES)}")


def _label(name: str, network: Any, prompt: Prompt) -> Tensor | None:
    """A class label [1], the null label where there is one; None where there are no classes."""
    null, classes = network.config.get("num_embeds_ada_norm"), network.config.get("num_class_embeds")
    if name == "DiTPipeline":
        number, accepted = (null if prompt in (None, "") else prompt), f"labels 0 .. {null}, of which {null} is none"
        classes = null + 1
    elif classes is None:
        if prompt in (None, ""):
            return None
        raise ValueError(f"prompt: {prompt!r}; this {name} has no condition; accepted is None")
    else:
        number, accepted = prompt, f"labels 0 .. {classes - 1} (there is no label for none)"
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < classes:
        raise ValueError(f"prompt: {prompt!r}; this {name} has classes; accepted are {accepted}")
    return torch.tensor([number], device=network.device)


@torch.no_grad()
def embed(pipe: Any, prompt: Prompt) -> dict[str, Tensor]:
    """The embeddings of a prompt, each [1, ...], by the names of the pipeline's arguments.

    None is what the pipeline guides away from when it is told of nothing. Raises ValueError as `prompted`.
    """
    name, kind = _kind(pipe)
    if isinstance(prompt, Mapping):
        if prompt.keys() != set(kind.embeddings) or any(len(v) != 1 for v in prompt.values()):
            shapes = {key: list(value.shape) for key, value in prompt.items()}
            raise ValueError(f"prompt: {shapes}; needed are {' and '.join(kind.embeddings)}, each of one row")
        return dict(prompt)
    if not isinstance(prompt, str | None):
        raise ValueError(f"prompt: {prompt!r}; {name} has prompts in words; accepted are one and its embeddings")
    if missing := [part for part in kind.text_parts if getattr(pipe, part, None) is None]:
        raise ValueError(f"prompt: this {name} has no {missing[0]}; give {' and '.join(kind.embeddings)}, by name")

    encode: Callable[..., tuple[Tensor, ...]] = pipe.encode_prompt
    device, words = pipe._execution_device, prompt or ""
    if name == "FluxPipeline":
        return dict(zip(kind.embeddings, encode(words, None, device=device)[:2], strict=True))
    if name == "StableDiffusionPipeline":
        answers = encode(words, device, 1, True)
    elif name in ("StableDiffusionXLPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline"):
        answers = encode(words, device=device, do_classifier_free_guidance=True)
    else:
        answers = encode(words, None, None, device=device, do_classifier_free_guidance=True)
    if name.startswith("PixArt"):  # both of the prompt, then both of the negative one
        chosen = answers[2:] if prompt is None else answers[:2]
    else:  # conditional and negative in turn; the negative one is the pipeline's own idea of no prompt
        chosen = answers[1::2] if prompt is None else answers[::2]
    return dict(zip(kind.embeddings, chosen, strict=True))


def _pixels(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """A picture's height and width. Raises ValueError for what is no multiple of the pipeline's."""
    network = getattr(pipe, _kind(pipe)[1].network)
    own = network.config.get("sample_size") or getattr(pipe, "default_sample_size", None)
    if own is None and not (height and width):
        raise ValueError("sample_size: null in the network's config.json; needed are height and width, in pixels")
    unit = pipe.vae_scale_factor * (2 if is_packed(network) else network.config.get("patch_size") or 1)
    h, w = (0, 0) if own is None else (v * pipe.vae_scale_factor for v in _pair(own))
    size = height or h, width or w
    if any(v % unit or v < unit for v in size):
        raise ValueError(f"height, width: {size[0]}, {size[1]}; accepted are multiples of {unit}")
    return size


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
