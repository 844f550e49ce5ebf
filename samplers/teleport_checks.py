"""Which diffusers pipelines a Gaussian can be put into, and why not: every refusal, before anything is changed."""

import hashlib
import math
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from samplers.gaussian import Gaussian
from samplers.network_hook import HOOKS
from samplers.teleport_scheduler import path_of


class Family(NamedTuple):
    """What a kind of pipeline has: its network, what it samples under, the paths that its loop is right for.

    packed: its latents are tokens [B, (h/2) (w/2), 4 C].
    """

    network: str
    conditions: str | None
    paths: tuple[str, ...]
    packed: bool = False


# DDPM, DDIM and DiT neither scale the first noise nor keep the state unscaled, as ve needs; SD3 and Flux scale nothing.
PIPELINES = {
    "DDIMPipeline": Family("unet", None, ("vp", "flow")),
    "DDPMPipeline": Family("unet", None, ("vp", "flow")),
    "DiTPipeline": Family("transformer", "classes", ("vp", "flow")),
    "FluxPipeline": Family("transformer", "prompts", ("flow",), packed=True),
    "PixArtAlphaPipeline": Family("transformer", "prompts", ("ve", "vp", "flow")),
    "PixArtSigmaPipeline": Family("transformer", "prompts", ("ve", "vp", "flow")),
    "StableDiffusion3Pipeline": Family("transformer", "prompts", ("flow",)),
    "StableDiffusionPipeline": Family("unet", "prompts", ("ve", "vp", "flow")),
    "StableDiffusionXLPipeline": Family("unet", "prompts", ("ve", "vp", "flow")),
}
_FROM_PICTURES = ("Img2Img", "Inpaint", "Depth2Img", "Pix2Pix", "Upscale", "Variation", "Kontext")


# A pipeline in half precision has the VAE that its Gaussian was fitted through in single, rounded.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_VAE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def vae_facts(vae: Any) -> dict[str, Any]:
    """What tells one VAE's latents from another's: class, scaling and shift, and SHA-256 of the weights by dtype.

    A hash is over the names and the bytes of the state dict in the order of names; one in float32 has its float16 and
    bfloat16 copies' hashes too. Raises ValueError for weights that are offloaded to no device.
    """
    own = next(vae.parameters()).dtype
    hashes = weight_hashes(vae, _DTYPES if own == torch.float32 else (own,))
    vae = getattr(vae, "_orig_mod", vae)  # of torch.compile
    settings = {name: vae.config.get(name) for name in _VAE}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}  # as JSON
    return {"class": type(vae).__name__, "sha256": hashes} | settings


_HASHES: WeakKeyDictionary[Any, tuple[Any, dict[str, str]]] = WeakKeyDictionary()


def weight_hashes(module: Any, dtypes: tuple[torch.dtype, ...]) -> dict[str, str]:
    """SHA-256 of a module's weights as they are in each dtype, by its name; kept as long as no weight is written to."""
    module = getattr(module, "_orig_mod", module)
    state = sorted(module.state_dict(keep_vars=True).items())
    if any(value.is_meta for _, value in state):
        raise ValueError(
            f"vae: the weights of this {type(module).__name__} are offloaded; attach before you offload them"
        )
    stamp = (dtypes, [(name, value.data_ptr(), value._version) for name, value in state])
    if module in _HASHES and _HASHES[module][0] == stamp:
        return _HASHES[module][1]
    digests = {dtype: hashlib.sha256() for dtype in dtypes}
    for name, value in state:
        for dtype, digest in digests.items():
            cast = value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous()
            digest.update(name.encode())
            digest.update(cast.reshape(-1).view(torch.uint8).numpy().tobytes())
    hashes = {str(dtype).removeprefix("torch."): digest.hexdigest() for dtype, digest in digests.items()}
    _HASHES[module] = stamp, hashes
    return hashes


def family_of(pipe: Any) -> Family:
    """What is known of a pipeline's kind. Raises ValueError, naming it, for one that is not supported."""
    kind = type(pipe).__name__
    if any(word in kind for word in _FROM_PICTURES):
        raise ValueError(f"pipe: {kind} starts from a picture; a jump replaces the first steps from pure noise")
    for cls in type(pipe).__mro__:
        if cls.__name__ in PIPELINES:
            return PIPELINES[cls.__name__]
    raise ValueError(f"pipe: {kind} is not supported; supported are {', '.join(PIPELINES)}")


def check_unattached(pipe: Any, family: Family) -> None:
    """Raise ValueError if the pipeline's scheduler or network jumps or weighs already, for this pipeline or another."""
    registry = getattr(getattr(pipe, family.network), "_diffusers_hook", None)
    hooked = registry is not None and any(registry.get_hook(hook) is not None for hook in HOOKS)
    marked = any(getattr(type(pipe.scheduler), mark, False) for mark in ("_jumps", "_weighs"))
    if hooked or marked:
        raise ValueError(
            f"pipe: {type(pipe).__name__} is already attached; accepted is one teleport or one corrector of guidance "
            "at a time"
        )


