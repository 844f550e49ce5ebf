"""DisBack's first stage learns what the second one starts from: at its noise levels, however the batch is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill.config import Train
from distill.noise import student_level
from tests.distill.command import Running, distill
from tests.distill.runs import lines
from tests.distill.tiny import TRAIN, write_config

DISBACK: dict[str, Any] = TRAIN | {
    "target": {"name": "nodes", "updates": 4},
    "degradation": {"steps": 4, "nodes": 3, "check_every": 2},
}
NEVER: dict[str, Any] = {"mean": 50.0, "std": 0.1}  # no level of it is in the teacher's range


@pytest.mark.parametrize("name", ["karras", "log-normal"])
@pytest.mark.parametrize("levels", ["own", "student"])
def test_both_stages_have_the_fake_scores_noise_levels(levels: str, name: str) -> None:
    noise = {"name": name, "sigma_min": 0.1, "sigma_max": 13.0, "rho": 3.0, "mean": 1.0, "std": 0.5}
    fake = {"levels": levels, "noise": {"mean": -2.0, "std": 0.3}}
    config = Train.model_validate(DISBACK | {"noise": noise, "fake": fake})
    first = config.first_stage()
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    one, two = (student_level(u, law, 0.1, 13.0) for law in (first.noise, config.fake_noise))
    assert torch.equal(one, two)
    assert (first.noise.sigma_min, first.noise.sigma_max, first.levels) == (0.1, 13.0, levels)
    median = float(one[49])  # u = 1/2
    if levels == "own":
        assert median == pytest.approx(0.1436, rel=1e-3)  # e^-2 = 0.1353, but for what lies below 0.1
    else:
        assert torch.equal(one, student_level(u, config.noise, 0.1, 13.0))
        assert median > 2
    weighted = config.model_copy(update={"noise": config.noise.model_copy(update={"weighting": "none"})})
    assert weighted.first_stage() == first  # a weight of the student's loss is none of a path's


@pytest.mark.slow
def test_a_law_that_no_stage_uses_is_not_looked_at(place: Path) -> None:
    config = write_config(place, DISBACK, fake={"levels": "student", "noise": NEVER})
    result = distill("train", "--config", config, cwd=place)
    assert result.code == 0, result.err
    refused = distill("train", "--config", config, "--run", "other", "--fake.levels", "own", cwd=place)
    assert refused.code == 2
    assert "fake.noise.mean, fake.noise.std: 50.0, 0.1 put less than a thousandth" in refused.err
    record = yaml.safe_load((place / "student/path/config.yaml").read_text())
    assert (record["levels"], record["noise"]["name"]) == ("student", "karras")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["recorded", "begun by train"])
def test_parts_of_the_launcher_are_no_other_path(place: Path, stage: str) -> None:
    """A divergence's weights are normalised over parts, so that a run records how many; its path does not."""
    weighted: dict[str, Any] = {"divergence": {"name": "jensen-shannon", "bins": 2}, "discriminator": {"lr": 1e-2}}
    config = write_config(place, DISBACK, real={"name": "data"}, **weighted)
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}

    def run(command: str, *words: object) -> str:
        result = Running((command, "--config", config, *words), place, environment=environment).wait()
        assert result.code == 0, result.err
        return result.out

    if stage == "recorded":
        assert "3 nodes" in run("degrade")
        run("train")
    else:
        run("train")
        assert "3 nodes" in run("degrade", "--resume")
    assert len(lines(place / "student")) == DISBACK["steps"]
    record = yaml.safe_load((place / "student/config.yaml").read_text())
    assert record["memory"]["accumulation"] == 2
