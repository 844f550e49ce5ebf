"""Students of every family by their folders: the pictures of the stock pipeline, from the run and from the export."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.export import export_student
from distill.generate import load_generator
from distill.noise import GENERATION
from distill.recipe import Sampling, read_recipe
from samplers import SampleNoise
from tests.distill import families
from tests.distill.command import distill
from tests.distill.runs import assert_refused
from tests.distill.student_runs import load, save_run
from tests.distill.tiny import write_config
from tests.some import some
from tests.truth import relative_error
from tools.sources import SourceSettings, open_source

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SEED, INDICES = 5, [1, 2, 5]
FEW = ("ddpm", "edm-classes", "sd15", "sdxl", "dit", "pixart", "sd3", "flux")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("\n".join(families.PROMPTS) + "\n")
    return tmp_path / "words.txt"


def options(name: str, words: Path) -> dict[str, Any]:
    return {"prompts": str(words)} if name in families.PROMPTED else {}


def by_stock(name: str, folder: Path, shape: tuple[int, ...], call: dict[str, Any]) -> torch.Tensor:
    """The exported pipeline's own call on our noise, [3, 3, H, W] in [0, 1]."""
    pipe, z = load(name, folder), SampleNoise(SEED, INDICES, GENERATION).normal(shape)
    arguments: dict[str, Any] = {"batch_size": 3}
    if name in families.PROMPTED:
        arguments = {"prompt": [families.PROMPTS[k % 2] for k in INDICES]}
    elif name in families.LABELS:
        arguments |= {"class_labels": [k % families.LABELS[name] for k in INDICES]}
    if name.startswith("flux"):
        z = pipe._pack_latents(z, *z.shape)
    more = {"latents": z, "output_type": "pt"} | families.CALL.get(name, {})
    pictures: torch.Tensor = pipe(**(arguments | call | more)).images
    return pictures


@pytest.mark.parametrize(
    "name", some([name for name in families.FAMILIES if name != "dit"], ("ddpm", "flux"))
)  # DiT takes no noise
def test_one_step_is_the_stock_pipelines(name: str, tmp_path: Path, words: Path) -> None:
    save_run(name, tmp_path)
    export_student(tmp_path / "run", tmp_path / "exported")
    generator = load_generator(tmp_path / "exported", **options(name, words))
    ours = generator(SEED, INDICES)
    assert ours.shape == (3, *generator.shape)
    assert generator.nfe == 1
    recipe = read_recipe(tmp_path / "exported", Sampling(**options(name, words)))
    assert recipe.student is not None
    shape = (4, 8, 8) if recipe.latent else recipe.shape
    theirs = by_stock(name, tmp_path / "exported", shape, recipe.student.call)
    assert relative_error((ours / 2 + 0.5).clamp(0, 1), theirs) < 1e-4
    assert ((theirs > 0) & (theirs < 1)).float().mean() > 0.2


@pytest.mark.parametrize(
    "name",
    some(
        FEW,
        (
            "flux",
            "dit",
        ),
    ),
)
def test_a_run_and_its_export_make_the_same_whatever_the_batch(name: str, tmp_path: Path, words: Path) -> None:
    steps = 3
    save_run(name, tmp_path, steps=steps)
    export_student(tmp_path / "run", tmp_path / "exported")
    run, exported = (load_generator(tmp_path / folder, **options(name, words)) for folder in ("run", "exported"))
    assert run.nfe == exported.nfe == steps
    assert (run.shape, run.n_classes) == (exported.shape, exported.n_classes)
    made = run(SEED, INDICES)
    assert made.shape == (3, *run.shape)
    assert relative_error(exported(SEED, INDICES), made) < 1e-4
    assert relative_error(torch.cat([run(SEED, [k]) for k in INDICES]), made) < 1e-4
    assert (made[0] - made[1]).abs().max() > 1e-3
    assert (run(SEED + 1, INDICES) - made).abs().max() > 1e-3


@pytest.mark.slow
def test_adapters_of_a_run(tmp_path: Path, words: Path) -> None:
    save_run("sd15", tmp_path, rank=2)
    export_student(tmp_path / "run", tmp_path / "exported")
    run, exported = (load_generator(tmp_path / folder, prompts=words) for folder in ("run", "exported"))
    assert relative_error(exported(SEED, INDICES), run(SEED, INDICES)) < 1e-4


