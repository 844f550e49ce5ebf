"""DisBack by the command: both stages whole, killed, on two processes, and what is refused."""

import json
import math
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from distill import checkpoint
from distill.config import Train
from distill.generate import load_generator
from distill.nodes import MANIFEST
from distill.pictures import node_switches
from distill.subject import load_subject
from tests.distill.command import distill
from tests.distill.runs import assert_refused, assert_same, entries, forked, kill_somewhere, lines
from tests.distill.tiny import TRAIN, save_teacher, write_config

DATA = {"name": "data"}
DISBACK: dict[str, Any] = TRAIN | {
    "target": {"name": "nodes", "updates": 4, "path": "path"},
    "degradation": {"steps": 5, "nodes": 3, "check_every": 5, "optimizer": {"lr": 5e-3, "betas": [0.0, 0.99]}},
    "steps": 6,
    "logging": {"log_every": 1, "sample_every": 100, "checkpoint_every": 3},
}
RING: dict[str, Any] = {
    "teacher": {"name": "ring", "path": "taught"},
    "student": {"sigma_init": 1.0, "optimizer": {"lr": 1e-2}},
    "toy": {"hidden": 8, "layers": 2},
    "noise": {"sigma_min": 0.05, "sigma_max": 5.0},
}
EXACT: dict[str, Any] = RING | {"teacher": {"name": "ring"}}
BRIDGE: dict[str, Any] = {
    "divergence": {"name": "jensen-shannon", "bins": 2},
    "real": DATA,
    "discriminator": {"features": "fake", "lr": 1e-2},
}


def target(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "updates": 4, "path": "path"} | more


def bridge(**more: Any) -> dict[str, Any]:
    return BRIDGE | {"target": target("score-interpolation", ratio="bridge", **more)}


def run(place: Path, name: str = "student", *words: object, command: str = "train", **changes: Any) -> Path:
    """A run by the command that has to go well; its folder."""
    config = write_config(place, DISBACK, **changes)
    result = distill(command, "--config", config, "--run", name, *words, cwd=place)
    assert result.code == 0, result.err
    return place / name


