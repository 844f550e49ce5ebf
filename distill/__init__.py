"""One-step students of diffusion models.

config       schemas of the experiments (no torch)        sections      their parts
cli          the `distill` command
experiment   a configuration -> the objects it names      run           run folders and the loop that fills them
plan         what a run would do: `--dry-run`             progress      a bar, or lines
blueprint    a run's networks without weights, of a       skeleton      pipeline folder's configurations
budget       bytes and FLOPs of a run, by                 memory        passes on the meta device (hardware: GPUs)
launch       what a launcher asks for, or is refused      sharding      FSDP2 (together: work shared by processes)
teacher      a diffusers folder as a frozen denoiser      pretrain      train a small teacher
subject      what a run distils: a teacher, or a toy      toy           exact mixtures and networks for them
source       the teacher of a configuration, its prompts  captions      prompts of files and folders
encode       latents and embeddings, made once            encoded       and read (rows: what a row is)
folders      pipeline folders, from local files           lora          adapters on shared weights
student      x = D(sigma_init z, sigma_init)              data          digits, image folders
losses       pure functions of tensors and denoisers      divergences   f, h(r): one table (weights: r -> a batch's h)
taps         features of a network's encoder, by hooks    discriminator heads on them, whose logit is ln r
adversary    what a discriminator adds to the trainer     real          its real samples: data, or the teacher's
ratio        heads, reals, weights of a configuration     methods       the sections that are the method
targets      what the student is pulled towards           trainer       the one alternating loop
disback      configuration -> path, and target on it      degradation   stage 1: the teacher learns the student
nodes        a path on disk: nodes, manifest              mismatch      a score's distance to a student's own
noise        samples of a process, noise levels           optim         one network's update (average: its mean)
checkpoint   resumable, safetensors (atomic: files)       export        students as diffusers folders (card: cards)
stock        noise levels that a stock pipeline takes     student_run   a run's student, read from its folder
recipe       what a folder would make images by           generate      images by a recipe
latents      pipelines of latents: sizes, VAE inverted    pictures      grids and curves
gaussian     a Gaussian of data or latents, streaming
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.adversary import Adversary, FakeHeads, TeacherHeads
    from distill.discriminator import Discriminator, log_ratio
    from distill.divergences import DIVERGENCES, FDivergence, alpha
    from distill.export import export_lora, export_student
    from distill.generate import load_generator
    from distill.losses import (
        adversarial_loss,
        denoising_loss,
        difference_penalty,
        discriminator_loss,
        distribution_matching_loss,
        gradient_penalty,
        level_weight,
        matching_weight,
    )
    from distill.mismatch import score_mismatch
    from distill.nodes import DegradationPath
    from distill.student import OneStep
    from distill.taps import Tap
    from distill.targets import Backtracking, Fixed, Nodes, ScoreInterpolation, WeightInterpolation
    from distill.teacher import Teacher
    from distill.trainer import Trainer, train
    from distill.weights import RatioWeight

_HOME = {
    "DIVERGENCES": "divergences",
    "Adversary": "adversary",
    "Backtracking": "targets",
    "DegradationPath": "nodes",
    "Discriminator": "discriminator",
    "FDivergence": "divergences",
    "FakeHeads": "adversary",
    "Fixed": "targets",
    "Nodes": "targets",
    "OneStep": "student",
    "RatioWeight": "weights",
    "ScoreInterpolation": "targets",
    "Tap": "taps",
    "Teacher": "teacher",
    "TeacherHeads": "adversary",
    "Trainer": "trainer",
    "WeightInterpolation": "targets",
    "adversarial_loss": "losses",
    "alpha": "divergences",
    "denoising_loss": "losses",
    "difference_penalty": "losses",
    "discriminator_loss": "losses",
    "distribution_matching_loss": "losses",
    "export_lora": "export",
    "export_student": "export",
    "gradient_penalty": "losses",
    "level_weight": "losses",
    "load_generator": "generate",
    "log_ratio": "discriminator",
    "matching_weight": "losses",
    "score_mismatch": "mismatch",
    "train": "trainer",
}
__all__ = [
    "DIVERGENCES",
    "Adversary",
    "Backtracking",
    "DegradationPath",
    "Discriminator",
    "FDivergence",
    "FakeHeads",
    "Fixed",
    "Nodes",
    "OneStep",
    "RatioWeight",
    "ScoreInterpolation",
    "Tap",
    "Teacher",
    "TeacherHeads",
    "Trainer",
    "WeightInterpolation",
    "adversarial_loss",
    "alpha",
    "denoising_loss",
    "difference_penalty",
    "discriminator_loss",
    "distribution_matching_loss",
    "export_lora",
    "export_student",
    "gradient_penalty",
    "level_weight",
    "load_generator",
    "log_ratio",
    "matching_weight",
    "score_mismatch",
    "train",
]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is used: importing this package costs the command line nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"distill.{_HOME[name]}"), name)
