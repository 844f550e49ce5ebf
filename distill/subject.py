"""What a run distils: a diffusers teacher or an exact toy, and the networks of the student and the fake score."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import pictures, toy
from distill.config import FirstStage, Train
from distill.encoded import Encoded
from distill.lora import adapted
from distill.nodes import fingerprint
from distill.noise import GENERATION, check_log_normal, check_range
from distill.sections import Lora
from distill.source import frozen_dtype, load_teacher
from distill.stock import Steps, student_steps
from distill.student import Student
from distill.teacher import Teacher
from samplers import Denoiser, GaussianMixture, NetworkDenoiser, SampleNoise, heun, karras_sigmas, sample
from samplers.adapters import FlowMatching
from samplers.schedules import karras_sigma

PREVIEW_ROWS = 8  # of ten pixel images; of latents, which are decoded, it is one
PREVIEW_POINTS = 2000
FLOW_TIMES = (0.02, 0.98)
JUDGED_CONDITIONS = 100
Generate = Callable[[Tensor, Any, SampleNoise], Tensor]


@dataclass(frozen=True)
class Subject:
    """A teacher as the trainer needs it.

    target: the denoiser to match, guided if the run says so. network: the denoiser whose encoder can be read and whose
    weights can be copied, None of an exact toy. student, fake: what is trained, at its start. as_student(denoiser):
    the student that a denoiser makes. shape: of a sample. n_conditions: classes or prompts; None is neither.
    conditions(noise, device): of a batch; condition_of(numbers [B], on the CPU): those of samples by number.
    preview(generate, path): draws what generate(z, cond, noise) makes of standard normal z [N, ...]; path None: takes
    part and draws nothing. mixture: what a toy is. rows: real latents with their prompts or classes. latent: whether a
    VAE decodes samples. prints: fingerprints of what a degradation path is made from, where there is one. usual: the
    noise levels that are trained at if nobody says; None is all. classes: labels by name. steps: the student's, with
    the stock pipeline that takes them; None of a toy.
    """

    target: Denoiser
    network: NetworkDenoiser | None
    student: nn.Module
    fake: NetworkDenoiser
    as_student: Callable[[Denoiser], Student]
    shape: tuple[int, ...]
    n_conditions: int | None
    sigma_min: float
    sigma_max: float
    conditions: Callable[[SampleNoise, torch.device | str], Any]
    preview: Callable[[Generate, Path | None], None]
    condition_of: Callable[[Tensor], Any] = lambda numbers: None
    mixture: GaussianMixture | None = None
    rows: Encoded | None = None
    latent: bool = False
    prints: dict[str, str] = field(default_factory=dict)
    usual: tuple[float, float] | None = None
    classes: dict[str, int] = field(default_factory=dict)
    steps: Steps | None = None

    def range(self, low: float | None, high: float | None) -> tuple[float, float]:
        """A configured range of noise levels, its open ends filled. Raises ValueError for one outside the teacher's."""
        usual = self.usual or (self.sigma_min, self.sigma_max)
        ends = usual[0] if low is None else low, usual[1] if high is None else high
        return check_range(*ends, self.sigma_min, self.sigma_max)


def load_subject(config: Train | FirstStage, device: torch.device, precision: str = "no") -> Subject:
    """The subject that a configuration names; its networks are made on the CPU, the target is on `device`.

    precision: accelerate's mixed precision, in which frozen networks are held if the configuration leaves it open.
    Raises ValueError as `Teacher.load`, for a student's start outside the teacher's range, prompts that are missing, of
    no use or made by other text encoders, and a dtype that the device lacks.
    """
    if config.teacher.name != "pipeline":
        return _toy(config, device)
    return subject_of(config, *load_teacher(config, device), device, precision)