def teach(place: Path, mixture: str = "ring", name: str = "taught", steps: int = 5) -> Path:
    """The network of a toy, taught for a moment."""
    content = {"command": "teach", "run": name, "mixture": mixture, "steps": steps, "batch_size": 16}
    more = {"toy": {"hidden": 8, "layers": 2}, "logging": DISBACK["logging"]}
    result = distill("teach", "--config", write_config(place, content, "teach.yaml", **more), cwd=place)
    assert result.code == 0, result.err
    return place / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """A place with a path that `distill degrade` has recorded; tests must not write into it."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(pipeline, place / "pipeline")
    run(place, command="degrade")
    return place


@pytest.fixture
def recorded(tmp_path: Path, finished: Path) -> Path:
    """A place with a teacher and its path."""
    return shutil.copytree(finished, tmp_path / "place")


def assert_same_path(path: Path, other: Path) -> None:
    """Nodes, manifest, and what stage 1 said on the way, bit for bit."""
    names = [sorted(p.name for p in folder.iterdir()) for folder in (path, other)]
    assert names[0] == names[1]
    assert MANIFEST in names[0]
    for name in (n for n in names[0] if n.endswith((".safetensors", MANIFEST))):
        assert (path / name).read_bytes() == (other / name).read_bytes(), name
    assert lines(path) == lines(other)
    assert not [p for p in path.rglob("*") if p.name.endswith(".tmp")]


def manifest(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return content


def kept(run: Path, name: str) -> dict[str, Tensor]:
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return load_file(found / f"{name}.safetensors")


# The first stage


def test_a_path_is_recorded_and_described(finished: Path) -> None:
    content, path = manifest(finished / "path"), finished / "path"
    assert content["storage"] == "full"
    steps = [node["step"] for node in content["nodes"]]
    assert steps[-1] == 5
    assert set(steps) <= {1, 2, 3, 4, 5}
    assert len(steps) == 3
    mismatches = [node["mismatch"] for node in content["nodes"]]
    assert mismatches[-1] == 0
    assert all(m > 0 for m in mismatches[:-1])
    assert entries(path) == sorted([
        ".lock", "config.yaml", "curves.png", MANIFEST, "metrics.jsonl", "samples", "samples/step-00000005.png",
        *(f"node-00{k}.safetensors" for k in (1, 2, 3)), "versions.json",
    ])  # fmt: skip
    for node in content["nodes"]:
        assert (path / node["file"]).stat().st_size == node["bytes"]
    teacher = load_file(finished / "pipeline/unet/diffusion_pytorch_model.safetensors")
    nodes = [load_file(path / node["file"]) for node in content["nodes"]]
    assert all({f"network.{k}" for k in teacher} == node.keys() for node in nodes)  # the score network only
    distances = [sum(float((node[f"network.{k}"] - teacher[k]).square().sum()) for k in teacher) for node in nodes]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert not (finished / "student").exists()


def test_the_command_says_what_it_recorded(recorded: Path) -> None:
    """At once where it is done already, and the same."""
    config = write_config(recorded, DISBACK)
    before = {p: p.stat().st_mtime_ns for p in (recorded / "path").rglob("*")}
    result = distill("degrade", "--config", config, "--resume", cwd=recorded)
    assert result.code == 0, result.err
    nodes = manifest(recorded / "path")["nodes"]
    size = sum(node["bytes"] for node in nodes)
    said = [f"node {k}: {n['step']} updates, mismatch to the last {n['mismatch']:.3f}" for k, n in enumerate(nodes, 1)]
    assert result.out.splitlines() == [f"path: 3 nodes, {size:,} bytes (full)", *said]
    assert {p: p.stat().st_mtime_ns for p in (recorded / "path").rglob("*")} == before


@pytest.mark.slow
def test_degrade_and_train_are_what_train_does_alone(recorded: Path) -> None:
    alone = run(recorded, "alone", target={"name": "nodes", "updates": 4})
    assert_same_path(alone / "path", recorded / "path")
    assert [line["node"] for line in lines(alone)] == [2, 2, 1, 1, 0, 0]
    assert_measured(run(recorded, "after", logging=DISBACK["logging"] | {"mismatch_every": 3}), alone)


def assert_measured(run: Path, without: Path) -> None:
    """At updates 3 and 6, and what is learned is what it was without; the picture shows where the node changes."""
    names = {"mismatch_target", "mismatch_teacher", "fake_error"}
    for line, plain in zip(lines(run), lines(without), strict=True):
        assert line.keys() & names == (names if line["step"] in (3, 6) else set())
        assert {k: v for k, v in line.items() if k not in names} == plain
        assert all(line[name] > 0 for name in line.keys() & names)
    for name in ("student", "fake", "average", "fake.optimizer", "target"):
        files = [folder / f"checkpoints/step-00000006/{name}.safetensors" for folder in (run, without)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    middle, last = (lines(run)[k] for k in (2, 5))
    assert middle["mismatch_target"] != middle["mismatch_teacher"]
    assert last["mismatch_target"] == last["mismatch_teacher"]
    with Image.open(run / "curves.png") as picture:
        picture.load()
    assert node_switches(lines(run)) == [3, 5]


@pytest.mark.slow
def test_the_first_stage_ends_when_its_loss_has_stopped_falling(place: Path) -> None:
    """Looks at 2, 4 and 6: the first is the best so far, two in vain end it. The last network is kept, step 6."""
    stage = DISBACK["degradation"] | {"steps": 100, "check_every": 2, "tolerance": 0.9, "patience": 2}
    run(place, command="degrade", degradation=stage)
    assert [line["step"] for line in lines(place / "path")] == [1, 2, 3, 4, 5, 6]
    assert manifest(place / "path")["nodes"][-1]["step"] == 6


KILLED: dict[str, dict[str, Any]] = {
    "toy": EXACT | {"target": {"name": "score-interpolation", "updates": 8, "schedule": "adaptive"}},
    "by mismatch": {"target": {"name": "nodes", "updates": 8}},
    "by steps": {"target": {"name": "nodes", "updates": 8}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_a_path_is_killed_and_ends_as_if_nothing_had_happened(place: Path, kind: str) -> None:
    """In both stages, and while the nodes are chosen; `train` does both. The plateau ends stage 1 at step 9."""
    stage = DISBACK["degradation"] | {"steps": 12, "check_every": 3, "tolerance": 0.95, "patience": 2}
    stage["spacing"] = "steps" if kind == "by steps" else "mismatch"
    logging = {"log_every": 1, "sample_every": 100, "checkpoint_every": 1}
    changes = KILLED[kind] | {"degradation": stage, "logging": logging, "steps": 10}
    whole = run(place, "whole", **changes)
    rng, command = random.Random(2), ("train", "--config", place / "config.yaml", "--run", "killed", "--resume")
    path, reached = place / "killed/path", []
    for after, until in ((2, 6), (9, 9)) if kind == "toy" else ((0, 2), (3, 6), (7, 9), (9, 9), (9, 9)):
        reached.append(kill_somewhere(command, path, place, rng, until, after))
    assert max(reached) > 0
    middle = kill_somewhere(command, place / "killed", place, rng, until=7, after=4)
    assert 3 <= middle < 10
    last = distill(*command, cwd=place)
    assert last.code == 0, last.err
    assert len(lines(path)) == 9
    assert_same_path(path, whole / "path")
    assert_same(place / "killed", whole)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["half", "low-rank"])
def test_a_path_of_differences_is_smaller_and_near(recorded: Path, storage: str) -> None:
    """Its run is nearly that of full copies."""
    whole = run(recorded, "whole")
    stage = DISBACK["degradation"] | {"storage": storage, "rank": 6}
    other = run(recorded, "small", degradation=stage, target=target("nodes", path="small/path"))
    sizes = [sum(node["bytes"] for node in manifest(recorded / p)["nodes"]) for p in ("path", "small/path")]
    assert sizes[1] < 0.8 * sizes[0]
    gaps = [[line["target_mismatch"] for line in lines(r)] for r in (whole, other)]
    assert gaps[0] != gaps[1]
    assert gaps[1] == pytest.approx(gaps[0], rel=0.05 if storage == "half" else 0.7)


# The second stage


MOVING = ("warm", "nodes", "weight-interpolation", "score-interpolation")


TARGETS: dict[str, dict[str, Any]] = {
    "warm": {"target": target("warm")},
    "nodes": {"target": target("nodes")},
    "nodes, adaptive": {"target": target("nodes", schedule="adaptive")},
    "weight-interpolation": {"target": target("weight-interpolation")},
    "score-interpolation": {"target": target("score-interpolation")},
    "score-interpolation, adaptive": {"target": target("score-interpolation", schedule="adaptive", stages=2)},
    "guided": {"target": target("nodes"), "teacher": {"path": "pipeline", "guidance": 2.0}},
    "bridge, teacher": bridge() | {"discriminator": {"features": "teacher", "lr": 1e-2}},
    "bridge, fake": bridge() | {"adversarial_weight": 0.1},
    "ratio of the teacher": BRIDGE | {"target": target("nodes"), "adversarial_weight": 0.1},
}


QUICK = ("nodes, adaptive",)


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in TARGETS])
def test_a_run_is_resumed_in_the_middle_of_its_path_and_exported(recorded: Path, kind: str) -> None:
    """From the checkpoint at update 3 of 4 on the way, with all its state."""
    changes, moves = TARGETS[kind], kind != "warm"
    whole = run(recorded, "whole", **changes)
    said = lines(whole)
    assert all(math.isfinite(value) for line in said for value in line.values())
    assert [line["step"] for line in said] == list(range(1, 7))
    assert [line.get("node", 0) > 0 for line in said] == [moves] * 4 + [False] * 2
    assert all(("target_mismatch" in line) == moves for line in said)

    shutil.copytree(whole, recorded / "cut")
    shutil.rmtree(recorded / "cut/checkpoints/step-00000006")
    assert_same(run(recorded, "cut", "--resume", **changes), whole)
    exported = distill("export", "whole", "exported", cwd=recorded)
    assert exported.code == 0, exported.err
    made = [load_generator(recorded / folder)(0, range(3)) for folder in ("whole", "exported")]
    assert torch.allclose(made[0], made[1], atol=1e-5)


@pytest.mark.slow
def test_the_fake_score_starts_at_the_last_node_and_the_targets_lead_from_there_to_the_teacher(recorded: Path) -> None:
    """Student and fake score stand still: the gap grows with every part of the way, to that of `warm` in the end."""
    tiny = {"lr": 1e-12}
    still: dict[str, Any] = {"fake": {"optimizer": tiny}, "student": {"sigma_init": 2.5, "optimizer": tiny}, "steps": 5}
    runs = {name: run(recorded, name, target=target(name), **still) for name in MOVING}
    last = load_file(recorded / "path/node-003.safetensors")
    teacher = load_file(recorded / "pipeline/unet/diffusion_pytorch_model.safetensors")
    for folder in runs.values():
        fake = kept(folder, "fake")
        assert all(torch.allclose(fake[key], last[key], rtol=0, atol=1e-9) for key in last)
        assert max(float((fake[f"network.{k}"] - teacher[k]).abs().max()) for k in teacher) > 1e-3

    gaps = {name: [line["gap"] for line in lines(folder)] for name, folder in runs.items()}
    warm, shares = gaps.pop("warm"), {}
    for name, values in gaps.items():
        shares[name] = [value / whole for value, whole in zip(values, warm, strict=True)]
        assert shares[name][4] == pytest.approx(1, rel=1e-5)
        assert max(shares[name][:4]) < 0.9
    assert max(shares["nodes"][:2]) < min(shares["nodes"][2:])
    assert all(a < b for a, b in pairwise(shares["weight-interpolation"]))
    # D_fake - D_target = fraction (D_fake - D_teacher)
    assert shares["score-interpolation"] == pytest.approx([0.04, 0.16, 0.36, 0.64, 1], rel=1e-3)


def test_switches_are_where_the_node_rounded_up_is_another() -> None:
    nodes = [2, 2, 1, 1, 0, 0]
    assert node_switches([{"step": k + 1, "node": float(n)} for k, n in enumerate(nodes)]) == [3, 5]
    drifting = [{"step": k, "node": n} for k, n in ((1, 0.8), (2, 0.5), (3, 0.2), (4, 0.0))]
    assert node_switches(drifting) == [4]
    assert node_switches([{"step": 1, "gap": 0.5}]) == []


STATISTICS = {"log_ratio", "weight_mean", "weight_max", "weight_ess"}


@pytest.mark.slow
@pytest.mark.parametrize("features", ["teacher", "fake"])
def test_a_divergence_and_the_adversarial_term_wait_for_the_teacher(recorded: Path, features: str) -> None:
    """h = 1 on the way, while the discriminator warms up. Means are over the updates that have a metric."""
    heads = {"features": features, "lr": 1e-2}
    changes = BRIDGE | {"target": target("nodes"), "adversarial_weight": 0.1, "discriminator": heads}
    config = write_config(recorded, DISBACK, **changes)
    result = distill("train", "--config", config, cwd=recorded)
    assert result.code == 0, result.err
    assert "the adversarial term and the weight of jensen-shannon wait for the teacher" in result.out
    said = lines(recorded / "student")
    waiting = STATISTICS | {"adversarial_loss"}
    for line in said:
        assert line.keys() & waiting == (waiting if line["step"] > 4 else set())
        assert line["discriminator_loss"] > 0
    assert said[4]["log_ratio"] != 0  # it has warmed up

    thrice = lines(run(recorded, "thrice", logging=DISBACK["logging"] | {"log_every": 6}, **changes))
    assert len(thrice) == 2  # at the checkpoint of update 3, too
    assert thrice[0].keys().isdisjoint(waiting)
    for name in waiting | {"gap", "node"}:
        values = [line[name] for line in said[3:] if name in line]
        assert thrice[1][name] == pytest.approx(sum(values) / len(values), rel=1e-5), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (BRIDGE, "\nthe weight of jensen-shannon waits for the teacher (until then h = 1)\n"),
        ({"real": DATA, "adversarial_weight": 0.1}, "\nthe adversarial term waits for the teacher"),
        (bridge() | {"adversarial_weight": 0.1}, "\nthe adversarial term waits for the teacher"),
        (bridge(), None),
        (BRIDGE | {"target": target("warm")}, None),
        ({}, None),
    ],
)
def test_the_command_says_what_waits(recorded: Path, changes: dict[str, Any], message: str | None) -> None:
    dry = distill("train", "--config", write_config(recorded, DISBACK, **changes), "--dry-run", cwd=recorded)
    assert dry.code == 0, dry.err
    assert "wait" not in dry.out if message is None else message in dry.out


SLOW_BRIDGES = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("teacher", "fake", "toy")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact toy", *SLOW_BRIDGES])
def test_a_bridge_weights_on_the_way(recorded: Path, kind: str) -> None:
    """By two ratios from each head; the one to the first student's samples learns, too."""
    if kind == "toy":
        teach(recorded)
    toys = {"exact toy": EXACT | {"target": target("score-interpolation", ratio="bridge", path=None)}}
    toys["toy"] = RING | {"target": target("score-interpolation", ratio="bridge", path=None)}
    features = "teacher" if kind in ("teacher", "toy") else "fake"
    found = run(recorded, **(bridge() | {"discriminator": {"features": features, "lr": 1e-2}} | toys.get(kind, {})))
    for line in lines(found):
        assert line.keys() >= STATISTICS
        assert line["weight_mean"] == pytest.approx(1, rel=1e-5)
    assert lines(found)[0]["log_ratio"] == 0
    assert all(line["log_ratio"] != 0 for line in lines(found)[1:])
    assert any(line["weight_ess"] < 1 - 1e-7 for line in lines(found)[:4])
    heads = kept(found, "discriminator")
    outputs = [tensor for name, tensor in heads.items() if name.endswith("bias") and len(tensor) == 2]
    assert outputs
    assert all(bool((bias != 0).all()) for bias in outputs)


