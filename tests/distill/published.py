"""The configurations of published pipelines, from their model cards' config.json files: folders without weights."""

import json
from pathlib import Path
from typing import Any

_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_WIDE_VAE = _VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_L |= {"vocab_size": 49408, "projection_dim": 768, "model_type": "clip_text_model", "hidden_act": "quick_gelu"}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_CLIP_G |= {"vocab_size": 49408, "projection_dim": 1280, "model_type": "clip_text_model", "hidden_act": "gelu"}
_T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
_T5_XXL |= {"feed_forward_proj": "gated-gelu", "model_type": "t5"}
_PLAIN = ["transformers", "CLIPTextModel"]
_PROJECTED = ["transformers", "CLIPTextModelWithProjection"]
_CROSS, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

Part = tuple[list[str], dict[str, Any]]
PIPELINES: dict[str, dict[str, Part]] = {
    "StableDiffusionPipeline": {  # 1.5
        "unet": (
            ["diffusers", "UNet2DConditionModel"],
            {
                "sample_size": 64,
                "block_out_channels": [320, 640, 1280, 1280],
                "down_block_types": [_CROSS, _CROSS, _CROSS, "DownBlock2D"],
                "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP],
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
            },
        ),
        "vae": (["diffusers", "AutoencoderKL"], _VAE),
        "text_encoder": (_PLAIN, _CLIP_L),
        "scheduler": (["diffusers", "PNDMScheduler"], _BETAS | {"skip_prk_steps": True, "steps_offset": 1}),
    },
    "StableDiffusionXLPipeline": {  # base 1.0
        "unet": (
            ["diffusers", "UNet2DConditionModel"],
            {
                "sample_size": 128,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", _CROSS, _CROSS],
                "up_block_types": [_CROSS_UP, _CROSS_UP, "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10],
                "cross_attention_dim": 2048,
                "attention_head_dim": [5, 10, 20],
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        "vae": (["diffusers", "AutoencoderKL"], _VAE | {"scaling_factor": 0.13025, "sample_size": 1024}),
        "text_encoder": (_PLAIN, _CLIP_L),
        "text_encoder_2": (_PROJECTED, _CLIP_G),
        "scheduler": (["diffusers", "EulerDiscreteScheduler"], _BETAS | {"steps_offset": 1}),
    },
    "StableDiffusion3Pipeline": {  # medium
        "transformer": (
            ["diffusers", "SD3Transformer2DModel"],
            {
                "sample_size": 128,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 24,
                "attention_head_dim": 64,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "caption_projection_dim": 1536,
                "pooled_projection_dim": 2048,
                "pos_embed_max_size": 192,
            },
        ),
        "vae": (["diffusers", "AutoencoderKL"], _WIDE_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
        "text_encoder": (_PROJECTED, _CLIP_L),
        "text_encoder_2": (_PROJECTED, _CLIP_G),
        "text_encoder_3": (["transformers", "T5EncoderModel"], _T5_XXL),
        "scheduler": (["diffusers", "FlowMatchEulerDiscreteScheduler"], {"shift": 3.0}),
    },
    "FluxPipeline": {  # 1-dev
        "transformer": (
            ["diffusers", "FluxTransformer2DModel"],
            {
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
            },
        ),
        "vae": (["diffusers", "AutoencoderKL"], _WIDE_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": (_PLAIN, _CLIP_L),
        "text_encoder_2": (["transformers", "T5EncoderModel"], _T5_XXL),
        "scheduler": (
            ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15, "base_shift": 0.5},
        ),
    },
}
_TOKENIZERS = {"FluxPipeline": ("", "_2"), "StableDiffusion3Pipeline": ("", "_2", "_3")}
_TOKENIZERS |= {"StableDiffusionXLPipeline": ("", "_2"), "StableDiffusionPipeline": ("",)}
_SAFETY = ("safety_checker", "feature_extractor", "image_encoder")


def save(pipeline: str, folder: Path) -> Path:
    """Writes a pipeline's model_index.json and config.json files, and nothing else."""
    parts = PIPELINES[pipeline]
    index: dict[str, Any] = {"_class_name": pipeline} | {name: kind for name, (kind, _) in parts.items()}
    index |= {f"tokenizer{k}": ["transformers", "PreTrainedTokenizerFast"] for k in _TOKENIZERS[pipeline]}
    if pipeline == "StableDiffusionPipeline":
        index |= {name: [None, None] for name in _SAFETY} | {"requires_safety_checker": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, (_, config) in parts.items():
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config))
    return folder


_D, _A, _U, _AU = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
_WIDE = {"layers_per_block": 4, "attention_head_dim": 256}
_EDM: dict[str, dict[str, Any]] = {  # the nearest UNet2DModel to EDM's networks: their widths, depths and attention
    "cifar10": _WIDE
    | {"sample_size": 32, "block_out_channels": [256] * 3, "down_block_types": [_D, _A, _D]}
    | {"up_block_types": [_U, _AU, _U]},
    "ffhq": _WIDE
    | {"sample_size": 64, "block_out_channels": [128, 256, 256, 256], "down_block_types": [_D, _D, _A, _D]}
    | {"up_block_types": [_U, _AU, _U, _U]},
    "imagenet64": {"layers_per_block": 3, "attention_head_dim": 64, "num_class_embeds": 1000}
    | {"sample_size": 64, "block_out_channels": [192, 384, 576, 768], "down_block_types": [_D, _A, _A, _A]}
    | {"up_block_types": [_AU, _AU, _AU, _U]},
}


def save_edm(name: str, folder: Path) -> Path:
    """As `save`, of a UNet2DModel under EDM's noise levels."""
    scheduler = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0}
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "EDMEulerScheduler"]}
    for file, content in (
        ("model_index.json", {"_class_name": "ConsistencyModelPipeline"} | index),
        ("unet/config.json", {"_class_name": "UNet2DModel"} | _EDM[name]),
        ("scheduler/scheduler_config.json", scheduler),
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    return folder
