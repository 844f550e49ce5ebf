"""A live diffusers scheduler that jumps: its first step is a Gaussian's closed-form flow and needs no network.

The instance is given a subclass under its own class's name. It keeps its whole grid; only the pipeline's loop sees a
short one, t_0 and then everything from the landing point on, so initial noise, step indices and the rules for last
steps are those of the whole run. A scheduler that looks back is taken through the skipped steps by its own `step`,
with the Gaussian in the network's place, and so remembers them (Wang & Vastola 2024, arXiv 2412.09726).
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.adapters import coordinates_of
from samplers.gaussian import PATHS, Gaussian, Mode
from samplers.live_scheduler import LiveScheduler

# The path on which a scheduler's states lie, and whether a step looks back at the steps before it.
SCHEDULERS: dict[str, tuple[str, bool]] = {
    "DDIMParallelScheduler": ("vp", False),
    "DDIMScheduler": ("vp", False),
    "DDPMParallelScheduler": ("vp", False),
    "DDPMScheduler": ("vp", False),
    "DEISMultistepScheduler": ("vp", True),
    "DPMSolverMultistepScheduler": ("vp", True),
    "DPMSolverSinglestepScheduler": ("vp", False),
    "EDMDPMSolverMultistepScheduler": ("ve", True),
    "EDMEulerScheduler": ("ve", False),
    "EulerAncestralDiscreteScheduler": ("ve", False),
    "EulerDiscreteScheduler": ("ve", False),
    "FlowMatchEulerDiscreteScheduler": ("flow", False),
    "FlowMatchHeunDiscreteScheduler": ("flow", False),
    "HeunDiscreteScheduler": ("ve", False),
    "KDPM2AncestralDiscreteScheduler": ("ve", False),
    "KDPM2DiscreteScheduler": ("ve", False),
    "LCMScheduler": ("vp", False),
    "LMSDiscreteScheduler": ("ve", True),
    "PNDMScheduler": ("vp", True),
    "SASolverScheduler": ("vp", True),
    "TCDScheduler": ("vp", False),
    "UniPCMultistepScheduler": ("vp", True),
}

# A state at sigma = infinity (flow t = 1, zero terminal SNR) is evaluated here: the rest is below rounding.
_FINITE = 1e8
_MEMORY = 4  # steps that the longest memory holds


class Grid(NamedTuple):
    """A scheduler's whole grid, and where it is entered.

    timesteps: all that a pipeline would loop over. sigmas: the noise level s / alpha of the state before each, perhaps
    infinite at first. starts: where a step of the solver begins, indices. landing: one of them; 0 skips nothing.
    """

    timesteps: Tensor
    sigmas: list[float]
    starts: list[int]
    landing: int


def path_of(scheduler: Any) -> str:
    """The path of a scheduler's states, a key of `samplers.gaussian.PATHS`.

    Raises ValueError, naming the scheduler, for one that is not supported or whose prediction type is not understood.
    """
    name = type(scheduler).__name__
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: {name} is not supported; supported are {', '.join(SCHEDULERS)}")
    coordinates_of(scheduler)
    return "flow" if scheduler.config.get("use_flow_sigmas") else SCHEDULERS[name][0]


def noise_levels(scheduler: Any) -> Tensor:
    """sigma = s / alpha of the state before each of the scheduler's timesteps, float64 [len(timesteps)]."""
    if not hasattr(scheduler, "sigmas"):
        a = scheduler.alphas_cumprod[scheduler.timesteps.to(scheduler.alphas_cumprod.device).long()].cpu().double()
        return ((1 - a) / a).sqrt()
    levels = scheduler.sigmas[: len(scheduler.timesteps)].cpu().double()
    return levels / (1 - levels).clamp_min(0) if path_of(scheduler) == "flow" else levels


