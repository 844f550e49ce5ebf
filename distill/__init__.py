"""One-step students of diffusion models.

config       schemas of the experiments (no torch)        cli         the `distill` command
experiment   a configuration -> the objects it names      run         run folders and the loop that fills them
teacher      a diffusers folder as a frozen denoiser      pretrain    train a small teacher
student      x = D(sigma_init z, sigma_init)              data        digits, image folders
losses       pure functions of tensors and denoisers      divergences f, h(r): one table
targets      what the student is pulled towards           trainer     the one alternating loop
noise        samples of a process, noise levels           optim       one network's update
checkpoint   resumable, safetensors (atomic: whole files) export      students as diffusers folders (card: model cards)
generate     images from a folder                         pictures    grids and curves
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.divergences import DIVERGENCES, FDivergence
    from distill.export import export_student
    from distill.generate import load_generator
    from distill.losses import denoising_loss, distribution_matching_loss, matching_weight
    from distill.student import OneStep
    from distill.targets import Fixed
    from distill.teacher import Teacher
    from distill.trainer import Adversary, Trainer, train

_HOME = {
    "DIVERGENCES": "divergences",
    "Adversary": "trainer",
    "FDivergence": "divergences",
    "Fixed": "targets",
    "OneStep": "student",
    "Teacher": "teacher",
    "Trainer": "trainer",
    "denoising_loss": "losses",
    "distribution_matching_loss": "losses",
    "export_student": "export",
    "load_generator": "generate",
    "matching_weight": "losses",
    "train": "trainer",
}
__all__ = [
    "DIVERGENCES",
    "Adversary",
    "FDivergence",
    "Fixed",
    "OneStep",
    "Teacher",
    "Trainer",
    "denoising_loss",
    "distribution_matching_loss",
    "export_student",
    "load_generator",
    "matching_weight",
    "train",
]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is used: importing this package costs the command line nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"distill.{_HOME[name]}"), name)
