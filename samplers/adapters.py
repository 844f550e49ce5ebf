"""A diffusers model and its scheduler as a denoiser: the only place with timesteps and alpha-bars.

Every prediction type has one form, D = c_skip x + c_out F(c_in x, timestep), and differs only in its coefficients
(Karras et al. 2022, Table 1; Salimans & Ho 2022 for v). One Euler step in these coordinates is then DDIM, diffusers'
Euler and flow-matching Euler. The scheduler is read for what the network was trained to predict, never stepped.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor, nn

from samplers.denoiser import expand
from samplers.network_call import predict

if TYPE_CHECKING:
    from samplers.targets import Conditioned


class Coefficients(NamedTuple):
    """D = skip * x + out * F(inner * x, timestep); every entry [] or [B], float64, on sigma's device."""

    inner: Tensor
    skip: Tensor
    out: Tensor
    timestep: Tensor


class Coordinates(Protocol):
    """What a network was trained on, as a function of sigma in [sigma_min, sigma_max] (finite, positive).

    sigma_limit: the highest level that can be asked: sigma_max, or where stock pipelines start beyond it.
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float

    @property
    def sigma_limit(self) -> float: ...

    def __call__(self, sigma: Tensor) -> Coefficients: ...

    def round_sigma(self, sigma: Tensor) -> Tensor: ...


class NetworkDenoiser(nn.Module):
    """A network in EDM coordinates: D(x, sigma, cond), called as every denoiser.

    cond: None, a tensor of class labels [B], or a dict of keyword arguments for the network's forward.
    The network runs in its own dtype; the state and the coefficients do not leave x's. A network with twice the
    channels of its input (learned variance: Nichol & Dhariwal 2021, DiT) has its first half read.
    Publishes sigma_min, sigma_max, sigma_limit and sigma_data. Raises ValueError for a sigma outside [sigma_min,
    sigma_limit] that lies on the CPU; on another device, where a look would cost a synchronisation, the result is NaN.
    """

    def __init__(self, network: nn.Module, coordinates: Coordinates) -> None:
        super().__init__()
        self.network = network
        self.coordinates = coordinates
        self.sigma_min, self.sigma_max = coordinates.sigma_min, coordinates.sigma_max
        self.sigma_data, self.sigma_limit = coordinates.sigma_data, coordinates.sigma_limit

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        inner, skip, out, timestep = self.coordinates(self._in_range(sigma.double()))
        dtype = next(self.network.parameters()).dtype
        arguments = {} if cond is None else _cast(cond, dtype) if isinstance(cond, dict) else {"class_labels": cond}
        scaled = (expand(inner, x) * x).to(dtype)
        timesteps = timestep.to(x.device, torch.float32).expand(len(x))
        prediction = predict(self.network, scaled, timesteps, arguments).to(x.dtype)
        if prediction.shape[1] == 2 * x.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]
        return expand(skip, x) * x + expand(out, x) * prediction

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level (in log sigma) that the network was trained at; sigma itself if all are."""
        return self.coordinates.round_sigma(sigma)

    def _in_range(self, sigma: Tensor) -> Tensor:
        # A float32 copy of a bound may lie a rounding error outside it.
        low, high = self.sigma_min * (1 - 1e-6), self.sigma_limit * (1 + 1e-6)
        inside = (sigma >= low) & (sigma <= high)
        if sigma.device.type == "cpu" and not bool(inside.all()):
            worst = float(sigma[~inside].flatten()[0])
            raise ValueError(
                f"sigma: {worst:.6g} is outside the network's range [{self.sigma_min:.6g}, {self.sigma_limit:.6g}]"
            )
        return torch.where(inside, sigma, torch.nan)


