"""Tiny real pipelines of every family, with their text encoders and tokenizers, as folders of safetensors.

The classes, schedulers and settings are those of published models; sizes are not: latents [4, 8, 8], pictures
[3, 16, 16] where there is a VAE, letters for words. Weights are random. Nothing is downloaded.
"""

import string
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.samplers import tiny_pipelines
from tests.samplers.networks import unet

PROMPTS = ("a red fox", "two green hills, at night")
_LETTERS = string.ascii_lowercase + string.digits + ",.-'!"
_STABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_STABLE |= {"set_alpha_to_one": False, "steps_offset": 1}


def vae(scale: float = 0.18215, shift: float | None = None) -> AutoencoderKL:
    """Pictures [3, 16, 16], latents [4, 8, 8]; a shift as Stable Diffusion 3 and Flux have it."""
    torch.manual_seed(1)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )
    return model.eval().requires_grad_(False)


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A letter is a token; 32 tokens a prompt."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(letter + "</w>" for letter in _LETTERS)]
    return CLIPTokenizer({token: k for k, token in enumerate(tokens)}, [], model_max_length=32, pad_token=pad)


def clip(kind: type = CLIPTextModel, width: int = 8, seed: int = 2) -> Any:
    """CLIP's text encoder; CLIPTextModelWithProjection is that of SDXL and SD3."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder = kind(config)
    with torch.no_grad():  # as drawn, they tell hardly one prompt from another
        encoder.get_input_embeddings().weight.mul_(50)
    return encoder.eval().requires_grad_(False)


def t5_tokenizer() -> T5TokenizerFast:
    """A letter is a token, and so is the beginning of a word."""
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in _LETTERS)]
    return T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=32)


def t5(width: int) -> T5EncoderModel:
    torch.manual_seed(7)
    words = len(t5_tokenizer())
    config = T5Config(vocab_size=words, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval().requires_grad_(False)


def ddpm(prediction_type: str = "epsilon") -> DDPMPipeline:
    return DDPMPipeline(unet(torch.float32), DDPMScheduler(prediction_type=prediction_type))


def ddpm_classes() -> ConsistencyModelPipeline:
    """Labels 0 .. 9, in the one stock pipeline that gives them to a UNet2DModel."""
    return ConsistencyModelPipeline(unet(torch.float32, classes=10), DDPMScheduler())


def edm() -> ConsistencyModelPipeline:
    return ConsistencyModelPipeline(unet(torch.float32), EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0))


def edm_classes() -> ConsistencyModelPipeline:
    """Labels 0 .. 9; the scheduler of consistency models, and of `distill teach`."""
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, clip_denoised=False)
    return ConsistencyModelPipeline(unet(torch.float32, classes=10), scheduler)


def dit() -> DiTPipeline:
    """Labels 0 .. 999, which the pipeline's null label, 1000, presumes; learned variance."""
    network = tiny_pipelines.dit().transformer
    return DiTPipeline(network, vae(), DDIMScheduler(clip_sample=False), id2label={7: "cock", 300: "tiger beetle"})


def conditional_unet(words: int = 16, **options: Any) -> UNet2DConditionModel:
    """Latents [B, 4, 8, 8], and embeddings of prompts [B, length, words]."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=words,
        **options,
    )
    return network.eval().requires_grad_(False)


def _stable_diffusion(network: Any, scheduler: Any, words: CLIPTokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(vae(), clip(width=16), words, network, scheduler, None, None, None, False)


def sd15() -> StableDiffusionPipeline:
    scheduler = PNDMScheduler(skip_prk_steps=True, **_STABLE)
    return _stable_diffusion(conditional_unet(), scheduler, clip_tokenizer())


def sd21() -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **_STABLE)
    network = conditional_unet(use_linear_projection=True)
    return _stable_diffusion(network, scheduler, clip_tokenizer(pad="!"))


def sdxl() -> StableDiffusionXLPipeline:
    network = conditional_unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8,
    )
    encoders = clip(), clip(CLIPTextModelWithProjection, seed=3)
    settings = {key: value for key, value in _STABLE.items() if key != "set_alpha_to_one"}
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **settings)
    words = clip_tokenizer(), clip_tokenizer(pad="!")
    return StableDiffusionXLPipeline(vae(0.13025), *encoders, *words, network, scheduler)


def pixart(kind: type = PixArtAlphaPipeline) -> Any:
    network = tiny_pipelines.pixart(kind).transformer
    return kind(t5_tokenizer(), t5(16), vae(), network, DPMSolverMultistepScheduler())


def sd3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    """The embeddings of both CLIP encoders, 16 wide together, are padded to T5's 24."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,  # the last one has no output for the words
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    words, encoders = clip_tokenizer(), [clip(CLIPTextModelWithProjection, seed=seed) for seed in (2, 3)]
    third = (t5(24), t5_tokenizer()) if with_t5 else (None, None)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(
        network, scheduler, vae(1.5305, 0.0609), encoders[0], words, encoders[1], words, *third
    )


def flux(guided: bool = True) -> FluxPipeline:
    """With an embedding of the guidance scale as FLUX.1-dev has it, or without, as FLUX.1-schnell."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guided,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
    words = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(scheduler, vae(0.3611, 0.1159), clip(width=16), words[0], t5(16), words[1], network)


FAMILIES: dict[str, Callable[[], Any]] = {
    "ddpm": ddpm,
    "ddpm-v": partial(ddpm, "v_prediction"),
    "ddpm-sample": partial(ddpm, "sample"),
    "ddpm-classes": ddpm_classes,
    "edm": edm,
    "edm-classes": edm_classes,
    "dit": dit,
    "sd15": sd15,
    "sd21": sd21,
    "sdxl": sdxl,
    "pixart": pixart,
    "pixart-sigma": partial(pixart, PixArtSigmaPipeline),
    "sd3": sd3,
    "sd3-no-t5": partial(sd3, with_t5=False),
    "flux": flux,
    "flux-schnell": partial(flux, guided=False),
}
PROMPTED = tuple(name for name in FAMILIES if not name.startswith(("ddpm", "edm", "dit")))
LABELS = {"ddpm-classes": 10, "edm-classes": 10, "dit": 1000}
# What the stock pipeline must be told besides: published sizes are bins, or of FLUX.1; no T5 is no accident.
CALL: dict[str, dict[str, Any]] = {
    **{name: {"use_resolution_binning": False, "clean_caption": False} for name in ("pixart", "pixart-sigma")},
    **{name: {"height": 16, "width": 16} for name in ("flux", "flux-schnell")},
}
LOAD: dict[str, dict[str, Any]] = {"sd3-no-t5": {"text_encoder_3": None, "tokenizer_3": None}}


def save(name: str, folder: Path) -> Path:
    """Writes the pipeline of a family to `folder`, and returns it."""
    pipe = FAMILIES[name]()
    with warnings.catch_warnings(action="ignore"):
        pipe.save_pretrained(folder, safe_serialization=True)
    if isinstance(pipe, ConsistencyModelPipeline):  # which their files do not tell from consistency models
        (folder / "distill.json").write_text('{"kind": "teacher"}')
    return folder


def conditions(name: str) -> dict[str, Any]:
    """What the stock call of a family is given for two samples."""
    if name in PROMPTED:
        return {"prompt": list(PROMPTS)}
    labels = {"class_labels": [3, LABELS[name] - 1]} if name in LABELS else {}
    return labels if name == "dit" else labels | {"batch_size": 2}
