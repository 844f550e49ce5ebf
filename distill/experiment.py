"""From a configuration to the objects that it names: the commands `teach` and `train` as functions.

`degrade`, and what a run of DisBack needs besides, is in `distill.disback`.
"""

import copy
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distill import checkpoint, disback, pictures, sharding, toy
from distill import config as schemas
from distill.adversary import Adversary, ScoreOnly
from distill.average import Average
from distill.card import teacher_card
from distill.export import save_pipeline, teacher_scheduler
from distill.folders import FACTS, NETWORK, network_part, part_folder, pipeline_folder, weight_files
from distill.launch import launched
from distill.lora import shared_copy
from distill.noise import Share, check_log_normal, log_normal_level, student_level
from distill.optim import learning_rate, prepare, replicated, student_rate
from distill.pretrain import Pretrainer, build_unet
from distill.ratio import (
    adversary_of,
    check_normalised,
    images_of,
    ratio_weight_of,
    real_samples,
    tell,
    untrained_heads,
)
from distill.run import Run, drive
from distill.student_run import HUB_ID
from distill.subject import checked_subject, preview_start, sampled, toy_preview
from distill.targets import Backtracking
from distill.trainer import Trainer, by_distance, by_level, unweighted
from samplers import Denoiser, denoiser_from
from samplers.atomic import atomic_write

Progress = Callable[[int, dict[str, float]], None]
_SCHEDULER = "scheduler/scheduler_config.json"


def teach(config: schemas.Teach, resume: bool, progress: Progress) -> Path:
    """Trains a teacher as the configuration says and returns its folder, RUN/model: a pipeline, or a toy's network."""
    mixture = None if config.mixture is None else toy.MIXTURES[config.mixture]()
    images = images_of(config.data) if mixture is None else toy.points(mixture, config.seed)
    accelerator = launched(config)
    device = accelerator.device
    share = Share(config.seed, config.batch_size, accelerator.process_index, accelerator.num_processes)
    n_classes = len(images.classes) or None
    low, high = (config.sigma_min, config.sigma_max) if mixture is None else (toy.SIGMA_MIN, toy.SIGMA_MAX)
    check_log_normal("noise", config.noise, low, high)
    scheduler = teacher_scheduler(config.sigma_data, low, high)
    torch.manual_seed(config.seed)
    if mixture is None:
        network = denoiser_from(
            build_unet(config.network, config.data.size, config.data.channels, n_classes), scheduler
        ).to(device)
    else:
        spread = toy.standard_deviation(mixture)
        network = toy.denoiser(mixture.dim, config.toy.hidden, config.toy.layers, spread).to(device)
    averaged = copy.deepcopy(network).requires_grad_(False).eval()
    average = Average(averaged, network, config.ema)
    run = Run(config, resume, accelerator)

    denoiser, update = prepare(accelerator, network, config.optimizer, config.steps)
    denoiser.train()
    pretrainer = Pretrainer(
        denoiser,
        update,
        images,
        partial(log_normal_level, config=config.noise, sigma_min=low, sigma_max=high),
        share,
        average=average,
        null_label=n_classes,
        label_dropout=config.label_dropout if n_classes else 0.0,
        sigma_data=network.sigma_data,
        device=device,
    )
    shape = images.shape

    def preview(path: Path | None) -> None:
        generate = sampled(averaged)
        if mixture is not None:
            return toy_preview(mixture.to(device), device)(generate, path)
        return pictures.save_grid(generate(*preview_start(shape, n_classes, device)), path)

    drive(
        run,
        pretrainer,
        config.steps,
        config.logging,
        {"teacher": network, "average": averaged},
        {"teacher": update.optimizer},
        preview,
        config.seed,
        progress,
    )
    folder = run.folder / "model"
    if accelerator.is_main_process:
        if config.mixture is not None:
            toy.save_denoiser(folder, averaged, config.mixture, config.toy)
        else:
            classes = list(images.classes)
            facts = {"kind": "teacher", "classes": classes, "null_label": n_classes}
            save_pipeline(folder, averaged.network, scheduler, facts, teacher_card(config, classes))
    accelerator.wait_for_everyone()
    return folder


