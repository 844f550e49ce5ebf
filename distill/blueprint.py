"""The networks of a run as `distill train` would build them, on the meta device: sizes and refusals without weights."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distill.budget import Networks
from distill.config import Train
from distill.data import Images
from distill.discriminator import Discriminator
from distill.encoded import Encoded
from distill.folders import pipeline_folder, read_facts
from distill.hardware import Hardware
from distill.ratio import real_images, real_rows
from distill.skeleton import META, Skeleton, check_weights, read_skeleton
from distill.source import null_of, read_prompts_of
from distill.subject import Subject, check_fit, subject_of
from distill.taps import Tap
from distill.teacher import Teacher, check_words


@dataclass(frozen=True)
class Blueprint:
    """The networks of a run; what it distils, with which nothing can be computed; the range of its noise levels."""

    networks: Networks
    teacher: Teacher
    subject: Subject
    levels: tuple[float, float]


def blueprint(config: Train, hardware: Hardware) -> Blueprint:
    """What a run would build, from the configurations of its teacher's folder. Raises ValueError as `train` would."""
    folder = pipeline_folder(str(config.teacher.path))
    skeleton = read_skeleton(folder, torch.float32, config.prompts.height, config.prompts.width)
    check_weights(skeleton.network, skeleton.part)
    rows, words = _prompts(config)
    teacher = _teacher(config, skeleton, rows)
    subject = subject_of(config, teacher, rows, META, "no" if hardware.autocast is None else "bf16")
    prompts = words if rows is None or not rows.embeddings else rows
    low, high = check_fit(config, subject, subject.n_conditions if prompts is None else len(prompts))
    trained: Any = subject.student
    student, fake = (replace(skeleton, network=part.network) for part in (trained, subject.fake))
    if config.fake.lora == config.student.lora:
        fake = student  # alike in all that is asked of it
    if config.real.name == "none":
        return Blueprint(Networks(skeleton, student, fake), teacher, subject, (low, high))
    read = skeleton if config.discriminator.features == "teacher" else fake
    tap = Tap(read.network, config.discriminator.levels)
    with META, torch.no_grad():
        features = [f.float() for f in tap.encode(read.call(1)[0])]
        heads = Discriminator(features, ratios=2 if config.target.ratio == "bridge" else 1)
    return Blueprint(
        Networks(skeleton, student, fake, heads, tap, _real(config, subject)), teacher, subject, (low, high)
    )


def _real(config: Train, subject: Subject) -> float:
    """Bytes of a run's real samples in memory, as far as they are here. Raises ValueError for those that do not fit."""
    real, size = config.real, math.prod(subject.shape)
    if real.name == "teacher":
        return 4.0 * real.count * size
    if real.name == "encoded" and subject.rows is not None:
        real_rows(subject, META)
    if real.name == "data" and (subject.latent or real.data.path is None or Path(real.data.path).exists()):
        found = real_images(config, subject)
        return float(len(found) * size * (4 if isinstance(found, Images) else 1))
    return 0.0


def _prompts(config: Train) -> tuple[Encoded | None, tuple[str, ...] | None]:
    """The rows or words of a run, as far as they are here."""
    prompts = config.prompt_source
    if all(Path(path).exists() for path in (prompts.file, prompts.encoded) if path is not None):
        return read_prompts_of(config)
    return None, None


def _teacher(config: Train, skeleton: Skeleton, rows: Encoded | None) -> Teacher:
    """The teacher of a skeleton, with which nothing can be computed.

    Raises ValueError as `distill.source.load_teacher`; rows: those that are here. Which VAE made them is not looked at.
    """
    source, prompts = config.teacher, config.prompt_source
    if rows is not None and rows.embeddings:
        null_of(rows, source.negative_prompt)
    check_words(skeleton.folder, source.negative_prompt, prompts.height, prompts.width)
    if skeleton.pipe is None:
        of = skeleton.folder, skeleton.network, skeleton.scheduler
        return Teacher.of_pixels(*of, source.guidance, source.guidance_interval)
    shapes = skeleton.embeddings(1) if skeleton.worded else {}
    null = {name: torch.zeros(shape, device=META) for name, shape in shapes.items()}
    size = {"height": prompts.height, "width": prompts.width}
    found = Teacher.of_pipeline(
        skeleton.pipe, source.guidance, **size, guidance_embedding=source.guidance_embedding, null=null
    )
    return replace(found, interval=source.guidance_interval, facts=read_facts(skeleton.folder))