def check_scheduler(pipe: Any, family: Family) -> None:
    """Raise ValueError for a scheduler that is not supported, or not in this pipeline."""
    path, scheduler, kind = path_of(pipe.scheduler), type(pipe.scheduler).__name__, type(pipe).__name__
    if path not in family.paths:
        raise ValueError(
            f"scheduler: {scheduler} has states on the path {path!r}, which {kind} does not sample; it does "
            f"{' and '.join(family.paths)}"
        )


def check_gaussian(pipe: Any, family: Family, gaussian: Gaussian) -> None:
    """Raise ValueError for a Gaussian of another shape, other classes, another range or VAE than the pipeline's."""
    kind, network = type(pipe).__name__, getattr(pipe, family.network)
    if not isinstance(gaussian, Gaussian):
        raise ValueError(f"gaussian: is a {type(gaussian).__name__}; needed is a Gaussian (Gaussian.load reads a file)")
    theirs = list(latent_shape(network, family))
    ours = list(gaussian.shape)[: len(theirs)]  # the size of pictures of prompts is the call's, which is checked too
    if ours != theirs or len(gaussian.shape) != 3:
        of = "channels" if len(theirs) == 1 else "shape"
        raise ValueError(f"gaussian: has {of} {ours}; those of {kind}'s samples are {theirs}")

    classes = network.config.get("num_embeds_ada_norm") if family.conditions == "classes" else None
    if gaussian.n_classes is not None and gaussian.n_classes != classes:
        has = "no class labels" if classes is None else f"{classes} classes"
        raise ValueError(f"gaussian: has {gaussian.n_classes} classes; {kind} has {has}")

    facts, vae = gaussian.facts, getattr(pipe, "vae", None)
    if vae is None:
        if facts.get("vae") is not None:
            raise ValueError(f"gaussian: was fitted to latents (facts['vae']); {kind} samples pixels")
        if facts.get("range") is not None and [float(v) for v in facts["range"]] != [-1.0, 1.0]:
            raise ValueError(
                f"gaussian: was fitted to pixels in {list(facts['range'])}; those of {kind} are in [-1, 1]"
            )
        low, high = facts.get("extremes") or (-1.0, 1.0)
        if low >= 0 or high <= 0 or max(-low, high) > 2:
            raise ValueError(f"gaussian: was fitted to numbers in [{low:g}, {high:g}]; {kind}'s pixels are in [-1, 1]")
        return
    if facts.get("vae") is None:
        raise ValueError(f"gaussian: was fitted to pixels (facts['vae'] is None); {kind} samples latents of its VAE")
    actual, fitted = vae_facts(vae), facts["vae"]
    for name in _VAE:
        if fitted.get(name) != actual[name]:
            raise ValueError(
                f"gaussian: was fitted to latents of a VAE with {name} {fitted.get(name)}; that of {kind} has "
                f"{actual[name]}"
            )
    hashes = fitted.get("sha256", {})
    if not any(hashes.get(dtype) == digest for dtype, digest in actual["sha256"].items()):
        raise ValueError(
            f"gaussian: was fitted to latents of a VAE with weights of SHA-256 {_listed(hashes)}; that of {kind} has "
            f"{_listed(actual['sha256'])}"
        )


def _listed(hashes: dict[str, str]) -> str:
    return ", ".join(f"{digest[:12]} ({dtype})" for dtype, digest in hashes.items()) or "unknown"


def latent_shape(network: Any, family: Family) -> tuple[int, ...]:
    """The shape of a sample, [C, h, w]; of pictures of prompts, whose size is the call's, [C]."""
    config = network.config
    if family.conditions == "prompts":
        return (config.in_channels // 4 if family.packed else config.in_channels,)
    size = config.sample_size
    return (config.in_channels, *((size, size) if isinstance(size, int) else size))


def conditional_labels(labels: Tensor, x: Tensor, null: int) -> tuple[Tensor, bool]:
    """The class of every row, [B], and whether the batch is guided: its second half the first, under the null label."""
    half = len(labels) // 2
    guided = (
        len(labels) == 2 * half > 0
        and bool((labels[half:] == null).all())
        and not bool((labels[:half] == null).any())
        and torch.equal(x[:half], x[half:])
    )
    return (torch.cat([labels[:half]] * 2) if guided else labels), guided


def check_sigma_skip(sigma_skip: float) -> float:
    """sigma_skip as a float. Raises ValueError for one that is not a positive number."""
    try:
        level = math.nan if isinstance(sigma_skip, bool | str) else float(sigma_skip)
    except (TypeError, ValueError, RuntimeError):
        level = math.nan
    if not 0 < level <= math.inf:
        raise ValueError(f"sigma_skip: {sigma_skip!r}; accepted are a positive number, a certificate and None")
    return level
