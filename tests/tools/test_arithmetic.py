from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from tools import arithmetic
from tools.arithmetic import full_precision, one_thread, reproducible

CPU = torch.device("cpu")


@pytest.fixture
def careless() -> Iterator[None]:
    """What a training script sets to be fast."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False


@pytest.mark.usefixtures("careless")
def test_switches_are_off_within_and_put_back() -> None:
    backends = torch.backends
    parts = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [part.fp32_precision for part in parts]
    assert before[0] == "tf32"
    with full_precision(CPU):
        assert [part.fp32_precision for part in parts] == ["ieee"] * 4
        assert backends.cudnn.deterministic
        assert not backends.cudnn.benchmark
    with pytest.raises(KeyError), full_precision(CPU):
        raise KeyError
    assert [part.fp32_precision for part in parts] == before
    assert backends.cuda.matmul.allow_tf32
    assert backends.cudnn.benchmark
    assert not backends.cudnn.deterministic
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("careless")
def test_products_are_exact_within_autocast() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x - exact).abs().max() > 1e-2
        with full_precision(CPU):
            assert (x @ x - exact).abs().max() < 1e-4


def test_threads_that_cross_put_back_what_was() -> None:
    """The first enters and leaves before the second leaves; a thread of its own for each."""
    deterministic, count = torch.backends.cudnn.deterministic, torch.get_num_threads()
    torch.backends.cudnn.deterministic = False
    first, second = (ExitStack() for _ in range(2))
    try:
        for stack in (first, second):
            stack.enter_context(reproducible(CPU))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: one_thread().__enter__()).result()
            first.close()
            assert torch.backends.cudnn.deterministic
            assert torch.get_num_threads() == 1
        second.close()
        assert not torch.backends.cudnn.deterministic
    finally:
        arithmetic._SINGLE.__exit__()
        torch.backends.cudnn.deterministic = deterministic
    assert torch.get_num_threads() == count
