"""Tiny stock diffusers pipelines with random weights, made from configs, and a network that knows a Gaussian exactly.

Latents are [4, 8, 8] everywhere, pixels [3, 8, 8]. Each pipeline has arguments that make it run (`ARGUMENTS`): prompts
as words where there is a text encoder, else as embeddings.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from samplers.adapters import FlowMatching, VariancePreserving, coordinates_of
from samplers.gaussian import Bound, Gaussian
from samplers.pipelines import vae_facts
from samplers.teleport_checks import PIPELINES
from tests.samplers.networks import conditional_unet, unet

WORDS = ["a", "red", "green", "fox", "hill"]
BOUND = Bound((20.0, 8.4, 5.0, 2.0), (0.004, 0.03, 0.04, 0.2))


def gaussian(
    channels: int = 4, *, classes: int | None = None, facts: dict[str, Any] | None = None, bound: Bound | None = BOUND
) -> Gaussian:
    """A Gaussian of [channels, 8, 8] with variances from 0.005 to 4 and a mean that is not small."""
    generator, d = torch.Generator().manual_seed(5), channels * 64
    mean = 0.5 * torch.randn((classes or 1, channels, 8, 8), generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn((d, 12), generator=generator, dtype=torch.float64)).Q.mT
    variances = 4 / torch.arange(1, 13, dtype=torch.float64) ** 1.5
    mean = mean if classes else mean[0]
    return Gaussian(mean, directions, variances, 0.005, n_classes=classes, facts=facts, bound=bound)


def vae() -> AutoencoderKL:
    """Pictures [3, 8, 8], latents [4, 8, 8]."""
    torch.manual_seed(1)
    model = AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1
    )
    return model.eval().requires_grad_(False)


class ExactNetwork(ModelMixin, ConfigMixin):
    """A network that predicts, in the parametrisation of a scheduler, exactly what is right for a Gaussian."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        sample_size: int = 8,
        patch_size: int = 1,
        time_cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.gaussian: Gaussian | None = None
        self.scheduler: Any = None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        assert self.gaussian is not None
        coordinates, t = coordinates_of(self.scheduler), timestep.double().reshape(-1)[0]
        if isinstance(coordinates, VariancePreserving):
            at_infinity = self.scheduler.alphas_cumprod[t.long()] == 0
            sigma = torch.tensor(1e8, dtype=torch.float64) if at_infinity else coordinates.sigma(t)
        elif isinstance(coordinates, FlowMatching):
            sigma = t / (1000 - t).clamp_min(1e-6)
        else:
            sigma = (4 * t).exp()
        inner, skip, out, _ = coordinates(sigma)
        x = hidden_states.double() / inner
        prediction = ((self.gaussian(x, sigma) - skip * x) / out).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def closed_form(gaussian: Gaussian, x: Tensor, start: tuple[Any, Any], end: tuple[Any, Any]) -> Tensor:
    """The flow in the eigenbasis of the full covariance: an independent way to the same formula."""
    u = gaussian.components
    eye = torch.eye(gaussian.dim, dtype=torch.float64)
    covariance = u.mT @ torch.diag(gaussian.variances) @ u + gaussian.rest * (eye - u.mT @ u)
    values, vectors = torch.linalg.eigh(covariance)
    (alpha, s), (alpha_to, s_to) = start, end
    gain = ((alpha_to**2 * values + s_to**2) / (alpha**2 * values + s**2)).sqrt()
    z = (x - alpha * gaussian.mean).flatten(1) @ vectors
    return alpha_to * gaussian.mean + ((gain * z) @ vectors.mT).reshape(x.shape)


def exact(scheduler: Any) -> Any:
    """Stable Diffusion (3, for flow matching) without guidance, in float64, whose network is right for `gaussian`."""
    network, decoder = ExactNetwork(), vae()
    network.gaussian, network.scheduler = gaussian(facts={"vae": vae_facts(decoder)}), scheduler
    if type(scheduler).__name__.startswith("FlowMatch"):
        return quiet(StableDiffusion3Pipeline(network, scheduler, decoder, None, None, None, None, None, None))
    return quiet(StableDiffusionPipeline(decoder, None, None, network, scheduler, None, None, None, False))


def exact_arguments(pipe: Any, batch: int = 3) -> dict[str, Any]:
    embeddings = torch.zeros((batch, 2, 4), dtype=torch.float64)
    pooled = {"pooled_prompt_embeds": embeddings[:, 0]} if isinstance(pipe, StableDiffusion3Pipeline) else {}
    size = {"height": 8, "width": 8}
    return {"prompt_embeds": embeddings, "guidance_scale": 0.0, "output_type": "latent"} | size | pooled


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddpm() -> DDPMPipeline:
    return quiet(DDPMPipeline(unet(torch.float32), DDPMScheduler()))


def ddim() -> DDIMPipeline:
    return quiet(DDIMPipeline(unet(torch.float32), DDIMScheduler()))


