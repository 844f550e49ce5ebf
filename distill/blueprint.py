"""The networks of a run as `distill train` would build them, on the meta device: sizes and refusals without weights."""

from dataclasses import replace
from typing import Any

import torch

from distill.budget import Networks
from distill.config import Train
from distill.discriminator import Discriminator
from distill.folders import pipeline_folder, read_facts
from distill.hardware import Hardware
from distill.lora import adapted
from distill.sections import Lora
from distill.skeleton import META, Skeleton, check_weights, read_skeleton
from distill.stock import Steps, student_steps
from distill.taps import Tap
from distill.teacher import Teacher, Words
from samplers import NetworkDenoiser
from samplers.adapters import coordinates_of
from samplers.prompts import PIPELINES


def blueprint(config: Train, hardware: Hardware) -> tuple[Networks, Teacher, Steps]:
    """The networks of a run, the teacher that they are of and the student's steps. Raises ValueError as `train`."""
    folder = pipeline_folder(str(config.teacher.path))
    size = config.prompts.height, config.prompts.width
    dtype = hardware.autocast if config.teacher.dtype == "auto" else getattr(torch, config.teacher.dtype)
    skeleton = read_skeleton(folder, dtype or torch.float32, *size)
    kind = PIPELINES[skeleton.kind].network if skeleton.kind in PIPELINES else "unet"
    check_weights(skeleton.network, folder / kind)
    skeleton.network.requires_grad_(False)
    teacher = _teacher(config, skeleton)
    steps = student_steps(
        skeleton.scheduler,
        teacher.denoiser.coordinates,
        skeleton.kind,
        config.student.sigma_init,
        config.student.steps,
        skeleton.network.config,
    )
    student = _copy(config.student.lora, skeleton, teacher.denoiser)
    fake = student if config.fake.lora == config.student.lora else _copy(config.fake.lora, skeleton, teacher.denoiser)
    if config.real.name == "none":
        return Networks(skeleton, student, fake), teacher, steps
    read = skeleton if config.discriminator.features == "teacher" else fake
    tap = Tap(read.network, config.discriminator.levels)
    with META, torch.no_grad():
        features = [f.float() for f in tap.encode(read.call(1)[0])]
        heads = Discriminator(features, ratios=2 if config.target.ratio == "bridge" else 1)
    return Networks(skeleton, student, fake, heads, tap), teacher, steps


def _teacher(config: Train, skeleton: Skeleton) -> Teacher:
    """The teacher of a skeleton, with which nothing can be computed. Raises ValueError as `Teacher.load`."""
    network, facts = skeleton.network, read_facts(skeleton.folder)
    denoiser = NetworkDenoiser(network, coordinates_of(skeleton.scheduler)).eval()
    known: dict[str, Any] = {
        "guidance": config.teacher.guidance, "facts": facts, "interval": config.teacher.guidance_interval,
        "pipe": skeleton.pipe,
    }  # fmt: skip
    if skeleton.worded:
        null = {name: torch.zeros(shape, device=META) for name, shape in skeleton.embeddings(1).items()}
        return Teacher(denoiser, skeleton.scheduler, skeleton.shape, words=Words(skeleton.pipe, null), **known)
    label = network.config.get("num_embeds_ada_norm")
    n_classes = len(facts["classes"]) if facts.get("classes") else network.config.get("num_class_embeds") or label
    null_label = facts.get("null_label", label)
    return Teacher(denoiser, skeleton.scheduler, skeleton.shape, n_classes, null_label, **known)


def _copy(lora: Lora, skeleton: Skeleton, denoiser: NetworkDenoiser) -> Skeleton:
    """What is trained: the network in float32, or adapters on the teacher's own."""
    if lora.rank is not None:
        return replace(skeleton, network=adapted(denoiser, lora, 0).network)
    network = read_skeleton(skeleton.folder, torch.float32, skeleton.height, skeleton.width).network
    return replace(skeleton, network=network.requires_grad_(True))
