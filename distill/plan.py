"""What a run of `distill train` would do, said before it is done: `--dry-run`.

The networks of a pipeline are built from its configurations alone (`distill.skeleton`), so that a laptop answers in
seconds for models and machines that it could not hold.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from distill.blueprint import Blueprint, blueprint
from distill.budget import Budget, Networks, budget, largest_fitting
from distill.config import Train
from distill.folders import pipeline_folder, unread_weights, weight_files
from distill.hardware import SHARE, Hardware
from distill.launch import check_networks, check_precision
from distill.noise import Share
from distill.ratio import check_normalised, real_samples, untrained_heads
from distill.subject import checked_subject

_GIB = 2**30


def plan(config: Train, hardware: Hardware | None = None) -> list[str]:
    """What a run would do, as lines: passes and samples, and what its networks are if the teacher is here.

    hardware: where it would run; None is what this process was launched on. What `train` would refuse about the
    teacher, the networks and the noise levels is refused here; the run folder is not looked at, no weights are read
    but for their names and shapes, and no samples are made.
    """
    lines = [f"{config.steps} updates of {config.batch_size} samples: {config.steps * config.batch_size:,} in all"]
    lines += [*passes(config), *first_stage(config), *notices(config)]
    if config.teacher.path is not None and not _is_here(config.teacher.path):
        return [*lines, f"teacher: {config.teacher.path} is not here, so the networks were not built"]
    if config.teacher.name != "pipeline":
        return [*lines, *_toy(config)]
    if hardware is None:
        check_precision()
        hardware = Hardware.present()
    check_networks(config, hardware.sharded and hardware.processes > 1, compiled=False)
    built = blueprint(config, hardware)
    return [*lines, *_of_pipeline(config, built), *_needs(config, built.networks, hardware)]


def _is_here(path: str) -> bool:
    """Whether the teacher can be looked at: a folder, or a repository in the hub's cache."""
    if Path(path).exists():
        return True
    try:
        return pipeline_folder(path).is_dir()
    except ValueError:
        return False


def _toy(config: Train) -> list[str]:
    device = torch.device("cpu")
    subject, low, high = checked_subject(config, device)
    heads = untrained_heads(config, subject, device)
    if config.real.name == "data":
        real_samples(config, subject, Accelerator())
    lines = [_shape(subject.shape, low, high)]
    for name, network in (("student", subject.student), ("fake", subject.fake), ("discriminator", heads)):
        if network is not None:
            lines.append(_parameters(name, network))
    return lines


def _of_pipeline(config: Train, built: Blueprint) -> list[str]:
    """The networks, and the levels that they would see."""
    networks, teacher, steps = built.networks, built.teacher, built.subject.steps
    assert steps is not None, "a pipeline's student has some"
    lines = [_shape(teacher.shape, *built.levels)]
    named = {"real.data.path": config.real.data.path, "real.encoded": config.real.encoded}
    named |= {"prompts.file": config.prompts.file, "prompts.encoded": config.prompts.encoded}
    for key, path in named.items():
        if path is not None and not Path(path).exists():
            lines.append(f"{key}: {path} is not here, so it was not looked at")
    network = networks.teacher.network
    if not weight_files(networks.teacher.part) and unread_weights(networks.teacher.part):
        lines.append(f"teacher: {networks.teacher.part} has no weights that are read (safetensors, of no variant)")
    lines.append(
        f"teacher: {networks.teacher.kind}, {type(network).__name__} with {type(teacher.scheduler).__name__}, "
        f"{_name(next(network.parameters()).dtype)}"
    )
    levels = ", ".join(f"{sigma:.4g}" for sigma in steps.sigmas)
    lines.append(f"student's noise levels: {levels}; exported as a {steps.pipeline} with {_kind(steps.scheduler)}")
    for name, part in (("student", networks.student), ("fake", networks.fake)):
        lines.append(_parameters(name, part.network))
        trained = sum(p.numel() for p in part.network.parameters() if p.requires_grad)
        if getattr(config, name).lora.rank is not None:
            lines.append(f"{name}: {trained:,} of them are adapters, which are trained; the others are the teacher's")
    if networks.heads is not None:
        lines.append(_parameters("discriminator", networks.heads))
    return lines