def grid_of(scheduler: Any, sigma_skip: float) -> Grid:
    """The grid of a scheduler whose timesteps are set, with its landing: the last entry that is not below sigma_skip.

    The comparison allows for a grid in float32. A landing is where a step begins of which nothing is known yet.
    """
    n, sigmas = len(scheduler.timesteps), noise_levels(scheduler).tolist()
    if scheduler.order == 2:  # every step has two entries, and the first step's first is not repeated
        starts = list(range(0, n, 2))
    elif hasattr(scheduler, "prk_timesteps"):  # PNDM: Runge-Kutta steps of four, or a first step in two halves
        warm_up = len(scheduler.prk_timesteps)
        starts = [*range(0, warm_up, 4), *range(warm_up, n)] if warm_up else [i for i in range(n) if i != 1]
    else:
        starts = list(range(n))

    landing = 0
    orders = getattr(scheduler, "order_list", None)  # singlestep: 1, 2, 3 within a group
    for i in starts:
        if not sigmas[i] >= sigma_skip * (1 - 1e-6):
            break
        landing = i if orders is None or orders[i] == 1 else landing
    return Grid(scheduler.timesteps, sigmas, starts, landing)


class JumpingScheduler(LiveScheduler):
    """A scheduler made to jump, from `attach` to `detach`; `grid` and `predictions` tell of the last run.

    begun: called when a run begins. opened: the pipeline's latents -> the state [B, *gaussian.shape] and its class
    labels [B] or None; raises ValueError for latents that the Gaussian does not describe. closed: a state -> latents.
    pending: between `set_timesteps` and the jump, when nothing reads the network's answer. predictions: how many of
    its answers were read since.
    """

    def __init__(
        self,
        scheduler: Any,
        gaussian: Gaussian,
        sigma_skip: float,
        mode: Mode,
        begun: Callable[[], None],
        opened: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        closed: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(scheduler)
        self.gaussian, self.sigma_skip, self.mode = gaussian, sigma_skip, mode
        self.grid: Grid | None = None
        self.pending, self.predictions = False, 0
        self._begun, self._opened, self._closed = begun, opened, closed

    def detach(self) -> None:
        """Give the scheduler its class back, the whole grid, and no attribute that it did not have."""
        if self.grid is not None:
            self.scheduler.timesteps = self.grid.timesteps
        super().detach()
        self.pending = False

    def _subclass(self) -> type:
        stock, jump = self.stock, self
        signature = inspect.signature(stock.step)

        @functools.wraps(stock.set_timesteps)
        def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            stock.set_timesteps(scheduler, *args, **kwargs)
            if scheduler is jump.scheduler:  # a copy of it is a stock scheduler
                jump._begin()

        @functools.wraps(stock.step)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if scheduler is not jump.scheduler:
                return stock.step(scheduler, *args, **kwargs)
            if jump.pending:
                call = signature.bind(scheduler, *args, **kwargs).arguments
                return jump._first_step(call["timestep"], call["sample"], call.get("return_dict", True))
            with jump._whole_grid():
                result = stock.step(scheduler, *args, **kwargs)
            jump.predictions += 1
            return result

        members: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step, "_jumps": True}
        if hasattr(stock, "scale_model_input"):

            @functools.wraps(stock.scale_model_input)
            def scale_model_input(scheduler: Any, *args: Any, **kwargs: Any) -> Tensor:
                if scheduler is not jump.scheduler:
                    return stock.scale_model_input(scheduler, *args, **kwargs)
                with jump._whole_grid():
                    return stock.scale_model_input(scheduler, *args, **kwargs)

            members["scale_model_input"] = scale_model_input

        return self._named(members)

    @contextmanager
    def _whole_grid(self) -> Iterator[None]:
        """The stock code finds all the timesteps."""
        if self.grid is None:
            yield
            return
        shown, self.scheduler.timesteps = self.scheduler.timesteps, self.grid.timesteps
        try:
            yield
        finally:
            self.scheduler.timesteps = shown

    def _begin(self) -> None:
        self.grid = grid_of(self.scheduler, self.sigma_skip)
        self.pending, self.predictions = self.grid.landing > 0, 0
        self._begun()
        if self.pending:
            whole = self.grid.timesteps
            self.scheduler.timesteps = torch.cat([whole[:1], whole[self.grid.landing :]])

    def _first_step(self, timestep: Any, sample: Tensor, return_dict: bool) -> Any:
        """The jump, as what `step` returns."""
        scheduler, grid, self.pending = self.scheduler, self.grid, False
        assert grid is not None
        begin = getattr(scheduler, "begin_index", None)
        if begin not in (None, 0) or bool(torch.as_tensor(timestep).cpu() != grid.timesteps[0].cpu()):
            raise ValueError(
                f"begin_index: the run starts at timestep {float(timestep):g} (begin_index {begin}); accepted is a run "
                f"from pure noise, at timestep {float(grid.timesteps[0]):g}"
            )
        x, cond = self._opened(sample)
        x, path = x.to(torch.promote_types(x.dtype, torch.float32)), path_of(scheduler)
        if self.mode == "marginal":  # which takes x / s for standard normal: what the pipeline drew
            start = torch.tensor(grid.sigmas[0], dtype=torch.float64)
            x = x * float(PATHS[path](start)[1] / getattr(scheduler, "init_noise_sigma", 1.0))

        def state(i: int) -> Tensor:
            return self.gaussian.transport(x, grid.sigmas[0], grid.sigmas[i], cond, mode=self.mode, path=path)

        if SCHEDULERS[self.stock.__name__][1]:
            self._replay(grid, state, cond, path, sample.dtype)
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = grid.landing
        landed = state(grid.landing)
        denoised = self._denoised(landed, grid.sigmas[grid.landing], cond, path)[0]
        latents, prediction = (self._closed(v.to(sample.dtype)) for v in (landed, denoised))
        return self._output(latents, prediction, return_dict)

    def _replay(
        self, grid: Grid, state: Callable[[int], Tensor], cond: Tensor | None, path: str, dtype: torch.dtype
    ) -> None:
        """Take the scheduler through the last skipped steps, the Gaussian for a network, for what it remembers."""
        scheduler, coordinates = self.scheduler, coordinates_of(self.scheduler)
        with_noise = "generator" in inspect.signature(self.stock.step).parameters
        # Those that count their steps, not index them, have to be taken through all.
        first = max(0, grid.landing - _MEMORY) if hasattr(scheduler, "_step_index") else 0
        with self._whole_grid():
            for i in range(first, grid.landing):
                x = state(i)
                denoised, x_ve, sigma = self._denoised(x, grid.sigmas[i], cond, path)
                _, skip, out, _ = coordinates(sigma)
                output = self._closed(((denoised - skip.to(x) * x_ve) / out.to(x)).to(dtype))
                if hasattr(scheduler, "_step_index"):
                    scheduler._step_index = i
                # The noise of stochastic schedulers is not the caller's, and its result is not looked at.
                noise = {"generator": torch.Generator().manual_seed(0)} if with_noise else {}
                self.stock.step(scheduler, output, grid.timesteps[i], self._closed(x.to(dtype)), **noise)
        if hasattr(scheduler, "last_sample"):
            scheduler.last_sample = None  # UniPC and SA-Solver would correct the state, which is exact

    def _denoised(self, x: Tensor, sigma: float, cond: Tensor | None, path: str) -> tuple[Tensor, Tensor, Tensor]:
        """The Gaussian's denoiser at a state of the path, that state as x0 + sigma eps, and sigma, which is finite."""
        level = torch.tensor(min(sigma, _FINITE), dtype=torch.float64, device=x.device)
        x_ve = x / PATHS[path](level)[0].to(x)
        return self.gaussian(x_ve, level, cond), x_ve, level

    def _output(self, latents: Tensor, denoised: Tensor, return_dict: bool) -> Any:
        """The stock class's own output; predictions of x0 in it are the Gaussian's."""
        returned = typing.get_type_hints(self.stock.step)["return"]
        cls: Any = next(kind for kind in typing.get_args(returned) if dataclasses.is_dataclass(kind))
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: denoised if name in ("pred_original_sample", "denoised") else latents for name in names}
        return cls(**values) if return_dict else tuple(values.values())
