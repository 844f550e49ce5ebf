"""The command as its users meet it: what is wrong is said in one line, with exit code 2, and harms nothing."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from distill import checkpoint
from tests.distill.command import Result, Running, distill, fresh, processor_time
from tests.distill.runs import assert_refused, entries
from tests.distill.tiny import TEACH, TRAIN, save_teacher, write_config

DIGITS = list("0123456789")
FACTS: dict[str, dict[str, Any]] = {
    "too many classes": {"classes": list("0123456789ab")},
    "null label of a class": {"classes": DIGITS, "null_label": 0},
    "null label in words": {"classes": DIGITS, "null_label": "none"},
    "a number of classes": {"classes": 7},
    "student": {"kind": "student", "classes": DIGITS, "null_label": None},
}


def test_help_imports_no_torch_and_answers_at_once() -> None:
    here = Path(__file__).parents[2]
    code = (
        "import sys, distill.cli\n"
        "sys.argv = ['distill', *sys.argv[1:]]\n"
        "try:\n    distill.cli.main()\n"
        "finally:\n    print('LOADED', [m for m in ('torch', 'diffusers', 'numpy', 'PIL') if m in sys.modules])\n"
    )
    for words, shown in ((["--help"], "distill train"), (["train", "--help"], "--student.optimizer.lr")):
        begun = processor_time()
        result = fresh("-c", code, *words, cwd=here)
        assert result.returncode == 0, result.stderr
        assert processor_time() - begun < 3
        assert shown in result.stdout
        assert "LOADED []" in result.stdout


def test_a_new_interpreter_reports_the_same_way(tmp_path: Path) -> None:
    result = fresh("-m", "distill.cli", "train", "--config", "nowhere.yaml", cwd=tmp_path)
    assert_refused(Result(result.returncode, result.stdout, result.stderr), "--config: nowhere.yaml")
    version = fresh("-m", "distill.cli", "--version", cwd=tmp_path)
    assert version.stdout.strip().count(".") == 2


WRONG_WORDS: list[tuple[list[object], str]] = [
    ([], "teach,degrade,train,sample,export"),
    (["trian"], "invalid choice: 'trian'"),
    (["train"], "required: train.run"),
    (["export"], "required: export.run, export.folder"),
    (
        ["--student.optimizer.lrr", 1],
        "student.optimizer.lrr: unknown key; the nearest known one is student.optimizer.lr",
    ),
    (["--step", 3], "step: unknown key; the nearest known one is steps"),  # no abbreviations
    (["--steps=0"], "steps: Input should be greater than or equal to 1. Got value: 0"),
    (["--steps", "many"], "steps: Input should be a valid integer"),
    (["--student.ema", 1], "student.ema: Input should be less than 1"),
    (["--student.optimizer.lr", "nan"], "student.optimizer.lr: Input should be a finite number"),
    (["--student.optimizer.betas", "[0.5]"], "student.optimizer.betas: Expected a tuple with 2 elements"),
    (["--target.name", "moving"], "target.name: Expected a Literal['fixed'"),
    (["--divergence.name", "reverse-kk"], "divergence.name: Expected a Literal['reverse-kl'"),
    (["--seed", -1], "seed: Input should be greater than or equal to 0"),
    (["--noise.trim", 0.5], "noise.trim: Input should be less than 0.5"),
    (["--student.sigma_init", 50], "student.sigma_init: 50.0 is outside the teacher's range [0.01, 20]"),
    (["--student.sigma_init", 0.001], "student.sigma_init: 0.001 is outside"),
    (["--noise.sigma_max", 50], "noise.sigma_min, noise.sigma_max: 0.02, 50 is not a range inside"),
    (["--noise.sigma_min", 11], "noise.sigma_min, noise.sigma_max: 11, 10 is not a range"),
    (["--fake.noise.mean", 60], "fake.noise.mean, fake.noise.std: 60.0"),
    (["--teacher.path", "nowhere"], "nowhere: there is no such folder"),
    (["--teacher.path", "."], "is no pipeline folder of diffusers"),
    (["--run", "config.yaml/run"], "config.yaml/run: Not a directory"),
]


@pytest.mark.parametrize(("words", "message"), WRONG_WORDS, ids=lambda v: "" if isinstance(v, str) else str(v))
def test_wrong_words(place: Path, words: list[object], message: str) -> None:
    config = write_config(place, TRAIN)
    before = entries(place)
    overrides = bool(words) and str(words[0]).startswith("--")
    result = distill(*(["train", "--config", config.name] if overrides else []), *words, cwd=place)
    assert_refused(result, message)
    assert entries(place) == before


WRONG_FILES: list[tuple[str, str]] = [
    ("a: [1,\n", "bad.yaml: is not YAML"),
    ("\x00\x01", "bad.yaml: is not YAML"),
    ("- 1\n", "bad.yaml: holds no keys"),
    ("", "bad.yaml: holds no keys"),
    (yaml.safe_dump(TEACH), "bad.yaml: is for `distill teach`, not for `distill train`"),
    (yaml.safe_dump(TRAIN | {"command": ["train"]}), "command: "),
    (yaml.safe_dump(TRAIN | {"fakes": {"steps": 3}}), "fakes.steps: unknown key; the nearest known one is fake.steps"),
    (yaml.safe_dump(TRAIN | {"fake": {"stepz": 3}}), "fake.stepz: unknown key; the nearest known one is fake.steps"),
    (yaml.safe_dump(TRAIN | {"steps": "many"}), "steps: Input should be a valid integer"),
    (yaml.safe_dump(TRAIN | {"steps": 2.5}), "steps: Input should be a valid integer"),
    (yaml.safe_dump(TRAIN | {"batch_size": -4}), "batch_size: Input should be greater than or equal to 1"),
    (yaml.safe_dump(TRAIN | {"run": 5}), "run: Expected a"),
    (yaml.safe_dump(TRAIN | {"student": 3}), "student: "),
    (yaml.safe_dump(TRAIN | {"teacher": {}}), "teacher: path: None does not go with name: pipeline"),
    (yaml.safe_dump({k: v for k, v in TRAIN.items() if k != "teacher"}), "teacher: path: None does not go with"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_FILES)
def test_wrong_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    assert_refused(distill("train", "--config", "bad.yaml", cwd=tmp_path), message)
    assert entries(tmp_path) == ["bad.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.name", "folder"], "path: None does not go with name: folder"),
        (["--data.path", "images"], "path: 'images' does not go with name: digits"),
        (["--data.size", 16], "the digits are 8x8"),
        (["--data.name", "folder", "--data.path", "images"], "images/b.png cannot be read as an image"),
        (["--data.name", "folder", "--data.path", "nowhere"], "data.path: nowhere is not a folder"),
        (["--network.channels", "[12]"], "channels: [12] are not multiples of 8"),
        (["--network.channels", "[8,8,8,8,8]"], "network.channels: 5 levels do not fit images of 8 pixels"),
        (["--network.attention", "[1]"], "attention: [1] are not levels in 0 .. 0"),
        (["--sigma_min", 30], "sigma_min: 30.0 is not below sigma_max: 20.0"),
        (["--noise.mean", 60], "noise.mean, noise.std: 60.0"),
    ],
)
def test_a_teacher_that_cannot_be_trained_leaves_no_run(tmp_path: Path, words: list[object], message: str) -> None:
    config = write_config(tmp_path, TEACH)
    from distill.data import digits
    from distill.pictures import save_grid

    save_grid(digits("train").images[:1], tmp_path / "images/a.png")
    (tmp_path / "images/b.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:60])
    before = entries(tmp_path)
    assert_refused(distill("teach", "--config", config, *words, cwd=tmp_path), message)
    assert entries(tmp_path) == before


def break_teacher(folder: Path, harm: str) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    index = json.loads((folder / "model_index.json").read_text())
    if harm == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif harm in ("missing key", "foreign key", "shape"):
        tensors = load_file(weights)
        if harm == "missing key":
            del tensors["conv_in.weight"]
        elif harm == "foreign key":
            tensors["lora.weight"] = torch.zeros(2)
        else:
            tensors["conv_in.bias"] = torch.zeros(3)
        save_file(tensors, weights, {"format": "pt"})
    elif harm == "no weights":
        weights.unlink()
    elif harm == "pickled weights":
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    elif harm == "no scheduler":
        shutil.rmtree(folder / "scheduler")
    elif harm == "index":
        (folder / "model_index.json").write_text("{")
    elif harm == "facts":
        (folder / "distill.json").write_text("{")
    elif harm in FACTS:
        (folder / "distill.json").write_text(json.dumps({"kind": "teacher"} | FACTS[harm]))
    else:
        index |= {
            "network": {"unet": ["diffusers", "UNet3DConditionModel"]},
            "foreign scheduler": {"scheduler": ["diffusers", "MyScheduler"]},
            "unknown scheduler": {"scheduler": ["diffusers", "KarrasVeScheduler"]},
        }[harm]
        (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("truncated weights", "pipeline/unet: cannot be read"),
        ("missing key", "pipeline/unet: its weights are not those of its config.json: conv_in.weight"),
        ("foreign key", "pipeline/unet: its weights are not those of its config.json: lora.weight"),
        ("shape", "pipeline/unet: cannot be read"),
        ("no weights", "pipeline/unet: cannot be read"),
        ("pickled weights", "pipeline/unet: has no safetensors that are read, only diffusion_pytorch_model.bin"),
        ("no scheduler", "pipeline/scheduler: is missing, and model_index.json names it"),
        ("index", "pipeline: its model_index.json is not JSON"),
        ("facts", "pipeline/distill.json: is not JSON"),
        ("too many classes", "pipeline/distill.json: speaks of label 11, but the network has 11 labels"),
        ("null label of a class", "pipeline/distill.json: null_label: 0; accepted are null, and numbers from 10"),
        ("null label in words", "pipeline/distill.json: null_label: 'none'; accepted are null, and numbers from 10"),
        ("a number of classes", "pipeline/distill.json: classes: 7; accepted is a list of names"),
        ("student", "teacher.path: pipeline is a student, which knows its own noise levels only"),
        ("network", "with a UNet3DConditionModel; supported are pipelines of a UNet2DModel in pixels, and DiTPipeline"),
        ("foreign scheduler", "pipeline: its scheduler MyScheduler is not one of diffusers"),
        ("unknown scheduler", "scheduler: KarrasVeScheduler"),
    ],
)
def test_a_teacher_that_cannot_be_used_leaves_no_run(place: Path, harm: str, message: str) -> None:
    break_teacher(place / "pipeline", harm)
    config = write_config(place, TRAIN)
    assert_refused(distill("train", "--config", config, cwd=place), message)
    assert not (place / "student").exists()


def test_guidance_needs_a_null_label(place: Path) -> None:
    (place / "pipeline/distill.json").write_text('{"kind": "teacher"}')
    config = write_config(place, TRAIN, teacher={"path": "pipeline", "guidance": 2.0})
    assert_refused(distill("train", "--config", config, cwd=place), "guidance: 2.0 needs a null label")
    assert not (place / "student").exists()


def test_a_run_is_not_overwritten(place: Path) -> None:
    config = write_config(place, TRAIN, steps=2)
    assert distill("train", "--config", config, cwd=place).code == 0
    before = {p: p.read_bytes() for p in (place / "student").rglob("*") if p.is_file()}
    assert_refused(distill("train", "--config", config, cwd=place), "run: student holds a run already", "--resume")
    assert_refused(
        distill("teach", "--config", write_config(place, TEACH, "teach.yaml"), "--run", "student", cwd=place),
        "holds a run already",
    )
    assert {p: p.read_bytes() for p in (place / "student").rglob("*") if p.is_file()} == before

    (place / "student/config.yaml").write_text("a: [")
    assert_refused(distill("train", "--config", config, "--resume", cwd=place), "student/config.yaml: is not YAML")
    (place / "student/config.yaml").unlink()
    assert_refused(distill("train", "--config", config, cwd=place), "holds a run already")
    assert_refused(distill("train", "--config", config, "--resume", cwd=place), "checkpoints but no config.yaml")


@pytest.mark.slow
def test_a_harmed_record_of_a_run_is_named(place: Path) -> None:
    config = write_config(place, TRAIN, steps=4)
    assert distill("train", "--config", config, cwd=place).code == 0
    metrics = (place / "student/metrics.jsonl").read_bytes()
    (place / "student/metrics.jsonl").write_bytes(b"\xff\n" + metrics.replace(b'"seconds"', b'"seconds": null, "was"'))
    resumed = distill("train", "--config", config, "--resume", cwd=place)
    assert resumed.code == 0, resumed.err
    for content, told in (("[1]", "holds no keys"), ("{", "is not JSON")):
        (place / "student/inputs.json").write_text(content)
        refused = distill("train", "--config", config, "--resume", cwd=place)
        assert_refused(refused, f"student/inputs.json: {told}")


def test_a_run_is_written_by_one_process_and_free_when_that_is_killed(place: Path) -> None:
    config = write_config(place, TRAIN, steps=100_000)
    metrics, seen = place / "student/metrics.jsonl", 0
    for words in ((), ("--resume",)):
        running = Running(("train", "--config", config, *words), place)
        while running.process.is_alive() and not (metrics.exists() and metrics.stat().st_size > seen):
            time.sleep(0.01)
        other = distill("train", "--config", config, "--resume", cwd=place)
        alive = running.process.is_alive()
        running.kill()
        assert_refused(other, "run: student is being written by another process")
        assert alive
        assert running.wait().code == -9
        seen = metrics.stat().st_size


def test_pictures_may_come_before_the_first_metrics(place: Path) -> None:
    logging = {"log_every": 10, "sample_every": 1, "checkpoint_every": 10}
    result = distill("train", "--config", write_config(place, TRAIN, steps=2, logging=logging), cwd=place)
    assert result.code == 0, result.err
    assert len(list((place / "student/samples").iterdir())) == 2
    assert (place / "student/curves.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "teach"])
@pytest.mark.parametrize("limit", [20_000, 200])
def test_a_full_disk_harms_nothing_that_was_saved(place: Path, kind: str, limit: int) -> None:
    """No file of a resumed run can grow beyond the limit: networks do not fit, then not even records do."""
    base = {"train": TRAIN, "teach": TEACH}[kind]
    config = write_config(place, base, run="run", steps=8)
    shorter = distill(kind, "--config", config, cwd=place)
    assert shorter.code == 0, shorter.err
    shutil.rmtree(place / "run/checkpoints/step-00000008")
    before = {p: p.read_bytes() for p in (place / "run/checkpoints").rglob("*") if p.is_file()}
    names = entries(place / "run")
    kept = {n: (place / "run" / n).read_bytes() for n in ("config.yaml", "versions.json", "metrics.jsonl")}
    network = {p: p.read_bytes() for p in (place / "run/network").rglob("*") if p.is_file()}

    result = distill(kind, "--config", config, "--resume", cwd=place, file_limit=limit)
    assert_refused(result)
    assert {p: p.read_bytes() for p in (place / "run/checkpoints").rglob("*") if p.is_file()} == before
    assert entries(place / "run") == names
    assert {p: p.read_bytes() for p in (place / "run/network").rglob("*") if p.is_file()} == network
    for name in ("config.yaml", "versions.json"):
        assert (place / "run" / name).read_bytes() == kept[name]
    assert distill(kind, "--config", config, "--resume", cwd=place).code == 0


def test_a_full_disk_keeps_the_network_that_an_export_needs(place: Path) -> None:
    """The record of the run still fits on the disk, the copy of the teacher's configuration does not."""
    config = write_config(place, TRAIN, steps=1)
    assert distill("train", "--config", config, cwd=place).code == 0
    file = place / "student/network/unet/config.json"
    before, record = file.read_bytes(), (place / "student/config.yaml").stat().st_size
    (place / "pipeline/unet/config.json").write_bytes(before + b" " * 4000)
    result = distill("train", "--config", config, "--resume", cwd=place, file_limit=record + 2000)
    assert_refused(result)
    assert file.read_bytes() == before
    assert distill("export", "student", "exported", cwd=place).code == 0


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_exports_or_pictures(place: Path) -> None:
    assert distill("train", "--config", write_config(place, TRAIN, steps=1), cwd=place).code == 0
    before = entries(place)
    assert_refused(distill("export", "student", "exported", cwd=place, file_limit=20_000), "exported")
    assert_refused(distill("sample", "student", "--n", 20, "--out", "grid.png", cwd=place, file_limit=100), "")
    assert entries(place) == before


