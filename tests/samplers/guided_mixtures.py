"""Stock pipelines whose latents are one number, and whose networks know the mixtures that it follows exactly.

Prompts are numbers: 0 is no prompt, 1 and 2 have mixtures of their own, and so has the geometric average on a grid.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiTPipeline, ModelMixin, StableDiffusion3Pipeline
from diffusers import StableDiffusionPipeline as StableDiffusion
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from samplers import GaussianMixture
from samplers.adapters import FlowMatching, VariancePreserving, coordinates_of
from tests.samplers.tiny_pipelines import quiet

NULL = 1000


def _mixture(weights: list[float], means: list[float], deviations: list[float]) -> GaussianMixture:
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, deviations))
    return GaussianMixture(w, m[:, None], s**2)


MIXTURES = {
    0: _mixture([0.5, 0.5], [-1.5, 1.5], [0.8, 0.8]),
    1: _mixture([0.3, 0.7], [-1.2, 1.8], [0.5, 0.5]),
    2: _mixture([0.7, 0.3], [-2.0, 0.6], [0.5, 0.6]),
}
GRID = torch.linspace(-8, 8, 20001, dtype=torch.float64)


def average(prompt: int, scale: float) -> Tensor:
    """The distribution function of q_u^(1 - w) q_c^w on the grid."""
    logs = [MIXTURES[i].log_density(GRID[:, None]) for i in (0, prompt)]
    log = (1 - scale) * logs[0] + scale * logs[1]
    density = (log - log.max()).exp()
    return density.cumsum(0) / density.sum()


def distance(samples: Tensor, distribution: Tensor) -> float:
    """W2 of equally weighted samples [n] and a distribution function on the grid."""
    n = len(samples)
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    quantiles = GRID[torch.searchsorted(distribution, levels).clamp_max(len(GRID) - 1)]
    return float((samples.double().sort().values - quantiles).square().mean().sqrt())


class MixtureNetwork(ModelMixin, ConfigMixin):
    """Predicts, in the parametrisation of a scheduler, what is right for the mixture of each row's prompt."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        sample_size: int = 1,
        patch_size: int = 1,
        num_embeds_ada_norm: int = NULL,
        time_cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.scheduler: Any = None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        coordinates, t = coordinates_of(self.scheduler), timestep.double().reshape(-1)[0]
        if isinstance(coordinates, VariancePreserving):
            at_infinity = t == t.round() and self.scheduler.alphas_cumprod[t.long()] == 0
            sigma = torch.tensor(1e8, dtype=torch.float64) if at_infinity else coordinates.sigma(t)
        else:
            assert isinstance(coordinates, FlowMatching)
            sigma = t / (1000 - t).clamp_min(1e-6)
        inner, skip, out, _ = coordinates(sigma)
        x = hidden_states.double() / inner
        if class_labels is not None:
            prompts = torch.where(class_labels == NULL, 0, class_labels)
        else:
            assert encoder_hidden_states is not None
            prompts = encoder_hidden_states[:, 0, 0].round().long()
        denoised = torch.empty_like(x)
        for prompt, mixture in MIXTURES.items():
            rows = prompts == prompt
            if bool(rows.any()):
                denoised[rows] = mixture(x[rows], sigma)
        prediction = ((denoised - skip * x) / out).to(hidden_states.dtype)
        if self.config.out_channels == 2 * self.config.in_channels:  # a learned variance, which is dropped
            prediction = torch.cat([prediction, torch.ones_like(prediction)], 1)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=1,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=1.0,
    ).eval()


class Latents(ModelMixin, ConfigMixin):
    """Stands where DiT's pipeline decodes, and keeps what it was given."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.last = torch.empty(0)

    def decode(self, latents: Tensor) -> Any:
        self.last = latents
        return Transformer2DModelOutput(sample=latents)


def pipeline(kind: str, scheduler: Any) -> Any:
    """`sd`, `sd3` (for flows) or `dit`."""
    network = MixtureNetwork(out_channels=2 if kind == "dit" else 1)
    network.scheduler = scheduler
    if kind == "dit":
        return quiet(DiTPipeline(network, Latents(), scheduler))
    if kind == "sd3":
        return quiet(StableDiffusion3Pipeline(network, scheduler, _vae(), None, None, None, None, None, None))
    return quiet(StableDiffusion(_vae(), None, None, network, scheduler, None, None, None, False))


def run(pipe: Any, prompts: list[int], particles: int, *, scale: float, steps: int, seed: int, **more: Any) -> Tensor:
    """The pipeline's final latents, [prompts, particles]."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(pipe, DiTPipeline):
        torch.manual_seed(seed)  # its scheduler is not given the generator
        labels = [prompt for prompt in prompts for _ in range(particles)]
        pipe(labels, guidance_scale=scale, num_inference_steps=steps, generator=generator, output_type="pt", **more)
        return pipe.vae.last.reshape(len(prompts), particles)
    torch.manual_seed(seed)
    copies = particles
    embeddings = torch.tensor(prompts, dtype=torch.float64)[:, None, None].expand(-1, 2, 4)
    arguments: dict[str, Any] = {"prompt_embeds": embeddings, "negative_prompt_embeds": torch.zeros_like(embeddings)}
    if isinstance(pipe, StableDiffusion3Pipeline):  # which repeats words, not embeddings
        arguments = {name: value.repeat_interleave(particles, 0) for name, value in arguments.items()}
        embeddings, copies = arguments["prompt_embeds"], 1
        arguments["pooled_prompt_embeds"] = embeddings[:, 0]
        arguments["negative_pooled_prompt_embeds"] = torch.zeros_like(embeddings[:, 0])
    out = pipe(
        height=8,
        width=8,
        num_images_per_prompt=copies,
        guidance_scale=scale,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **arguments,
        **more,
    )
    return out.images.reshape(len(prompts), particles)
