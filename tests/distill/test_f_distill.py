"""f-distill by the command: every divergence and place for the heads, killed, on two processes, refused."""

import math
import random
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distill import checkpoint
from distill.divergences import DIVERGENCES
from distill.generate import load_generator
from distill.methods import DivergenceName
from distill.taps import Tap
from tests.distill.command import distill
from tests.distill.runs import assert_refused, assert_same, entries, forked, kill_somewhere, lines
from tests.distill.tiny import TRAIN, unet, write_config
from tests.some import some

DATA = {"name": "data"}
MADE = {"name": "teacher", "count": 40, "sampler": "euler", "steps": 2, "cache": "samples"}
RING: dict[str, Any] = {
    "teacher": {"name": "ring"},
    "student": {"sigma_init": 1.0},
    "toy": {"hidden": 8, "layers": 2},
    "noise": {"sigma_min": 0.05, "sigma_max": 5.0},
}

# Together: every divergence, place for the heads, form of R1, kind of real samples; with and without the adversarial
# term and guidance.
RUNS: dict[str, dict[str, Any]] = {
    "reverse-kl": {"real": DATA, "adversarial_weight": 0.1, "discriminator": {"features": "fake"}},
    "softened-reverse-kl": {"real": DATA, "discriminator": {"r1": 0.1}},
    "jensen-shannon": {"real": DATA, "adversarial_weight": 0.1, "discriminator": {"features": "fake", "r1": 0.1}},
    "squared-hellinger": {"real": MADE, "discriminator": {"features": "fake", "r1": 0.1, "r1_form": "difference"}},
    "forward-kl": {"real": MADE, "adversarial_weight": 0.1, "teacher": {"path": "pipeline", "guidance": 2.0}},
    "jeffreys": {
        "real": DATA,
        "teacher": {"path": "pipeline", "guidance": 2.0},
        "discriminator": {"features": "fake", "levels": [-1], "weight": 0.5},
    },
    "neyman": {
        "real": DATA,
        "adversarial_weight": 0.1,
        "discriminator": {"r1": 0.1, "r1_form": "difference"},
        "noise": {"sigma_min": 0.02, "sigma_max": 10.0, "weighting": "level"},
    },
    "alpha": {"real": DATA, "discriminator": {"features": "teacher"}, "fake": {"steps": 2}},
}


def divergence(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name} | ({"exponent": -0.5} if name == "alpha" else {}) | more


def test_every_divergence_is_tried() -> None:
    assert list(RUNS) == [*DIVERGENCES, "alpha"] == list(get_args(DivergenceName))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_by_every_divergence_is_finite(place: Path, name: str) -> None:
    heads = {"lr": 1e-2} | RUNS[name].get("discriminator", {})  # so that three updates make the ratios differ
    changes = RUNS[name] | {"discriminator": heads, "divergence": divergence(name, bins=2)}
    config = write_config(place, TRAIN, steps=3, **changes)
    result = distill("train", "--config", config, cwd=place)
    assert result.code == 0, result.err
    run, choice = place / "student", RUNS[name]
    wanted = {"gap", "student_loss", "fake_loss", "discriminator_loss", "log_ratio"}
    wanted |= {"weight_mean", "weight_max", "weight_ess"}
    wanted |= {"adversarial_loss"} if "adversarial_weight" in choice else set()
    wanted |= {"gradient_penalty"} if "r1" in choice.get("discriminator", {}) else set()
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
    for line in lines(run):
        assert line.keys() - {"step"} == wanted
        assert all(math.isfinite(value) for value in line.values())
        assert line["weight_mean"] == pytest.approx(1, rel=1e-5)
    first, *_, last = lines(run)
    assert first["log_ratio"] == 0  # heads start without an opinion
    assert first["adversarial_loss" if "adversarial_loss" in first else "weight_ess"] == pytest.approx(
        math.log(2) if "adversarial_loss" in first else 1.0
    )
    assert last["log_ratio"] != 0
    if name != "reverse-kl":
        assert last["weight_ess"] < 1 - 1e-7
        assert (load_file(run / "checkpoints/step-00000003/ratio_weight.safetensors")["means"] != 1).any()
    else:
        assert (last["weight_max"], last["weight_ess"]) == (1, 1)
        assert not (run / "checkpoints/step-00000003/ratio_weight.safetensors").exists()


