"""Two processes agree with one on the first five losses of every family, replicated and sharing the networks out."""

from pathlib import Path
from typing import Any

import pytest

from tests.distill import families
from tests.distill.command import distill
from tests.distill.runs import DDP, FSDP, forked, lines
from tests.distill.tiny import write_config

# One of each network class and kind of coordinates; tests/distill/test_processes.py has Stable Diffusion and Flux.
NAMES = ("ddpm-v", "edm", "dit", "sdxl", "pixart", "sd3")


@pytest.mark.slow
@pytest.mark.parametrize("how", [DDP, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_agree_with_one(name: str, how: tuple[object, ...], tmp_path: Path) -> None:
    """To 1e-3; a loss that is rounding alone is compared to the largest of its kind."""
    families.save(name, tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(families.PROMPTS) + "\n")
    sizes = {side: families.CALL[name][side] for side in ("height", "width")} if name.startswith("flux") else {}
    latents = (tmp_path / "teacher/vae").is_dir()
    base: dict[str, Any] = {
        "command": "train",
        "run": "student",
        "teacher": {"path": "teacher"},
        "prompts": {"file": "prompts.txt"} | sizes if name in families.PROMPTED else {},
        "student": {"sigma_init": None if latents else 2.5, "optimizer": {"lr": 1e-3}},
        "fake": {"optimizer": {"lr": 1e-3}},
        "batch_size": 4,
        "steps": 5,
        "logging": {"log_every": 1, "sample_every": 100, "checkpoint_every": 5},
    }
    config = write_config(tmp_path, base)
    one = distill("train", "--config", config, "--run", "one", cwd=tmp_path)
    assert one.code == 0, one.err
    text = forked(tmp_path, "train", "--config", config, "--run", "two", kind=how)
    assert text.startswith("0\n"), text
    logged, found = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    for key in logged[-1].keys() - {"step"}:
        size = max(abs(line[key]) for line in logged)
        assert size > 0
        for a, b in zip(logged, found, strict=True):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4 * size), (key, a["step"])
