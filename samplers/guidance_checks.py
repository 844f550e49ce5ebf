"""Which pipelines' guidance can be corrected, and why not: refusals before a call, and those that only it can tell."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.teleport_checks import Family, check_scheduler, check_unattached, conditional_labels
from samplers.weighing_scheduler import check_single_stochastic


class Branches(NamedTuple):
    """How a kind of pipeline guides: its network, which half of the batch has the condition, the scheduler's batch.

    doubled: the scheduler is given both halves, of which the first is kept.
    """

    family: Family
    conditional_first: bool = False
    doubled: bool = False


PIPELINES = {
    "DiTPipeline": Branches(Family("transformer", "classes", ("vp", "flow")), conditional_first=True, doubled=True),
    "PixArtAlphaPipeline": Branches(Family("transformer", "prompts", ("ve", "vp", "flow"))),
    "PixArtSigmaPipeline": Branches(Family("transformer", "prompts", ("ve", "vp", "flow"))),
    "StableDiffusion3Pipeline": Branches(Family("transformer", "prompts", ("flow",))),
    "StableDiffusionPipeline": Branches(Family("unet", "prompts", ("ve", "vp", "flow"))),
    "StableDiffusionXLPipeline": Branches(Family("unet", "prompts", ("ve", "vp", "flow"))),
}
_REASONS = {
    "DDIMPipeline": "has no guidance",
    "DDPMPipeline": "has no guidance",
    "FluxPipeline": "feeds the guidance scale to its network: there are no two predictions",
    "LatentConsistencyModelPipeline": "feeds the guidance scale to its network: there are no two predictions",
}


def branches_of(pipe: Any) -> Branches:
    """How a pipeline guides. Raises ValueError, naming it, for one that is not supported."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in PIPELINES:
            return PIPELINES[cls.__name__]
    reason = _REASONS.get(type(pipe).__name__, "is not supported")
    raise ValueError(f"pipe: {type(pipe).__name__} {reason}; supported are {', '.join(PIPELINES)}")


def check_pipeline(pipe: Any) -> Branches:
    """All that can be known before a call. Raises ValueError, with the reason, and changes nothing."""
    branches, kind = branches_of(pipe), type(pipe).__name__
    check_unattached(pipe, branches.family)
    network = getattr(pipe, branches.family.network)
    if network.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"time_cond_proj_dim: this {kind} feeds the guidance scale to its network (distilled guidance); there are "
            "no two predictions"
        )
    check_single_stochastic(pipe.scheduler)
    check_scheduler(pipe, branches.family)
    if branches.doubled and type(pipe.scheduler).__name__.startswith("DDIM"):
        raise ValueError(f"scheduler: {kind} calls DDIM without eta, so that copies never separate; accepted is DDPM")
    return branches


def check_call(pipe: Any) -> None:
    """What a pipeline has stored of its call's arguments, when the call begins. Raises ValueError by name."""
    rescale, end = getattr(pipe, "guidance_rescale", 0.0), getattr(pipe, "denoising_end", None)
    if rescale:
        raise ValueError(f"guidance_rescale: {rescale}; the rescaled prediction is that of no law; accepted is 0")
    if isinstance(end, float) and 0 < end < 1:
        raise ValueError(f"denoising_end: {end} ends the run among noise; accepted is None")
    scale = getattr(pipe, "guidance_scale", None)
    if scale is not None and not scale >= 1:
        raise ValueError(
            f"guidance_scale: {scale}; {type(pipe).__name__} guides only above 1; accepted are 1, where there is "
            "nothing to correct, and above"
        )


def check_eta(scheduler: Any, given: dict[str, Any]) -> None:
    """Raise ValueError for DDIM without its noise."""
    name = type(scheduler).__name__
    if name.startswith("DDIM"):
        eta = float(given.get("eta", 0.0))
        if not 0 < eta <= 1:
            raise ValueError(f"eta: {eta:g} in {name}; without noise copies never separate; accepted are (0, 1]")


def check_groups(particles: int, rows: int, x: Tensor, arguments: Any) -> None:
    """Raise ValueError if the batch is not groups of consecutive rows under one condition.

    rows: samples in the batch; arguments: of the network's call, of which tensors of as many rows as x are looked at.
    """
    if rows % particles:
        raise ValueError(f"particles: {particles} do not divide the batch of {rows}; {_call_with(particles)}")
    values = arguments.values() if isinstance(arguments, dict) else arguments
    for value in values:
        if isinstance(value, dict | list | tuple):
            check_groups(particles, rows, x, value)
        if isinstance(value, Tensor) and value is not x and value.ndim and len(value) == len(x):
            by_group = value.unflatten(0, (-1, particles))
            if not torch.equal(by_group, by_group[:, :1].expand_as(by_group)):
                raise ValueError(
                    f"particles: the batch's conditions are not groups of {particles} equal ones; "
                    f"{_call_with(particles)}"
                )


def _call_with(particles: int) -> str:
    return f"call the pipeline with num_images_per_prompt={particles} (class_labels: each {particles} times in a row)"


def is_guided(branches: Branches, network: Any, x: Tensor, arguments: dict[str, Any], rows: int) -> bool:
    """Whether the network was asked under both conditions; rows: of the scheduler's sample."""
    if branches.doubled:
        return conditional_labels(arguments["class_labels"], x, network.config.num_embeds_ada_norm)[1]
    return len(x) == 2 * rows


def scale_of(pipe: Any, guided: Tensor, cond: Tensor, uncond: Tensor, before: float | None) -> float | None:
    """The w of guided = uncond + w (cond - uncond), None if both are the same. Raises ValueError if there is no such w.

    That of the pipeline if it has one, else that of the step before if it fits, else the shortest decimal that gives
    what was given, bit by bit.
    """
    difference = cond - uncond

    def fits(w: float) -> bool:
        slack = 16 * torch.finfo(guided.dtype).eps * (uncond.abs().max() + abs(w) * difference.abs().max())
        return not bool((uncond + w * difference - guided).abs().max() > slack)  # what is not a number fits

    w = getattr(pipe, "guidance_scale", before)
    if w is None or (not hasattr(pipe, "guidance_scale") and not fits(w)):
        d = difference.double()
        square = float(d.square().sum())
        if square == 0:
            return None
        estimate = float(((guided - uncond).double() * d).sum()) / square
        candidates = (float(f"{estimate:.{digits}g}") for digits in range(1, 17))
        w = next((c for c in candidates if torch.equal(uncond + c * difference, guided)), estimate)
    if not fits(w):
        raise ValueError(
            f"guidance_scale: what reached the scheduler is not uncond + {w:g} (cond - uncond); accepted is plain "
            "classifier-free guidance"
        )
    return float(w)