def test_a_dry_run_says_the_target_and_writes_nothing(recorded: Path) -> None:
    before = entries(recorded)
    for name, more, message in (
        ("nodes", {}, "target: nodes for 4 updates, then the teacher; path: path\n"),
        ("score-interpolation", {"schedule": "adaptive"},
         "target: score-interpolation for 4 updates at the latest, then the teacher; path: path\n"),
        ("weight-interpolation", {"path": None},
         "target: weight-interpolation for 4 updates, then the teacher; path: student/path\n"),
    ):  # fmt: skip
        config = write_config(recorded, DISBACK, target=target(name, **more))
        dry = distill("train", "--config", config, "--dry-run", cwd=recorded)
        assert dry.code == 0, dry.err
        assert message in dry.out
    assert entries(recorded) == sorted({*before, "config.yaml"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nodes", "bridge", "adaptive"])
def test_two_processes_walk_the_path_that_one_does(place: Path, kind: str) -> None:
    """Both stages; the nodes are the same steps, their weights and all losses to 1e-4.

    But for the bias of the keys, which no attention depends on: its gradient is rounding, of which Adam makes steps.
    """
    changes: dict[str, Any] = {
        "nodes": {"target": target("nodes", updates=6, path=None)},
        "bridge": bridge(updates=6, path=None),
        "adaptive": {"target": target("score-interpolation", schedule="adaptive", stages=2, updates=6, path=None)},
    }[kind]
    changes |= {"steps": 9, "batch_size": 16}
    one = run(place, "one", **changes)
    text = forked(place, "train", "--config", place / "config.yaml", "--run", "two")
    assert text.startswith("0\n"), text
    two = place / "two"
    nodes = [manifest(folder / "path")["nodes"] for folder in (one, two)]
    assert [n["step"] for n in nodes[0]] == [n["step"] for n in nodes[1]]
    for node in nodes[0]:
        weights = [load_file(folder / "path" / node["file"]) for folder in (one, two)]
        seen = [key for key in weights[0] if not key.endswith("to_k.bias")]
        assert all(torch.allclose(weights[0][k], weights[1][k], rtol=1e-4, atol=1e-5) for k in seen)
    for folders in ((one / "path", two / "path"), (one, two)):
        for a, b in zip(lines(folders[0]), lines(folders[1]), strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"weight_max", "weight_ess", "target_mismatch"}:  # means of each process's own
                smallest = 1e-5 if name == "log_ratio" else 1e-9
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=smallest), (name, a["step"])


# Toys


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVING)
def test_a_toys_network_is_taught_and_walked_back_to(tmp_path: Path, name: str) -> None:
    teach(tmp_path)
    found = run(tmp_path, **(RING | {"target": target(name, path=None)}))
    assert len(lines(found)) == 6
    teacher, fake = load_file(tmp_path / "taught/model/toy.safetensors"), kept(found, "fake")
    assert teacher.keys() == fake.keys()
    assert manifest(found / "path")["nodes"][-1]["step"] == 5