def subject_of(
    config: Train | FirstStage, teacher: Teacher, rows: Encoded | None, device: torch.device, precision: str = "no"
) -> Subject:
    """As `load_subject`, of a teacher with its prompts, in float32 on the CPU, and the rows encoded for it."""
    network: Any = teacher.denoiser.network
    steps = student_steps(
        teacher.scheduler,
        teacher.denoiser.coordinates,
        type(teacher.pipe).__name__ if teacher.pipe is not None else "",
        config.student.sigma_init if isinstance(config, Train) else config.sigma_init,
        config.student.steps if isinstance(config, Train) else config.student_steps,
        network.config,
        config.teacher.guidance_embedding,
    )
    dtype = frozen_dtype(config.teacher.dtype, precision, device)
    student_lora = config.student.lora if isinstance(config, Train) else Lora()
    fake_lora = config.fake.lora if isinstance(config, Train) else config.lora
    prints: dict[str, str] = {}
    if device.type != "meta" and (isinstance(config, FirstStage) or config.target.name != "fixed"):
        # Of the weights in float32, however the networks hold them: at its start an adapted one is the teacher.
        made = (teacher.denoiser, teacher.denoiser)
        prints = _prints(config, *made, Student(teacher.denoiser, steps.sigmas, steps.start, steps.noises), fake_lora)
    copies = [teacher.clone() if lora.rank is None else None for lora in (student_lora, fake_lora)]
    # After full copies are made, and before adapters are put on it, which then share what is on the device.
    teacher.denoiser.to(dtype).to(device)
    student, fake = (
        adapted(teacher.denoiser, lora, config.seed + k) if made is None else made
        for k, (made, lora) in enumerate(zip(copies, (student_lora, fake_lora), strict=True))
    )
    if config.memory.checkpointing:
        for trained in (student, fake):
            _checkpoint(trained.network)
    if teacher.pipe is not None:
        teacher.pipe.to(device)
    latent = teacher.pipe is not None
    count, at_once = (10, 1) if latent else (10 * PREVIEW_ROWS, 10 * PREVIEW_ROWS)

    def preview(generate: Generate, path: Path | None) -> None:
        noise = SampleNoise(0, range(count), GENERATION)
        z = noise.normal(teacher.shape, device=device)
        with torch.no_grad():
            x = []
            for k in range(0, count, at_once):
                part = slice(k, k + at_once)
                cond = teacher.condition_of(torch.arange(count)[part] % 10, device)
                x.append(generate(z[part], cond, noise[part]))
            if path is not None:
                pictures.save_grid(teacher.pictures(torch.cat(x)), path)

    prompts = None if teacher.words is None else teacher.words.prompts
    return Subject(
        teacher.guided,
        teacher.denoiser,
        student.eval(),
        fake.eval(),
        lambda denoiser: Student(denoiser, steps.sigmas, steps.start, steps.noises),
        teacher.shape,
        teacher.n_classes if prompts is None else len(prompts),
        teacher.sigma_min,
        teacher.sigma_max,
        teacher.conditions,
        preview,
        lambda numbers: teacher.condition_of(numbers, device),
        rows=rows,
        latent=latent,
        prints=prints,
        usual=_usual_range(teacher.denoiser),
        classes=teacher.classes,
        steps=steps,
    )


def _usual_range(denoiser: NetworkDenoiser) -> tuple[float, float]:
    """The noise levels that are trained at where nobody says. A flow's own range is that of all flow times but the
    last; at both ends there is nothing to learn (DMD2 leaves out as much of its timesteps)."""
    if isinstance(denoiser.coordinates, FlowMatching):
        return FLOW_TIMES[0] / (1 - FLOW_TIMES[0]), FLOW_TIMES[1] / (1 - FLOW_TIMES[1])
    return denoiser.sigma_min, denoiser.sigma_max


def _prints(
    config: Train | FirstStage, teacher: NetworkDenoiser, first: nn.Module, student: Student, lora: Lora
) -> dict[str, str]:
    """Of what a path is made from: the teacher, or what learns in its place, and the first student's network."""
    facts: dict[str, Any] = {"name": config.teacher.name, "coordinates": type(teacher.coordinates).__name__}
    facts |= {name: getattr(teacher, name) for name in ("sigma_min", "sigma_max", "sigma_data")}
    # What differences are taken to has the first values of the adapters too, which the seed draws.
    adapters = {} if lora.rank is None else {"lora": lora.model_dump(mode="json"), "seed": config.seed}
    start: dict[str, Any] = {
        "sigma_init": student.sigmas[0],
        "toy": config.toy.model_dump() if config.teacher.exact else None,
    }
    if len(student) > 1 or student.start != student.sigmas[0]:
        start |= {"sigmas": student.sigmas, "start": student.start}
    return {"teacher": fingerprint(teacher, **facts, **adapters), "student": fingerprint(first, **facts, **start)}


def _checkpoint(network: Any) -> None:
    """Lets a network compute its activations again. Raises ValueError for one that does not know how to."""
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(f"memory.checkpointing: a {type(network).__name__} does not support it")
    network.enable_gradient_checkpointing()


def checked_subject(
    config: Train | FirstStage, device: torch.device, precision: str = "no"
) -> tuple[Subject, float, float]:
    """The subject and the range of noise levels, both found good before anything is written."""
    subject = load_subject(config, device, precision)
    if isinstance(config, FirstStage):
        low, high = subject.range(config.noise.sigma_min, config.noise.sigma_max)
        if config.noise.name == "log-normal":
            check_log_normal("fake.noise" if config.levels == "own" else "noise", config.noise, low, high)
        return subject, low, high
    return subject, *check_fit(config, subject, subject.n_conditions)


