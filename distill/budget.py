"""What a run needs: bytes on each accelerator, by part, and FLOPs of an update, by the cost formula of the trainer.

The passes are those that `Trainer` and `distill.adversary` count; what a pass needs is found on meta
(`distill.memory`). Left out: the heads' own activations and arithmetic, batches, and what the allocator wastes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import Train
from distill.hardware import Hardware
from distill.memory import Pass, measure
from distill.skeleton import Skeleton
from distill.taps import Tap

_FLOAT, _ADAM = 4, 8  # bytes of a weight, and of its two moments


@dataclass(frozen=True)
class Networks:
    """The networks of a run, on meta. teacher: frozen, in its dtype. student, fake: as they are trained.

    heads: of the discriminator; tap: where they read, in the network that `config.discriminator.features` names. real:
    bytes of the real samples, which every process holds.
    """

    teacher: Skeleton
    student: Skeleton
    fake: Skeleton
    heads: nn.Module | None = None
    tap: Tap | None = None
    real: float = 0.0


@dataclass(frozen=True)
class Budget:
    """Bytes of one process, and FLOPs. rows: samples that it computes at once.

    held: what is there throughout, by name. moments: what comes on top, by the moment's name; they do not meet.
    update: FLOPs of an update of the whole batch, by network.
    """

    rows: int
    held: dict[str, float]
    moments: dict[str, float]
    update: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + max(self.moments.values())


def budget(config: Train, networks: Networks, launch: Hardware, rows: int) -> Budget:
    """The budget of a run with `rows` samples at once in each process."""
    student = _passes(networks.student, config, launch, rows)
    fake = student if networks.fake is networks.student else _passes(networks.fake, config, launch, rows)
    guided = 2 if config.teacher.guidance != 1 else 1
    call, inputs = networks.teacher.call(guided * rows)
    teacher = measure(networks.teacher.network, call, backward=False, inputs=inputs)
    encoder = _encoder(config, networks, rows)

    held, moments = _held(config, networks, launch), dict[str, float]()
    predict = teacher.peak / guided + fake.casts
    compare = max(teacher.peak, predict, *(p.peak for p in encoder.values()))
    moments["the student's update"] = max(student.train.saved + compare, student.step)
    moments["a fake step"] = max(fake.step, *(p.peak for name, p in encoder.items() if name == "learn"), 0)
    if launch.sharded:
        moments["the student's update"] += 2 * _largest_block(networks.student.network)
        moments["a fake step"] += 2 * _largest_block(networks.fake.network)
    return Budget(rows, held, moments, _update(config, student, teacher, fake, encoder, rows))


@dataclass(frozen=True)
class _Passes:
    """train: a pass with its backward. step: its bytes in this launch. casts: bytes of the weights in low precision,
    where autocast makes them."""

    train: Pass
    step: float
    casts: float


def _passes(skeleton: Skeleton, config: Train, launch: Hardware, rows: int) -> _Passes:
    """Of a network that is trained. Sharded weights are gathered in float32; what autocast makes of them is kept."""
    autocast, network = launch.autocast, skeleton.network
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    call, inputs = skeleton.call(rows)
    train = measure(
        network,
        call,
        backward=True,
        checkpointing=config.memory.checkpointing,
        autocast=autocast,
        accumulated=rows * launch.processes < config.batch_size,
        inputs=inputs,
    )
    step = float(train.peak)
    if launch.sharded:  # gradients are scattered, block by block
        step -= _FLOAT * trained * (1 - 1 / launch.processes)
    return _Passes(train, step, 0.0 if autocast is None else float(autocast.itemsize * trained))


def _encoder(config: Train, networks: Networks, rows: int) -> dict[str, Pass]:
    """The passes of the encoder that a discriminator reads: "forward" (one sample a row), "pull", "learn"."""
    if networks.tap is None:
        return {}
    of_teacher = config.discriminator.features == "teacher"
    skeleton, tap = (networks.teacher if of_teacher else networks.fake), networks.tap
    network, r1 = skeleton.network, config.discriminator.r1
    moved = 1 if r1 and config.discriminator.r1_form == "difference" else 0
    exact = bool(r1) and config.discriminator.r1_form == "exact"
    trained = [p for p in network.parameters() if p.requires_grad]

    def read(n: int, graph: str) -> Pass:
        call, inputs = skeleton.call(n)
        x = inputs[0].requires_grad_(graph in ("pull", "twice"))

        def features() -> Tensor:
            total = torch.stack([f.float().mean() for f in tap.encode(call)]).sum()
            if graph == "twice":
                penalty = torch.autograd.grad(total, x, create_graph=True)[0]
                return penalty if of_teacher else torch.cat([penalty.flatten(), total[None]])
            return total

        again, fused = graph == "pull" and _able(network), graph != "twice"
        return measure(network, features, backward=graph != "none", checkpointing=again, fused=fused, inputs=inputs)

    if not of_teacher:
        learn = read((1 + moved) * rows, "twice" if exact else "weights")
        found = {"forward": read(rows, "none"), "learn": learn}
        for p in trained:
            p.requires_grad_(False)
    else:
        found = {"forward": read(rows, "none"), "learn": read((2 + moved) * rows, "twice" if exact else "none")}
    if config.adversarial_weight:
        found["pull"] = read(rows, "pull")
    for p in trained:
        p.requires_grad_(True)
    return found


def _able(network: Any) -> bool:
    return bool(getattr(network, "_supports_gradient_checkpointing", False))


def _held(config: Train, networks: Networks, launch: Hardware) -> dict[str, float]:
    """What a process holds from one update to the next."""
    share = launch.processes if launch.sharded else 1
    student, fake = (_own(skeleton, networks.teacher) for skeleton in (networks.student, networks.fake))
    trained = [_trained(skeleton.network) for skeleton in (networks.student, networks.fake)]
    heads = 0 if networks.heads is None else sum(p.numel() for p in networks.heads.parameters())
    held = {
        "teacher": float(sum(p.nbytes for p in networks.teacher.network.parameters())),
        "student": student / share,
        "fake score": fake / share,
        "average": student / share if config.memory.ema == "device" else 0.0,
        "Adam": _ADAM * (sum(trained) / share + heads),
        "discriminator": float(_FLOAT * heads),
    }
    if launch.processes > 1 and not launch.sharded:
        held["buckets of gradients (DDP)"] = float(_FLOAT * (sum(trained) + heads))
    copies = {"nodes": 1, "score-interpolation": 1, "weight-interpolation": 2}.get(config.target.name, 0)
    held["path"] = copies * float(_FLOAT * sum(p.numel() for p in networks.teacher.network.parameters()))
    held["real samples"] = networks.real
    if networks.teacher.vae is not None:
        held["VAE"] = float(sum(p.nbytes for p in networks.teacher.vae.parameters()))
    return {name: size for name, size in held.items() if size}


def _own(skeleton: Skeleton, teacher: Skeleton) -> float:
    """Bytes of a network's own weights: all of a copy, of adapters on the teacher's weights only those."""
    network = skeleton.network
    adapted = any(not p.requires_grad for p in network.parameters())
    return float(_FLOAT * (_trained(network) if adapted else sum(p.numel() for p in network.parameters())))


def _trained(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def _largest_block(network: nn.Module) -> float:
    """Bytes of the largest block that FSDP gathers whole: of a list of modules, the largest member."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    return max((float(sum(p.nbytes for p in block.parameters())) for blocks in lists for block in blocks), default=0.0)


