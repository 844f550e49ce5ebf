"""Networks shared out among processes (FSDP2 on the CPU, for real): the same weights, files and pictures as of one."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from distill import checkpoint, sharding
from tests.distill.command import fresh
from tests.distill.runs import DDP, FSDP, launcher
from tests.distill.sharded_ranks import Learner


def of_two(place: Path, *how: object) -> dict[str, Any]:
    """Runs sharded_ranks.py with two processes; what it has found out."""
    root = Path(__file__).parents[2]
    script = ("-m", "tests.distill.sharded_ranks", place)
    result = fresh(*launcher(how), *script, cwd=place, PYTHONPATH=str(root), ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    facts: dict[str, Any] = json.loads((place / "facts.json").read_text())
    return facts


def difference(a: Path, b: Path) -> float:
    """The largest |one - two| / |one| of the files of two checkpoints, in the 2-norm of all that a file holds.

    Of the sum: single weights whose gradient is nothing but rounding errors are moved by Adam as far as others.
    """
    names = sorted(file.name for file in a.glob("*.safetensors"))
    assert names == sorted(file.name for file in b.glob("*.safetensors"))
    worst = 0.0
    for name in names:
        one, two = load_file(a / name), load_file(b / name)
        assert one.keys() == two.keys()
        steps = {key for key in one if key.endswith(".step")}
        assert all(torch.equal(one[key], two[key]) for key in steps)
        both = [torch.cat([file[key].flatten() for key in sorted(one.keys() - steps)]) for file in (one, two)]
        worst = max(worst, float((both[0] - both[1]).norm() / both[0].norm()))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("how", [DDP, FSDP, (*FSDP, "--fsdp_reshard_after_forward", "false")])
def test_processes_learn_save_and_load_what_one_does(tmp_path: Path, how: tuple[object, ...]) -> None:
    """Three updates in two parts each, clipped, averaged; files go from one process to two and back."""
    alone = Learner(Accelerator(cpu=True), seed=0)
    whole = sum(tensor.numel() for tensor in alone.network.state_dict().values())
    alone.learn(range(3))
    alone.save(tmp_path / "one", 3)
    facts = of_two(tmp_path, *how)

    shared = how != DDP
    assert facts["processes"] == 2
    assert facts["sharded"] == [shared, shared]
    assert facts["share"] == (pytest.approx(0.5, abs=0.05) if shared else 1.0), whole
    assert facts["units"] == (6 if shared else 0)  # two blocks down, two up, the middle one, and the rest
    assert facts["class"] == "UNet2DModel"
    assert facts["denoiser"] is shared
    assert facts["finite"]
    assert facts["harm is seen"]

    assert difference(tmp_path / "one/step-00000003", tmp_path / "two/step-00000003") < 1e-4
    torch.testing.assert_close(torch.tensor(facts["picture"]), alone.picture().flatten(), rtol=1e-3, atol=1e-5)
    for file in (tmp_path / "one/step-00000003").glob("*.safetensors"):
        assert (tmp_path / "copied/step-00000003" / file.name).read_bytes() == file.read_bytes()  # one to two and back
    states = [json.loads((tmp_path / f / "step-00000003/state.json").read_text()) for f in ("one", "copied")]
    assert states[0] == states[1]

    alone.learn(range(3, 5))
    alone.save(tmp_path / "whole", 5)
    assert difference(tmp_path / "whole/step-00000005", tmp_path / "continued/step-00000005") < 1e-4
    again = Learner(Accelerator(cpu=True), seed=2)
    assert checkpoint.load(tmp_path / "continued/step-00000005", again.modules, again.optimizers) == 5
    assert difference(again.save(tmp_path / "again", 5), tmp_path / "continued/step-00000005") == 0


@pytest.mark.slow
def test_a_policy_that_names_no_part_is_refused(tmp_path: Path) -> None:
    policy = ("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "Block")
    root = Path(__file__).parents[2]
    words = (*launcher((*FSDP, *policy)), "-m", "tests.distill.sharded_ranks", tmp_path)
    result: subprocess.CompletedProcess[str] = fresh(
        *words, cwd=tmp_path, PYTHONPATH=str(root), ACCELERATE_USE_CPU="true"
    )
    assert result.returncode != 0
    assert "fsdp_transformer_layer_cls_to_wrap: Block; a UNet2DModel has" in result.stderr


def test_what_nobody_shares_is_itself() -> None:
    learner = Learner(Accelerator(cpu=True), seed=0)
    tensor = learner.network.network.conv_in.weight
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert not sharding.is_sharded(learner.network)
    assert sharding.local(tensor) is sharding.whole(tensor) is sharding.like(tensor, tensor) is tensor
