"""What a student update costs, in seconds, memory, arithmetic and network passes: our trainer beside a published loop.

All arms start from copies of the same networks and run in turns on one thread, so that a busy machine hits all alike.
The published loop is that of DMD2 (Yin et al. 2024b, arXiv 2405.14867): new samples for every fake step, the student's
batch serving the first; heads on the fake score's encoder; separate encoder-only passes over real, generated and (for
the adversarial term, noised anew) the student's samples; predictions without a graph; the denoising and the
classification loss in one backward. The loops over parameters for clipping and averages, and a number read from every
loss, are those of FastGen, where f-distill (Xu et al. 2025, arXiv 2502.15681) is published, but for one average
instead of three. On CPUs they cost next to nothing; on accelerators each read number is a wait that is not seen here.

Memory is the allocator's own: every allocation and free that torch's profiler records, kernels' workspaces included,
is summed over two updates after the first, so that gradients that live from one update to the next are in it. That is
exact, and the same in every run. (Resident memory rounds to what malloc returns to the system; a dispatch mode does not
see inside kernels.) It is reported above what always exists, weights and optimizer states, and together with that.
"""

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distill.adversary import FakeHeads, TeacherHeads
from distill.config import LogNormal, Network, StudentNoise
from distill.config import Optimizer as OptimizerConfig
from distill.data import Images
from distill.discriminator import Discriminator, frozen
from distill.divergences import DIVERGENCES
from distill.export import teacher_scheduler
from distill.losses import adversarial_loss, denoising_loss, discriminator_loss, matching_weight
from distill.losses import distribution_matching_loss as matching_loss
from distill.noise import Share, karras_level, log_normal_level
from distill.optim import Update, adamw
from distill.pretrain import build_unet
from distill.real import RealImages
from distill.student import OneStep
from distill.taps import Tap
from distill.targets import Fixed
from distill.trainer import Trainer
from distill.weights import RatioWeight
from samplers import NetworkDenoiser, denoiser_from
from samplers.denoiser import expand

LOW, HIGH, DATA = 0.002, 80.0, 0.5  # noise levels and the data's standard deviation, as in EDM
ADVERSARIAL_WEIGHT, DISCRIMINATOR_WEIGHT, CLIP, DECAY = 3e-3, 1e-2, 10.0, 0.999  # DMD2 on ImageNet-64, but for DECAY
TARGETS = {"time": 0.75, "memory": 0.8}  # of (b), relative to (a)
UNET = Network(channels=(32, 64, 64), layers=2)
RATES = OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2)
student_level = partial(karras_level, config=StudentNoise(), sigma_min=LOW, sigma_max=HIGH)
fake_level = partial(log_normal_level, config=LogNormal(), sigma_min=LOW, sigma_max=HIGH)
Step = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """Images [3, size, size], `batch` of them, for UNets of that form; `fake_steps` is K."""

    batch: int = 32
    size: int = 16
    network: Network = UNET
    fake_steps: int = 5


@dataclass
class Networks:
    """An arm's own copies of the networks, and where the heads read."""

    student: NetworkDenoiser
    fake: NetworkDenoiser
    teacher: NetworkDenoiser
    average: NetworkDenoiser
    heads: Discriminator

    def bottleneck(self, network: NetworkDenoiser) -> Tap:
        return Tap(network.network, (-1,))


def networks(sizes: Sizes) -> Networks:
    """Untrained networks: what they have learned does not change what they cost."""
    torch.manual_seed(0)
    unet = build_unet(sizes.network, sizes.size, 3, None)
    teacher = denoiser_from(unet, teacher_scheduler(DATA, LOW, HIGH)).requires_grad_(False)
    x = torch.zeros(1, 3, sizes.size, sizes.size)
    with torch.no_grad():
        heads = Discriminator(Tap(unet, (-1,)).encode(lambda: teacher(x, torch.ones(1))))
    student, fake = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
    return Networks(student, fake, teacher, copy.deepcopy(teacher), heads)