@pytest.mark.slow
def test_a_toy_is_taught_again_bit_for_bit_and_resumed(tmp_path: Path) -> None:
    whole, again = teach(tmp_path), teach(tmp_path, name="again")
    assert_same(whole, again)
    weights = [load_file(folder / "model/toy.safetensors") for folder in (whole, again)]
    average = kept(whole, "average")
    assert all(torch.equal(weights[0][k], weights[1][k]) and torch.equal(weights[0][k], average[k]) for k in average)
    shutil.rmtree(again / "checkpoints/step-00000005")
    words = ("--config", tmp_path / "teach.yaml", "--run", "again", "--resume")
    resumed = distill("teach", *words, cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert_same(whole, again)
    assert (again / "model/toy.safetensors").read_bytes() == (whole / "model/toy.safetensors").read_bytes()


@pytest.mark.slow
def test_an_exact_toy_has_a_path_of_scores(tmp_path: Path) -> None:
    """Its first stage begins with an untrained network, its last target is the mixture itself."""
    found = run(tmp_path, **(EXACT | {"target": target("score-interpolation", path=None)}))
    assert [line["node"] for line in lines(found)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])


# What is refused


Harm = Callable[[Path], object]


def another_teacher(place: Path) -> None:
    shutil.rmtree(place / "pipeline")
    save_teacher(place / "pipeline", seed=1)


