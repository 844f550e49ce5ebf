"""The command as its users run it: in processes of its own."""

import csv
import io
import json
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
from PIL import Image

from distill.data import digits
from tests.distill.tiny import save_teacher
from tests.tools.batches import (
    environment,
    fid,
    forked,
    manifest,
    save_pictures,
    save_student,
    write_manifest,
)
from tools.digest import digest_json
from tools.features import load_extractor, quantise
from tools.manifest import DEFAULT_METRICS, METRIC_NAMES
from tools.results import Result
from tools.statistics import FeatureStatistics


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """ref, pics and rgb: folders of noise; teacher and student: tiny pipelines; held-out: the digits of that half."""
    folder = tmp_path_factory.mktemp("inputs")
    save_pictures(folder / "ref", 60, seed=5)
    save_pictures(folder / "pics", 40)
    save_pictures(folder / "rgb", 20, shape=(3, 8, 8))
    save_teacher(folder / "teacher")
    save_student(folder / "student", seed=1)
    (folder / "held-out").mkdir()
    for k, image in enumerate(quantise(digits("held-out").images)):
        Image.fromarray(image[0].numpy()).save(folder / "held-out" / f"{k:04}.png")
    return folder


@pytest.fixture(scope="module")
def batch(inputs: Path, tmp_path_factory) -> Path:
    """A folder with m.yaml and what `distill-fid batch m.yaml` makes of it."""
    folder = tmp_path_factory.mktemp("batch")
    sources = {name: inputs / name for name in ("teacher", "student", "pics")}
    write_manifest(folder / "m.yaml", manifest(inputs / "ref", sources, steps=[1, 2], n=24, seed=3))
    result = forked("batch", "m.yaml", cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "said").write_text(result.stdout)
    return folder / "runs" / "m"


def result_of(batch: Path, name: str, **axes: object) -> Path:
    """The file of a source's result at some point of the matrix."""
    for file in sorted((batch / "results").glob("*.json")):
        result = Result.load(file)
        if result.name == name and result.axes | axes == result.axes:
            return file
    raise AssertionError(f"{name} has no result at {axes}")


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


# Batches and what is made of them


def test_a_batch_prints_its_table_and_again_from_its_results(batch: Path) -> None:
    said = (batch.parents[1] / "said").read_text()
    lines = [line.split(" | ")[:2] for line in said.splitlines()[:6]]
    assert lines[2:] == [["| pics", "–"], ["| student", "–"], ["| teacher", "1"], ["| teacher", "2"]]
    again = forked("batch", "m.yaml", cwd=batch.parents[1])
    assert again.stdout == said
    assert again.stderr.splitlines() == ["4 of 4 results are there"]
    assert forked("report", batch, cwd=batch).stdout.splitlines()[0] == said.splitlines()[0]


def test_a_result_says_all_that_decided_it(batch: Path, inputs: Path) -> None:
    result = Result.load(result_of(batch, "teacher", steps=2))
    assert (result.n, result.nfe, result.axes["sampler"], result.axes["draw"]) == (24, 2, "euler", 0)
    assert result.facts["pairing"] == {"which": {"seed": 3}, "of": None}
    assert list(result.values) == ["digits", "pixels"]
    assert result.facts["references"]["digits"]["n"] == 60
    assert result.inputs["source"] == str(inputs / "teacher")
    how = result.provenance
    assert how["command"] == "distill-fid batch m.yaml"
    assert {"torch", "numpy", "python", "diffusers"} <= how["versions"].keys()
    assert how["processes"] == 1
    assert how["made_on"] == {space: [how["judged_on"]] for space in ("digits", "pixels")}
    assert how["judged_on"].endswith("full float32, one thread")
    assert how["seconds"] > 0