class PublishedLoop:
    """DMD2's loop, as the module describes it."""

    def __init__(self, nets: Networks, images: Tensor, sizes: Sizes) -> None:
        self.nets, self.images, self.sizes, self.tap = nets, images, sizes, nets.bottleneck(nets.fake)
        self.student = OneStep(nets.student, HIGH)
        self.trained = {
            "student": list(nets.student.parameters()),
            "fake": [*nets.fake.parameters(), *nets.heads.parameters()],
        }
        self.optimizers: dict[str, Optimizer] = {
            name: AdamW(parameters, lr=RATES.lr, betas=RATES.betas, weight_decay=RATES.weight_decay)
            for name, parameters in self.trained.items()
        }

    def step(self, n: int) -> dict[str, float]:
        """Update number n: one of the student, K of the fake score."""
        metrics: dict[str, float] = {}
        for k in range(self.sizes.fake_steps):
            with torch.set_grad_enabled(k == 0):
                x = self.student(torch.randn(self.sizes.batch, *self.images.shape[1:]))
            if k == 0:
                metrics |= self._student_turn(x)
            metrics |= self._fake_turn(x.detach())
        return metrics

    def _student_turn(self, x: Tensor) -> dict[str, float]:
        x_sigma, sigma = self._noised(x.detach(), student_level)
        with torch.no_grad():
            target = self.nets.teacher(x_sigma, sigma)
            fake = self.nets.fake(x_sigma, sigma)
        matching = matching_loss(x, fake, target, matching_weight(x, target)).mean()
        with frozen(self.nets.fake, self.nets.heads):
            adversarial = adversarial_loss(self._logits(x)).mean()
            self._update("student", matching + ADVERSARIAL_WEIGHT * adversarial)
        with torch.no_grad():
            for kept, current in zip(self.nets.average.parameters(), self.nets.student.parameters(), strict=True):
                kept.lerp_(current, 1 - DECAY)
        return {"student_loss": matching.item(), "adversarial_loss": adversarial.item()}

    def _fake_turn(self, x0: Tensor) -> dict[str, float]:
        sigma = fake_level(torch.rand(len(x0), dtype=torch.float64))
        denoising = denoising_loss(self.nets.fake, x0, sigma, torch.randn_like(x0), sigma_data=DATA).mean()
        real = self.images[torch.randint(len(self.images), (len(x0),))]
        classification = discriminator_loss(self._logits(real), self._logits(x0)).mean()
        self._update("fake", denoising + DISCRIMINATOR_WEIGHT * classification)
        return {"fake_loss": denoising.item(), "discriminator_loss": classification.item()}

    def _noised(self, x: Tensor, level: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        sigma = level(torch.rand(len(x), dtype=torch.float64))
        return x + expand(sigma, x) * torch.randn_like(x), sigma

    def _logits(self, x: Tensor) -> Tensor:
        """An encoder-only pass of the fake score on samples noised anew."""
        x_sigma, sigma = self._noised(x, student_level)
        return self.nets.heads(self.tap.encode(lambda: self.nets.fake(x_sigma, sigma)))

    def _update(self, name: str, loss: Tensor) -> None:
        loss.backward()
        gradients = [p.grad for p in self.trained[name] if p.grad is not None]
        norm = sum(gradient.norm().item() ** 2 for gradient in gradients) ** 0.5
        for gradient in gradients:
            gradient.mul_(min(1.0, CLIP / (norm + 1e-6)))
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()


@dataclass
class Arm:
    """One way of training: `step` is an update of the student and what goes with it."""

    name: str
    nets: Networks
    step: Step
    optimizers: list[Optimizer]


def arms(sizes: Sizes) -> list[Arm]:
    """The published loop, then ours: the same algorithm, then f-distill's, and that without one part at a time."""
    nets = networks(sizes)
    generator = torch.Generator().manual_seed(0)
    images = DATA * torch.randn(512, 3, sizes.size, sizes.size, generator=generator)
    loop = PublishedLoop(copy.deepcopy(nets), images, sizes)
    return [
        Arm("(a) published loop, heads on the fake score", loop.nets, loop.step, list(loop.optimizers.values())),
        _ours("(b) ours, heads on the fake score", copy.deepcopy(nets), images, sizes, "fake"),
        _ours("(c) ours, heads on the teacher, f-weighted", copy.deepcopy(nets), images, sizes, "teacher", True),
        _ours("(d) (c) without the adversarial term", copy.deepcopy(nets), images, sizes, "teacher", True, 0.0),
        _ours("(e) (c) with h = 1", copy.deepcopy(nets), images, sizes, "teacher"),
    ]


def _ours(
    name: str, nets: Networks, images: Tensor, sizes: Sizes, heads: str, weighted: bool = False,
    adversarial_weight: float = ADVERSARIAL_WEIGHT,
) -> Arm:  # fmt: skip
    network = nets.fake if heads == "fake" else nets.teacher
    common: dict[str, Any] = {
        "network": network, "tap": nets.bottleneck(network), "heads": nets.heads, "train_heads": nets.heads,
        "reals": RealImages(Images(images), tuple(images.shape[1:]), None), "weight": DISCRIMINATOR_WEIGHT,
    }  # fmt: skip
    optimizers = [adamw(nets.student, RATES), adamw(nets.fake, RATES, nets.heads)]
    student_update, fake_update = (Update(optimizer, lambda step: RATES.lr, CLIP) for optimizer in optimizers)
    trainer = Trainer(
        OneStep(nets.student, HIGH), nets.fake, Fixed(nets.teacher), student_update, fake_update,
        student_level, fake_level, Share(0, sizes.batch), tuple(images.shape[1:]),
        ratio_weight=RatioWeight(DIVERGENCES["jensen-shannon"]) if weighted else None,
        adversary=FakeHeads(**common) if heads == "fake" else TeacherHeads(**common, level=student_level),
        adversarial_weight=adversarial_weight,
        fake_steps=sizes.fake_steps,
        sigma_data=DATA,
        average=(nets.average, nets.student, DECAY),
    )  # fmt: skip
    return Arm(name, nets, trainer.step, optimizers)


class Pass(NamedTuple):
    """part: "full", or "encoder" where the decoder takes no part. way: "forward", "backward", "backward to the input"
    where no parameter of the network gets a gradient, or "forward again" where a backward pass runs residual blocks
    once more, because their graph was not kept: less than a pass, for each ends at the last tensor that is needed."""

    network: str
    part: str
    way: str


@contextmanager
def counted_passes(nets: Networks, batch: int) -> Iterator[dict[Pass, float]]:
    """Counts the passes inside, in rows / batch, by hooks on the first down block and the last up block of each UNet.

    Every pass enters the encoder; it is full if it leaves the decoder too (backward: if its gradient enters there).
    Checkpointing runs residual blocks again and not what contains them: a pass is one forward again if the first
    residual block of either end ran once more than its down or up block did. The counts are there after the block.
    """
    rows: Counter[tuple[str, str, str]] = Counter()

    def watch(name: str, unet: Any, end: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            rows[name, end, "forward"] += len(hidden)
            if hidden.requires_grad:
                way = "backward" if any(p.requires_grad for p in unet.parameters()) else "backward to the input"
                hidden.register_hook(lambda _: rows.update({(name, end, way): len(hidden)}))

        def again(_: nn.Module, args: Any) -> None:
            rows[name, end, "residual"] += len(args[0])

        block = unet.down_blocks[0] if end == "encoder" else unet.up_blocks[-1]
        return block.register_forward_hook(hook), block.resnets[0].register_forward_pre_hook(again)

    passes: dict[Pass, float] = {}
    unets = {name: getattr(nets, name).network for name in ("student", "teacher", "fake")}
    handles = [h for name, unet in unets.items() for end in ("encoder", "decoder") for h in watch(name, unet, end)]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
    for name in unets:
        for end in ("encoder", "decoder"):
            rows[name, end, "forward again"] = rows[name, end, "residual"] - rows[name, end, "forward"]
        for way in ("forward", "forward again", "backward", "backward to the input"):
            full, entered = rows[name, "decoder", way], rows[name, "encoder", way]
            counts = {Pass(name, "full", way): full / batch, Pass(name, "encoder", way): (entered - full) / batch}
            passes.update({kind: count for kind, count in counts.items() if count})


def peak_bytes(arm: Arm, first: int) -> int:
    """The most bytes alive at once in the updates `first` and `first` + 1, beside weights and optimizer states."""
    for optimizer in arm.optimizers:
        optimizer.zero_grad()  # so that no free is of what was allocated unseen
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for n in (first, first + 1):
            arm.step(n)
    results: Any = recorded.profiler and recorded.profiler.kineto_results
    events = sorted(results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes))


def static_bytes(arm: Arm) -> int:
    """Weights and optimizer states."""
    modules = [value for value in vars(arm.nets).values() if isinstance(value, nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    states = [state for optimizer in arm.optimizers for state in optimizer.state.values()]
    tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


class _Operations(TorchDispatchMode):
    """The sum of torch's formulas. (Its own counter follows modules as well, which a gradient in an input breaks.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output


def flops(step: Callable[[], Any]) -> int:
    """Of convolutions and matrix products, those that are run again for a backward pass included."""
    with _Operations() as counter:
        step()
    return counter.total


def encoder_share(nets: Networks, sizes: Sizes) -> float:
    """e: what of a forward pass the bottleneck needs, in arithmetic."""
    x, sigma = torch.zeros(1, 3, sizes.size, sizes.size), torch.ones(1)
    with torch.no_grad():
        encoder = flops(lambda: nets.bottleneck(nets.teacher).encode(lambda: nets.teacher(x, sigma)))
        return encoder / flops(lambda: nets.teacher(x, sigma))


def cost_table(repetitions: int = 5, sizes: Sizes | None = None) -> str:
    """Measures every arm after one update of warm-up (about four minutes); ratios are medians over the repetitions.

    Seconds are the processor's, on one thread: time that other programs took is not in them.
    """
    sizes, threads = sizes or Sizes(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = arms(sizes)
        seconds: dict[str, list[float]] = {arm.name: [] for arm in measured}
        for n in range(repetitions + 1):
            for arm in measured:
                begun = time.process_time()
                arm.step(n)
                seconds[arm.name] += [time.process_time() - begun] if n else []
        passes, peaks, operations = [], [], []
        for arm in measured:
            with counted_passes(arm.nets, sizes.batch) as counted:
                arm.step(repetitions + 1)
            passes.append(counted)
            peaks.append(peak_bytes(arm, repetitions + 2))
            operations.append(flops(partial(arm.step, repetitions + 4)))
        share = encoder_share(measured[0].nets, sizes)
    finally:
        torch.set_num_threads(threads)

    base = seconds[measured[0].name]
    ratios = [statistics.median(s / b for s, b in zip(seconds[arm.name], base, strict=True)) for arm in measured]
    totals = [peak + static_bytes(arm) for peak, arm in zip(peaks, measured, strict=True)]
    lines = [
        f"K = {sizes.fake_steps} fake steps, batch {sizes.batch}, images of {sizes.size} pixels, UNet of widths "
        f"{list(sizes.network.channels)}; the encoder is {share:.2f} of a forward pass; {repetitions} repetitions.",
        "",
        "| one update of the student | s | ratio | arithmetic, ratio | peak memory, MiB | ratio | with weights and "
        "optimizers | ratio |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for i, arm in enumerate(measured):
        lines.append(
            f"| {arm.name} | {statistics.median(seconds[arm.name]):.2f} | {ratios[i]:.2f} "
            f"| {operations[i] / operations[0]:.2f} | {peaks[i] / 2**20:.0f} | {peaks[i] / peaks[0]:.2f} "
            f"| {totals[i] / 2**20:.0f} | {totals[i] / totals[0]:.2f} |"
        )
    met = {"time": ratios[1], "memory": peaks[1] / peaks[0]}
    bars = [f"{k} {met[k]:.2f}, at most {TARGETS[k]}: {'yes' if met[k] <= TARGETS[k] else 'no'}" for k in TARGETS]
    lines += ["", f"Targets of (b) relative to (a): {'; '.join(bars)}.", ""]
    return "\n".join(lines) + "\n" + passes_table([arm.name for arm in measured], passes)


def passes_table(names: list[str], passes: list[dict[Pass, float]]) -> str:
    """A column for every arm, named by its letter, and a row for every kind of pass."""
    kinds = list(dict.fromkeys(kind for counted in passes for kind in counted))
    lines = [
        "| passes over the batch | " + " | ".join(name.split()[0] for name in names) + " |",
        "|:--|" + "--:|" * len(names),
    ]
    for kind in sorted(kinds, key=lambda k: (("student", "teacher", "fake").index(k.network), k.part != "full")):
        counts = " | ".join(f"{counted.get(kind, 0):g}" for counted in passes)
        lines.append(f"| {kind.network}, {kind.part}, {kind.way} | {counts} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(cost_table())
