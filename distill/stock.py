"""A student's noise levels, such that a stock pipeline of diffusers with a stock scheduler takes exactly its steps.

x = start z; at each level but the last, x0 = D(x, sigma) and x = x0 + sqrt(sigma_next^2 - floor^2) eps; D at the last
level is the sample. This is multistep consistency sampling (Song et al. 2023, Algorithm 1), and the few-step sampling
of DMD2 (Yin et al. 2024). `start` is what the pipeline makes of its unit noise, in EDM coordinates: not always
sqrt(1 + sigma^2) and not always sigma. Stock schedulers re-noise so in three families; the fourth has one step only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.folders import sample_shape
from samplers.adapters import Coordinates, FlowMatching, VariancePreserving
from samplers.prompts import GUIDANCE_EMBEDDING, PIPELINES

CONSISTENCY = "CMStochasticIterativeScheduler"
PIXELS = "ConsistencyModelPipeline"  # what runs a UNet2DModel, with and without classes, under any scheduler here


@dataclass(frozen=True)
class Steps:
    """What a student does, and the stock pipeline that does the same.

    sigmas: levels at which the network is called, falling, without 0. start: x = start z at the first. floor: of the
    noise that leads to a next level. pipeline: the class of diffusers; scheduler: what it is saved with; call: the
    arguments of its call, beside the conditions.
    """

    sigmas: tuple[float, ...]
    start: float
    floor: float
    pipeline: str
    scheduler: Any
    call: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def noises(self) -> tuple[float, ...]:
        """The standard deviation of the noise that is added after each step but the last."""
        return tuple(math.sqrt(max(sigma**2 - self.floor**2, 0.0)) for sigma in self.sigmas[1:])

    @property
    def facts(self) -> dict[str, Any]:
        """As JSON, without the scheduler, which has a file of its own."""
        return {"sigmas": list(self.sigmas), "start": self.start, "floor": self.floor, "call": self.call}


def student_steps(
    scheduler: Any,
    coordinates: Coordinates,
    pipeline_class: str,
    sigma_init: float | None,
    steps: int,
    network_config: Mapping[str, Any],
    guidance_embedding: float = GUIDANCE_EMBEDDING,
) -> Steps:
    """The steps of a student of a teacher with this scheduler, in the pipeline that it is exported to.

    sigma_init: the first level; None is where the stock pipeline starts. A network of discrete timesteps starts at the
    one that is nearest in log sigma. pipeline_class: the teacher's, by name. network_config: of its network.
    guidance_embedding: what a guidance-distilled network (Flux) is fed, which its pipeline calls guidance_scale.
    Raises ValueError for a level outside the teacher's range, and a number of steps that no stock scheduler takes.
    """
    if steps < 1:
        raise ValueError(f"student.steps: {steps}; accepted are numbers from 1")
    high = coordinates.sigma_limit
    first = high if sigma_init is None else sigma_init
    if not coordinates.sigma_min <= first <= high * (1 + 1e-6):
        raise ValueError(
            f"student.sigma_init: {sigma_init} is outside the teacher's range [{coordinates.sigma_min:.6g}, {high:.6g}]"
        )
    call: dict[str, Any] = {"num_inference_steps": steps}
    kind = PIPELINES.get(pipeline_class)
    if kind is None or (kind.network == "unet" and not kind.embeddings):
        pipeline_class = PIXELS
    else:  # every pipeline of latents guides by default; where the scale is embedded, the network needs one
        call["guidance_scale"] = guidance_embedding if network_config.get("guidance_embeds") else 1.0
    if pipeline_class.startswith("PixArt"):  # which would make another size, and of other words, than was asked for
        call |= {"use_resolution_binning": False, "clean_caption": False}
    if pipeline_class == PIXELS and len(set(sample_shape(network_config)[1:])) > 1:
        raise ValueError(
            f"sample_size: {list(network_config['sample_size'])}; a {PIXELS}, which the student is exported to, makes "
            "squares only"
        )

    if isinstance(coordinates, FlowMatching):
        if pipeline_class in (PIXELS, "DiTPipeline"):
            raise ValueError(
                f"scheduler: {type(scheduler).__name__}, of flow time; a {pipeline_class} does not sample by it, "
                "accepted are those of noise levels"
            )
        return _flow(scheduler, pipeline_class, first, steps, call)
    if isinstance(coordinates, VariancePreserving):
        return _discrete(scheduler, coordinates, pipeline_class, first, steps, call)
    if type(scheduler).__name__ == CONSISTENCY:
        return _consistency(scheduler, pipeline_class, first, steps, call)
    if type(scheduler).__name__.startswith("EDM"):
        return _edm(scheduler, pipeline_class, first, steps, call)
    raise ValueError(
        f"scheduler: {type(scheduler).__name__} with continuous timesteps; no stock scheduler takes the steps of its "
        "student"
    )


def _consistency(scheduler: Any, pipeline: str, first: float, steps: int, call: dict[str, Any]) -> Steps:
    """Karras' levels from sigma_max on, as the scheduler spaces them; D(x, floor) = x is its boundary."""
    settings = {"sigma_max": first, "clip_denoised": False, "s_noise": 1.0}
    stock = type(scheduler).from_config(scheduler.config, **settings)
    if steps > stock.config.num_train_timesteps:
        raise ValueError(f"student.steps: {steps}; the scheduler has {stock.config.num_train_timesteps} levels")
    stock.set_timesteps(steps)
    sigmas = (first, *(float(sigma) for sigma in stock.sigmas[1:steps]))
    return Steps(sigmas, first, float(stock.config.sigma_min), pipeline, stock, call)


