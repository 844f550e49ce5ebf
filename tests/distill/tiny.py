"""Tiny but real: networks of a few thousand weights, teachers of random weights, and small configurations."""

from pathlib import Path
from typing import Any

import torch
import yaml

from distill.export import save_pipeline, teacher_scheduler
from distill.pretrain import build_unet
from distill.sections import Network

TEACH: dict[str, Any] = {
    "command": "teach",
    "run": "teacher",
    "network": {"channels": [8]},
    "batch_size": 8,
    "steps": 6,
    "sigma_data": 0.75,
    "logging": {"log_every": 1, "sample_every": 100, "checkpoint_every": 2},
}
TRAIN: dict[str, Any] = {
    "command": "train",
    "run": "student",
    "teacher": {"path": "pipeline"},
    "student": {"sigma_init": 2.5, "optimizer": {"lr": 1e-3}},
    "noise": {"sigma_min": 0.02, "sigma_max": 10.0},
    "batch_size": 8,
    "steps": 6,
    "logging": {"log_every": 1, "sample_every": 100, "checkpoint_every": 2},
}
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.01, 20.0, 0.75


def unet(n_classes: int | None = 10, seed: int = 0, **network: Any) -> Any:
    """A UNet2DModel for images [B, 1, 8, 8] with random weights, as the library builds it."""
    torch.manual_seed(seed)
    return build_unet(Network(**({"channels": (8,)} | network)), 8, 1, n_classes).eval()


def save_teacher(folder: Path, n_classes: int | None = 10, seed: int = 0) -> Path:
    """A pipeline folder as `distill teach` writes it, with a network that nobody trained."""
    facts = {"kind": "teacher", "classes": [str(k) for k in range(n_classes or 0)], "null_label": n_classes}
    scheduler = teacher_scheduler(SIGMA_DATA, SIGMA_MIN, SIGMA_MAX)
    save_pipeline(folder, unet(n_classes, seed), scheduler, facts, "# A teacher of random weights\n")
    return folder


def write_config(folder: Path, base: dict[str, Any], name: str = "config.yaml", **changes: Any) -> Path:
    """A configuration file in `folder`: `base` with some of its keys replaced."""
    file = folder / name
    file.write_text(yaml.safe_dump(base | changes))
    return file
