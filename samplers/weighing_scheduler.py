"""A live diffusers scheduler whose steps begin with a resampling: the instance gets a subclass of its class's name.

Only schedulers are right whose step is one draw from x_k and the prediction there: nothing is remembered that would
have to be permuted too, and noise is added, without which copies of a particle never separate.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samplers.live_scheduler import LiveScheduler
from samplers.teleport_scheduler import noise_levels, path_of

SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
)
_INSTEAD = (
    "accepted are DDPM, DDIM with eta > 0, EulerAncestralDiscrete and DPMSolverMultistep with algorithm_type "
    "'sde-dpmsolver++' and solver_order 1"
)
_REFUSED = {
    "CMStochasticIterativeScheduler": "draws fresh noise around the prediction, which is not the model's own process",
    "DEISMultistepScheduler": "remembers steps, and is deterministic",
    "DPMSolverSDEScheduler": "has steps of second order",
    "DPMSolverSinglestepScheduler": "remembers steps",
    "EDMDPMSolverMultistepScheduler": "remembers steps",
    "EDMEulerScheduler": "is deterministic, or (s_churn) adds noise after the network was asked",
    "EulerDiscreteScheduler": "is deterministic, or (s_churn) adds noise after the network was asked",
    "FlowMatchHeunDiscreteScheduler": "has steps of second order",
    "HeunDiscreteScheduler": "has steps of second order",
    "KDPM2AncestralDiscreteScheduler": "has steps of second order",
    "KDPM2DiscreteScheduler": "has steps of second order",
    "LCMScheduler": "draws fresh noise around the prediction, which is not the model's own process",
    "LMSDiscreteScheduler": "remembers steps, and is deterministic",
    "PNDMScheduler": "remembers steps, and is deterministic",
    "SASolverScheduler": "remembers steps",
    "TCDScheduler": "draws fresh noise around the prediction, which is not the model's own process",
    "UniPCMultistepScheduler": "remembers steps, and is deterministic",
}


def check_single_stochastic(scheduler: Any) -> None:
    """Raise ValueError, with the reason, for a scheduler whose particles cannot be resampled between steps."""
    name, config = type(scheduler).__name__, scheduler.config
    reason = _REFUSED.get(name, "is not supported")
    if name == "FlowMatchEulerDiscreteScheduler":
        reason = "is deterministic, so that copies never separate"
        if config.get("stochastic_sampling"):
            reason = "with stochastic_sampling draws fresh noise around the prediction, not the model's own process"
        reason += " (for flows: use_flow_sigmas and prediction_type 'flow_prediction')"
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: {name} {reason}; {_INSTEAD}")
    for setting in ("clip_sample", "thresholding"):
        if config.get(setting):
            raise ValueError(
                f"{setting}: True in {name}; a clipped prediction is that of no product of laws; accepted is False"
            )
    variance = config.get("variance_type")
    if variance not in (None, "fixed_small", "fixed_small_log"):
        raise ValueError(f"variance_type: {variance!r} in {name}; accepted are fixed_small and fixed_small_log")
    if name == "DPMSolverMultistepScheduler":
        algorithm, order = config.algorithm_type, config.solver_order
        if algorithm != "sde-dpmsolver++":
            raise ValueError(f"algorithm_type: {algorithm!r} in {name}; accepted is 'sde-dpmsolver++'")
        if order != 1:
            raise ValueError(f"solver_order: {order} in {name} remembers steps; accepted is 1")


def levels_of(scheduler: Any) -> list[float]:
    """sigma = s / alpha before each step of the scheduler's grid, perhaps infinite at first, and after the last."""
    if hasattr(scheduler, "sigmas"):
        last = float(scheduler.sigmas[-1])
        last = last / (1 - last) if path_of(scheduler) == "flow" else last
    else:
        a = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        last = ((1 - a) / a) ** 0.5
    return [*noise_levels(scheduler).tolist(), last]


class WeighingScheduler(LiveScheduler):
    """A scheduler that asks before every step which particles to step from, from `attach` to `detach`.

    begun: called when a run's timesteps are set. before: (step, the step's arguments by name) -> rows of sample and
    model_output that are to be stepped, or None for all as they are. after: (step, the stepped samples).
    """

    def __init__(
        self,
        scheduler: Any,
        begun: Callable[[], None],
        before: Callable[[int, dict[str, Any]], Tensor | None],
        after: Callable[[int, Tensor], None],
    ) -> None:
        super().__init__(scheduler)
        self.levels: list[float] = []
        self._begun, self._before, self._after = begun, before, after
        self._steps = 0

    def _subclass(self) -> type:
        stock, weighing = self.stock, self
        signature = inspect.signature(stock.step)

        @functools.wraps(stock.set_timesteps)
        def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            stock.set_timesteps(scheduler, *args, **kwargs)
            if scheduler is weighing.scheduler:  # a copy of it is a stock scheduler
                weighing._steps, weighing.levels = 0, levels_of(scheduler)
                weighing._begun()

        @functools.wraps(stock.step)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if scheduler is not weighing.scheduler:
                return stock.step(scheduler, *args, **kwargs)
            return weighing._step(signature.bind(scheduler, *args, **kwargs))

        return self._named({"set_timesteps": set_timesteps, "step": step, "_weighs": True})

    def _step(self, call: inspect.BoundArguments) -> Any:
        k, given = self._steps, call.arguments
        timesteps = self.scheduler.timesteps
        if k >= len(timesteps) or bool(torch.as_tensor(given["timestep"]).cpu() != timesteps[k].cpu()):
            raise ValueError(
                f"timestep: {float(given['timestep']):g} is not that of step {k} of the scheduler's {len(timesteps)}; "
                "accepted is a run through all of them, from pure noise"
            )
        rows = self._before(k, given)
        if rows is not None:
            given["sample"], given["model_output"] = given["sample"][rows], given["model_output"][rows]
        result = self.stock.step(*call.args, **call.kwargs)
        self._steps += 1
        self._after(k, result[0] if isinstance(result, tuple) else result.prev_sample)
        return result
