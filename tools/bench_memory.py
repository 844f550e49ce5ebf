"""What training a model of each family takes in memory, measured on a CPU beside what `distill train --dry-run` says.

Networks of the published classes with a few hundred thousand to a few million random weights; the trainer's own update
of batch 4, reverse KL, one fake step. Held: weights, averages and optimizer states, each storage once. Update: the most
that the allocator has handed out besides (`tools.bench_cost.peak_bytes`).
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from distill.average import Average
from distill.blueprint import blueprint
from distill.budget import budget
from distill.config import Train
from distill.hardware import Hardware
from distill.lora import adapted, shared_copy
from distill.noise import Share
from distill.optim import Update, adamw
from distill.sections import Lora
from distill.skeleton import Skeleton, read_skeleton
from distill.student import OneStep
from distill.targets import Fixed
from distill.trainer import Trainer
from samplers import NetworkDenoiser
from samplers.adapters import coordinates_of
from samplers.prompts import PIPELINES
from tools.bench_arms import RATES, Arm
from tools.bench_cost import peak_bytes

BATCH, RANK, DECAY = 4, 4, 0.999
_MIB = 2**20
_VAE = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 4}
_VAE |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "latent_channels": 4, "shift_factor": 0.1}
_CROSS = {
    "sample_size": 16, "block_out_channels": [64, 128], "layers_per_block": 1, "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
_ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 32, "use_linear_projection": True}
_JOINT = {"attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 64}
_FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
_PNDM = ("PNDMScheduler", {"steps_offset": 1})
_EDM = ("EDMEulerScheduler", {"sigma_min": 0.002, "sigma_max": 80.0})

Part = tuple[str, dict[str, Any]]
FAMILIES: dict[str, tuple[str, Part, Part]] = {  # pipeline, network, scheduler
    "EDM": ("ConsistencyModelPipeline", ("UNet2DModel", {
        "sample_size": 32, "block_out_channels": [64, 128], "layers_per_block": 1, "num_class_embeds": 10,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }), _EDM),
    "DiT": ("DiTPipeline", ("DiTTransformer2DModel", {
        "sample_size": 16, "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "out_channels": 8,
    }), ("DDIMScheduler", {})),
    "Stable Diffusion": ("StableDiffusionPipeline", ("UNet2DConditionModel", _CROSS), _PNDM),
    "SDXL": ("StableDiffusionXLPipeline", ("UNet2DConditionModel", _CROSS | _ADDED | {
        "projection_class_embeddings_input_dim": 64 + 6 * 32, "transformer_layers_per_block": [2, 1],
    }), ("EulerDiscreteScheduler", {})),
    "PixArt": ("PixArtAlphaPipeline", ("PixArtTransformer2DModel", {
        "sample_size": 16, "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "caption_channels": 64,
        "cross_attention_dim": 128,
    }), ("DPMSolverMultistepScheduler", {})),
    "SD3": ("StableDiffusion3Pipeline", ("SD3Transformer2DModel", _JOINT | {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 4, "caption_projection_dim": 128,
        "pos_embed_max_size": 16,
    }), _FLOW),
    "Flux": ("FluxPipeline", ("FluxTransformer2DModel", _JOINT | {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "axes_dims_rope": [8, 12, 12],
        "guidance_embeds": True,
    }), _FLOW),
}  # fmt: skip
_ABSENT = {
    "StableDiffusionPipeline": ["text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"],
    "StableDiffusionXLPipeline": ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"],
    "StableDiffusion3Pipeline": [f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")],
    "FluxPipeline": [f"{part}{k}" for part in ("text_encoder", "tokenizer") for k in ("", "_2")],
    "PixArtAlphaPipeline": ["text_encoder", "tokenizer"],
}


def save(name: str, folder: Path) -> Path:
    """The configurations of a family's pipeline, without weights."""
    pipeline, network, scheduler = FAMILIES[name]
    part = "unet" if network[0].startswith("UNet") else "transformer"
    parts = {part: network, "scheduler": scheduler} | ({} if name == "EDM" else {"vae": ("AutoencoderKL", _VAE)})
    index: dict[str, Any] = {"_class_name": pipeline} | {key: ["diffusers", kind] for key, (kind, _) in parts.items()}
    index |= {key: [None, None] for key in _ABSENT.get(pipeline, [])}
    if pipeline == "StableDiffusionPipeline":
        index["requires_safety_checker"] = False
    for key, (_, config) in parts.items():
        (folder / key).mkdir(parents=True)
        file = "scheduler_config.json" if key == "scheduler" else "config.json"
        (folder / key / file).write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def configuration(folder: Path, rank: int | None, checkpointing: bool) -> Train:
    """The run that is measured and planned."""
    lora = {"rank": rank}
    pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"]
    prompts: dict[str, Any] = {"height": 128, "width": 128} if pipeline == "FluxPipeline" else {}
    if PIPELINES.get(pipeline) and PIPELINES[pipeline].embeddings:
        prompts["encoded"] = str(folder / "encoded")  # a plan does not need them
    return Train.model_validate({
        "run": "unused", "teacher": {"path": str(folder)}, "student": {"sigma_init": None, "lora": lora},
        "fake": {"lora": lora}, "memory": {"checkpointing": checkpointing}, "batch_size": BATCH, "prompts": prompts,
    })  # fmt: skip