@pytest.mark.slow
def test_each_choice_changes_what_is_learned(place: Path) -> None:
    """The weights of the student and of the heads after three updates differ between any two choices."""
    choice = divergence("jensen-shannon", bins=2)
    base = write_config(place, TRAIN, steps=3, real=DATA, divergence=choice, discriminator={"lr": 5e-3})
    changes = {
        "base": (),
        "divergence": ("--divergence.name", "forward-kl"),
        "features": ("--discriminator.features", "fake"),
        "exact": ("--discriminator.r1", 1),
        "difference": ("--discriminator.r1", 1, "--discriminator.r1_form", "difference"),
        "adversarial": ("--adversarial_weight", 1),
        "guidance": ("--teacher.guidance", 2),
        "lr": ("--discriminator.lr", 1e-2),
        "weight": ("--discriminator.weight", 0.5, "--discriminator.features", "fake"),
        "weighting": ("--noise.weighting", "level"),
        "raw": ("--divergence.normalise", "false"),
    }
    seen: dict[Any, str] = {}
    for run, words in changes.items():
        result = distill("train", "--config", base, "--run", run, *words, cwd=place)
        assert result.code == 0, result.err
        kept = [(place / run / f"checkpoints/step-00000003/{n}.safetensors") for n in ("student", "discriminator")]
        assert seen.setdefault(tuple(file.read_bytes() for file in kept), run) == run


KILLED: dict[str, dict[str, Any]] = {
    "teacher, exact, data": {
        "divergence": divergence("jensen-shannon"),
        "discriminator": {"features": "teacher", "r1": 0.1, "lr": 1e-2},
        "adversarial_weight": 0.1,
        "real": DATA,
    },
    "fake, difference, teacher's samples, running means": {
        "divergence": divergence("forward-kl", decay=0.7, bins=3),
        "discriminator": {"features": "fake", "r1": 0.1, "r1_form": "difference"},
        "fake": {"steps": 2},
        "real": MADE,
    },
    "fake, exact, guided": {
        "teacher": {"path": "pipeline", "guidance": 2.0},
        "discriminator": {"features": "fake", "r1": 0.1},
        "adversarial_weight": 0.1,
        "real": DATA,
    },
    "teacher, guided, alpha, running means": {
        "teacher": {"path": "pipeline", "guidance": 2.0},
        "divergence": divergence("alpha", decay=0.9, bins=2),
        "real": MADE,
    },
    "toy": RING
    | {"divergence": divergence("jeffreys", decay=0.5), "discriminator": {"features": "fake"}, "real": DATA},
}
QUICK = ("toy",)


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KILLED])
@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(place: Path, kind: str) -> None:
    """Weights, those of the heads and the ratio's running means too, optimizers and metrics, bit for bit."""
    steps = 14
    logging = {"log_every": 1, "sample_every": 100, "checkpoint_every": 1}
    heads = {"lr": 1e-2} | KILLED[kind].get("discriminator", {})
    changes = KILLED[kind] | {"discriminator": heads, "steps": steps, "logging": logging}
    config = write_config(place, TRAIN, **changes)
    whole = distill("train", "--config", config, "--run", "whole", cwd=place)
    assert whole.code == 0, whole.err
    rng, command = random.Random(3), ("train", "--config", config, "--run", "killed", "--resume")
    kill_somewhere(command, place / "killed", place, rng, until=3)
    reached = kill_somewhere(command, place / "killed", place, rng, until=9, after=7)
    assert 6 <= reached < steps
    if "divergence" in KILLED[kind]:  # the state that a resumed run has to find is not what a new one starts with
        kept = load_file(place / f"killed/checkpoints/step-{reached:08d}/ratio_weight.safetensors")["means"]
        assert (kept - 1).abs().max() > 1e-4
    last = distill(*command, cwd=place)
    assert last.code == 0, last.err

    assert_same(place / "killed", place / "whole")
    newest = checkpoint.newest(place / "killed/checkpoints")
    assert newest is not None
    ratio = {"ratio_weight"} if "divergence" in KILLED[kind] else set()
    assert {f.stem for f in newest.glob("*.safetensors")} == ratio | {
        "student", "fake", "average", "discriminator", "student.optimizer", "fake.optimizer"
    }  # fmt: skip
    head = load_file(newest / "discriminator.safetensors")
    assert any(bool(t.any()) for key, t in head.items() if key.endswith("bias"))
    assert [line["step"] for line in lines(place / "killed")] == list(range(1, steps + 1))


