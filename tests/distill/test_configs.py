"""Every configuration file goes through the real parser, and says what the schema says."""

import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from distill.cli import _parse
from distill.config import COMMANDS, Teach, Train
from distill.noise import uncovered
from distill.ratio import UNCOVERED
from distill.run import completed, differences
from distill.sections import Network
from tests.distill.tiny import TEACH, TRAIN
from tests.some import some

CONFIGS = (Path(__file__).parents[2] / "configs").glob("*.yaml")
FILES = sorted(
    file for file in CONFIGS if not file.stem.endswith("evaluation")
)  # manifests: tests/tools/test_manifest.py


def parse(*arguments: object) -> Teach | Train:
    command, parsed = _parse([str(a) for a in arguments])
    values = parsed.as_dict()
    known = {"resume", "config"} | ({"dry_run", "hardware"} if command == "train" else set())
    assert known <= values.keys()
    return COMMANDS[command].model_validate({k: v for k, v in values.items() if k not in known})


def test_there_are_configurations() -> None:
    assert len(FILES) >= 2


@pytest.mark.parametrize("file", some(FILES, 4, ids=lambda file: file.stem))
def test_a_configuration_is_read_and_read_again_the_same(file: Path, tmp_path: Path) -> None:
    """As the command reads it, as pydantic does, and as the record that a run keeps."""
    content = yaml.safe_load(file.read_text())
    config = parse(content["command"], "--config", file)
    assert config == COMMANDS[content["command"]].model_validate(content)
    assert not Path(config.run).is_absolute()
    record = tmp_path / "config.yaml"
    record.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    assert parse(content["command"], "--config", record) == config


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_fake_score_learns_where_the_student_is_judged(file: Path) -> None:
    """But for less than a quarter of the levels, from where on a run would tell of it."""
    content = yaml.safe_load(file.read_text())
    if content["command"] != "train":
        pytest.skip("there is no fake score")
    config = Train.model_validate(content)
    low, high = config.noise.sigma_min or 0.002, config.noise.sigma_max or 80.0
    assert uncovered(config.fake, config.noise, low, high) <= UNCOVERED


def test_options_after_the_file_override_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(TRAIN))
    config = parse(
        "train", "--config", file, "--student.optimizer.lr", "1e-2", "--fake.steps=5", "--noise.sigma_min", "null"
    )
    assert isinstance(config, Train)
    assert config.student.optimizer.lr == 0.01
    assert config.student.sigma_init == TRAIN["student"]["sigma_init"]
    assert (config.fake.steps, config.noise.sigma_min) == (5, None)
    file.write_text(yaml.safe_dump(TEACH))
    teach = parse("teach", f"--config={file}", "--network.channels", "[16, 32]")
    assert isinstance(teach, Teach)
    assert teach.network.channels == (16, 32)


def test_a_configuration_is_frozen_and_closed() -> None:
    config = Train.model_validate(TRAIN)
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Train.model_validate(TRAIN | {"stepz": 3})


def test_differences_are_named_by_their_keys() -> None:
    before = Train.model_validate(TRAIN).model_dump(mode="json")
    after = Train.model_validate(
        TRAIN | {"run": "elsewhere", "logging": {}, "seed": 1, "fake": {"noise": {"mean": 0.0}}}
    ).model_dump(mode="json")
    assert sorted(differences(before, after)) == ["fake.noise.mean", "seed"]
    del before["target"]
    assert sorted(differences(before, after)) == ["fake.noise.mean", "seed", "target"]


@pytest.mark.parametrize("channels", [(8,), (24, 32), (40, 64), (48, 64), (80, 160), (96, 192)])
def test_every_width_that_is_accepted_can_be_built(channels: tuple[int, ...]) -> None:
    from distill.pretrain import build_unet

    network = build_unet(Network(channels=channels, attention=(len(channels) - 1,)), 8, 1, 3)
    assert network.config.block_out_channels == channels
    assert network.config.norm_num_groups <= 32
    assert network.config.num_class_embeds == 4


def test_the_schemas_load_no_torch() -> None:
    from tests.distill.command import fresh

    code = "import sys, distill.config; print('torch' in sys.modules)"
    result = fresh("-c", code, cwd=Path(sys.modules["distill"].__file__ or "").parents[1])
    assert result.stdout == "False\n", result.stderr


def test_a_record_of_an_earlier_version_is_completed() -> None:
    """Keys that it did not know have their defaults, so that its run goes on; what was changed is still named."""
    now = Train(run="run", teacher={"path": "teacher"})
    then = now.model_dump(mode="json")
    for unknown in ("prompts", "memory"):
        del then[unknown]
    del then["student"]["steps"]
    assert differences(completed(now, then), now.model_dump(mode="json")) == []
    then["student"]["ema"] = 0.5
    assert differences(completed(now, then), now.model_dump(mode="json")) == ["student.ema"]
    assert completed(now, {"command": "train", "of": "another form"}) == {"command": "train", "of": "another form"}
