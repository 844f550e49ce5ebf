"""A place to work in, with a teacher to distil."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from tests.distill.tiny import save_teacher


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline folder of a class-conditional teacher; tests must not write into it."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "pipeline")


@pytest.fixture
def place(tmp_path: Path, pipeline: Path) -> Path:
    """An empty folder with a copy of that teacher in `pipeline`."""
    shutil.copytree(pipeline, tmp_path / "pipeline")
    return tmp_path


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state a process; a test that asks for a launch of its own wants none of another's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