def check_fit(config: Train, subject: Subject, n_conditions: int | None) -> tuple[float, float]:
    """The range of noise levels of a run. Raises ValueError where it does not fit the subject, and for numbers of
    samples that are too few for its conditions."""
    _check_turns(config)
    low, high = subject.range(config.noise.sigma_min, config.noise.sigma_max)
    if config.fake.levels == "own":
        check_log_normal("fake.noise", config.fake.noise, low, high)
    if config.noise.name == "log-normal":
        check_log_normal("noise", config.noise, low, high)
    if config.logging.mismatch_every is not None and (n_conditions or 1) > JUDGED_CONDITIONS:
        raise ValueError(
            f"logging.mismatch_every: {config.logging.mismatch_every}; {n_conditions} conditions have too few "
            f"samples each to know a law by: accepted is null, or at most {JUDGED_CONDITIONS} conditions"
        )
    if config.real.name == "teacher" and config.real.count < (n_conditions or 1):
        raise ValueError(
            f"real.count: {config.real.count} is less than one for each of {n_conditions} classes or prompts"
        )
    return low, high


def _check_turns(config: Train) -> None:
    """Raises ValueError where a run would leave a step of its student out, altogether or on the path."""
    student, target = config.student, config.target
    if student.steps == 1:
        return
    turn = student.hold * student.steps
    why = f"{student.steps} steps of a student, each held for {student.hold} updates (student.hold)"
    if config.steps < turn:
        raise ValueError(f"steps: {config.steps}; {why}, need at least {turn}")
    if target.moves and target.updates < turn:
        raise ValueError(f"target.updates: {target.updates}; {why}, need at least {turn} for a path to guide all")
    if target.moves and target.schedule == "adaptive":
        raise ValueError(
            "target.schedule: adaptive; mismatches of a student's several steps do not compare, accepted is even"
        )


def _toy(config: Train | FirstStage, device: torch.device) -> Subject:
    torch.manual_seed(config.seed)
    mixture = toy.MIXTURES[config.teacher.name]()
    student: nn.Module
    if config.teacher.path is None:
        network = None
        student, fake = toy.networks(mixture, config.toy)
    else:
        network = toy.load_denoiser(config.teacher.path, config.teacher.name)
        student, fake = (copy.deepcopy(network).requires_grad_(True) for _ in range(2))
        network.to(device)
    mixture = mixture.to(device)
    shape = (mixture.dim,)

    as_student = _toy_student(config)
    return Subject(
        mixture if network is None else network,
        network,
        student,
        fake,
        as_student,
        shape,
        None,
        toy.SIGMA_MIN,
        toy.SIGMA_MAX,
        lambda noise, device: None,
        toy_preview(mixture, device),
        mixture=mixture,
        prints=_prints(config, fake, student, as_student(fake), Lora()),
    )


def _toy_student(config: Train | FirstStage) -> Callable[[Denoiser], Student]:
    """Students of a toy, of several steps with noise levels even in the Karras index."""
    first = config.student.sigma_init if isinstance(config, Train) else config.sigma_init
    count = config.student.steps if isinstance(config, Train) else config.student_steps
    if first is None or not toy.SIGMA_MIN < first <= toy.SIGMA_MAX:
        raise ValueError(
            f"student.sigma_init: {first} is outside the teacher's range [{toy.SIGMA_MIN:.6g}, {toy.SIGMA_MAX:.6g}]"
        )
    if count > 1 and config.teacher.path is None:
        raise ValueError(
            f"student.steps: {count}; the student of an exact teacher sees no noise level, accepted is 1 (or a "
            "teacher.path of a toy's network)"
        )
    index = torch.arange(count) / count
    sigmas = [first, *karras_sigma(index, toy.SIGMA_MIN, first, 7.0)[1:].tolist()]
    return lambda denoiser: Student(denoiser, sigmas, first, sigmas[1:])


def sampled(denoiser: NetworkDenoiser) -> Generate:
    """Generation by 18 Heun steps from the highest noise level."""
    sigmas = karras_sigmas(18, denoiser.sigma_min, denoiser.sigma_max)
    return lambda z, cond, noise: sample(heun, denoiser, sigmas[0] * z, sigmas, cond)


def toy_preview(mixture: GaussianMixture, device: torch.device) -> Callable[[Generate, Path | None], None]:
    """Draws points over those of the mixture; always of the same noise."""
    shape = (mixture.dim,)
    reference = mixture.sample(PREVIEW_POINTS, generator=torch.Generator(device).manual_seed(0))

    def preview(generate: Generate, path: Path | None) -> None:
        noise = SampleNoise(0, range(PREVIEW_POINTS), GENERATION)
        with torch.no_grad():
            pictures.save_points(generate(noise.normal(shape, device=device), None, noise), reference, path)

    return preview


def preview_start(
    shape: tuple[int, ...], n_classes: int | None, device: torch.device
) -> tuple[Tensor, Tensor | None, SampleNoise]:
    """Noise, labels and streams of a grid of ten columns; always the same, so that grids can be compared."""
    n = 10 * PREVIEW_ROWS
    noise = SampleNoise(0, range(n), GENERATION)
    labels = None if n_classes is None else torch.arange(n, device=device) % 10 % n_classes
    return noise.normal(shape, device=device), labels, noise
