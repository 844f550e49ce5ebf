"""From a configuration to the objects that it names: the commands `teach` and `train` as functions."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill import checkpoint, data, divergences, pictures
from distill import config as schemas
from distill.adversary import Adversary, FakeHeads, ScoreOnly, TeacherHeads
from distill.atomic import atomic_write
from distill.card import teacher_card
from distill.discriminator import Discriminator
from distill.export import save_pipeline, teacher_scheduler
from distill.noise import Share, check_log_normal, check_range, karras_level, log_normal_level
from distill.optim import Update, adamw, learning_rate, student_rate
from distill.pretrain import Pretrainer, build_unet
from distill.real import RealImages, RealMixture, teacher_samples
from distill.run import Run, drive
from distill.student import OneStep
from distill.subject import Subject, load_subject, preview_start
from distill.taps import Tap
from distill.targets import Fixed
from distill.teacher import FACTS, pipeline_folder
from distill.trainer import Trainer, by_distance, by_level
from distill.weights import RatioWeight
from samplers import Denoiser, NetworkDenoiser, SampleNoise, denoiser_from, heun, karras_sigmas, sample
from samplers.schedules import karras_index

Progress = Callable[[int, dict[str, float]], None]
NETWORK = "network"  # in a run folder: the teacher's configuration without its weights
_DESCRIPTION = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
Reals = Callable[[SampleNoise, Any], Tensor]


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
        lambda path: pictures.save_grid(preview_teacher(average, shape, n_classes, device), path),
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
    accelerator = Accelerator()
    device = accelerator.device
    subject, low, high = checked_subject(config, device)
    heads = untrained_heads(config, subject, device)
    reals = None if config.real.name == "teacher" else real_samples(config, subject, accelerator)
    share = Share(config.seed, config.batch_size, accelerator.process_index, accelerator.num_processes)
    average = copy.deepcopy(subject.student).requires_grad_(False).to(device)
    run = Run(config, resume, accelerator)
    if accelerator.is_main_process and config.teacher.path is not None:
        _keep_network(pipeline_folder(config.teacher.path), run.folder / NETWORK)
    accelerator.wait_for_everyone()
    if config.real.name == "teacher":  # long work, begun when nothing is left to refuse
        reals = real_samples(config, subject, accelerator)

    student_denoiser, student_update = _prepare(
        accelerator, subject.student, config.student.optimizer, config.steps, schedule=student_rate
    )
    fake_steps = config.steps * config.fake.steps
    trained_heads = None if heads is None else accelerator.prepare(heads)
    fake_denoiser, fake_update = _prepare(
        accelerator, subject.fake, config.fake.optimizer, fake_steps, heads=trained_heads, lr=config.discriminator.lr
    )
    student_level = partial(karras_level, config=config.noise, sigma_min=low, sigma_max=high)
    modules: dict[str, nn.Module] = {"student": subject.student, "fake": subject.fake, "average": average}
    adversary: Adversary = ScoreOnly()
    if heads is not None and reals is not None and trained_heads is not None:
        modules["discriminator"] = heads
        adversary = _adversary(config, subject, heads, trained_heads, reals, student_level)
    ratio_weight = None
    if not config.divergence.constant:
        modules["ratio_weight"] = ratio_weight = _ratio_weight(config, low, high, accelerator)
    sigma_data = subject.fake.sigma_data
    trainer = Trainer(
        OneStep(student_denoiser, config.student.sigma_init),
        fake_denoiser,
        Fixed(subject.target),
        student_update,
        fake_update,
        student_level=student_level,
        fake_level=partial(log_normal_level, config=config.fake.noise, sigma_min=low, sigma_max=high),
        share=share,
        shape=subject.shape,
        conditions=subject.conditions,
        ratio_weight=ratio_weight,
        weighting=by_distance if config.noise.weighting == "distance" else by_level(sigma_data),
        adversary=adversary,
        adversarial_weight=config.adversarial_weight,
        fake_steps=config.fake.steps,
        sigma_data=sigma_data,
        average=(average, subject.student, config.student.ema),
        device=device,
    )
    student = OneStep(average, config.student.sigma_init)
    drive(
        run,
        trainer,
        config.steps,
        config.logging,
        modules,
        {"student": student_update.optimizer, "fake": fake_update.optimizer},
        lambda path: subject.preview(student, path),
        config.seed,
        progress,
    )
    return run.folder


def checked_subject(config: schemas.Train, device: torch.device) -> tuple[Subject, float, float]:
    """The subject and the range of noise levels, both found good before anything is written."""
    subject = load_subject(config, device)
    low, high = check_range(config.noise.sigma_min, config.noise.sigma_max, subject.sigma_min, subject.sigma_max)
    check_log_normal("fake.noise", config.fake.noise, low, high)
    if config.real.name == "teacher" and config.real.count < (subject.n_classes or 1):
        raise ValueError(f"real.count: {config.real.count} is less than one for each of {subject.n_classes} classes")
    return subject, low, high


def real_samples(config: schemas.Train, subject: Subject, accelerator: Accelerator) -> Reals | None:
    if config.real.name == "none":
        return None
    if subject.mixture is not None:
        return RealMixture(subject.mixture, accelerator.device)
    if config.real.name == "data":
        images = _images(config.real.data)
    else:
        images = teacher_samples(config.teacher, config.real, accelerator)
    return RealImages(images, subject.shape, subject.n_classes, accelerator.device)


def untrained_heads(config: schemas.Train, subject: Subject, device: torch.device) -> Discriminator | None:
    """Untrained heads that fit the features; sizes are read from one pass over one sample."""
    if config.real.name == "none":
        return None
    network, tap = _tapped(config, subject)
    where = next(network.parameters()).device
    cond = subject.conditions(SampleNoise(config.seed, [0]), where)
    x, sigma = torch.zeros(1, *subject.shape, device=where), torch.full((1,), network.sigma_max, device=where)
    with torch.no_grad():
        features = tap.encode(lambda: network(x, sigma, cond))
    if any(len(maps) != 1 for maps in features):
        raise ValueError(
            f"discriminator: the features of a {type(network.network).__name__} have {len(features[0])} rows a sample; "
            "read are networks with one (images, not the frames of a video)"
        )
    torch.manual_seed(config.seed)
    return Discriminator(features).to(device)


def _tapped(config: schemas.Train, subject: Subject) -> tuple[NetworkDenoiser, Tap]:
    """The denoiser that a discriminator reads, and where."""
    network = subject.network if config.discriminator.features == "teacher" else subject.fake
    assert network is not None, "a toy has no teacher network: refused by the schema"
    return network, Tap(network.network, config.discriminator.levels)


def _adversary(
    config: schemas.Train,
    subject: Subject,
    heads: Discriminator,
    train_heads: Callable[..., Tensor],
    reals: Reals,
    level: Callable[[Tensor], Tensor],
) -> Adversary:
    choice = config.discriminator
    network, tap = _tapped(config, subject)
    shared: dict[str, Any] = {
        "network": network,
        "tap": tap,
        "heads": heads,
        "train_heads": train_heads,
        "reals": reals,
        "weight": choice.weight,
        "r1": choice.r1,
        "r1_exact": choice.r1_form == "exact",
    }
    return FakeHeads(**shared) if choice.features == "fake" else TeacherHeads(**shared, level=level)


def _ratio_weight(config: schemas.Train, low: float, high: float, accelerator: Accelerator) -> RatioWeight:
    choice, noise = config.divergence, config.noise

    def index(sigma: Tensor) -> Tensor:
        """Where in the levels that are used, in [0, 1]."""
        return (karras_index(sigma, low, high, noise.rho) - noise.trim) / (1 - 2 * noise.trim)

    return RatioWeight(
        divergences.named(choice.name, choice.exponent),
        choice.clip,
        choice.normalise,
        choice.bins,
        choice.decay,
        index,
        partial(accelerator.reduce, reduction="sum"),
    ).to(accelerator.device)


def preview_teacher(denoiser: Denoiser, shape: tuple[int, ...], n_classes: int | None, device: torch.device) -> Tensor:
    """A grid of a denoiser's samples by 18 Heun steps, one column a class, [N, C, H, W]."""
    z, labels = preview_start(shape, n_classes, device)
    sigmas = karras_sigmas(18, denoiser.sigma_min, denoiser.sigma_max)  # type: ignore[attr-defined]
    return sample(heun, denoiser, sigmas[0] * z, sigmas, labels)


def _prepare(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: schemas.Optimizer,
    steps: int,
    schedule: Callable[..., float] = learning_rate,
    heads: nn.Module | None = None,
    lr: float | None = None,
) -> tuple[nn.Module, Update]:
    """A network ready for any number of processes, and its update; of `heads` with peak learning rate `lr` too."""
    network.to(accelerator.device)
    prepared, prepared_optimizer = accelerator.prepare(network, adamw(network, optimizer, heads, lr))
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