def real_arm(skeleton: Skeleton, rank: int | None, checkpointing: bool) -> tuple[Arm, int]:
    """The trainer on real networks of a skeleton's configuration, and the bytes that it holds after an update."""
    torch.manual_seed(0)
    network = type(skeleton.network).from_config(skeleton.network.config)
    teacher = NetworkDenoiser(network, coordinates_of(skeleton.scheduler)).requires_grad_(False).eval()
    student, fake = (
        copy.deepcopy(teacher).requires_grad_(True) if rank is None else adapted(teacher, Lora(rank=rank), k)
        for k in range(2)
    )
    average: Any = copy.deepcopy(student) if rank is None else shared_copy(student)
    if checkpointing:
        for trained in (student, fake):
            trained.network.enable_gradient_checkpointing()  # type: ignore[operator]
    cond = tree_map_only(Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), skeleton.condition(BATCH))
    optimizers = [adamw(student, RATES), adamw(fake, RATES)]
    first, second = (Update(optimizer, lambda step: RATES.lr) for optimizer in optimizers)
    trainer = Trainer(
        OneStep(student, teacher.sigma_max), fake, Fixed(teacher), first, second, torch.ones_like, torch.ones_like,
        Share(0, BATCH), skeleton.shape, conditions=lambda noise, device: cond,
        average=Average(average.requires_grad_(False), student, DECAY),
    )  # fmt: skip
    trainer.step(0)
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    tensors = [p for module in (teacher, student, fake, average) for p in nn.Module.parameters(module)] + states
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return Arm("", None, trainer.step, optimizers), sum(held.values())  # type: ignore[arg-type]


def memory_table(names: tuple[str, ...] = tuple(FAMILIES)) -> str:
    """A row for every family, full copies and adapters, with and without checkpointing (minutes, on one thread)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = [
        f"MiB, batch {BATCH}; adapters of rank {RANK}; told: by the dry run, on the meta device.",
        "",
        "| family | weights, millions | networks | activations | held | told | update | told |",
        "|:--|--:|:--|:--|--:|--:|--:|--:|",
    ]
    try:
        for name in names:
            for rank, checkpointing in ((None, False), (None, True), (RANK, False), (RANK, True)):
                lines.append(_row(name, rank, checkpointing))
    finally:
        torch.set_num_threads(threads)
    return "\n".join(lines) + "\n"


def _row(name: str, rank: int | None, checkpointing: bool) -> str:
    with tempfile.TemporaryDirectory() as spare:
        folder = save(name, Path(spare) / "pipeline")
        config = configuration(folder, rank, checkpointing)
        told = budget(config, blueprint(config, Hardware()).networks, Hardware(), BATCH)
        skeleton = read_skeleton(folder, height=config.prompts.height, width=config.prompts.width)
        arm, held = real_arm(skeleton, rank, checkpointing)
        update = peak_bytes(arm, 1)
    own = sum(size for part, size in told.held.items() if part != "VAE")
    millions = sum(p.numel() for p in skeleton.network.parameters()) / 1e6
    return (
        f"| {name} | {millions:.2f} | {'full' if rank is None else 'adapters'} | "
        f"{'again' if checkpointing else 'kept'} | {held / _MIB:.1f} | {own / _MIB:.1f} | {update / _MIB:.1f} | "
        f"{max(told.moments.values()) / _MIB:.1f} |"
    )


if __name__ == "__main__":
    print(memory_table())