def missing(place: Path) -> None:
    (place / "path/node-002.safetensors").unlink()


def truncated(place: Path) -> None:
    file = place / "path/node-002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def broken(place: Path) -> None:
    (place / f"path/{MANIFEST}").write_text("{")


def nothing(place: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("harm", "changes", "message"),
    [
        (another_teacher, {}, "target.path: path was recorded with another teacher (SHA-256 "),
        (nothing, {"student": {"sigma_init": 2.0}}, "target.path: path was recorded with another student (SHA-256 "),
        (missing, {}, "target.path: path/node-002.safetensors is missing"),
        (truncated, {}, "path/node-002.safetensors is truncated or not the node that was recorded"),
        (broken, {}, f"path/{MANIFEST}: is no manifest of a degradation path"),
    ],
)
@pytest.mark.parametrize("command", ["train", "degrade"])
def test_a_path_that_does_not_fit_is_refused(
    recorded: Path, harm: Harm, changes: dict[str, Any], message: str, command: str
) -> None:
    harm(recorded)
    config = write_config(recorded, DISBACK, **changes)
    before = entries(recorded)
    words = ("--resume",) if command == "degrade" else ()
    assert_refused(distill(command, "--config", config, *words, cwd=recorded), message)
    assert entries(recorded) == before


def test_a_path_with_more_nodes_than_there_are_updates_is_refused(recorded: Path) -> None:
    """However few nodes the configuration asks for: the path is what it is."""
    changes = {"target": target("nodes", updates=1), "degradation": DISBACK["degradation"] | {"nodes": 2}}
    config = write_config(recorded, DISBACK, **changes)
    before = entries(recorded)
    message = "target.updates: 1 are less than one for each of the 2 targets of path before the teacher"
    assert_refused(distill("train", "--config", config, cwd=recorded), message)
    assert entries(recorded) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"degradation": {"nodes": 0}}, "degradation.nodes: Input should be greater than or equal to 1"),
        ({"degradation": {"steps": 0}}, "degradation.steps: Input should be greater than or equal to 1"),
        ({"target": target("nodes", updates=0)}, "target.updates: Input should be greater than or equal to 1"),
        ({"target": target("nodes", updates=6)}, "target.updates: 6 do not leave an update of steps: 6 for the teach"),
        (
            {"target": target("score-interpolation", updates=50)},
            "target.updates: 50 do not leave an update of steps: 6 for the teacher",
        ),
        ({"target": target("nodes", updates=1)}, "target.updates: 1 are less than one for each of the 2 targets"),
        (
            EXACT | {"target": target("nodes")},
            "target.name: nodes; an exact teacher has no weights, accepted are fixed, warm and score-interpolation",
        ),
        (EXACT | {"target": target("weight-interpolation")}, "target.name: weight-interpolation; an exact teacher"),
        (
            BRIDGE | {"target": target("nodes", ratio="bridge")},
            "ratio: bridge does not go with name: nodes; the ratio on the way is known for score-interpolation",
        ),
        (
            {"target": target("score-interpolation", ratio="bridge")},
            "target.ratio: bridge; needed are real samples (real.name: none)",
        ),
        (bridge() | {"divergence": {"name": "reverse-kl"}}, "weights (divergence.name: reverse-kl)"),
        (bridge() | {"discriminator": {"r1": 0.1}}, "discriminator.r1: 0.1; a bridge has no penalty"),
        (
            bridge() | {"divergence": {"name": "forward-kl", "normalise": False}},
            "divergence.normalise: False; a bridge",
        ),
        ({"target": {"name": "node"}}, "target.name"),
        (RING | {"teacher": {"name": "ring", "path": "pipeline"}}, "teacher.path: pipeline holds no network of a toy"),
    ],
)
def test_a_configuration_that_cannot_be_walked_is_refused(place: Path, changes: dict[str, Any], message: str) -> None:
    config = write_config(place, DISBACK, **changes)
    before = entries(place)
    assert_refused(distill("train", "--config", config, cwd=place), message)
    assert entries(place) == before


