"""What an update costs in network passes, for the published loop and for ours; and that both do train."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.sections import Network
from tools.bench_arms import Arm, Sizes, arms
from tools.bench_cost import Pass, cost_table, counted_passes, flops, peak_bytes

K = 2
TINY = Sizes(batch=4, size=8, network=Network(channels=(8, 8)), fake_steps=K)
OURS = {("student", "full", "forward"): 1, ("student", "full", "backward"): 1, ("teacher", "full", "forward"): 1} | {
    ("fake", "full", "forward"): 1 + K,
    ("fake", "full", "backward"): K,
}
TEACHER_HEADS = OURS | {("teacher", "encoder", "forward"): 2 * K}
THROUGH_TEACHER = {("teacher", "encoder", "forward again"): 1, ("teacher", "encoder", "backward to the input"): 1}
EXPECTED: dict[str, dict[tuple[str, str, str], int]] = {
    "(a)": OURS
    | {
        ("student", "full", "forward"): K,  # new samples for every fake step
        ("fake", "encoder", "forward"): 1 + 2 * K,  # the adversarial term; real and generated, each on its own
        ("fake", "encoder", "backward"): 2 * K,
        ("fake", "encoder", "backward to the input"): 1,
    },
    "(b)": OURS
    | {
        ("fake", "encoder", "forward"): K,  # real; the generated are read from the denoising pass
        ("fake", "encoder", "backward"): K,
        ("fake", "encoder", "forward again"): 1,  # of residual blocks, for the adversarial term
        ("fake", "encoder", "backward to the input"): 1,
    },
    "(c)": TEACHER_HEADS | THROUGH_TEACHER,
    "(d)": TEACHER_HEADS,
    "(e)": TEACHER_HEADS | THROUGH_TEACHER,  # f-weighting adds no pass
}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Arm]:
    return {arm.name.split()[0]: arm for arm in arms(TINY)}


@pytest.mark.parametrize("letter", EXPECTED)
def test_an_update_makes_the_passes_that_the_docstrings_count(tiny: dict[str, Arm], letter: str) -> None:
    with counted_passes(tiny[letter].nets, TINY.batch) as passes:
        tiny[letter].step(0)
    assert passes == {Pass(*kind): count for kind, count in EXPECTED[letter].items()}


def test_residual_blocks_that_run_again_are_counted_where_they_do(tiny: dict[str, Arm]) -> None:
    nets = tiny["(a)"].nets
    x, sigma = torch.zeros(TINY.batch, 3, TINY.size, TINY.size), torch.ones(TINY.batch)
    for parts, count in ((("fake",), 2), (("fake", "student"), 1)):
        unets = [getattr(nets, name).network for name in parts]
        for unet in unets:
            unet.enable_gradient_checkpointing()
        with counted_passes(nets, TINY.batch) as passes:
            for name in parts:
                for _ in range(count):
                    getattr(nets, name)(x, sigma).sum().backward()
        for unet in unets:
            unet.disable_gradient_checkpointing()
        ways = ("forward", "forward again", "backward")
        assert passes == {Pass(name, "full", way): count for name in parts for way in ways}


@pytest.mark.parametrize("letter", EXPECTED)
def test_decoders_are_in_no_graph_but_those_that_learn(tiny: dict[str, Arm], letter: str) -> None:
    """The teacher's never; the fake score's in the denoising passes only, K of them."""
    nets, seen = tiny[letter].nets, {"teacher": [], "fake": []}
    handles = [
        block.register_forward_hook(lambda m, args, out, found=found: found.append(out.requires_grad))
        for name, found in seen.items()
        for block in getattr(nets, name).network.up_blocks
    ]
    tiny[letter].step(0)
    for handle in handles:
        handle.remove()
    assert seen == {"teacher": [False, False], "fake": [False, False] + [True, True] * K}


@pytest.mark.slow
@pytest.mark.parametrize("letter", EXPECTED)
def test_every_network_but_the_teacher_is_trained(letter: str) -> None:
    arm = {arm.name.split()[0]: arm for arm in arms(TINY)}[letter]
    modules = {name: getattr(arm.nets, name) for name in ("student", "fake", "teacher", "average", "heads")}
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
    for n in range(2):
        metrics = arm.step(n)
        assert {"student_loss", "adversarial_loss", "fake_loss", "discriminator_loss"} - set(metrics) <= (
            {"adversarial_loss"} if letter == "(d)" else set()
        )
        assert all(math.isfinite(float(value)) for value in metrics.values())
    for name, module in modules.items():
        moved = [not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True)]
        some = name == "average"  # of weights near 1 a thousandth of a step is lost to rounding
        assert not any(moved) if name == "teacher" else any(moved) if some else all(moved), name


@pytest.mark.slow
def test_peak_memory_is_that_of_the_graph_that_is_alive(tiny: dict[str, Arm]) -> None:
    def hold(n: int) -> dict[str, Any]:
        kept = [torch.empty(3 << 20, dtype=torch.uint8) for _ in range(2)]
        del kept[0]
        torch.empty(1 << 20, dtype=torch.uint8)
        return {}

    assert peak_bytes(Arm("", tiny["(a)"].nets, hold, []), 0) == pytest.approx(6 << 20, rel=1e-3)
    assert peak_bytes(tiny["(a)"], 1) == peak_bytes(tiny["(a)"], 3)


@pytest.mark.slow
def test_operations_are_those_that_torch_counts_and_those_that_are_run_again(tiny: dict[str, Arm]) -> None:
    step = partial(tiny["(a)"].step, 0)
    with FlopCounterMode(display=False) as counter:
        step()
    assert flops(step) == counter.get_total_flops() > 0

    network, x, sigma = tiny["(a)"].nets.teacher, torch.zeros(2, 3, TINY.size, TINY.size), torch.ones(2)
    x.requires_grad_()
    with torch.no_grad():
        forward = flops(lambda: network(x, sigma))
    kept = flops(lambda: torch.autograd.grad(network(x, sigma).sum(), x))
    network.network.enable_gradient_checkpointing()
    again = flops(lambda: torch.autograd.grad(network(x, sigma).sum(), x))
    network.network.disable_gradient_checkpointing()
    assert kept > 1.5 * forward
    assert 0.5 * forward < again - kept < forward  # up to the last tensor that a backward pass needs


@pytest.mark.slow
def test_the_table_has_a_row_for_every_arm_and_says_whether_targets_are_met() -> None:
    table = cost_table(1, TINY)
    for letter in EXPECTED:
        assert f"\n| {letter} " in table
    assert "Targets of (b) relative to (a): time " in table
    assert f"\n| student, full, forward | {K} | 1 | 1 | 1 | 1 |" in table
