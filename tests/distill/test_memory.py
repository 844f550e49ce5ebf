"""What a pass needs, as found on meta: closed forms, and what the CPU's allocator and torch's counter see."""

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from distill.memory import measure
from distill.skeleton import META, check_weights, read_skeleton
from samplers.network_call import predict
from tests.distill.families import save

ROWS = 64  # what kernels of a CPU take for themselves, padding aside, is then little
SIZE: dict[str, Any] = {"flux": {"height": 16, "width": 16}}
NAMES = ("edm-classes", "sdxl")
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("ddpm", "dit", "sd15", "pixart", "sd3", "flux")]


def layers(*widths: int) -> nn.Sequential:
    with META:
        return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))


def test_a_chain_of_layers_has_a_closed_form() -> None:
    """Without a graph two neighbours live at once; with one, all inputs of layers, and the output, which the loss
    needs; the weights' gradients at the end. FLOPs are 2 for each weight and row, twice as many on the way back."""
    network, x = layers(100, 300, 500, 200), torch.zeros(8, 100, device=META)
    weights = 100 * 300 + 300 * 500 + 500 * 200
    plain = measure(network, lambda: network(x), backward=False, inputs=[x])
    assert (plain.saved, plain.peak) == (4 * 8 * 200, 4 * 8 * (300 + 500))
    assert (plain.forward, plain.backward) == (2 * 8 * weights, 0)

    learned = measure(network, lambda: network(x), backward=True, inputs=[x])
    assert learned.saved == 4 * 8 * (300 + 500 + 200)
    assert 4 * weights < learned.peak < 4 * weights + 2 * 4 * 8 * (300 + 500 + 200)
    assert learned.forward == plain.forward
    assert learned.backward == 2 * 2 * 8 * weights - 2 * 8 * 100 * 300  # nobody asks for the gradient of x
    assert all(p.grad is None for p in network.parameters())
    later = measure(network, lambda: network(x), backward=True, accumulated=True, inputs=[x])
    assert later.saved == 4 * weights + learned.saved
    assert later.peak > 4 * weights + 4 * 500 * 200  # all that there are, and one more before it is added


def test_autocast_keeps_a_cast_of_every_weight_for_the_backward_pass() -> None:
    network, x = layers(100, 300, 200), torch.zeros(8, 100, device=META)
    weights = 100 * 300 + 300 * 200
    half = measure(network, lambda: network(x), backward=True, autocast=torch.bfloat16, inputs=[x])
    # The first layer's weight is not needed for a gradient in x, which nobody asks for.
    assert half.saved == 2 * (300 * 200 + 8 * (100 + 300 + 200))
    without = measure(network, lambda: network(x), backward=False, autocast=torch.bfloat16, inputs=[x])
    assert without.peak >= 2 * weights


def test_attention_keeps_no_table_of_its_weights() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x, n = torch.zeros(1, 2, 1000, 8, device=META, requires_grad=True), 1000
    fused = measure(Attention(), lambda: Attention()(x), backward=True, inputs=[x])
    plain = measure(Attention(), lambda: Attention()(x), backward=True, fused=False, inputs=[x])
    assert fused.peak < 4 * 2 * n * n < plain.peak
    assert fused.forward == plain.forward == 2 * 2 * 2 * n * n * 8


def real(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def allocated(call: Any) -> int:
    """The most bytes that the CPU's allocator had handed out at once, kernels' workspaces included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_a_pass_needs_what_the_allocator_of_a_cpu_hands_out(name: str, tmp_path: Path) -> None:
    """Within a quarter, where a graph or its absence makes a factor of 2 to 10. Most agree to 1 %; a convolution of 8
    channels is padded to the vectors of some CPUs."""
    skeleton = read_skeleton(save(name, tmp_path / name), **SIZE.get(name, {}))
    part = tmp_path / name / ("unet" if (tmp_path / name / "unet").is_dir() else "transformer")
    check_weights(skeleton.network, part)
    network = type(skeleton.network).from_pretrained(part).requires_grad_(True)
    cond = tree_map_only(Tensor, real, skeleton.condition(ROWS))
    arguments = {} if cond is None else cond if isinstance(cond, dict) else {"class_labels": cond}
    x, timestep = torch.zeros(ROWS, *skeleton.shape), torch.zeros(ROWS)

    def run(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            output = predict(network, x, timestep, arguments)
            if backward:
                loss = output.float().square().mean()
                del output
                loss.backward()
        network.zero_grad()

    call, inputs = skeleton.call(ROWS)
    for backward, checkpointing in ((False, False), (True, False), (True, True)):
        if checkpointing:
            network.enable_gradient_checkpointing()
        run(backward)
        found = allocated(lambda backward=backward: run(backward))
        told = measure(skeleton.network, call, backward=backward, checkpointing=checkpointing, inputs=inputs)
        assert told.peak == pytest.approx(found, rel=0.25), (backward, checkpointing)
    network.disable_gradient_checkpointing()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(False)
    assert measure(skeleton.network, call, backward=False).forward == counter.get_total_flops() > 0
