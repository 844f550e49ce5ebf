"""What a student update costs, in seconds, memory, arithmetic and network passes: the arms of `tools.bench_arms`.

They run in turns on one thread, so that a busy machine hits all alike.

Memory is the allocator's own: every allocation and free that torch's profiler records, kernels' workspaces included,
is summed over two updates after the first, so that gradients that live from one update to the next are in it. That is
exact, and the same in every run. (Resident memory rounds to what malloc returns to the system; a dispatch mode does not
see inside kernels.) It is reported above what always exists, weights and optimizer states, and together with that.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tools.bench_arms import Arm, Networks, Sizes, arms

TARGETS = {"time": 0.75, "memory": 0.8}  # of (b), relative to (a)


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
