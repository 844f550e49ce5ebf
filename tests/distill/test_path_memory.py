"""What a path holds in memory beside the trainer's own networks: two at most, and none when the teacher is reached."""

import gc
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill import disback
from distill.config import Train
from distill.nodes import DegradationPath
from distill.subject import load_subject
from distill.targets import Backtracking
from tests.distill.tiny import TRAIN

PLAIN = (torch.Tensor, torch.nn.Parameter)


def held() -> int:
    """Bytes of all float tensors on the CPU that are alive, each storage once; not of those that a compiler invents."""
    gc.collect()
    with warnings.catch_warnings(action="ignore"):
        tensors = [o for o in gc.get_objects() if type(o) in PLAIN and o.is_floating_point()]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """A folder with a teacher and a path of every kind of storage."""
    folder = tmp_path_factory.mktemp("paths")
    for storage in ("full", "half", "low-rank"):
        disback.degrade(config(folder, pipeline, "nodes", storage))
    return folder


def config(folder: Path, pipeline: Path, name: str, storage: str) -> Train:
    changes = {
        "teacher": {"path": str(pipeline)},
        "target": {"name": name, "updates": 4, "path": str(folder / storage)},
        "degradation": {"steps": 4, "nodes": 3, "storage": storage, "check_every": 100, "rank": 2},
    }
    return Train.model_validate(TRAIN | changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "storage", "networks"),
    [
        ("nodes", "full", 1),
        ("nodes", "half", 1),
        ("nodes", "low-rank", 1),
        ("weight-interpolation", "full", 2),
        ("score-interpolation", "full", 1),
    ],
)
def test_a_path_holds_no_more_than_it_says_and_lets_go_of_it(
    recorded: Path, pipeline: Path, name: str, storage: str, networks: int
) -> None:
    configured = config(recorded, pipeline, name, storage)
    path = DegradationPath.read(configured.path)
    subject = load_subject(configured, torch.device("cpu"))
    size = sum(tensor.nbytes for tensor in subject.fake.state_dict().values())
    before = held()
    target = disback.target(configured, subject, path, Accelerator())
    assert isinstance(target, Backtracking)
    for n in range(4):
        target.begin(n)
        assert not target.final
        assert networks * size <= held() - before < (networks + 0.05) * size
    target.begin(4)
    assert target.final
    assert held() - before < 0.05 * size
