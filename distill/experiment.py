"""From a configuration to the objects that it names: the commands `teach` and `train` as functions."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill import checkpoint, data
from distill import config as schemas
from distill.atomic import atomic_write
from distill.card import teacher_card
from distill.divergences import DIVERGENCES
from distill.export import save_pipeline, teacher_scheduler
from distill.noise import GENERATION, Share, check_log_normal, check_range, karras_level, log_normal_level
from distill.optim import Update, adamw, learning_rate, student_rate
from distill.pretrain import Pretrainer, build_unet
from distill.run import Run, drive
from distill.student import OneStep
from distill.targets import Fixed
from distill.teacher import FACTS, Teacher, pipeline_folder
from distill.trainer import Trainer
from samplers import Denoiser, SampleNoise, denoiser_from, heun, karras_sigmas, sample

Progress = Callable[[int, dict[str, float]], None]
NETWORK = "network"  # in a run folder: the teacher's configuration without its weights
_DESCRIPTION = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
PREVIEW_ROWS = 8


def teach(config: schemas.Teach, resume: bool, progress: Progress) -> Path:
    """Trains a teacher as the configuration says and returns its pipeline folder, RUN/model."""
    images = _images(config.data)
    accelerator = Accelerator()
    device = accelerator.device
    share = Share(config.seed, config.batch_size, accelerator.process_index, accelerator.num_processes)
    n_classes = len(images.classes) or None
    check_log_normal("noise", config.noise, config.sigma_min, config.sigma_max)
    scheduler = teacher_scheduler(config.sigma_data, config.sigma_min, config.sigma_max)
    torch.manual_seed(config.seed)
    network = denoiser_from(
        build_unet(config.network, config.data.size, config.data.channels, n_classes), scheduler
    ).to(device)
    average = copy.deepcopy(network).requires_grad_(False).eval()
    run = Run(config, resume, accelerator)

    denoiser, update = _prepare(accelerator, network, config.optimizer, config.steps)
    denoiser.train()
    level = partial(log_normal_level, config=config.noise, sigma_min=config.sigma_min, sigma_max=config.sigma_max)
    pretrainer = Pretrainer(
        denoiser,
        update,
        images,
        level,
        share,
        average=(average, network, config.ema),
        null_label=n_classes,
        label_dropout=config.label_dropout if n_classes else 0.0,
        sigma_data=config.sigma_data,
        device=device,
    )
    shape = tuple(images.images.shape[1:])
    drive(
        run,
        pretrainer,
        config.steps,
        config.logging,
        {"teacher": network, "average": average},
        {"teacher": update.optimizer},
        lambda: preview_teacher(average, shape, n_classes, device),
        config.seed,
        progress,
    )
    folder = run.folder / "model"
    if accelerator.is_main_process:
        classes = list(images.classes)
        facts = {"kind": "teacher", "classes": classes, "null_label": n_classes}
        save_pipeline(folder, average.network, scheduler, facts, teacher_card(config, classes))
    accelerator.wait_for_everyone()
    return folder


def train(config: schemas.Train, resume: bool, progress: Progress) -> Path:
    """Distils a teacher as the configuration says and returns the run folder."""
    teacher = Teacher.load(config.teacher.path, config.teacher.guidance)
    accelerator = Accelerator()
    device = accelerator.device
    share = Share(config.seed, config.batch_size, accelerator.process_index, accelerator.num_processes)
    noise = config.noise
    low, high = check_range(noise.sigma_min, noise.sigma_max, teacher.sigma_min, teacher.sigma_max)
    check_log_normal("fake.noise", config.fake.noise, low, high)
    OneStep(teacher.denoiser, config.student.sigma_init)  # refuses a start outside the range before anything is written
    teacher.denoiser.to(device)
    student_network, fake_network = teacher.clone().eval(), teacher.clone().eval()
    average = copy.deepcopy(student_network).requires_grad_(False)
    run = Run(config, resume, accelerator)
    if accelerator.is_main_process:
        _keep_network(pipeline_folder(config.teacher.path), run.folder / NETWORK)
    accelerator.wait_for_everyone()

    optimizer = config.student.optimizer
    student_denoiser, student_update = _prepare(
        accelerator, student_network, optimizer, config.steps, schedule=student_rate
    )
    fake_steps = config.steps * config.fake.steps
    fake_denoiser, fake_update = _prepare(accelerator, fake_network, config.fake.optimizer, fake_steps)
    trainer = Trainer(
        OneStep(student_denoiser, config.student.sigma_init),
        fake_denoiser,
        Fixed(teacher.guided),
        student_update,
        fake_update,
        student_level=partial(karras_level, config=noise, sigma_min=low, sigma_max=high),
        fake_level=partial(log_normal_level, config=config.fake.noise, sigma_min=low, sigma_max=high),
        share=share,
        shape=teacher.shape,
        conditions=teacher.conditions,
        divergence=DIVERGENCES[config.divergence.name],
        fake_steps=config.fake.steps,
        sigma_data=teacher.denoiser.sigma_data,
        average=(average, student_network, config.student.ema),
        device=device,
    )
    student = OneStep(average, config.student.sigma_init)
    drive(
        run,
        trainer,
        config.steps,
        config.logging,
        {"student": student_network, "fake": fake_network, "average": average},
        {"student": student_update.optimizer, "fake": fake_update.optimizer},
        lambda: preview_student(student, teacher.shape, teacher.n_classes, device),
        config.seed,
        progress,
    )
    return run.folder


def preview_teacher(denoiser: Denoiser, shape: tuple[int, ...], n_classes: int | None, device: torch.device) -> Tensor:
    """A grid of a denoiser's samples by 18 Heun steps, one column a class, [N, C, H, W]."""
    z, labels = _preview_start(shape, n_classes, device)
    sigmas = karras_sigmas(18, denoiser.sigma_min, denoiser.sigma_max)  # type: ignore[attr-defined]
    return sample(heun, denoiser, sigmas[0] * z, sigmas, labels)


