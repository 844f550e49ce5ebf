"""A pipeline is attached, detached, hooked and copied: what is put on comes off, and nothing else."""

import copy
import inspect
from typing import Any

import pytest
import torch

from samplers.pipelines import teleport
from tests.samplers.tiny_pipelines import MAKERS, Calls, fitting, left, pictures, stable_diffusion

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what diffusers does with numpy
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:guidance acts"),
]
SKIP = 5.0


def test_attached_for_good_until_detached() -> None:
    pipe = stable_diffusion()
    stock, state = pictures(pipe), left(pipe)
    jump = teleport(pipe, fitting(pipe), SKIP).attach()
    first, second = pictures(pipe), pictures(pipe)
    assert torch.equal(first, second)
    assert not torch.equal(first, stock)
    jump.detach()
    jump.detach()
    assert left(pipe) == state
    assert torch.equal(pictures(pipe), stock)
    with jump:
        assert torch.equal(pictures(pipe), first)


def test_an_exception_undoes_too() -> None:
    pipe = stable_diffusion()
    stock, state = pictures(pipe), left(pipe)

    def fail(*_: Any) -> dict[str, Any]:
        raise KeyError("from the callback")

    with pytest.raises(KeyError, match="callback"), teleport(pipe, fitting(pipe), SKIP):
        pictures(pipe, callback_on_step_end=fail)
    assert left(pipe) == state
    assert torch.equal(pictures(pipe), stock)


@pytest.mark.parametrize("first", ["offload", "attach"])
def test_offloading_and_other_hooks_stay_in_place(first) -> None:
    """diffusers' offloading takes the network's forward off and puts it on again after every call."""
    pipe = stable_diffusion()
    with teleport(pipe, fitting(pipe), SKIP):
        expected = pictures(pipe)
    stock, state = pictures(pipe), left(pipe)
    jump = teleport(pipe, fitting(pipe), SKIP)
    if first == "attach":
        jump.attach()
    pipe.enable_model_cpu_offload(device="cpu")
    if first == "offload":
        jump.attach()
    for _ in range(3):
        with Calls(pipe) as made:
            assert torch.equal(pictures(pipe), expected)
        assert jump.run is not None
        assert len(made) == jump.run.network_calls == jump.run.nfe < 13
    jump.detach()
    offloaded, move = [], pipe.unet._hf_hook.pre_forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        offloaded.append(1)
        return move(*args, **kwargs)

    pipe.unet._hf_hook.pre_forward = noted
    with Calls(pipe) as made:
        assert torch.equal(pictures(pipe), stock)
    assert len(made) == len(offloaded) == 13
    pipe.remove_all_hooks()
    assert vars(pipe.unet).pop("forward") == state[-1]  # accelerate leaves the bound method
    assert left(pipe) == state


def test_hooks_of_caches_do_not_see_the_call_that_is_not_made() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            self.calls += 1
            return args, kwargs

    pipe, counting = stable_diffusion(), Counting()
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(counting, "counting")
    state = left(pipe)
    with teleport(pipe, fitting(pipe), SKIP) as jump:
        pictures(pipe)
    assert jump.run is not None
    assert counting.calls == jump.run.network_calls
    assert left(pipe)[:-1] == state[:-1]
    pictures(pipe)
    assert counting.calls == jump.run.network_calls + 13


def test_a_copy_of_the_scheduler_is_a_stock_one() -> None:
    pipe = stable_diffusion()
    with teleport(pipe, fitting(pipe), SKIP):
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(10)
        assert len(twin.timesteps) == 11
        rebuilt = type(pipe.scheduler).from_config(pipe.scheduler.config)
        rebuilt.set_timesteps(10)
        assert torch.equal(rebuilt.timesteps, twin.timesteps)


def test_the_signatures_that_pipelines_look_at_are_the_stock_ones() -> None:
    pipe = MAKERS["StableDiffusionXLPipeline"]()
    names = ("set_timesteps", "step", "scale_model_input")
    stock = [inspect.signature(getattr(pipe.scheduler, name)) for name in names]
    with teleport(pipe, fitting(pipe), SKIP):
        assert [inspect.signature(getattr(pipe.scheduler, name)) for name in names] == stock
