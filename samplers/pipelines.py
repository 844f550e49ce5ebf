"""Gaussian teleportation in a stock diffusers pipeline: in every call inside `with teleport(pipe, gaussian):`.

The first network call of a run is answered with zeros, which nothing reads: the scheduler's first step is the
Gaussian's closed-form flow to the last grid point not below sigma_skip (`samplers.teleport_scheduler`). The initial
noise, the random numbers and the pipeline's files are the stock ones. Why a step that asks the network for nothing:
pipelines differ in whether they take latents, timesteps or sigmas, but each loops over its scheduler's timesteps.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from einops import rearrange
from torch import Tensor

from samplers.gaussian import Gaussian, Mode
from samplers.network_hook import NetworkHook
from samplers.skip import Skip
from samplers.teleport_checks import (
    check_gaussian,
    check_scheduler,
    check_sigma_skip,
    check_unattached,
    conditional_labels,
    family_of,
    vae_facts,
)
from samplers.teleport_scheduler import JumpingScheduler

__all__ = ["Run", "Teleport", "teleport", "vae_facts"]


@dataclass(frozen=True)
class Run:
    """What one call of the pipeline did. An NFE is one prediction, guided or not; network_calls are the network's own.

    sigma_from, sigma_to: noise levels s / alpha before and after the jump. kl: so many nats are lost by starting at
    sigma_to, plus or minus kl_error (a certificate's), or at most (the Gaussian's bound, an estimate with two standard
    errors on top; kl_error is 0); None where nothing is known.
    """

    steps: int
    skipped: int
    sigma_from: float
    sigma_to: float
    nfe_before: int
    nfe: int
    network_calls: int
    guidance: bool
    kl: float | None
    kl_error: float


class _Call(NamedTuple):
    """A call of the network that was not made, as far as the jump depends on it."""

    x: Tensor
    labels: Tensor | None
    places: Tensor | None
    scale: Tensor | None


class Teleport:
    """A pipeline that jumps, from `attach` to `detach` or inside `with`. Printed, it tells what the last call did.

    Made by `teleport`. Attached, the scheduler and the network belong to the pipeline's loop.
    """

    def __init__(self, pipe: Any, gaussian: Gaussian, sigma_skip: float, mode: Mode, certificate: Skip | None) -> None:
        self.pipe, self.gaussian, self.sigma_skip, self.mode = pipe, gaussian, sigma_skip, mode
        self.certificate, self.family = certificate, family_of(pipe)
        self._jump: JumpingScheduler | None = None
        self._hook = NetworkHook("teleport", self._through)
        self._network_calls, self._guided, self._warned = 0, False, False
        self._unmade: list[_Call] = []

    def attach(self) -> Self:
        """Make the pipeline jump in every call from now on. Raises ValueError, and changes nothing, if it cannot."""
        check_unattached(self.pipe, self.family)
        check_scheduler(self.pipe, self.family)
        self._hook.attach(getattr(self.pipe, self.family.network))
        self._jump = JumpingScheduler(
            self.pipe.scheduler, self.gaussian, self.sigma_skip, self.mode, self._begun, self._opened, self._closed
        )
        self._jump.attach()
        return self

    def detach(self) -> None:
        """Give the pipeline back as it was; nothing if it is not attached."""
        if self._jump is None or self._hook.network is None:
            return
        self._jump.detach()
        self._hook.detach()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def run(self) -> Run | None:
        """What the last call did, None before the first."""
        if self._jump is None or self._jump.grid is None:
            return None
        grid, nfe = self._jump.grid, self._jump.predictions
        kl, kl_error = self._cost(grid.sigmas[grid.landing]) if grid.landing else (0.0, 0.0)
        return Run(
            steps=len(grid.starts),
            skipped=grid.starts.index(grid.landing),
            sigma_from=grid.sigmas[0],
            sigma_to=grid.sigmas[grid.landing],
            nfe_before=grid.landing + nfe,
            nfe=nfe,
            network_calls=self._network_calls,
            guidance=self._guided,
            kl=kl,
            kl_error=kl_error,
        )

    def __str__(self) -> str:
        run = self.run
        if run is None:
            return f"no run yet; skips the steps that end at or above sigma {self.sigma_skip:.3g}"
        if not run.skipped:
            return (
                f"skipped 0 of {run.steps} steps: none from sigma {run.sigma_from:.3g} ends at or above "
                f"{self.sigma_skip:.3g}, {run.nfe} NFE"
            )
        parts = [f"skipped {run.skipped} of {run.steps} steps, sigma {run.sigma_from:.3g} -> {run.sigma_to:.3g}"]
        if run.kl is not None:
            cost = f"{run.kl:.2g} +- {run.kl_error:.1g}" if run.kl_error else f"<= {run.kl:.2g}"
            # One Gaussian for all classes or prompts says nothing of the law under one of them.
            pooled = self.family.conditions if self.gaussian.n_classes is None else None
            parts.append(f"KL {cost} nats" + (f" over all {pooled}" if pooled else ""))
        parts.append(f"{run.nfe_before} -> {run.nfe} NFE")
        if run.guidance:
            parts.append(f"guidance below {run.sigma_to:.3g} only")
        return ", ".join(parts)

    def _cost(self, sigma: float) -> tuple[float | None, float]:
        """The nats that a jump to sigma costs at most, and their standard error, as far as they are known."""
        if self.certificate is not None:
            return self.certificate.kl, self.certificate.kl_error
        bound = self.gaussian.bound.at(sigma) if self.gaussian.bound is not None else math.inf
        return (bound if math.isfinite(bound) else None), 0.0

    def _through(self, network: Any, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput
        from diffusers.models.unets.unet_2d import UNet2DOutput

        zeros = self._answer(network, args, kwargs)
        if zeros is None:
            return inner(*args, **kwargs)
        output = UNet2DOutput if self.family.network == "unet" else Transformer2DModelOutput
        return output(sample=zeros) if kwargs.get("return_dict", True) else (zeros,)

    def _answer(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What the network's call gives if nothing will read it; None if it has to be made."""
        jump = self._jump
        if jump is not None and self.pipe.scheduler is not jump.scheduler:
            raise ValueError("scheduler: was replaced while the pipeline jumps; detach first, and attach again")
        if jump is None or not jump.pending:
            if jump is not None and jump.grid is not None and jump.grid.landing and kwargs.get("skip_layers"):
                raise ValueError("skip_guidance_layers: starts and stops at steps by number; accepted is None")
            self._network_calls += 1
            return None
        x = args[0] if args else kwargs["hidden_states"]
        self._unmade.append(_Call(x, kwargs.get("class_labels"), kwargs.get("img_ids"), kwargs.get("guidance")))
        channels = network.config.out_channels or network.config.in_channels
        return x.new_zeros((*x.shape[:-1], channels) if self.family.packed else (len(x), channels, *x.shape[2:]))

    def _begun(self) -> None:
        self._network_calls, self._guided, self._unmade = 0, False, []
        self._hook.reattach()

    def _opened(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """The state [B, *shape] in a pipeline's latents, and its classes [B]. Raises ValueError for another shape."""
        first, labels = (self._unmade or [_Call(latents, None, None, None)])[0], None
        shape = list(latents.shape[1:])
        if self.family.packed and first.places is not None:
            h, w = (2 * int(first.places.reshape(-1, 3)[:, k].max()) + 2 for k in (1, 2))
            shape = [latents.shape[2] // 4, h, w]
        if shape != list(self.gaussian.shape):
            raise ValueError(f"height, width: the latents are {shape}; the Gaussian is of {list(self.gaussian.shape)}")
        self._check_end()

        self._guided = len(self._unmade) > 1 or len(first.x) > len(latents) or first.scale is not None
        if first.labels is not None:
            null = self._hook.network.config.num_embeds_ada_norm
            labels, self._guided = conditional_labels(first.labels, first.x, null)
        if self._guided and not self._warned:
            self._warned = True
            warnings.warn(
                f"guidance acts below sigma {self.run.sigma_to:.3g} only, where the jump lands: it goes to the law "  # type: ignore[union-attr]
                f"{'of the class' if self.gaussian.n_classes else 'of all data'}, without guidance",
                UserWarning,
                stacklevel=2,
            )
        self._unmade = []
        if self.family.packed:
            latents = rearrange(latents, "b (h w) (c p q) -> b c (h p) (w q)", h=shape[1] // 2, p=2, q=2)
        return latents, labels if self.gaussian.n_classes is not None else None

    def _closed(self, state: Tensor) -> Tensor:
        return rearrange(state, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2) if self.family.packed else state

    def _check_end(self) -> None:
        """A run that hands over to another pipeline (SDXL's denoising_end) must not end above the landing."""
        end, jump = getattr(self.pipe, "denoising_end", None), self._jump
        assert jump is not None
        assert jump.grid is not None
        if isinstance(end, float) and 0 < end < 1:
            cutoff = round(jump.scheduler.config.num_train_timesteps * (1 - end))
            if jump.grid.timesteps[jump.grid.landing] < cutoff:
                raise ValueError(
                    f"denoising_end: {end} ends the run at timestep {cutoff}, before the jump's landing at "
                    f"{float(jump.grid.timesteps[jump.grid.landing]):g}"
                )


def teleport(
    pipe: Any,
    gaussian: Gaussian,
    sigma_skip: float | Skip | None = None,
    *,
    tolerance: float = 0.05,
    mode: Mode = "ode",
) -> Teleport:
    """A diffusers pipeline whose runs begin with a jump of the Gaussian, at no cost in network calls.

    gaussian: of the pipeline's samples: pixels in [-1, 1], or latents as they are diffused (scaled) with
    facts["vae"] = vae_facts(pipe.vae). sigma_skip: the noise level s / alpha above which the network is not asked: your
    own, a certificate of `samplers.skip.choose_sigma_skip`, or None for the lowest level at which
    gaussian.bound is within the tolerance, in nats. mode: `ode` keeps the noise's image, `marginal` also repairs the
    difference between the pipeline's noise and the noised data.
    The KL is of the law that the Gaussian was fitted to: all classes or prompts together, if it has no class means.
    Raises ValueError, with nothing changed, for a pipeline, scheduler, shape, range, VAE or classes that do not fit.
    """
    family = family_of(pipe)
    check_unattached(pipe, family)
    check_scheduler(pipe, family)
    check_gaussian(pipe, family, gaussian)
    if mode not in ("ode", "marginal") or not tolerance > 0:
        raise ValueError(f"mode, tolerance: {mode!r}, {tolerance}; accepted are ode and marginal, and positive nats")
    certificate = None
    if sigma_skip is None:
        if gaussian.bound is None:
            raise ValueError(
                "sigma_skip: is None and the Gaussian has no bound; give a number, the certificate of "
                "choose_sigma_skip, or a Gaussian fitted with its bound (Gaussian.fit, distill gaussian)"
            )
        level = gaussian.bound.sigma_skip(tolerance)
    elif isinstance(sigma_skip, Skip):
        certificate, level = sigma_skip, check_sigma_skip(sigma_skip.sigma_skip)
    else:
        level = check_sigma_skip(sigma_skip)
    return Teleport(pipe, gaussian, level, mode, certificate)
