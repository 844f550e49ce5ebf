"""The command as its users run it: in processes of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data import digits
from tests.tools.batches import (
    environment,
    fid,
    forked,
    manifest,
    write_manifest,
)
from tools.features import load_extractor
from tools.manifest import DEFAULT_METRICS, METRIC_NAMES
from tools.results import Result
from tools.statistics import FeatureStatistics


def one_line(result: subprocess.CompletedProcess[str], message: str, cwd: Path) -> None:
    """What a mistake is answered with: nothing but one line, and nothing is left behind."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("distill-fid")
    assert result.stderr.count("\n") == 1
    assert not list(cwd.iterdir())


# Before anything is imported


def test_help_needs_no_torch_and_answers_at_once() -> None:
    begun = time.perf_counter()
    result = fid("--help")
    assert time.perf_counter() - begun < 3
    assert result.returncode == 0
    for command in ("score", "batch", "report", "compare", "verify", "stats"):
        assert f"distill-fid {command}" in result.stdout
    heavy = ("torch", "scipy", "diffusers", "PIL", "matplotlib")
    code = f"import sys, tools.fid; print([m for m in {heavy} if m in sys.modules])"
    fresh = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert fresh.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "distill-fid: error: the following arguments are required: score | batch"),
        (["judge"], "invalid choice: 'judge'"),
        (["score", "digits", "--n", "3"], "--n: '3' is not a whole number from 4"),
        (["score", "digits", "--draws", "0.5"], "--draws: '0.5' is not a whole number from 1"),
        (["score", "digits", "--seed", "-1"], "--seed"),
        (["score", "digits", "--guidance", "nan"], "--guidance: 'nan' is not a finite number"),
        (["score", "digits", "--features", "inception"], "'inception'; accepted are digits, pixels, inception-clean"),
        (["score", "digits", "--features", "digits=fld"], "'fld'; accepted are fd, relative-fd"),
        (["score", "digits", "--features", "digits", "--metrics", "fld"], "'fld'; accepted are fd, relative-fd"),
        (["score", "digits", "--sampler", "ddim"], "sampler.0: 'ddim': Input should be 'euler', 'heun'"),
        (["score", "a=digits", "a=digits"], "two are called 'a'"),
        (["score", "=digits"], "'=digits' is not NAME=PATH"),
        (["stats", "digits"], "required: --out"),
        (["stats", "digits", "--out", "s.txt"], "out: s.txt is no .npz"),
        (["stats", "digits", "--out", "."], "out: . is no .npz"),
        (["batch", "m.yaml", "--shard", "4/3"], "--shard: '4/3' is not i/n with 1 <= i <= n"),
        (["batch", "m.yaml", "--shard", "0/3"], "--shard: '0/3' is not i/n"),
        (["batch", "m.yaml", "--shard", "1"], "--shard: '1' is not i/n"),
        (["batch", "m.yaml", "--workers", "0"], "--workers: '0' is not a whole number from 1"),
        (["batch", "m.yaml"], "manifest: m.yaml cannot be read"),
        (["report"], "required: RESULT"),
        (["compare", "a.json"], "required: B.json"),
    ],
)
def test_mistakes_of_writing_are_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    one_line(forked(*arguments, cwd=tmp_path), message, tmp_path)


# What is not as the command says


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "nowhere", "--out", "s.npz"], "source: 'nowhere' is no folder, nor a file of images"),
        (["stats", "IN/teacher", "--out", "s.npz"], "teacher makes images; needed are images that exist"),
        (["stats", "IN/pics", "--features", "nothing", "--out", "s.npz"], "features: 'nothing'; accepted: digits"),
        (["score", "digits", "nowhere"], "source: 'nowhere' is no folder"),
        (["score", "digits", "--reference", "nowhere"], "source: 'nowhere' is no folder"),
        (["score", "digits", "--reference", "nowhere.npz"], "nowhere.npz"),
        (["score", "digits", "--reference", "IN/teacher"], "teacher makes images; needed are images that exist"),
        (["score", "digits", "--device", "abacus"], "device: 'abacus'"),
        (["score", "IN/rgb"], "digits reads images of 1x8x8"),
        (["score", "IN/rgb", "--reference", "IN/ref", "--features", "pixels"], "rgb is read by pixels|3x8x8"),
        (["score", "IN/pics", "--features", "a.b:c"], "a.b:c cannot be imported"),
        (["score", "IN/pics", "--features", "pixels=inception-score"], "needs an extractor that classifies"),
        (["score", "IN/teacher", "--teleport", "nowhere"], "teleport: nowhere"),
        (["batch", "IN/pics"], "manifest: "),
        (["batch", "IN/pics/0000.png"], "manifest: "),
        (["report", "nowhere"], "nowhere is not a result of distill-fid"),
        (["report", "IN/pics"], "pics has no results"),
        (["report", "IN/pics/0000.png"], "0000.png is not a result of distill-fid"),
        (["compare", "IN", "IN"], "is not a result of distill-fid"),
        (["verify", "nowhere.json"], "nowhere.json is not a result of distill-fid"),
        (["verify", "IN/pics"], "pics is not a result of distill-fid"),
    ],
)
def test_mistakes_about_the_world_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, inputs: Path, tmp_path: Path
) -> None:
    words = [word.replace("IN", str(inputs)) if word.startswith("IN") else word for word in arguments]
    one_line(forked(*words, cwd=tmp_path), message, tmp_path)