def train(config: schemas.Train, resume: bool, progress: Progress) -> Path:
    """Distils a teacher as the configuration says and returns the run folder."""
    accelerator = launched(config)
    device = accelerator.device
    subject, low, high = checked_subject(config, device, accelerator.mixed_precision)
    heads = untrained_heads(config, subject, device)
    reals = None if config.real.name == "teacher" else real_samples(config, subject, accelerator)
    share = Share(config.seed, config.batch_size, accelerator.process_index, accelerator.num_processes)
    parts = config.memory.accumulation or accelerator.gradient_accumulation_steps
    share.numbers(0, 0, parts)  # refuses parts that are not whole
    check_normalised(config, parts)
    stated = config
    if parts > 1 and not config.divergence.constant:  # what is normalised over a part is not what is over another
        config = config.model_copy(update={"memory": config.memory.model_copy(update={"accumulation": parts})})
    averaged = sharding.place(accelerator, shared_copy(subject.student).requires_grad_(False))
    walked = disback.recorded_path(stated, subject)
    run = Run(config, resume, accelerator)
    if accelerator.is_main_process and config.teacher.path is not None:
        _keep_teacher(config, run.folder / NETWORK)
    accelerator.wait_for_everyone()
    if config.real.name == "teacher":  # long work, begun when nothing is left to refuse
        reals = real_samples(config, subject, accelerator)
    begun_with = run.folder / NETWORK / "path.sha256"
    if walked is None and config.target.name != "fixed" and begun_with.is_file():
        raise ValueError(f"--resume: the path that this run began with is no longer in {config.path}")
    if walked is None and config.target.name != "fixed":
        # Stage 1 has networks of its own: these are let go (some know themselves), and made again after it.
        del subject, heads, reals, averaged
        gc.collect()
        disback.degrade(stated)
        gc.collect()
        return train(stated, True, progress)
    if walked is not None and accelerator.is_main_process:
        _keep_identity(walked.identity, begun_with, f"the path in {walked.folder} is")
    accelerator.wait_for_everyone()
    starts = disback.start_samples(config, subject, device)
    target = disback.target(config, subject, walked, accelerator)

    rate = (
        student_rate if config.target.name == "fixed" else learning_rate
    )  # elsewhere the fake score knows the student
    student_denoiser, student_update = prepare(
        accelerator, subject.student, config.student.optimizer, config.steps, schedule=rate
    )
    fake_steps = config.steps * config.fake.steps
    trained_heads = None if heads is None else replicated(accelerator, heads)
    fake_denoiser, fake_update = prepare(
        accelerator, subject.fake, config.fake.optimizer, fake_steps, heads=trained_heads, lr=config.discriminator.lr
    )
    average = Average(averaged, subject.student, config.student.ema, config.memory.ema)
    student_levels = partial(student_level, config=config.noise, sigma_min=low, sigma_max=high)
    fake_levels = partial(student_level, config=config.fake_noise, sigma_min=low, sigma_max=high)
    modules: dict[str, nn.Module] = {"student": subject.student, "fake": subject.fake, "average": averaged}
    adversary: Adversary = ScoreOnly()
    if heads is not None and reals is not None and trained_heads is not None:
        modules["discriminator"] = heads
        adversary = adversary_of(config, subject, heads, trained_heads, reals, starts, student_levels)
    del starts  # the first student, which a bridge lets go of at its end
    if isinstance(target, Backtracking):
        modules["target"] = target
    ratio_weight = None
    if not config.divergence.constant:
        modules["ratio_weight"] = ratio_weight = ratio_weight_of(config, low, high, parts, accelerator)
    sigma_data = subject.fake.sigma_data
    tell(config, low, high, parts)
    trainer = Trainer(
        subject.as_student(student_denoiser),
        fake_denoiser,
        target,
        student_update,
        fake_update,
        student_level=student_levels,
        fake_level=fake_levels,
        share=share,
        shape=subject.shape,
        conditions=subject.conditions,
        ratio_weight=ratio_weight,
        weighting={"distance": by_distance, "level": by_level(sigma_data), "none": unweighted}[config.noise.weighting],
        adversary=adversary,
        adversarial_weight=config.adversarial_weight,
        fake_steps=config.fake.steps,
        sigma_data=sigma_data,
        average=average,
        parts=parts,
        hold=config.student.hold,
        begins_last=walked is not None,
        device=device,
    )

    def preview(path: Path | None) -> None:
        with average.shown() as network:
            subject.preview(subject.as_student(network), path)

    measure = None
    if config.logging.mismatch_every is not None:
        denoisers: dict[str, Denoiser] = {"target": target, "teacher": subject.target}
        if config.student.steps == 1:  # of several steps the fake score knows the one that is held, not what all make
            denoisers["fake"] = subject.fake
        rows = min(256, len(share.numbers(0, 0, parts)))
        measure = partial(disback.measured, config, subject, denoisers, (low, high), rows, device)
    drive(
        run,
        trainer,
        config.steps,
        config.logging,
        modules,
        {"student": student_update.optimizer, "fake": fake_update.optimizer},
        preview,
        config.seed,
        progress,
        measure,
    )
    return run.folder


def _keep_teacher(config: schemas.Train, folder: Path) -> None:
    """Copies the teacher's configuration, so that a run can be exported when its teacher is gone, and its hash.

    Raises ValueError where a resumed run began with another teacher.
    """
    path = str(config.teacher.path)
    kept: dict[str, Path] = {}
    if config.teacher.name == "pipeline":
        source = pipeline_folder(path)
        part = network_part(source)
        weights = weight_files(part_folder(source, part))
        kept = {name: source / name for name in ("model_index.json", "vae/config.json", FACTS)}
        kept |= {f"{part}/config.json": part_folder(source, part) / "config.json"}
        kept |= {_SCHEDULER: part_folder(source, "scheduler") / "scheduler_config.json"}
    else:
        source = toy.teacher_folder(path)
        weights = sorted(source.glob("*.safetensors"))
    identity = " ".join(checkpoint.sha256(file) for file in weights)
    if not Path(path).exists():  # a repository's id, found in the hub's cache
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / HUB_ID) as file:
            file.write(path.encode())
    _keep_identity(identity, folder / "teacher.sha256", f"the weights in {source} are")
    for name, original in kept.items():
        if original.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / name) as file:  # a resumed run has a good copy already
                file.write(original.read_bytes())


def _keep_identity(identity: str, file: Path, what: str) -> None:
    """Writes what a run has begun with, or raises ValueError where a resumed run began with something else."""
    if file.is_file() and file.read_text() != identity:
        raise ValueError(f"--resume: {what} not what this run began with")
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as opened:
        opened.write(identity.encode())