def test_a_run_that_is_not_finite_stops_and_says_where(place: Path) -> None:
    student = {"sigma_init": 2.5, "optimizer": {"lr": 1e12}}
    diverging = write_config(place, TRAIN, run="wild", steps=40, student=student)
    result = distill("train", "--config", diverging, cwd=place)
    assert_refused(result, "step ", "stopped. The last good checkpoint is ")
    newest = checkpoint.newest(place / "wild/checkpoints")
    assert result.err.rstrip().endswith(newest.name if newest else "none")
    if newest:
        for file in newest.glob("*.safetensors"):
            assert all(bool(t.isfinite().all()) for t in load_file(file).values()), file.name


def test_a_teacher_that_is_not_finite_stops_the_first_step(place: Path) -> None:
    file = place / "pipeline/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    result = distill("train", "--config", write_config(place, TRAIN), cwd=place)
    assert_refused(result, "step 1: gap is nan; stopped. The last good checkpoint is none")
    assert not (place / "student/checkpoints").exists()


def test_the_last_good_checkpoint_survives_a_run_that_goes_wrong(place: Path) -> None:
    """A learning rate that is zero at the first update and absurd from the second on."""
    student = {"optimizer": {"lr": 1e20, "schedule": "constant"}}
    logging = {"log_every": 1, "sample_every": 100, "checkpoint_every": 1}
    config = write_config(place, TRAIN, steps=20, student=student, logging=logging)
    result = distill("train", "--config", config, cwd=place)
    assert_refused(result, "stopped. The last good checkpoint is step-0000000")
    found = checkpoint.newest(place / "student/checkpoints")
    assert found is not None
    assert result.err.endswith(f"The last good checkpoint is {found.name}\n")
    stopped = re.search(r"step (\d+): ", result.err)
    assert stopped is not None
    assert int(found.name[5:]) == int(stopped[1]) - 1
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(found / "student.safetensors").values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "is no pipeline folder"),
        (["pipeline", "--n", 0], "--n, --steps: 0, 18; both must be at least 1"),
        (["pipeline", "--out", "x.jpg"], "--out: x.jpg is not named .png"),
        (["pipeline", "--n", 2, "--guidance", -2], "guidance: -2.0; accepted are finite scales from 0"),
        (["pipeline", "--n", 2, "--guidance", "inf"], "guidance: "),
        (["pipeline", "--n", 2, "--device", "abacus"], "device: 'abacus' cannot be used here"),
        (["pipeline", "--n", 2, "--seed", -1], "seed: -1 is not a whole number"),
        (["pipeline", "--sampler", "eulr"], "sampler: Expected a Literal['euler'"),
        (["pipeline", "--n", 2, "--steps", 1, "--out", "file/x.png"], "file: "),
    ],
)
def test_samples_that_cannot_be_drawn(place: Path, words: list[Any], message: str) -> None:
    (place / "file").write_text("")
    before = entries(place)
    assert_refused(distill("sample", *words, cwd=place), message)
    assert entries(place) == before


def test_sample_writes_a_grid(place: Path) -> None:
    from PIL import Image

    result = distill("sample", "pipeline", "--n", 12, "--steps", 2, "--out", "new/grid.png", cwd=place)
    assert result.code == 0, result.err
    assert "12 samples" in result.out
    with Image.open(place / "new/grid.png") as image:
        assert image.size == (10 * 34 + 2, 2 * 34 + 2)
    other = save_teacher(place / "other", 3, seed=1)
    both = distill("sample", "a=pipeline", f"b={other}", "--n", 10, "--steps", 2, "--out", "both.png", cwd=place)
    assert both.code == 0, both.err
    assert (place / "both.png").is_file()