def test_an_empty_folder_and_one_that_only_says_it_is_a_pipeline(tmp_path: Path) -> None:
    work, given = tmp_path / "work", tmp_path / "given"
    work.mkdir()
    given.mkdir()
    one_line(forked("score", given, cwd=work), "has no images (.png, ", work)
    (given / "model_index.json").write_text("{}")
    one_line(forked("score", given, cwd=work), f"{given}: is a ", work)


def test_what_a_runs_record_says_wrong_is_named_by_its_key(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("command: train\nrun: run\nteacher: {path: teacher}\nbatch_size: 0\n")
    result = fid("score", str(run), "--n", "40", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "distill-fid: error: batch_size: Input should be greater than or equal to 1 (got 0)\n"


def test_a_folder_where_a_file_should_be_and_the_other_way_round(batch: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder.npz"
    file.write_text("")
    folder.mkdir()
    for arguments, message in (
        (("stats", "digits", "--out", folder), f"out: {folder} is a folder, not a file to write"),
        (("report", batch, "--csv", folder), f"out: {folder} is a folder, not a file to write"),
        (("report", batch, "--plots", file), f"out: {file} is a file, not a folder"),
        (("score", "digits", "--out", file), f"out: {file} is a file, not a folder"),
        (("batch", batch.parents[1] / "m.yaml", "--out", file), f"out: {file} is a file, not a folder"),
    ):
        result = forked(*arguments, cwd=tmp_path)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert message in result.stderr


def test_a_truncated_picture_is_named_and_the_others_are_judged(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "pics", tmp_path / "cut")
    file = tmp_path / "cut" / "0003.png"
    file.write_bytes(file.read_bytes()[:60])
    features = ("--features", "pixels=fd", "--reference", inputs / "ref", "--draws", 1, "--batch", 8)
    result = forked("score", "cut", inputs / "pics", *features, "--out", "kept", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("distill-fid: error: ")
    assert "cut/0003.png: cannot be read as an image" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert "pics" in {Result.load(file).name for file in (tmp_path / "kept" / "results").iterdir()}


# Statistics


def test_stats_of_a_folder_are_those_of_its_images(inputs: Path, tmp_path: Path) -> None:
    result = forked("stats", inputs / "held-out", "--features", "digits", "--out", "new/s.npz", cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()) == (0, ["image 500/898", "image 898/898"])
    extractor = load_extractor("digits", (1, 8, 8))
    assert result.stdout == f"898 images, {extractor.name}: new/s.npz\n"

    features = extractor(digits("held-out").images).features.double().numpy()
    written = FeatureStatistics.load(tmp_path / "new" / "s.npz")
    assert (written.count, written.extractor) == (898, extractor.name)
    np.testing.assert_allclose(written.mean, features.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(written.covariance, np.cov(features.T), rtol=1e-5, atol=1e-6)


def test_the_reference_digits_are_the_held_out_half(tmp_path: Path) -> None:
    result = forked("stats", "digits", "--features", "pixels", "--out", "s.npz", cwd=tmp_path)
    assert result.stdout.startswith("898 images, pixels|1x8x8")
    mean = digits("held-out").images.flatten(1).double().mean(0)
    written = FeatureStatistics.load(tmp_path / "s.npz").mean
    torch.testing.assert_close(written, mean, rtol=0, atol=1 / 255)  # a grey level
    assert (written - digits("train").images.flatten(1).double().mean(0)).abs().max() > 4 / 255


def test_statistics_judge_as_their_images_do_and_those_of_another_extractor_are_refused(
    inputs: Path, tmp_path: Path
) -> None:
    assert forked("stats", inputs / "ref", "--features", "pixels", "--out", "s.npz", cwd=tmp_path).returncode == 0
    common = ("score", inputs / "pics", "--draws", 1, "--n", 40, "--features", "pixels=fd")
    by_file = forked(*common, "--reference", "s.npz", cwd=tmp_path)
    by_images = forked(*common, "--reference", inputs / "ref", cwd=tmp_path)
    assert by_file.returncode == by_images.returncode == 0
    assert by_file.stdout.splitlines()[2] == by_images.stdout.splitlines()[2]

    refused = forked("score", inputs / "pics", "--features", "digits=fd", "--reference", "s.npz", cwd=tmp_path)
    assert refused.returncode == 2
    assert "reference: statistics of pixels|1x8x8" in refused.stderr
    assert "samples read by digits-" in refused.stderr
    pairs = forked("score", inputs / "pics", "--features", "pixels=kd", "--reference", "s.npz", cwd=tmp_path)
    assert "kd needs the reference's images" in pairs.stderr


# Score


def test_score_of_real_digits_and_of_a_folder(inputs: Path, tmp_path: Path) -> None:
    arguments = ("score", "floor=digits", inputs / "held-out", "--n", "299", "--out", "kept")
    result = forked(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    head, _, floor, folder = result.stdout.splitlines()[:4]
    metrics = "digits precision | digits recall | digits class-entropy | digits class-accuracy"
    assert head.startswith(f"|  | digits relative-fd | digits relative-fd, debiased | {metrics} | pixels fd |")
    assert floor.startswith("| floor | ")
    assert floor.endswith("| – | – | 299 x 3 |")
    assert folder.startswith("| held-out | ")
    assert "reference: digits" in result.stdout

    kept = [Result.load(file) for file in (tmp_path / "kept" / "results").iterdir()]
    accuracy = [r.values["digits"]["class-accuracy"].value for r in kept if r.name == "floor"]
    assert len(accuracy) == 3
    assert np.mean(accuracy) > 0.99  # the classifier knows them by heart
    own = [r.values["digits"]["relative-fd"].value for r in kept if r.name == "held-out"]
    assert 0 < np.mean(own) < 3
    assert np.std(own) > 0
    assert kept[0].provenance["command"].startswith("distill-fid score floor=digits ")
    assert kept[0].facts["extractors"]["digits"] == load_extractor("digits", (1, 8, 8)).name


def test_metrics_are_asked_for_by_extractor_or_for_all(inputs: Path, tmp_path: Path) -> None:
    common = ("score", inputs / "pics", "--reference", inputs / "ref", "--draws", 1)
    one = forked(*common, "--features", "pixels=vendi@2,fd", "digits", "--metrics", "kd", cwd=tmp_path)
    heads = [head.strip() for head in one.stdout.splitlines()[0].split("|")]
    assert heads[2:6] == ["pixels vendi@2", "pixels fd", "pixels fd, debiased", "digits kd"]
    default = forked(*common, "--features", "pixels", cwd=tmp_path).stdout.splitlines()[0]
    assert all(f"| {metric} |" in default for metric in DEFAULT_METRICS)
    shown = " ".join(forked("score", "--help", cwd=tmp_path).stdout.split())
    assert all(metric in shown for metric in METRIC_NAMES)


def test_score_of_a_pipeline_is_of_its_seed(inputs: Path, tmp_path: Path) -> None:
    def values(seed: int) -> list[dict]:
        common = ("--n", 8, "--draws", 2, "--steps", 2, "--batch", 20, "--features", "digits=fd,class-accuracy")
        result = forked(
            "score", f"tiny={inputs / 'teacher'}", *common, "--seed", seed, "--out", f"r{seed}", cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[2].startswith("| tiny | ")
        kept = [Result.load(file) for file in (tmp_path / f"r{seed}" / "results").iterdir()]
        assert all((r.nfe, r.n) == (3, 8) and r.provenance["images_per_second"] > 0 for r in kept)  # Heun: 2 + 1
        return [r.values for r in sorted(kept, key=lambda r: r.axes["draw"])]

    five, six = values(5), values(6)
    assert five[0] != five[1] == six[0]  # draw 1 of seed 5 is draw 0 of seed 6


def test_a_small_folder_says_that_it_is_small(inputs: Path, tmp_path: Path) -> None:
    common = ("--reference", inputs / "ref", "--features", "pixels=fd")
    result = forked("score", inputs / "pics", *common, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| 40 x 1 |" in result.stdout
    assert "pics: has 40 images, enough for 1 draws of 40; left out: draw 1" in result.stderr
    assert "- warning: pixels fd: 40 samples of 64 features" in result.stdout
    assert not list(tmp_path.iterdir())  # nothing is kept


# How it ends


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(batch: Path) -> None:
    words = [sys.executable, "-m", "tools.fid", "report", str(batch), "--list"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) in (0, 1)
    process.stderr.close()


@pytest.mark.slow
def test_an_interruption_is_one_line(inputs: Path, tmp_path: Path) -> None:
    sources = {"teacher": inputs / "teacher"}
    write_manifest(tmp_path / "m.yaml", manifest(inputs / "ref", sources, steps=400))
    words = [sys.executable, "-m", "tools.fid", "batch", "m.yaml"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
                               cwd=tmp_path)  # fmt: skip
    assert process.stderr is not None
    while "ref [" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "distill-fid: interrupted; the same command continues"
    assert "Traceback" not in rest


def test_a_traceback_is_to_be_had(tmp_path: Path) -> None:
    result = fid("batch", "nowhere", cwd=tmp_path, DISTILL_TRACEBACK="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
