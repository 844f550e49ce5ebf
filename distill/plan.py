"""What a run of `distill train` would do, said before it is done: `--dry-run`."""

from pathlib import Path

import torch
from accelerate import Accelerator

from distill.config import Train
from distill.experiment import real_samples, untrained_heads
from distill.subject import checked_subject


def plan(config: Train) -> list[str]:
    """What a run would do, as lines: passes and samples, and what its networks are if the teacher is here.

    What `train` would refuse about the teacher, the networks and the data is refused here; the run folder is not
    looked at, and no samples are made.
    """
    lines = [f"{config.steps} updates of {config.batch_size} samples: {config.steps * config.batch_size:,} in all"]
    lines += [*passes(config), *first_stage(config), *notices(config)]
    if config.teacher.path is not None and not Path(config.teacher.path).exists():
        return [*lines, f"teacher: {config.teacher.path} is not here, so the networks were not built"]
    device = torch.device("cpu")
    subject, low, high = checked_subject(config, device)
    heads = untrained_heads(config, subject, device)
    if config.real.name == "data":
        real_samples(config, subject, Accelerator())
    lines.append(f"samples of shape {list(subject.shape)}, noise levels {low:.6g} .. {high:.6g}")
    for name, network in (("student", subject.student), ("fake", subject.fake), ("discriminator", heads)):
        if network is not None:
            lines.append(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")
    return lines


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
    lines = [
        f"an update: student 1 forward, 1 backward; teacher 1 forward{guided}; fake score {1 + k} forward, {k} backward"
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