def _cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a network with their floating-point tensors, at any depth of dicts, in its dtype."""
    return {
        key: _cast(value, dtype)
        if isinstance(value, dict)
        else value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in arguments.items()
    }


class EDM:
    """Karras preconditioning, as EDMEulerScheduler and (from sigma_min) CMStochasticIterativeScheduler describe it.

    boundary: D(x, boundary) = x holds exactly (consistency models; 0 is plain EDM). timestep = scale ln(sigma).
    """

    def __init__(
        self,
        sigma_data: float,
        sigma_min: float,
        sigma_max: float,
        boundary: float,
        scale: float,
        sign: float,
    ) -> None:
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.sigma_limit = sigma_max
        self._boundary, self._scale, self._sign = boundary, scale, sign

    def __call__(self, sigma: Tensor) -> Coefficients:
        norm = (sigma**2 + self.sigma_data**2).sqrt()
        above = sigma - self._boundary
        skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return Coefficients(1 / norm, skip, self._sign * above * self.sigma_data / norm, self._scale * sigma.log())

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


class VariancePreserving:
    """A discrete-time network trained at alphas_cumprod [T]: sigma = sqrt((1 - a) / a) at timesteps 0 .. T-1.

    Between two timesteps the fractional timestep is linear in log sigma. With zero terminal SNR the last sigma is
    infinite, and sigma_max is the last finite one: a start from N(0, sigma_max^2) instead of from sigma = infinity
    costs at most E|x0|^2 / (2 sigma_max^2) nats.
    """

    sigma_data = 1.0  # latents and images of unit variance are what the x / sqrt(1 + sigma^2) input assumes

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        a = alphas_cumprod.detach().to("cpu", torch.float64)
        log_sigmas = (((1 - a) / a).log() / 2)[a > 0]
        if len(log_sigmas) > 2 and log_sigmas[-1] <= log_sigmas[-2]:  # 2^-24, which diffusers writes where it is zero
            log_sigmas = log_sigmas[:-1]
        if len(log_sigmas) < 2 or not bool((log_sigmas.diff() > 0).all()) or not bool(log_sigmas.isfinite().all()):
            raise ValueError("scheduler: its alphas_cumprod do not fall from below 1 from one timestep to the next")
        self._tables = {log_sigmas.device: log_sigmas}  # one for each device, so that no step copies it
        self._prediction_type = prediction_type
        self.sigma_min, self.sigma_max = (math.exp(float(end)) for end in (log_sigmas[0], log_sigmas[-1]))
        self.sigma_limit = self.sigma_max

    def __call__(self, sigma: Tensor) -> Coefficients:
        inner = (1 + sigma**2).rsqrt()
        if self._prediction_type == "epsilon":
            skip, out = torch.ones_like(sigma), -sigma
        elif self._prediction_type == "v_prediction":
            skip, out = inner**2, -sigma * inner
        else:
            skip, out = torch.zeros_like(sigma), torch.ones_like(sigma)
        return Coefficients(inner, skip, out, self.timestep(sigma))

    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) timestep of sigma, like sigma, in [0, T - 1]."""
        table, log_sigma = self._log_sigmas(sigma.device), sigma.log()
        above = torch.searchsorted(table, log_sigma).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        # The clamp undoes the rounding that _in_range allows at both ends; NaN passes through.
        return above - 1 + ((log_sigma - low) / (high - low)).clamp(0, 1)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level at a (fractional) timestep in [0, T - 1], float64; the inverse of `timestep`.

        T - 2 is the last where the terminal SNR is zero. Raises ValueError for a timestep outside.
        """
        last = len(self._log_sigmas(timestep.device)) - 1
        if not bool(((timestep >= 0) & (timestep <= last)).all()):
            raise ValueError(f"timestep: {timestep.tolist()}; accepted are [0, {last}], where sigma is finite")
        return self._interpolate(timestep)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self._interpolate(self.timestep(sigma.double()).round()).to(sigma.dtype)

    def _log_sigmas(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _interpolate(self, timestep: Tensor) -> Tensor:
        table = self._log_sigmas(timestep.device)
        below = timestep.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[below], table[below + 1], timestep.double() - below).exp()


class FlowMatching:
    """A velocity v = eps - x0 at flow time t = sigma / (1 + sigma), fed (1 - t) x and t T (Lipman et al. 2023).

    t = 1 is sigma = infinity; sigma_max is at t = 1 - 1/(10 T), which costs at most E|x0|^2 / (2 (10 T - 1)^2) nats.
    Stock pipelines start at t = 1, which sigma_limit is in float32.
    """

    sigma_data = 1.0
    sigma_limit = 1e8

    def __init__(self, num_train_timesteps: int) -> None:
        self._timesteps = num_train_timesteps
        self.sigma_min, self.sigma_max = 1e-6, float(10 * num_train_timesteps - 1)

    def __call__(self, sigma: Tensor) -> Coefficients:
        inner = 1 / (1 + sigma)
        return Coefficients(inner, inner, -sigma * inner, self._timesteps * sigma * inner)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma


_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_CONSISTENCY = ("CMStochasticIterativeScheduler",)
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_DISCRETE = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)


class Pipeline(Protocol):
    """A diffusers pipeline, as far as it tells itself from a network."""

    @property
    def components(self) -> dict[str, Any]: ...


@overload
def denoiser_from(model: nn.Module, scheduler: Any) -> NetworkDenoiser: ...


@overload
def denoiser_from(
    model: Pipeline, scheduler: Any = None, *, prompt: Any = None, height: int | None = None, width: int | None = None
) -> "Conditioned": ...


def denoiser_from(
    model: Any, scheduler: Any = None, *, prompt: Any = None, height: int | None = None, width: int | None = None
) -> "NetworkDenoiser | Conditioned":
    """A diffusers model, read through its scheduler, as a denoiser; or a pipeline's under a prompt.

    model: predicts for x [B, C, ...] given `timestep` (UNet2DModel, DiTTransformer2DModel, UNet2DConditionModel ...).
    scheduler: the one that the model was trained with, or any that describes the same training. What it does to
    samples only (clip_sample, thresholding, its grid of timesteps) is not applied.
    For a pipeline the second argument is the prompt, or the class label: see `samplers.prompts.prompted`.
    Raises ValueError, naming the scheduler, for one whose training is not known here.
    """
    if isinstance(model, nn.Module) or not hasattr(model, "components"):
        if scheduler is None or not (prompt is height is width is None):
            raise ValueError("scheduler: a network needs one, and has no prompt, height or width of its own")
        return NetworkDenoiser(model, coordinates_of(scheduler))
    if scheduler is not None and prompt is not None:
        raise ValueError("prompt: is given twice; accepted for a pipeline is denoiser_from(pipe, prompt)")
    from samplers.prompts import prompted

    return prompted(model, scheduler if prompt is None else prompt, height=height, width=width)


def coordinates_of(scheduler: Any) -> Coordinates:
    """What a diffusers scheduler says that its network was trained on. Raises ValueError if that is not known."""
    name = type(scheduler).__name__
    config: Any = getattr(scheduler, "config", {})
    prediction_type = config.get("prediction_type", "epsilon")

    if name in _EDM and prediction_type in ("epsilon", "v_prediction"):
        sign = 1.0 if prediction_type == "epsilon" else -1.0
        return EDM(config.sigma_data, config.sigma_min, config.sigma_max, boundary=0.0, scale=0.25, sign=sign)
    if (
        name == "EulerDiscreteScheduler"
        and prediction_type == "v_prediction"
        and config.get("timestep_type") == "continuous"
    ):
        # Fed ln(sigma) / 4 rather than a timestep: v-prediction is then EDM with sigma_data 1 (Stable Video Diffusion).
        table = VariancePreserving(scheduler.alphas_cumprod, prediction_type)
        low, high = config.sigma_min or table.sigma_min, config.sigma_max or table.sigma_max
        return EDM(1.0, low, high, boundary=0.0, scale=0.25, sign=-1.0)
    if name in _CONSISTENCY:
        low = config.sigma_min
        return EDM(config.sigma_data, max(low, 1e-6), config.sigma_max, boundary=low, scale=250.0, sign=1.0)
    if config.get("use_flow_sigmas") and prediction_type != "flow_prediction":
        raise ValueError(f"scheduler: {name} has use_flow_sigmas, but prediction_type {prediction_type!r}")
    if name in _FLOW or (name in _DISCRETE and prediction_type == "flow_prediction"):
        if config.get("invert_sigmas"):
            raise ValueError(f"scheduler: {name} with invert_sigmas runs from data to noise, which is not supported")
        return FlowMatching(config.num_train_timesteps)
    if name in _DISCRETE and prediction_type in ("epsilon", "v_prediction", "sample"):
        return VariancePreserving(scheduler.alphas_cumprod, prediction_type)
    known = ", ".join(sorted((*_EDM, *_CONSISTENCY, *_FLOW, *_DISCRETE)))
    raise ValueError(
        f"scheduler: {name} with prediction_type {prediction_type!r} is not understood; understood are {known}"
    )