def _edm(scheduler: Any, pipeline: str, first: float, steps: int, call: dict[str, Any]) -> Steps:
    """One Euler step to 0 is D. It starts from sqrt(sigma_max^2 + 1) z, the marginal of data of unit variance."""
    if steps > 1:
        raise ValueError(
            f"student.steps: {steps}; a {type(scheduler).__name__} does not add noise between steps, so that a stock "
            "pipeline takes one step only"
        )
    from diffusers import EDMEulerScheduler

    config = scheduler.config
    stock = EDMEulerScheduler(
        sigma_min=min(config.sigma_min, first / 2),
        sigma_max=first,
        sigma_data=config.sigma_data,
        prediction_type=config.prediction_type,
        final_sigmas_type="zero",
    )
    return Steps((first,), math.sqrt(1 + first**2), 0.0, pipeline, stock, call)


def _discrete(
    scheduler: Any, coordinates: VariancePreserving, pipeline: str, first: float, steps: int, call: dict[str, Any]
) -> Steps:
    """Latent consistency's scheduler with the teacher's betas, of which those above the first level are cut off.

    Its boundary condition, c_skip = 1 / (1 + (2 timestep_scaling t)^2), is made nothing by timestep_scaling.
    """
    from diffusers import LCMScheduler

    last = round(float(coordinates.timestep(torch.tensor(first, dtype=torch.float64).clamp_max(coordinates.sigma_max))))
    levels = last + 1
    if levels < 2 * steps:
        raise ValueError(
            f"student.steps: {steps}; student.sigma_init = {first:.6g} is timestep {last} of the teacher, which leaves "
            f"room for {levels // 2}"
        )
    stock = LCMScheduler(
        num_train_timesteps=levels,
        trained_betas=_betas(scheduler, levels).tolist(),
        # Levels are taken evenly from these, the last one first. As few as there are steps: more are then refused.
        original_inference_steps=levels if levels % steps else steps,
        prediction_type=scheduler.config.get("prediction_type", "epsilon"),
        timestep_scaling=1e4,
        steps_offset=1,  # not read; Stable Diffusion's pipelines warn of another
    )
    stock.set_timesteps(steps)
    sigmas = tuple(coordinates.sigma(stock.timesteps.double()).tolist())
    return Steps(sigmas, math.sqrt(1 + sigmas[0] ** 2), 0.0, pipeline, stock, call)


def _betas(scheduler: Any, levels: int) -> Tensor:
    """The first betas of a scheduler, float32, whose products are its alphas_cumprod."""
    alphas_cumprod = scheduler.alphas_cumprod.detach().to("cpu", torch.float32)[:levels]
    betas: Tensor = scheduler.betas.detach().to("cpu", torch.float32)[:levels]
    if torch.equal((1 - betas).cumprod(0), alphas_cumprod):
        return betas
    before = torch.cat((torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1].double()))
    return (1 - alphas_cumprod.double() / before).float()


def _flow(scheduler: Any, pipeline: str, first: float, steps: int, call: dict[str, Any]) -> Steps:
    """Even steps in flow time before its shift. Of one step Euler's is D; several are stochastic, with noise between.

    A shift that depends on the picture's size (Flux) is held at that of the largest size, which is the pipeline's own.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    t = float(torch.tensor(first / (1 + first), dtype=torch.float32))  # sigma_limit is t = 1, exactly
    shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    if config.get("use_dynamic_shifting"):
        largest = float(config.get("max_shift") or 1.15)
        shift = largest if config.get("time_shift_type") == "linear" else math.exp(largest)
    unshifted = t / (shift - (shift - 1) * t)
    even = [unshifted * (1 - k / steps) for k in range(steps)]
    times = [shift * u / (1 + (shift - 1) * u) for u in even]

    stock = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps, shift=shift, stochastic_sampling=steps > 1
    )
    sigmas = (first, *(u / (1 - u) for u in times[1:]))
    written = [float(f"{u:.9g}") for u in even]  # float32 tells no more
    if steps > 1 or written[0] < 1:
        call = call | {"sigmas": written}
    return Steps(sigmas, 1 + first, 0.0, pipeline, stock, call)
