"""Students of several steps as runs: no step is left out, on a path or without one, and what is measured is theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import Train
from distill.student import Student
from distill.subject import checked_subject
from samplers import GaussianMixture
from tests.distill.command import distill
from tests.distill.runs import assert_refused, entries, lines
from tests.distill.tiny import TRAIN, write_config

RING: dict[str, Any] = {
    "teacher": {"name": "ring", "path": "taught"},
    "student": {"sigma_init": 5.0, "steps": 4, "hold": 1},
    "toy": {"hidden": 8, "layers": 2},
    "noise": {"sigma_min": 0.05, "sigma_max": 5.0},
}
MIXTURE = GaussianMixture(torch.ones(2), torch.tensor([[1.0], [-1.0]]), torch.tensor([0.3, 0.2]))
PATH: dict[str, Any] = {
    "target": {"name": "nodes", "updates": 4},
    "degradation": {"steps": 4, "nodes": 3, "check_every": 2},
}


def student(steps: int, hold: int) -> dict[str, Any]:
    return TRAIN["student"] | {"steps": steps, "hold": hold}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "short": (
        {"student": student(2, 25)},
        "steps: 6; 2 steps of a student, each held for 25 updates (student.hold), need at least 50",
    ),
    "short path": (
        {"student": student(2, 3)} | PATH,
        "target.updates: 4; 2 steps of a student, each held for 3 updates (student.hold), need at least 6",
    ),
    "adaptive": (
        {"student": student(2, 1)} | PATH | {"target": PATH["target"] | {"schedule": "adaptive"}},
        "target.schedule: adaptive; mismatches of a student's several steps do not compare, accepted is even",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_would_leave_a_step_out_is_refused(place: Path, name: str) -> None:
    changes, message = REFUSED[name]
    config = write_config(place, TRAIN, **changes)
    before = entries(place)
    assert_refused(distill("train", "--config", config, cwd=place), message)
    assert entries(place) == before


def test_a_path_begins_with_the_step_whose_samples_it_was_recorded_for() -> None:
    """The last one, for every seed; otherwise the order stays as it is without a path, and every turn is whole."""
    several = Student(MIXTURE, [4.0, 1.5, 0.4], 4.0, [1.4, 0.3])
    for seed in range(20):
        free, led = (
            [several.trained_step(seed, n, 2, begins_last) for n in range(30)] for begins_last in (False, True)
        )
        assert led[:2] == [3, 3]
        assert sorted(led[:6]) == [1, 1, 2, 2, 3, 3]
        assert [n for n in led[:6] if n < 3] == [n for n in free[:6] if n < 3]
        assert led[6:] == free[6:]


def test_levels_fall() -> None:
    with pytest.raises(ValueError, match=r"sigmas: \[4.0, 0.4, 1.5\]; accepted are levels that fall"):
        Student(MIXTURE, [4.0, 0.4, 1.5], 4.0, [0.3, 1.4])


@pytest.mark.slow
def test_toys_have_several_steps_with_levels_that_fall(tmp_path: Path) -> None:
    teach = {"command": "teach", "run": "taught", "mixture": "ring", "steps": 2, "batch_size": 16, "toy": RING["toy"]}
    taught = distill("teach", "--config", write_config(tmp_path, teach, "teach.yaml"), cwd=tmp_path)
    assert taught.code == 0, taught.err
    config = write_config(tmp_path, TRAIN, **RING)
    result = distill("train", "--config", config, cwd=tmp_path)
    assert result.code == 0, result.err
    said = TRAIN | RING | {"teacher": RING["teacher"] | {"path": str(tmp_path / "taught")}}
    subject, *_ = checked_subject(Train.model_validate(said), torch.device("cpu"))
    made = subject.as_student(subject.student)
    assert len(made) == 4
    assert made.sigmas[0] == 5.0
    assert all(0.002 < after < before for before, after in zip(made.sigmas, made.sigmas[1:], strict=False))
    exact = distill("train", "--config", config, "--run", "exact", "--teacher.path", "null", cwd=tmp_path)
    assert_refused(exact, "student.steps: 4; the student of an exact teacher sees no noise level")


@pytest.mark.slow
def test_a_path_guides_all_steps_and_the_fake_scores_error_is_not_told(place: Path) -> None:
    logging = TRAIN["logging"] | {"mismatch_every": 3}
    config = write_config(place, TRAIN, student=student(2, 2), logging=logging, **PATH)
    result = distill("train", "--config", config, cwd=place)
    assert result.code == 0, result.err
    said = lines(place / "student")
    assert [line.get("node", 0) > 0 for line in said] == [True] * 4 + [False] * 2
    measured = [line.keys() & {"mismatch_target", "mismatch_teacher", "fake_error"} for line in said]
    assert measured[2] == measured[5] == {"mismatch_target", "mismatch_teacher"}


def test_a_students_run_is_no_teacher(place: Path) -> None:
    config = write_config(place, TRAIN, steps=1)
    assert distill("train", "--config", config, cwd=place).code == 0
    result = distill("train", "--config", config, "--run", "next", "--teacher.path", "student", cwd=place)
    assert_refused(result, "student: is no pipeline folder", "this is a run of `distill train`")
