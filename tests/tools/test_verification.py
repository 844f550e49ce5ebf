"""A result is what its inputs give, or it is said what is not. Real files, a real batch of tiny images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tools.batches import manifest, save_pictures, save_student
from tools.digest import digest_json
from tools.manifest import manifest_of
from tools.processes import run_batch
from tools.verification import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Pictures, a reference and a student, and the results of two draws of the pictures."""
    folder = tmp_path_factory.mktemp("made")
    save_pictures(folder / "inputs" / "ref", 40, seed=1)
    save_pictures(folder / "inputs" / "pics", 32)
    save_student(folder / "inputs" / "student")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_batch(of({"pics": "inputs/pics"}, draw=[0, 1]), "batch", device="cpu")
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy, from inside which its paths are relative."""
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def of(sources: dict[str, str], **changes: Any) -> Any:
    return manifest_of(manifest("inputs/ref", sources, **({"n": 16} | changes)), "m.yaml")


def result_of(world: Path, draw: int = 0) -> Path:
    for file in (world / "batch" / "results").glob("*.json"):
        if json.loads(file.read_text())["axes"]["draw"] == draw:
            return file
    raise AssertionError(f"draw {draw} has no result")


def chunk_of(world: Path, draw: int = 0) -> Path:
    stream = json.loads(result_of(world, draw).read_text())["facts"]["stream"]
    return min((world / "batch" / "features" / stream).rglob("*.safetensors"))


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    del content["sha256"]  # by someone who knows how a file is signed
    file.write_text(json.dumps(content | {"sha256": digest_json(content)}))


UNCHANGED = [(True, "inputs: unchanged"), (True, "values: all 4 are the same to the bit")]


def outcome(file: Path, recompute: bool = False) -> list[tuple[bool, str]]:
    """Without the first, which says that the key is that of the facts."""
    first, *rest = verify(file, "cpu", recompute)
    assert first[0]
    assert first[1].startswith(f"key: {file.stem}")
    return rest


def test_what_has_not_changed_is_verified(world: Path) -> None:
    for draw in (0, 1):
        assert outcome(result_of(world, draw)) == UNCHANGED
        assert outcome(result_of(world, draw), recompute=True) == UNCHANGED


def test_a_generators_result_is_verified(world: Path) -> None:
    run_batch(of({"student": "inputs/student"}), "other", device="cpu")
    (file,) = (world / "other" / "results").iterdir()
    assert outcome(file) == outcome(file, recompute=True) == UNCHANGED


def test_features_that_are_gone_are_not_looked_at_but_can_be_made_again(world: Path) -> None:
    gone = chunk_of(world)
    gone.unlink()
    said = "values: not looked at, 1 chunks of features are not there (--recompute makes them)"
    assert outcome(result_of(world)) == [UNCHANGED[0], (False, said)]
    assert outcome(result_of(world), recompute=True) == UNCHANGED
    assert not gone.exists()  # recomputing leaves nothing behind


def test_a_result_away_from_its_features_can_be_recomputed(world: Path) -> None:
    moved = world / "mail" / result_of(world).name
    moved.parent.mkdir()
    shutil.move(result_of(world), moved)
    assert "not looked at" in outcome(moved)[1][1]
    assert outcome(moved, recompute=True) == UNCHANGED
    assert [file.name for file in moved.parent.iterdir()] == [moved.name]


# What has changed


@pytest.mark.parametrize("recompute", [False, True])
def test_a_changed_picture_is_a_changed_input(world: Path, recompute: bool) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("inputs/pics/0003.png")
    ((good, said),) = outcome(result_of(world), recompute)
    assert not good
    assert said.startswith("inputs: have changed: ")
    assert "source" in said
    assert "references" not in said


def test_a_changed_reference_is_named_as_such(world: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("inputs/ref/0003.png")
    ((good, said),) = outcome(result_of(world))
    assert not good
    assert said.startswith("inputs: have changed: ")
    assert "references" in said
    assert "source" not in said


def test_pictures_that_went_are_a_changed_input(world: Path) -> None:
    for k in range(16):
        Path(f"inputs/pics/{k:04}.png").unlink()
    ((good, said),) = outcome(result_of(world, draw=1))
    assert (good, said.startswith("inputs: have changed: ")) == (False, True)
    assert "left out: draw 1" in said


def test_inputs_that_are_gone_are_named(world: Path) -> None:
    shutil.rmtree("inputs/pics")
    rewrite(result_of(world), lambda content: content["provenance"].update(folder=str(world)))
    ((good, said),) = outcome(result_of(world))
    assert not good
    assert said.startswith("inputs: cannot be read any more: source: 'inputs/pics' is no folder")


@pytest.mark.parametrize("where", ["metadata", "middle", "end"])
def test_a_changed_chunk_is_named(world: Path, where: str) -> None:
    file = chunk_of(world)
    content = bytearray(file.read_bytes())
    if where == "end":
        content = content[:-7]
    else:
        content[40 if where == "metadata" else len(content) // 2] ^= 1
    file.write_bytes(content)
    _, (good, said) = outcome(result_of(world))
    assert not good
    assert said.startswith("values: cache: ")
    assert file.name in said
    assert "delete it" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fd: fd.update(value=fd["value"] + 1), "values: digits fd value is "),
        (lambda fd: fd.update(standard_error=9.5), "and was 9.5"),
        (lambda fd: fd.update(warning=None), "values: digits fd warning is "),
    ],
)
def test_a_number_that_was_changed_by_hand_is_named(world: Path, change: Callable, said: str) -> None:
    rewrite(result_of(world), lambda content: change(content["values"]["digits"]["fd"]))
    unchanged, (good, found) = outcome(result_of(world))
    assert unchanged == UNCHANGED[0]
    assert not good
    assert said in found
    assert "pixels" not in found


@pytest.mark.parametrize("recompute", [False, True])
def test_a_metric_that_was_added_or_taken_away_by_hand_is_named(world: Path, recompute: bool) -> None:
    rewrite(result_of(world), lambda content: content["values"]["digits"].pop("kd"))
    assert "values: digits kd value is " in outcome(result_of(world), recompute)[1][1]
    rewrite(result_of(world), lambda content: content["values"]["digits"].update(sparkle={"value": 1.0}))
    _, (good, said) = outcome(result_of(world), recompute)
    assert not good
    assert "digits sparkle value is None, and was 1.0" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 16000}, "n: 16000, where its inputs give 16"),
        ({"nfe": 3}, "nfe: 3, where its inputs give None"),
        ({"axes": {"draw": 7}}, "axes: {'draw': 7}, where its inputs give {'draw': 0}"),
    ],
)
def test_a_setting_that_was_changed_by_hand_is_named(world: Path, change: dict[str, Any], said: str) -> None:
    file = result_of(world)
    rewrite(file, lambda content: content.update(change))
    assert (False, said) in outcome(file)


def test_facts_that_were_changed_by_hand_are_an_error(world: Path) -> None:
    rewrite(result_of(world), lambda content: content["facts"].update(n=17))
    with pytest.raises(ValueError, match="it was changed by hand"):
        list(verify(result_of(world)))


def test_what_is_no_result_is_an_error(world: Path) -> None:
    with pytest.raises(ValueError, match="is not a result of distill-fid"):
        list(verify(world / "batch" / "hashes.json"))