def test_report_writes_tables_and_pictures(batch: Path, tmp_path: Path) -> None:
    options = ("--csv", "new/all.csv", "--markdown", "new/all.md", "--plots", "plots", "--list")
    result = forked("report", batch, *options, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "new" / "all.md").read_text() in result.stdout
    assert f"{result_of(batch, 'student').name}: student (draw 0)" in result.stdout
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "all.csv").read_text())))
    assert len(rows) == 4 * 4
    by_key = {(row["key"], row["extractor"], row["metric"]): row for row in rows}
    for file in (batch / "results").iterdir():
        kept = Result.load(file)
        for space, metrics in kept.values.items():
            for metric, estimate in metrics.items():
                row = by_key[kept.key, kept.facts["extractors"][space], metric]
                assert float(row["value"]) == estimate.value
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [picture.name for picture in pictures] == ["digits-fd.png", "digits-kd.png", "pixels-fd.png",
                                                      "pixels-precision.png"]  # fmt: skip
    for picture in pictures:
        Image.open(picture).verify()
        assert f"plots/{picture.name}" in result.stdout.splitlines()


def test_report_says_where_there_is_nothing_to_draw(batch: Path, tmp_path: Path) -> None:
    result = forked("report", result_of(batch, "student"), "--plots", "plots", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr.startswith("plots: none")
    assert not list(tmp_path.iterdir())


def signed(content: dict) -> dict:
    """As one would who knows how a file is signed."""
    unsigned = {name: value for name, value in content.items() if name != "sha256"}
    return unsigned | {"sha256": digest_json(unsigned)}


def test_two_results_of_one_key_that_differ_are_refused_naming_both(batch: Path, tmp_path: Path) -> None:
    file = result_of(batch, "pics")
    content = json.loads(file.read_text())
    content["values"]["digits"]["kd"]["value"] += 1e-12
    (tmp_path / "other.json").write_text(json.dumps(signed(content)))
    result = forked("report", batch, "other.json", cwd=tmp_path)
    assert result.returncode == 2
    assert f"{file} and other.json have one key, {file.stem}, and other values" in result.stderr


def test_compare_says_whether_the_same_noise_became_better(batch: Path, tmp_path: Path) -> None:
    a, b = (result_of(batch, "teacher", steps=steps) for steps in (1, 2))
    result = forked("compare", a, b, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    head, _, *rows, blank, paired, _ = result.stdout.splitlines()
    assert head.startswith("|  | teacher (sampler euler, steps 1, ")
    assert [row.split(" | ")[0] for row in rows] == ["| digits fd", "| digits kd", "| pixels fd", "| pixels precision"]
    assert (blank, paired) == ("", "- paired by sample number")
    assert "not paired" in forked("compare", a, result_of(batch, "pics"), cwd=tmp_path).stdout


def test_verify_says_so_and_exits_with_1_where_it_is_not_so(batch: Path, tmp_path: Path) -> None:
    file = result_of(batch, "teacher", steps=2)
    good = forked("verify", file, cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines() == [
        f"key: {file.stem}, and the file is as it was written",
        "inputs: unchanged",
        "values: all 4 are the same to the bit",
    ]
    content = json.loads(file.read_text())
    content["values"]["digits"]["fd"]["value"] *= 2
    (tmp_path / "changed.json").write_text(json.dumps(signed(content)))
    bad = forked("verify", "changed.json", "--recompute", "--device", "cpu", cwd=tmp_path)
    assert bad.returncode == 1
    assert bad.stdout.splitlines()[-1].startswith("NOT VERIFIED: values: digits fd value is ")
    content["facts"]["n"] = 5
    (tmp_path / "forged.json").write_text(json.dumps(content))
    forged = forked("verify", "forged.json", cwd=tmp_path)
    assert (forged.returncode, forged.stderr.count("\n")) == (2, 1)
    assert "it was changed by hand" in forged.stderr


def test_shards_together_make_the_same_results(batch: Path, inputs: Path, tmp_path: Path) -> None:
    """Half of the jobs each: together they are what one command makes."""
    for shard in ("1/2", "2/2"):
        result = forked("batch", batch.parents[1] / "m.yaml", "--out", "halves", "--shard", shard, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.split("\n\n")[0].splitlines()) == 2 + 2
    whole = {f.name: Result.load(f).values for f in (batch / "results").iterdir()}
    assert {f.name: Result.load(f).values for f in (tmp_path / "halves" / "results").iterdir()} == whole


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
