"""`distill encode` in real processes: killed anywhere, it goes on; processes share the work; what it refuses."""

import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main
from distill.encoded import COMMON, MANIFEST, Encoded, shard_name
from tests.distill import families
from tests.distill.command import Result, Running, distill
from tests.distill.runs import assert_refused, entries, forked
from tests.distill.test_encoded import pictures

N = 24
WORK = ("encode", "--pipeline", "pipe", "--data.name", "folder", "--data.path", "images", "--data.size", 16)
WORK = (*WORK, "--rows", 2, "--batch", 1, "--flip", "true", "--negative_prompt", "dark")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a pipeline, images with words, and `whole`, which nobody disturbed."""
    place = tmp_path_factory.mktemp("encode")
    families.save("sd15", place / "pipe")
    families.save("dit", place / "dit")
    pictures(place / "images", N, words=True)
    pictures(place / "others", N, classes=("a",), words=True)
    pictures(place / "classes", 4, classes=("a", "b"))
    result = distill(*WORK, "--out", "whole", cwd=place)
    assert result.code == 0, result.err
    told = f"whole: {2 * N} rows of latents [4, 8, 8], mirrored [4, 8, 8], prompt_embeds [32, 16]; {N // 2 + 1} files, "
    assert told in result.out
    assert f"row {N}/{N}" in result.out
    return place


Here = Callable[..., Result]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """The command in this process, where a refusal takes no time."""

    def run(cwd: Path, *words: object) -> Result:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["distill", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return Result(int(str(left.value.code)), *capfd.readouterr())

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, whose record of the command names the folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != MANIFEST}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")}


def assert_whole(folder: Path, like: Path) -> None:
    assert contents(folder) == contents(like)
    ours, theirs = (json.loads((f / MANIFEST).read_text()) for f in (folder, like))
    assert ours | {"made": None} == theirs | {"made": None}
    Encoded.read(folder).verify()


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_ends_the_same(done: Path) -> None:
    """kill -9 after a shard or two, again and again: what was finished is never written again, nothing half is left."""
    rng, out = random.Random(0), done / "killed"
    kills = 0
    for _ in range(5):
        before = stamps(out)
        running = Running((*WORK, "--out", "killed"), done)
        while running.process.is_alive() and len(stamps(out)) <= len(before):
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.03)
        running.kill()
        code = running.wait().code
        kills += code == -9
        assert code in (-9, 0)
        after = stamps(out)
        assert {name: after[name] for name in before} == before
        whole = contents(done / "whole")
        assert all(whole[file.name] == file.read_bytes() for file in out.glob("*.safetensors"))
    assert kills >= 3
    assert not (out / MANIFEST).exists()
    (out / f".{shard_name(3)}.0a1b2c3d.tmp").write_bytes(b"half")  # where a kill falls into the writing
    before = stamps(out)
    result = distill(*WORK, "--out", "killed", cwd=done)
    assert result.code == 0, result.err
    first = int(result.out.split("row ")[1].split("/")[0])
    assert first == 2 * len([name for name in before if name != COMMON])
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    assert_whole(out, done / "whole")


def test_a_finished_folder_is_left_as_it_is(done: Path) -> None:
    before = stamps(done / "whole")
    result = distill(*WORK, "--out", "whole", cwd=done)
    assert result.code == 0, result.err
    assert stamps(done / "whole") == before


@pytest.mark.slow
def test_a_damaged_file_is_named_and_made_anew_when_it_is_gone(done: Path) -> None:
    shutil.copytree(done / "whole", done / "harmed")
    shard = done / "harmed" / shard_name(3)
    content = shard.read_bytes()
    for harmed in (content[:-1] + bytes([content[-1] ^ 1]), content[:-7]):
        shard.write_bytes(harmed)
        assert_refused(distill(*WORK, "--out", "harmed", cwd=done), f"harmed/{shard_name(3)} is damaged", "remove it")
        assert shard.read_bytes() == harmed
    shard.unlink()
    before = stamps(done / "harmed")
    assert distill(*WORK, "--out", "harmed", cwd=done).code == 0
    assert {name: s for name, s in stamps(done / "harmed").items() if name in before} == before
    assert_whole(done / "harmed", done / "whole")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--seed", 1), "was made with seed 0, not 1"),
        pytest.param(("--dtype", "float32"), "was made with dtype float16, not float32", marks=pytest.mark.slow),
        pytest.param(("--rows", 3), "was made with rows 2, not 3", marks=pytest.mark.slow),
        pytest.param(("--flip", "false"), "was made with flip True, not False", marks=pytest.mark.slow),
        pytest.param(
            ("--negative_prompt", "light"), "was made with negative_prompt dark, not light", marks=pytest.mark.slow
        ),
        (("--data.path", "others"), "was made with images.files "),
        (("--prompts", "words.csv"), "was made with prompts.words "),
        (("--pipeline", "dit", "--negative_prompt", "null"), "was made with pipeline StableDiffusionPipeline, not DiT"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_other_settings_are_refused(done: Path, here: Here, words: tuple[Any, ...], told: str) -> None:
    rows = [f"{k:02d}.png,fox {k}" for k in range(N)]
    (done / "words.csv").write_text("\n".join(["file_name,caption", *rows]))
    before = contents(done / "whole")
    assert_refused(here(done, *WORK, *words, "--out", "whole"), told, "the same settings, or another folder")
    assert contents(done / "whole") == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "data.path, prompts: None, None; needed are images, prompts, or both"),
        (("--data.name", "folder"), "path: None does not go with name: folder"),
        (("--prompts", "nowhere.txt"), "prompts: nowhere.txt cannot be read"),
        (("--prompts", "broken.txt"), "broken.txt cannot be read as text in UTF-8, by line 2"),
        (("--prompts", "a.txt", "--flip", "true"), "flip: True; there are no images"),
        (("--prompts", "a.txt", "--rows", 0), "rows"),
        (("--prompts", "a.txt", "--dtype", "int8"), "dtype"),
        (("--prompts", "a.txt", "--device", "nothing"), "device: 'nothing' cannot be used here"),
        (("--prompts", "a.txt", "--pipeline", "nowhere"), "nowhere: there is no such folder"),
        (("--prompts", "a.txt", "--pipeline", "images"), "images: is no pipeline folder of diffusers"),
        (("--prompts", "a.txt", "--pipeline", "other"), "is a StableCascadeDecoderPipeline; supported are"),
        (("--prompts", "a.txt", "--pipeline", "wordless"), "has no text_encoder; give prompt_embeds"),
        (("--prompts", "a.txt", "--pipeline", "dit"), "prompts: a.txt; a DiTPipeline has no use for words"),
        (("--prompts", "a.txt", "--out", "taken"), "out: taken is there and is not of `distill encode`"),
        (("--data.name", "folder", "--data.path", "nowhere"), "data.path: nowhere is not a folder of images"),
        (("--data.name", "folder", "--data.path", "images", "--data.size", 17), "size: 17; the pipeline's VAE takes"),
        (("--data.name", "folder", "--data.path", "classes"), "classes has no words for its images, which a Stable"),
        (
            ("--data.name", "folder", "--data.path", "classes", "--pipeline", "dit", "--negative_prompt", "x"),
            "negative_prompt: 'x' has no use",
        ),
        (("--data.name", "folder", "--data.path", "classes", "--prompts", "a.txt"), "a.txt; words for images are in a"),
        (
            ("--data.name", "folder", "--data.path", "classes", "--pipeline", "pixels"),
            "pixels: has no VAE, its samples",
        ),
        (("--data.name", "folder", "--data.path", "half"), "half/01.png has no 01.txt beside it"),
        (("--data.name", "folder", "--data.path", "cut"), "cut/00.png cannot be read as an image"),
        (("--config", "train.yaml"), "is for `distill train`, not for `distill encode`"),
        (("--data.nam", "folder"), "data.nam: unknown key; the nearest known one is data.name"),
    ],
    ids=lambda v: " ".join(map(str, v))[:40] if isinstance(v, tuple) else "",
)
def test_what_cannot_be_encoded(bad: Path, here: Here, words: tuple[Any, ...], told: str) -> None:
    before = {name for name in entries(bad) if not name.startswith("out")}
    assert_refused(here(bad, "encode", "--pipeline", "pipe", "--out", "out", "--data.size", 16, *words), told)
    assert {name for name in entries(bad) if not name.startswith("out")} == before
    if "cannot be read as an image" in told:  # which is found when it is read
        shutil.rmtree(bad / "out")
    assert not (bad / "out").exists()


@pytest.fixture(scope="module")
def bad(done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bad")
    for name in ("pipe", "dit", "classes", "images"):
        (place / name).symlink_to(done / name)
    index = json.loads((done / "pipe/model_index.json").read_text())
    for name, changes in (
        ("other", {"_class_name": "StableCascadeDecoderPipeline"}),
        ("pixels", {"_class_name": "DDPMPipeline", "vae": [None, None]}),
        ("wordless", {"text_encoder": [None, None], "tokenizer": [None, None]}),
    ):
        (place / name).mkdir()
        (place / name / "model_index.json").write_text(json.dumps(index | changes))
        for part in ("scheduler", "unet", "vae"):
            (place / name / part).symlink_to(done / "pipe" / part)
    pictures(place / "half", 2, words=True)
    (place / "half/01.txt").unlink()
    pictures(place / "cut", 1, words=True)
    content = (place / "cut/00.png").read_bytes()
    (place / "cut/00.png").write_bytes(content[: len(content) // 2])
    (place / "taken").mkdir()
    (place / "taken/file").write_text("")
    (place / "a.txt").write_text("a fox")
    (place / "broken.txt").write_bytes(b"a fox\n\xff\n")
    (place / "train.yaml").write_text("command: train\n")
    return place


def test_a_full_disk_leaves_no_half_file(done: Path) -> None:
    assert_refused(distill(*WORK, "--out", "full", cwd=done, file_limit=3000))
    assert not list((done / "full").glob(".*"))
    whole = contents(done / "whole")
    assert all(whole[file.name] == file.read_bytes() for file in (done / "full").glob("*.safetensors"))


@pytest.mark.slow
def test_two_processes_make_the_same_files(done: Path) -> None:
    running = Running((*WORK, "--out", "two"), done)  # some of it by one
    while running.process.is_alive() and len(stamps(done / "two")) < 4:
        time.sleep(0.001)
    running.kill()
    running.wait()
    before = stamps(done / "two")
    assert 4 <= len(before) < N // 2
    text = forked(done, *WORK, "--out", "two")
    assert text.startswith("0\n"), text
    assert text.count("rows of latents") == 1, text
    assert {name: s for name, s in stamps(done / "two").items() if name in before} == before
    assert_whole(done / "two", done / "whole")


@pytest.mark.slow
def test_what_goes_wrong_on_the_second_process_is_said_once(done: Path, tmp_path: Path) -> None:
    (tmp_path / "pipe").symlink_to(done / "pipe")
    pictures(tmp_path / "images", N, words=True)
    (tmp_path / "images/07.png").write_bytes(b"no image")
    text = forked(tmp_path, *WORK, "--out", "out")
    assert not text.startswith("0\n")
    assert text.count("distill: error: data.path: images/07.png cannot be read as an image") == 1, text
    assert sorted(stamps(tmp_path / "out")) == sorted([COMMON, *(shard_name(k) for k in (0, 1, 2))])