@torch.no_grad()
def preview_student(student: OneStep, shape: tuple[int, ...], n_classes: int | None, device: torch.device) -> Tensor:
    """The same grid from a one-step student."""
    return student(*_preview_start(shape, n_classes, device))


def _preview_start(shape: tuple[int, ...], n_classes: int | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Noise and labels of a grid of ten columns; always the same noise, so that grids can be compared."""
    n = 10 * PREVIEW_ROWS
    z = SampleNoise(0, range(n), GENERATION).normal(shape, device=device)
    return z, None if n_classes is None else torch.arange(n, device=device) % 10 % n_classes


def _prepare(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: schemas.Optimizer,
    steps: int,
    schedule: Callable[..., float] = learning_rate,
) -> tuple[nn.Module, Update]:
    """A network ready for any number of processes, and its update."""
    network.to(accelerator.device)
    prepared, prepared_optimizer = accelerator.prepare(network, adamw(network, optimizer))
    rate = partial(schedule, optimizer, steps=steps)
    return prepared, Update(prepared_optimizer, rate, optimizer.clip, accelerator.backward)


def _images(config: schemas.Data) -> data.Images:
    if config.name == "digits":
        return data.digits("train")
    return data.folder(str(config.path), config.size, config.channels)


def _keep_network(teacher_folder: Path, folder: Path) -> None:
    """Copies the teacher's configuration, so that a run can be exported when its teacher is gone, and its hash.

    Raises ValueError where a resumed run began with another teacher.
    """
    weights = sorted((teacher_folder / "unet").glob("*.safetensors"))
    identity = " ".join(checkpoint.sha256(file) for file in weights).encode()
    known = folder / "teacher.sha256"
    if known.is_file() and known.read_bytes() != identity:
        raise ValueError(f"--resume: the weights in {teacher_folder} are not those that this run began with")
    kept = {name: teacher_folder / name for name in (*_DESCRIPTION, FACTS)}
    contents = {name: file.read_bytes() for name, file in kept.items() if file.is_file()} | {known.name: identity}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as file:  # a resumed run has a good copy already
            file.write(content)
