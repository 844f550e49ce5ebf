"""Between two lines of metrics nothing waits for the device: no value of a tensor on it is read, no copy to it waits.

Without an accelerator the device is `meta`: its tensors have shapes and no values, so that whatever asks for a value
(.item(), .cpu(), bool(), a mask as an index, clipping in Python) is seen, and cannot go on. A copy to the device that
is not said to be `non_blocking` is seen too, and a tensor that is made of numbers there. On a GPU torch itself raises.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill import Fixed, Trainer, train
from distill.adversary import FakeHeads, ScoreOnly, TeacherHeads
from distill.average import Average
from distill.discriminator import Discriminator
from distill.divergences import DIVERGENCES
from distill.methods import StudentNoise
from distill.noise import Share, karras_level, log_normal_level
from distill.optim import Update, adamw
from distill.sections import LogNormal, Optimizer
from distill.student import Student
from distill.taps import Tap
from distill.targets import Backtracking, ScoreInterpolation
from distill.weights import RatioWeight
from samplers import Guided, NetworkDenoiser, SampleNoise
from samplers.adapters import EDM
from tests.distill.tiny import SIGMA_DATA, unet
from tests.some import some

MADE_OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor)
READING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2")


class Numbers(TorchFunctionMode):
    """Notes every tensor on `device` that is made of Python's numbers, or of a tensor elsewhere, as by a copy."""

    def __init__(self, device: str, found: list[str]) -> None:
        super().__init__()
        self.device, self.found = device, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        where = (kwargs or {}).get("device")
        if func in MADE_OF_NUMBERS and where is not None and torch.device(where).type == self.device:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """Notes every operation that needs a value of a tensor on `device`, or copies to it and waits."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found = device, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [t.device.type == self.device for t in tensors]
        copies = name == "_to_copy" and any(there) and (kwargs or {}).get("device", tensors[0].device).type == "cpu"
        copies |= name == "copy_" and there == [False, True]
        to = torch.device((kwargs or {}).get("device") or "cpu").type
        waits = name == "_to_copy" and there == [False] and to == self.device
        waits |= name == "copy_" and there == [True, False]
        copies |= waits and not ((kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2]))
        masks = name in ("index", "index_put_") and any(t.dtype == torch.bool for t in tensors[1:])
        if copies or ((name in READING or masks) and any(there)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_read(device: str) -> Iterator[None]:
    """Raises AssertionError, naming the operations, where a value of a tensor on the device is asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    reads = Reads(device)
    try:
        with reads, Numbers(device, reads.found):
            yield
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(f"{reads.found}: {error}") from error
    assert not reads.found, reads.found


def denoiser(device: str, seed: int = 0) -> NetworkDenoiser:
    return NetworkDenoiser(unet(10, seed), EDM(SIGMA_DATA, 0.01, 20.0, 0.0, 0.25, 1.0)).to(device)


def trainer(device: str, heads: str | None = None, walks: bool = False, steps: int = 1, parts: int = 1) -> Trainer:
    """A run's objects, as an experiment makes them: guided, clipped, averaged, all noise from the samples' streams."""
    student, fake, teacher = (denoiser(device, seed) for seed in range(3))
    teacher.requires_grad_(False)
    average = denoiser(device).requires_grad_(False)
    config = Optimizer(lr=1e-3, clip=1.0, warmup=2)
    guided = Guided(teacher, 2.0, 10)
    target: Any = Fixed(guided)
    if walks:
        target = Backtracking(
            ScoreInterpolation(denoiser(device, 3).requires_grad_(False), guided), guided, 2, device=device
        )
    level = partial(karras_level, config=StudentNoise(), sigma_min=0.02, sigma_max=10.0)
    adversary: Any = ScoreOnly()
    trained: nn.Module | None = None
    if heads is not None:
        network = teacher if heads == "teacher" else fake
        tap = Tap(network.network)
        with torch.no_grad():
            x, sigma, labels = torch.zeros(1, 1, 8, 8, device=device), torch.ones(1, device=device), torch.zeros(1)
            features = tap.encode(lambda: network(x, sigma, labels.long().to(device)))
        trained = Discriminator(features).to(device)
        reals: Callable[[SampleNoise, Any], Tensor] = lambda noise, cond: noise.normal((1, 8, 8), device=device)  # noqa: E731
        shared: dict[str, Any] = {
            "network": network,
            "tap": tap,
            "heads": trained,
            "train_heads": trained,
            "reals": reals,
        }
        adversary = TeacherHeads(**shared, r1=1.0, level=level) if heads == "teacher" else FakeHeads(**shared, r1=0.0)
    rate: Callable[[int], float] = lambda step: 1e-3  # noqa: E731
    return Trainer(
        Student(student, [2.5, 0.5][:steps], 2.5, [0.5][: steps - 1]),
        fake,
        target,
        Update(adamw(student, config), rate, config.clip),
        Update(adamw(fake, config, trained), rate, config.clip),
        level,
        partial(log_normal_level, config=LogNormal(), sigma_min=0.02, sigma_max=10.0),
        Share(0, 4),
        (1, 8, 8),
        conditions=lambda noise, where: noise.integers(10, where),
        ratio_weight=None if heads is None else RatioWeight(DIVERGENCES["jensen-shannon"]).to(device),
        adversary=adversary,
        adversarial_weight=0.0 if heads is None else 0.1,
        fake_steps=2,
        average=Average(average, student, 0.9),
        parts=parts,
        device=device,
    )


CASES: list[dict[str, Any]] = [
    {"heads": "teacher"},
    {"heads": "fake"},
    {"walks": True},
    {"steps": 2, "parts": 2},
]


@pytest.mark.parametrize("case", some(CASES, ids=str))
def test_no_update_reads_the_device(case: dict[str, Any]) -> None:
    stepper, updates = trainer("meta", **case), 3 if "walks" in case else 2
    with nothing_read("meta"):
        metrics = list(train(stepper, updates))
    assert len(metrics) == updates
    assert all(value.device.type == "meta" for value in metrics[-1].values())


READINGS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "cpu": lambda x: x.cpu(),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "copy": lambda x: torch.zeros(3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "to": lambda x: torch.zeros(3).to(x.device),
    "filled": lambda x: x.copy_(torch.zeros(3)),
    "number": lambda x: torch.as_tensor(1.0, device=x.device),
}


@pytest.mark.parametrize("name", READINGS)
def test_a_reading_would_be_seen(name: str) -> None:
    x = torch.zeros(3, device="meta")
    with pytest.raises(AssertionError), nothing_read("meta"):
        READINGS[name](x)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_update_waits_for_a_gpu(case: dict[str, Any]) -> None:
    stepper = trainer("cuda", **case)
    for _ in train(stepper, 2):  # what is set up once may wait
        pass
    with nothing_read("cuda"):
        for _ in train(stepper, 4, start=2):
            pass