def _update(
    config: Train, student: _Passes, teacher: Pass, fake: _Passes, encoder: dict[str, Pass], rows: int
) -> dict[str, float]:
    """FLOPs of an update, for the whole batch."""
    each, k = config.batch_size / rows, config.fake.steps
    before = (config.student.steps - 1) / 2  # a few-step student's steps without a graph, on average
    flops = {
        "student": (1 + before) * student.train.forward + student.train.backward,
        "teacher": float(teacher.forward),
        "fake score": fake.train.forward + k * (fake.train.forward + fake.train.backward),
    }
    if encoder:
        learn = encoder["learn"]
        flops["discriminator"] = k * float(learn.forward + learn.backward)
        if "pull" in encoder:  # its forward is the prediction's, but for what is computed again
            flops["discriminator"] += encoder["pull"].backward
    if config.target.name == "score-interpolation":
        share = config.target.updates / config.steps
        flops["path"] = share * student.train.forward
    return {name: each * value for name, value in flops.items()}


Fits = Callable[[int], Budget]


def largest_fitting(at: Fits, now: Budget, limit: float) -> int:
    """The most samples at once, up to those of `now`, whose peak stays below `limit`; 0 if not even one does.

    Peaks are convex in the samples, so that a line through two of them is never too low between them.
    """
    if now.peak <= limit:
        return now.rows
    if now.rows == 1:
        return 0
    one = at(1)
    if one.peak > limit:
        return 0
    slope = (now.peak - one.peak) / (now.rows - 1)
    return 1 + int((limit - one.peak) // slope)