def test_a_fixed_target_has_no_path_to_record(place: Path) -> None:
    config = write_config(place, TRAIN)
    before = entries(place)
    assert_refused(distill("degrade", "--config", config, cwd=place), "target.name: fixed has no path to record")
    assert entries(place) == before


def test_a_path_is_not_recorded_over(recorded: Path) -> None:
    config = write_config(recorded, DISBACK)
    before = {p: p.stat().st_mtime_ns for p in recorded.rglob("*")}
    result = distill("degrade", "--config", config, cwd=recorded)
    assert_refused(result, "target.path: path holds a path already; remove it or choose another")
    assert {p: p.stat().st_mtime_ns for p in recorded.rglob("*")} == before


@pytest.mark.slow
def test_a_run_goes_on_with_the_path_that_it_began_with_only(recorded: Path) -> None:
    begun = run(recorded, "begun")
    shutil.rmtree(begun / "checkpoints/step-00000006")
    shutil.rmtree(recorded / "path")
    result = distill("train", "--config", write_config(recorded, DISBACK), "--run", "begun", "--resume", cwd=recorded)
    assert_refused(result, "--resume: the path that this run began with is no longer in path")
    assert not (recorded / "path").exists()
    run(recorded, command="degrade", degradation=DISBACK["degradation"] | {"optimizer": {"lr": 2e-3}})
    result = distill("train", "--config", write_config(recorded, DISBACK), "--run", "begun", "--resume", cwd=recorded)
    assert_refused(result, "--resume: the path in path is not what this run began with")