def dit() -> DiTPipeline:
    """Latents [4, 8, 8] under labels 0 .. 999, which the pipeline's null label, 1000, presumes; learned variance."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=1, sample_size=8, dropout=0.0
    )
    return quiet(DiTPipeline(network.eval().requires_grad_(False), vae(), DDIMScheduler(clip_sample=False)))


def tokenizer() -> CLIPTokenizer:
    letters = [letter for word in WORDS for letter in word]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer({token: k for k, token in enumerate(dict.fromkeys(tokens))}, [], model_max_length=16)


def stable_diffusion() -> StableDiffusionPipeline:
    words = tokenizer()
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    encoder = CLIPTextModel(config).eval().requires_grad_(False)
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)
    network = conditional_unet(torch.float32)
    return quiet(StableDiffusionPipeline(vae(), encoder, words, network, scheduler, None, None, None, False))


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    network = conditional_unet(
        torch.float32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    return quiet(StableDiffusionXLPipeline(vae(), None, None, None, None, network, scheduler))


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(StableDiffusion3Pipeline(network.eval(), scheduler, vae(), None, None, None, None, None, None))


def flux(guidance: bool = False) -> FluxPipeline:
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return quiet(FluxPipeline(scheduler, vae(), None, None, None, None, network.eval()))


def pixart(kind: type = PixArtAlphaPipeline) -> Any:
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
    )
    return quiet(kind(None, None, vae(), network.eval(), DPMSolverMultistepScheduler()))


def pixart_sigma() -> Any:
    return pixart(PixArtSigmaPipeline)


def embeddings(*names: str, pooled: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Two prompts, of which the second is `negative`."""
    found = {}
    for k, name in enumerate((*names, *pooled)):
        generator = torch.Generator().manual_seed(k)
        found[name] = torch.randn((2, 16) if name in pooled else (2, 3, 16), generator=generator)
    return found


_PROMPTS = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_PIXART: dict[str, Any] = {
    "prompt_attention_mask": torch.ones(2, 3),
    "negative_prompt_attention_mask": torch.ones(2, 3),
    "negative_prompt": None,
    "use_resolution_binning": False,
}

MAKERS = {
    "DDPMPipeline": ddpm,
    "DDIMPipeline": ddim,
    "DiTPipeline": dit,
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "PixArtAlphaPipeline": pixart,
    "PixArtSigmaPipeline": pixart_sigma,
}

# What makes each run, on two samples, with guidance where it has it.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "DDPMPipeline": {"batch_size": 2},
    "DDIMPipeline": {"batch_size": 2},
    "DiTPipeline": {"class_labels": [7, 300]},
    "StableDiffusionPipeline": {"prompt": ["a red fox", "green hill"]},
    "StableDiffusionXLPipeline": embeddings(*_PROMPTS, pooled=_POOLED),
    "StableDiffusion3Pipeline": embeddings(*_PROMPTS, pooled=_POOLED),
    "FluxPipeline": embeddings("prompt_embeds", pooled=("pooled_prompt_embeds",)) | {"height": 8, "width": 8},
    "PixArtAlphaPipeline": embeddings(*_PROMPTS) | _PIXART,
    "PixArtSigmaPipeline": embeddings(*_PROMPTS) | _PIXART,
}


def fitting(pipe: Any, *, classes: int | None = None, bound: Bound | None = BOUND) -> Gaussian:
    """A Gaussian that describes the samples of one of these pipelines."""
    decoder = getattr(pipe, "vae", None)
    facts = {"vae": vae_facts(decoder)} if decoder is not None else {"vae": None, "range": [-1, 1]}
    return gaussian(3 if decoder is None else 4, classes=classes, facts=facts, bound=bound)


def pictures(pipe: Any, steps: int = 12, seed: int = 0, **more: Any) -> Tensor:
    """What the pipeline makes, [2, 3, 8, 8] in [0, 1]."""
    arguments = ARGUMENTS[type(pipe).__name__] | {"num_inference_steps": steps} | more
    torch.manual_seed(seed)  # DiT's scheduler is not given the generator
    result = pipe(generator=torch.Generator().manual_seed(seed), output_type="pt", **arguments).images
    return result if isinstance(result, Tensor) else torch.as_tensor(result).permute(0, 3, 1, 2)


def network(pipe: Any) -> nn.Module:
    return getattr(pipe, PIPELINES[type(pipe).__name__].network)


class Calls:
    """The inputs of a network's first layer: every time that the network really ran."""

    def __init__(self, pipe: Any) -> None:
        model = network(pipe)
        layer = next(getattr(model, name) for name in ("conv_in", "pos_embed", "x_embedder") if hasattr(model, name))
        layer = model.x_embedder if isinstance(pipe, FluxPipeline) else layer
        self.inputs: list[Tensor] = []
        self._handle = layer.register_forward_hook(lambda _, inputs, __: self.inputs.append(inputs[0].clone()))

    def __enter__(self) -> list[Tensor]:
        return self.inputs

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def left(pipe: Any) -> tuple[Any, ...]:
    """What an attachment changes, to be compared after it."""
    model = network(pipe)
    return type(pipe.scheduler), set(vars(pipe.scheduler)), set(vars(model)), type(model), model.forward
