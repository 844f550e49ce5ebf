"""The command as its users run it: in processes of its own."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.data import digits
from tools.features import EXTRACTORS, quantise
from tools.fid import EXTRACTOR_NAMES, main
from tools.statistics import FeatureStatistics


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.fid", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def write(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for k, image in enumerate(quantise(images)):
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(folder / f"{k:04}.png")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A real diffusers pipeline with an untrained class-conditional UNet of a few thousand weights."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=10,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


def test_help_needs_no_torch_and_answers_at_once() -> None:
    begun = time.perf_counter()
    result = run("--help")
    assert time.perf_counter() - begun < 2
    assert result.returncode == 0
    assert "stats" in result.stdout
    assert "score" in result.stdout
    loaded = "import sys, tools.fid; print([m for m in ('torch', 'scipy', 'diffusers', 'PIL') if m in sys.modules])"
    fresh = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert fresh.stdout == "[]\n"


def test_the_command_knows_the_extractors_without_importing_them() -> None:
    assert tuple(EXTRACTORS) == EXTRACTOR_NAMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required"),
        (["compare"], "invalid choice: 'compare'"),
        (["score", "digits", "--n", "3"], "--n: '3' is not a whole number from 4"),
        (["score", "digits", "--draws", "0.5"], "--draws: '0.5' is not a whole number from 1"),
        (["score", "digits", "--seed", "-1"], "--seed"),
        (["score", "digits", "--guidance", "nan"], "--guidance: 'nan' is not a finite number"),
        (["score", "digits", "--features", "inception"], "invalid choice: 'inception'"),
        (["score", "a=digits", "a=digits"], "two are called 'a'"),
        (["score", "=digits"], "'=digits' is not NAME=PATH"),
        (["score", "digits", "--out", "."], "out: . is a folder"),
        (["stats", "digits"], "required: --out"),
    ],
)
def test_mistakes_of_writing_are_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "nowhere", "--out", "s.npz"], "source: 'nowhere' is not a folder, nor 'digits'"),
        (["score", "digits", "nowhere", "--out", "r.json"], "source: 'nowhere' is not a folder"),
        (["score", "digits", "--reference", "nowhere"], "source: 'nowhere' is not a folder"),
        (["score", "digits", "--device", "abacus"], "device: 'abacus'"),
    ],
)
def test_mistakes_about_the_world_are_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("distill-fid: error: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_a_folder_that_says_it_is_a_pipeline_must_be_one(tmp_path, capsys) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["score", str(tmp_path), "--out", str(tmp_path / "r.json")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"distill-fid: error: {tmp_path}: its model_index.json names no unet")
    assert (said.err.count("\n"), said.out) == (1, "")
    assert [f.name for f in tmp_path.iterdir()] == ["model_index.json"]


def test_stats_of_a_folder_are_those_of_its_images(tmp_path) -> None:
    images = digits("train").images[:100]
    write(tmp_path / "pngs", images)
    result = run("stats", "pngs", "--features", "digits", "--out", "new/s.npz", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    extractor = EXTRACTORS["digits"]((1, 8, 8))
    assert result.stdout == f"100 images, {extractor.name}: new/s.npz\n"

    expected = FeatureStatistics(32)
    expected.update(extractor(images))
    written = FeatureStatistics.load(tmp_path / "new" / "s.npz")
    assert written.count == 100
    torch.testing.assert_close(written.mean, expected.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(written.covariance, expected.covariance, rtol=1e-5, atol=1e-6)


def test_the_reference_digits_are_the_held_out_half(tmp_path, capsys) -> None:
    assert main(["stats", "digits", "--features", "pixels", "--out", str(tmp_path / "s.npz")]) == 0
    assert capsys.readouterr().out.startswith("898 images, pixels|1x8x8|u8")
    mean = digits("held-out").images.flatten(1).double().mean(0)
    written = FeatureStatistics.load(tmp_path / "s.npz").mean
    torch.testing.assert_close(written, mean, rtol=0, atol=1 / 255)  # a grey level
    assert (written - digits("train").images.flatten(1).double().mean(0)).abs().max() > 4 / 255


def test_score_of_real_digits_and_of_a_folder(tmp_path) -> None:
    write(tmp_path / "pngs", digits("held-out").images)
    result = run("score", "floor=digits", "pngs", "--n", "299", "--out", "r.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    head, _, floor, pngs = result.stdout.splitlines()[:4]
    assert head.startswith("|  | FD | pixel FD | precision | recall | class entropy | class accuracy | NFE | images/s")
    assert floor.startswith("| floor | ")
    assert floor.endswith("| – | – | 299 x 3 |")
    assert pngs.startswith("| pngs | ")
    assert "floor: draw 3: 299 images, FD " in result.stderr

    written = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    by_name = {entry["name"]: entry for entry in written["entries"]}
    assert by_name["floor"]["source"] == "digits"
    assert by_name["floor"]["summary"]["class_accuracy"]["mean"] > 0.99  # the classifier knows them by heart
    assert 0 < by_name["pngs"]["summary"]["fd"]["mean"] < 3
    assert by_name["pngs"]["summary"]["fd"]["std"] > 0
    assert written["settings"]["features"] == EXTRACTORS["digits"]((1, 8, 8)).name
    assert written["settings"]["command"].startswith("distill-fid score floor=digits pngs --n 299")


def test_a_small_folder_against_a_folder_says_that_it_is_small(tmp_path) -> None:
    images = torch.rand(60, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write(tmp_path / "a", images[:40])
    write(tmp_path / "b", images[40:])
    result = run("score", "b", "--reference", "a", "--features", "pixels", "--n", "30", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| 20 x 1 |" in result.stdout
    assert "b: has images for 1 x 20, not 3 x 30" in result.stderr


def test_images_that_do_not_match_the_reference_raise(tmp_path, capsys) -> None:
    write(tmp_path / "colour", torch.zeros(20, 3, 5, 5))
    assert main(["score", str(tmp_path / "colour"), "--n", "20"]) == 2
    assert "shape [20, 3, 5, 5] is not ['B', 1, 8, 8]" in capsys.readouterr().err


def test_score_of_a_pipeline_folder(pipeline: Path, tmp_path, capsys) -> None:
    def entry(seed: int) -> dict:
        out = tmp_path / "r.json"
        arguments = ["score", f"tiny={pipeline}", "--n", "8", "--draws", "2", "--steps", "2", "--seed", str(seed)]
        assert main([*arguments, "--out", str(out)]) == 0
        return json.loads(out.read_text(encoding="utf-8"))["entries"][0]

    first, again, shifted = entry(5), entry(5), entry(6)
    assert first["nfe"] == 3  # Heun: two steps, the last of them Euler's
    assert len(first["images_per_second"]) == len(first["scores"]) == 2
    assert min(first["images_per_second"]) > 0
    assert first["scores"] == again["scores"]
    assert first["scores"][0] != first["scores"][1] == shifted["scores"][0]  # draw 1 of seed 5 is draw 0 of seed 6
    assert 0 <= first["scores"][0]["class_accuracy"] <= 1
    assert capsys.readouterr().out.splitlines()[2].startswith("| tiny | ")