def test_a_recorded_path_is_not_taken_for_one_of_other_settings(recorded: Path) -> None:
    other = DISBACK["degradation"] | {"nodes": 2}
    config = write_config(recorded, DISBACK, degradation=other)
    result = distill("degrade", "--config", config, "--resume", cwd=recorded)
    assert_refused(result, "degradation.nodes: path was recorded with other values")


def test_the_record_of_a_path_is_no_configuration_of_a_run(recorded: Path) -> None:
    for command in ("degrade", "train"):
        result = distill(command, "--config", "path/config.yaml", cwd=recorded)
        assert_refused(result, "path/config.yaml: is the record of a path")


@pytest.mark.slow
def test_a_toys_network_of_another_mixture_or_a_harmed_one_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, DISBACK, **RING)
    result = distill("train", "--config", config, cwd=tmp_path)
    assert_refused(result, "teacher.path: taught holds no network of a toy (there is no toy.json)")
    taught = teach(tmp_path) / "model"
    before = entries(tmp_path)
    result = distill("train", "--config", config, "--teacher.name", "grid", cwd=tmp_path)
    assert_refused(result, "teacher.path: taught/model has learned the ring, not teacher.name: grid")
    weights = taught / "toy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert_refused(distill("train", "--config", config, cwd=tmp_path), "teacher.path: taught/model cannot be read")
    (taught / "toy.json").write_text("{}")
    assert_refused(distill("train", "--config", config, cwd=tmp_path), "teacher.path: taught/model cannot be read")
    assert entries(tmp_path) == before


