"""Run folders of students of every family, as `distill train` leaves them, without any training."""

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill import checkpoint
from distill.config import Train
from tests.distill import families


class Weights(nn.Module):
    """Tensors by any names, as a checkpoint takes them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.tensors


def network_of(pipe: Any) -> tuple[str, Any]:
    """The name and the module of what is distilled."""
    part = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    return part, getattr(pipe, part)


def load(name: str, folder: Path) -> Any:
    """A pipeline by stock diffusers."""
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **families.LOAD.get(name, {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_run(name: str, place: Path, rank: int | None = None, alpha: float | None = None, **student: Any) -> Any:
    """Writes place/teacher and place/run; returns the teacher's pipeline with the student's network in it.

    rank: of adapters, which the student's network then has; None is all of its weights, changed a little.
    """
    pipe = load(name, families.save(name, place / "teacher"))
    part, network = network_of(pipe)
    generator = torch.Generator().manual_seed(11)
    if rank is not None:
        from peft import LoraConfig, inject_adapter_in_model

        linear = [k for k, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "block" in k]
        settings = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=linear[::2])
        inject_adapter_in_model(settings, network, adapter_name="default")
    with torch.no_grad():
        for key, value in network.named_parameters():
            if rank is None or ".lora_" in key:
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
    state = {f"network.{k}": v for k, v in network.state_dict().items() if rank is None or ".lora_" in k}

    run = place / "run"
    size = {key: families.CALL[name][key] for key in ("height", "width") if key in families.CALL.get(name, {})}
    config = Train.model_validate(
        {
            "run": str(run),
            "teacher": {"path": str(place / "teacher"), "guidance_embedding": 2.0},  # Flux's; not what it defaults to
            "prompts": size,
            # From where DDPM starts, pictures of random weights are black and white only.
            "student": {"sigma_init": 1.0 if name.startswith("ddpm") else None, "lora": {"rank": rank, "alpha": alpha}}
            | student,
        }
    )
    for file in ("model_index.json", f"{part}/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        if (place / "teacher" / file).is_file():
            (run / "network" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place / "teacher" / file, run / "network" / file)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    checkpoint.save(run / "checkpoints", 7, {"average": Weights(state)}, {})
    return pipe


def pictures(name: str, pipe: Any, call: dict[str, Any], seed: int = 3) -> Tensor:
    """What a stock pipeline makes of two samples: latents where it gives them, else pictures in [0, 1]."""
    latent = {"output_type": "latent"} if name in families.PROMPTED else {"output_type": "np"}
    torch.manual_seed(seed)  # DiT, SD3 and Flux do not give their scheduler the generator
    arguments = families.conditions(name) | families.CALL.get(name, {}) | call | latent
    return torch.as_tensor(pipe(generator=torch.Generator().manual_seed(seed), **arguments).images)