def _needs(config: Train, networks: Networks, hardware: Hardware) -> list[str]:
    """Memory and time on some hardware."""
    parts = config.memory.accumulation or hardware.parts
    rows = config.batch_size // (hardware.processes * parts)
    if not rows:
        return [f"memory: a batch of {config.batch_size} is less than one for {hardware.processes} x {parts} parts"]
    Share(config.seed, config.batch_size, 0, hardware.processes).numbers(
        0, 0, parts
    )  # refuses parts that are not whole
    check_normalised(config, parts)
    needed = budget(config, networks, hardware, rows)
    gib, limit = needed.peak / _GIB, hardware.memory / _GIB
    lines = [f"on {hardware}; {rows} samples at a time, {parts} times for an update, in each process"]
    lines += [f"  {name}: {_size(size)}" for name, size in needed.held.items()]
    lines += [f"  in {name}: {_size(size)}" for name, size in needed.moments.items()]
    verdict = "fits" if needed.peak <= hardware.memory else "does not fit"
    advice = _advice(config, networks, hardware, needed)
    lines.append(f"memory of a process: {gib:.2f} GiB, which {verdict} into {limit:.1f} GiB{advice}")
    if networks.teacher.encoders:
        words = sum(networks.teacher.encoders.values()) * 4
        lines.append(f"  before the networks, text encoders: {_size(words)} in float32 (none with prompts.encoded)")
    copies = 1 + [config.student.lora.rank, config.fake.lora.rank].count(None)
    weights = sum(p.numel() for p in networks.teacher.network.parameters())
    lines.append(f"  on the host, while each process makes its networks: {_size(4.0 * copies * weights)}")
    if config.memory.ema == "cpu":
        lines.append(f"  on the host, for each process's average and what it is copied through: {_size(8.0 * weights)}")
    return [*lines, *_time(config, needed, hardware)]


def _advice(config: Train, networks: Networks, hardware: Hardware, now: Budget) -> str:
    if now.peak <= hardware.memory:
        return ""
    fitting = largest_fitting(lambda rows: budget(config, networks, hardware, rows), now, hardware.memory)
    if not fitting:
        return "; not even one sample does (memory.checkpointing, lora.rank and FSDP need less)"
    each = config.batch_size // hardware.processes
    parts = next(parts for parts in range(-(-each // fitting), each + 1) if each % parts == 0)
    fitting = each // parts
    return f"; {fitting} samples at a time would: memory.accumulation {parts}"


def _time(config: Train, needed: Budget, hardware: Hardware) -> list[str]:
    update = sum(needed.update.values())
    shares = ", ".join(f"{name} {flops / update:.0%}" for name, flops in needed.update.items())
    hours = config.steps * update / hardware.speed / 3600
    percent = f"{SHARE:.0%} of the peak of {hardware}"
    return [
        f"an update: {update:.2e} FLOP ({shares})",
        f"{config.steps} updates: {config.steps * update:.2e} FLOP, {_duration(hours)} at {percent}",
    ]


def _shape(shape: tuple[int, ...], low: float, high: float) -> str:
    return f"samples of shape {list(shape)}, noise levels {low:.6g} .. {high:.6g}"


def _parameters(name: str, network: torch.nn.Module) -> str:
    return f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters"


def _kind(scheduler: Any) -> str:
    return type(scheduler).__name__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= 0.01 * _GIB else f"{size / 2**20:.2f} MiB"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:.1f} days"


def first_stage(config: Train) -> list[str]:
    """What the recording of a degradation path costs, if the run needs one."""
    if config.target.name == "fixed":
        return []
    stage = config.degradation
    return [
        f"first stage: at most {stage.steps} updates, each student 1 forward, fake score 1 forward, 1 backward; "
        f"{stage.nodes} nodes ({stage.storage}) in {config.path}, unless it is recorded there"
    ]


def notices(config: Train) -> list[str]:
    """What a user should know of a run before it begins: what waits for the teacher to be the target."""
    target, waiting = config.target, []
    if not target.moves:
        return []
    if config.adversarial_weight:
        waiting.append("the adversarial term")
    if not config.divergence.constant and target.ratio != "bridge":
        waiting.append(f"the weight of {config.divergence.name}")
    latest = " at the latest" if target.schedule == "adaptive" else ""
    lines = [f"target: {target.name} for {target.updates} updates{latest}, then the teacher; path: {config.path}"]
    if waiting:
        verb = "waits" if len(waiting) == 1 else "wait"
        until = "" if target.ratio == "bridge" else " (until then h = 1)"
        lines.append(f"{' and '.join(waiting)} {verb} for the teacher{until}")
    return lines


def passes(config: Train) -> list[str]:
    """The network passes of an update, as the docstrings of `Trainer` and its adversary count them."""
    k, guided = config.fake.steps, " (2 where guided)" if config.teacher.guidance != 1 else ""
    if config.target.name == "score-interpolation":
        guided += f" (on the way, for {config.target.updates} updates, the last node's 1 more)"
    before = (
        f" ({(config.student.steps - 1) / 2:g} more without a graph, on average)" if config.student.steps > 1 else ""
    )
    lines = [
        f"an update: student 1 forward{before}, 1 backward; teacher 1 forward{guided}; fake score {1 + k} forward, "
        f"{k} backward"
    ]
    if config.real.name != "none":
        where = config.discriminator.features
        encoded = f"{2 * k} without a graph" if where == "teacher" else f"{k} forward and backward"
        r1 = " and those of the penalty" if config.discriminator.r1 else ""
        through = "; 1 backward to the samples" if config.adversarial_weight else ""
        if config.target.ratio == "bridge":
            through += f"; on the way {k} forward of the first student, and {k} more of the encoder"
        lines.append(f"discriminator: the encoder of the {where}, {encoded}{r1}{through}")
    return lines