SPREADS: list[dict[str, Any]] = [{"toy": {"hidden": 8, "layers": 2, "spread": spread}} for spread in (1.0, 2.0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (*SPREADS, "student"),
        ({"teacher": {"name": "ring"}}, {"teacher": {"name": "grid"}}, "teacher"),
        ({"seed": 0}, {"seed": 1}, "teacher"),
    ],
)
def test_a_path_of_another_toy_is_refused(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], kind: str
) -> None:
    walked = EXACT | {"target": target("score-interpolation")}
    run(tmp_path, command="degrade", **(walked | first))
    config = write_config(tmp_path, DISBACK, **(walked | second))
    assert_refused(distill("train", "--config", config, cwd=tmp_path), f"path was recorded with another {kind}")


def test_a_path_that_was_begun_otherwise_is_refused_before_anything_is_written(place: Path) -> None:
    """Half a first stage, of another learning rate."""
    other = DISBACK["degradation"] | {"optimizer": {"lr": 1e-3}, "steps": 2000}
    config = write_config(place, DISBACK, degradation=other)
    kill_somewhere(("degrade", "--config", config), place / "path", place, random.Random(0), 2, after=2)
    assert not (place / f"path/{MANIFEST}").exists()
    config = write_config(place, DISBACK)
    before = entries(place)
    result = distill("train", "--config", config, cwd=place)
    assert_refused(result, "degradation.optimizer.lr, degradation.steps: path was recorded with other values")
    assert entries(place) == before


def test_a_path_of_adapters_is_of_their_seed(pipeline: Path) -> None:
    """What its differences are taken to has the adapters' first values, which the seed draws."""

    def teacher_of(seed: int, rank: int | None) -> str:
        lora = {"rank": rank, "targets": ["time_embedding.linear_1"] if rank else []}
        target = {"name": "nodes", "updates": 4}
        changes = {"teacher": {"path": str(pipeline)}, "target": target, "fake": {"lora": lora}, "seed": seed}
        config = Train.model_validate(TRAIN | changes)
        return load_subject(config, torch.device("cpu")).prints["teacher"]

    assert teacher_of(0, None) == teacher_of(1, None)
    assert teacher_of(0, 2) == teacher_of(0, 2) != teacher_of(1, 2)