TWO: dict[str, dict[str, Any]] = {
    "teacher": {"divergence": divergence("jensen-shannon", bins=3), "real": DATA, "adversarial_weight": 0.1},
    "fake": {"divergence": divergence("forward-kl", bins=2, decay=0.5), "real": MADE, "fake": {"steps": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("features", TWO)
def test_two_processes_learn_what_one_does(place: Path, features: str) -> None:
    """The first ten of all metrics but the largest weight and the effective size, which each process has of its own.

    The mean log-ratio is a sum of both signs around zero: its tolerance is absolute, a thousandth of a typical value.
    """
    heads = {"features": features, "lr": 5e-3, "r1": 0.01}
    logging = {"log_every": 1, "sample_every": 100, "checkpoint_every": 5}
    changes = TWO[features] | {"discriminator": heads, "steps": 10, "batch_size": 16, "logging": logging}
    config = write_config(place, TRAIN, **changes)
    assert distill("train", "--config", config, "--run", "one", cwd=place).code == 0
    text = forked(place, "train", "--config", config, "--run", "two")
    assert text.startswith("0\n"), text
    one, two = lines(place / "one"), lines(place / "two")
    assert [line["step"] for line in two] == list(range(1, 11))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"step", "weight_max", "weight_ess"}:
            smallest = 1e-5 if name == "log_ratio" else 1e-9
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=smallest), (name, a["step"])
    assert max(line["weight_max"] for line in one) > 1.02  # there was something to normalise
    means = [load_file(place / run / "checkpoints/step-00000010/ratio_weight.safetensors")["means"] for run in
             ("one", "two")]  # fmt: skip
    assert torch.allclose(*means, rtol=1e-4)


def parameters(file: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(file).values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipeline", "ring"])
def test_a_dry_run_says_what_a_run_does_and_writes_nothing(place: Path, kind: str) -> None:
    changes = RING if kind == "ring" else {}
    heads = {"features": "fake", "r1": 0.1}
    more = {"fake": {"steps": 3}, "real": DATA, "adversarial_weight": 0.1, "discriminator": heads, "steps": 1}
    config = write_config(place, TRAIN, **(changes | more))
    before = entries(place)
    dry = distill("train", "--config", config, "--dry-run", cwd=place)
    assert dry.code == 0, dry.err
    assert entries(place) == before
    assert "1 updates of 8 samples: 8 in all" in dry.out
    assert "student 1 forward, 1 backward; teacher 1 forward; fake score 4 forward, 3 backward" in dry.out
    assert "discriminator: the encoder of the fake, 3 forward and backward" in dry.out
    shape = [2] if kind == "ring" else [1, 8, 8]
    assert f"samples of shape {shape}, noise levels " + ("0.05 .. 5\n" if kind == "ring" else "0.02 .. 10\n") in dry.out

    assert distill("train", "--config", config, cwd=place).code == 0
    for name in ("student", "fake", "discriminator"):
        count = parameters(place / f"student/checkpoints/step-00000001/{name}.safetensors")
        assert f"{name}: {count:,} parameters\n" in dry.out, name


def test_a_dry_run_needs_no_teacher(tmp_path: Path) -> None:
    config = write_config(tmp_path, TRAIN, teacher={"path": "nowhere", "guidance": 2.0})
    dry = distill("train", "--config", config, "--dry-run", cwd=tmp_path)
    assert dry.code == 0, dry.err
    assert "teacher 1 forward (2 where guided)" in dry.out
    assert "teacher: nowhere is not here, so the networks were not built" in dry.out
    assert "parameters" not in dry.out
    assert "discriminator" not in dry.out
    assert entries(tmp_path) == ["config.yaml"]


@pytest.mark.slow
def test_a_student_is_exported_and_sampled(place: Path) -> None:
    changes = {"divergence": divergence("jeffreys"), "adversarial_weight": 0.1, "real": DATA, "steps": 3}
    config = write_config(place, TRAIN, discriminator={"features": "fake"}, **changes)
    assert distill("train", "--config", config, cwd=place).code == 0
    exported = distill("export", "student", "exported", cwd=place)
    assert exported.code == 0, exported.err
    grid = distill("sample", "student", "exported", "--n", 10, "--out", "grid.png", cwd=place)
    assert grid.code == 0, grid.err
    assert "student, 1 NFE" in grid.out
    images = [load_generator(place / path)(0, range(10)) for path in ("student", "exported", "pipeline")]
    assert torch.allclose(images[0], images[1], atol=1e-5)
    assert not torch.allclose(images[0], images[2], atol=1e-2)


NAMES = ", ".join(f"'{name}'" for name in (*DIVERGENCES, "alpha"))
JS = ("--real.name", "data", "--divergence.name", "jensen-shannon")
WRONG: list[tuple[tuple[object, ...], str]] = [
    (("--divergence.name", "kl"), f"divergence.name: Expected a Literal[{NAMES}]. Got value: kl"),
    (("--real.name", "data", "--divergence.name", "alpha"), "exponent: None does not go with name: alpha"),
    ((*JS, "--divergence.exponent", 1), "exponent: 1.0 does not go with name: jensen-shannon (alpha needs one)"),
    ((*JS, "--divergence.exponent", "inf"), "divergence.exponent: "),
    (("--adversarial_weight", 0.1), "adversarial_weight: 0.1 needs real samples (real.name: data, encoded or teacher)"),
    ((*JS, "--adversarial_weight", -1), "adversarial_weight: Input should be greater than or equal to 0"),
    (("--divergence.name", "jensen-shannon"), "divergence.name: jensen-shannon weights by a ratio"),
    ((*JS[2:], "--real.name", "none"), "needs real samples (real.name: data, encoded or teacher)"),
    ((*JS, "--divergence.clip", "[20, 0.1]"), "clip: [20.0, 0.1]; the first bound must be below the second"),
    ((*JS, "--divergence.clip", "[0.5, 0.5]"), "clip: [0.5, 0.5]; the first bound must be below the second"),
    ((*JS, "--divergence.clip", "[0, 1]"), "divergence.clip"),
    ((*JS, "--divergence.bins", 0), "divergence.bins: Input should be greater than or equal to 1"),
    ((*JS, "--divergence.decay", 1), "divergence.decay: Input should be less than 1"),
    ((*JS, "--discriminator.levels", "[0, 3]"), "levels: [0, 3]; a UNet2DModel of this size has levels 0 .. 0"),
    ((*JS, "--discriminator.levels", "[-2]", "--discriminator.features", "fake"), "levels: [-2]; a UNet2DModel"),
    ((*JS, "--discriminator.levels", "[]"), "levels: []; a UNet2DModel"),
    ((*JS, "--discriminator.features", "both"), "discriminator.features: Expected a Literal['teacher', 'fake']"),
    ((*JS, "--discriminator.r1", -1), "discriminator.r1: Input should be greater than or equal to 0"),
    ((*JS, "--discriminator.r1_form", "none"), "discriminator.r1_form: Expected a Literal['exact', 'difference']"),
    ((*JS, "--discriminator.weight", 0), "discriminator.weight: Input should be greater than 0"),
    (("--real.name", "teacher", "--real.sampler", "eulr"), "real.sampler: Expected a Literal['euler'"),
    (("--real.name", "teacher", "--real.count", 0), "real.count: Input should be greater than or equal to 1"),
    (("--real.name", "data", "--real.data", "{name: folder, path: nowhere}"), "data.path: nowhere is not a folder"),
    (("--real.name", "data", "--real.data", "{name: folder, path: pictures, size: 16}"), "images are [1, 16, 16]"),
    (("--real.name", "data", "--real.data", "{name: folder, path: pictures}"), "real.data: has no classes"),
    (("--real.name", "data", "--real.data", "{name: folder, path: sorted}"), "real.data: has none of class 2"),
    (("--teacher.name", "ring"), "teacher.path: pipeline holds no network of a toy"),
    (("--teacher.name", "rings"), "teacher.name: Expected a Literal['pipeline', 'two-modes', 'ring', 'grid']"),
    (("--teacher.path", "null"), "path: None does not go with name: pipeline"),
]


@pytest.mark.parametrize(("words", "message"), some(WRONG, 10))
def test_wrong_words(place: Path, words: tuple[object, ...], message: str) -> None:
    from distill.data import digits
    from distill.pictures import save_grid

    for name in ("pictures/a.png", "sorted/a/a.png", "sorted/b/b.png"):
        save_grid(digits("train").images[:1], place / name)
    config = write_config(place, TRAIN)
    before = entries(place)
    assert_refused(distill("train", "--config", config, *words, cwd=place), message)
    assert entries(place) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"real": DATA, "discriminator": {"features": "teacher"}}, "an exact teacher has no network, accepted is fake"),
        ({"real": DATA}, "discriminator.features: teacher; an exact teacher has no network, accepted is fake"),
        ({"teacher": {"name": "ring", "guidance": 2.0}}, "guidance: 2.0; a toy has no conditions to guide by"),
        ({"teacher": {"name": "ring", "path": "pipeline"}}, "teacher.path: pipeline holds no network of a toy"),
        ({"noise": {"sigma_max": 30.0}}, "noise.sigma_min, noise.sigma_max: 0.02, 30 is not a range"),
        ({"toy": {"spread": 0}}, "toy.spread: Input should be greater than 0"),
        (
            {"real": DATA, "discriminator": {"features": "fake", "levels": [2]}},
            "levels: [2]; a ToyNetwork of this size has levels 0 .. 1 (or -2 .. -1)",
        ),
    ],
)
def test_wrong_toys(place: Path, changes: dict[str, Any], message: str) -> None:
    config = write_config(place, TRAIN, **(RING | changes))
    before = entries(place)
    assert_refused(distill("train", "--config", config, cwd=place), message)
    assert_refused(distill("train", "--config", config, "--dry-run", cwd=place), message)
    assert entries(place) == before


@pytest.mark.slow
def test_a_resumed_run_keeps_its_divergence_and_its_discriminator(place: Path) -> None:
    config = write_config(place, TRAIN, steps=1, real=DATA, divergence=divergence("jeffreys"))
    assert distill("train", "--config", config, cwd=place).code == 0
    words = ("--divergence.name", "neyman", "--discriminator.r1", 1, "--real.seed", 2, "--adversarial_weight", 1)
    result = distill("train", "--config", config, "--resume", *words, cwd=place)
    changed = "adversarial_weight, discriminator.r1, divergence.name, real.seed"
    assert_refused(result, f"the configuration of student has changed in {changed}\n")


def test_layers_that_are_not_known_are_refused_by_the_name_of_the_network() -> None:
    with pytest.raises(ValueError, match="discriminator: a Sequential has no layers that are known here; known are"):
        Tap(nn.Sequential(nn.Linear(2, 2)))
    assert len(Tap(unet())) == 1