def test_one_checkpoint_of_a_run(tmp_path: Path, words: Path) -> None:
    """Snapshots that are kept, too: a folder with average.safetensors two below the run."""
    save_run("sd15", tmp_path)
    one = tmp_path / "run/snapshots/step-00000003"
    one.parent.mkdir()
    (tmp_path / "run/checkpoints/step-00000007").rename(one)
    assert read_recipe(one, Sampling(prompts=str(words))).files[0] == one / "average.safetensors"
    made = load_generator(one, prompts=words)(SEED, INDICES)
    with pytest.raises(ValueError, match="run: has no checkpoint yet"):
        load_generator(tmp_path / "run", prompts=words)
    one.rename(tmp_path / "run/checkpoints/step-00000003")
    assert torch.equal(load_generator(tmp_path / "run", prompts=words)(SEED, INDICES), made)


def test_what_decides_the_pictures_of_a_run_is_in_its_facts(tmp_path: Path, words: Path) -> None:
    """Also the parts that a student shares with its teacher, which lie elsewhere; where, does not matter."""
    save_run("sd15", tmp_path)
    settings = SourceSettings(prompts=str(words))
    before = open_source(tmp_path / "run", settings).facts
    (tmp_path / "run/config.yaml").write_text(
        (tmp_path / "run/config.yaml").read_text().replace(str(tmp_path / "teacher"), str(tmp_path / "moved"))
    )
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert open_source(tmp_path / "run", settings).facts == before
    changed = load("sd15", tmp_path / "moved").vae
    with torch.no_grad():
        changed.decoder.conv_out.bias.add_(1)
    changed.save_pretrained(tmp_path / "moved/vae")
    assert open_source(tmp_path / "run", settings).facts != before


def test_pictures_side_by_side_are_of_one_size(tmp_path: Path) -> None:
    """A student of another size than its teacher's own is compared to the teacher at its size."""
    folder = families.save("sd15", tmp_path / "teacher")
    (tmp_path / "words.csv").write_text("text\na red fox\nhills\n")
    student = export_size(folder, tmp_path, 32)
    words = ("sample", "teacher=teacher", f"student={student.name}", "--prompts", "words.csv", "--n", 2, "--steps", 2)
    refused = distill(*words, cwd=tmp_path)
    assert_refused(refused, "has no column 'caption'; there are text")
    words = (*words, "--column", "text")
    assert_refused(distill(*words, cwd=tmp_path), "teacher [3, 16, 16], student [3, 32, 32]; accepted is one shape")
    done = distill(*words, "--height", 32, "--width", 32, cwd=tmp_path)
    assert done.code == 0, done.err
    assert_refused(distill(*words, "--height", 31, "--width", 32, cwd=tmp_path), "height")


def export_size(teacher: Path, place: Path, size: int) -> Path:
    """An exported student of pictures of size x size, trained for an update."""
    config: dict[str, Any] = {
        "command": "train", "run": "run", "teacher": {"path": str(teacher)}, "student": {"sigma_init": None},
        "prompts": {"file": "words.csv", "column": "text", "height": size, "width": size}, "batch_size": 2, "steps": 1,
    }  # fmt: skip
    done = distill("train", "--config", write_config(place, config), cwd=place)
    assert done.code == 0, done.err
    assert distill("export", "run", "exported", cwd=place).code == 0
    return place / "exported"


def test_refusals(tmp_path: Path, words: Path) -> None:
    save_run("sd15", tmp_path)
    with pytest.raises(ValueError, match=r"prompts: None; .*run needs a text file of them"):
        load_generator(tmp_path / "run")
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"teacher: there is no such folder \(of the teacher's pipeline, which is needed"
    ):
        load_generator(tmp_path / "run", prompts=words)
    export_student(tmp_path / "run", tmp_path / "exported", tmp_path / "moved")
    (tmp_path / "exported/distill.json").write_text('{"kind": "student", "sigmas": [1.0], "start": "far"}')
    with pytest.raises(ValueError, match=r"distill\.json: does not say sigmas, start, floor and call"):
        load_generator(tmp_path / "exported", prompts=words)


@pytest.mark.slow
def test_the_command(tmp_path: Path, words: Path) -> None:
    save_run("sd15", tmp_path, steps=2)
    result = distill("sample", "run", "--prompts", "words.txt", "--n", "4", "--out", "grid.png", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "4 samples each of run, 2 NFE" in result.out
    assert (tmp_path / "grid.png").stat().st_size > 100
    for option, value in (("--steps", 4), ("--guidance", 2.0), ("--sampler", "euler"), ("--height", 64)):
        result = distill("sample", "run", "--prompts", "words.txt", option, value, cwd=tmp_path)
        said = f"{option}: {value}; is for diffusion models: a student has steps and a size of its own"
        assert_refused(result, said)
    result = distill("sample", "run", "--prompts", "words.txt", "--target", "guided", cwd=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--prompts: words.txt is not for --target" in result.err
    result = distill("export", "run", "exported", "--base", "teacher", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "exported: a StableDiffusionPipeline" in result.out
    result = distill("export", "run", "lora", "--lora", cwd=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "has no adapters" in result.err
