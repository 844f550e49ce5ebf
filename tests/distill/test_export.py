"""The whole road: teach, distil, export, load where this library does not exist, compare."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from distill import Teacher, load_generator
from distill.student_run import StudentRun
from samplers import SampleNoise, denoiser_from
from tests.distill.command import distill, fresh
from tests.distill.runs import assert_refused
from tests.distill.tiny import SIGMA_DATA, SIGMA_MAX, TEACH, TRAIN, save_teacher, write_config

# A process in which none of our packages can be imported loads the folder and runs the stock pipeline once.
FOREIGN = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("distill", "samplers", "tools"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
try:
    import distill
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("distill could be imported")

import numpy as np, torch
from diffusers import ConsistencyModelPipeline

torch.set_num_threads(1)
pipe = ConsistencyModelPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
n, labelled = 6, sys.argv[2] == "labels"
shape = (n, pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
labels = {"class_labels": [0, 1, 2, 0, 1, 2]} if labelled else {}
images = pipe(
    batch_size=n, num_inference_steps=1, generator=torch.Generator().manual_seed(3), output_type="np", **labels
).images
random = pipe(batch_size=64, num_inference_steps=1, generator=torch.Generator().manual_seed(4), output_type="np")
np.savez(sys.argv[3], noise=noise.numpy(), images=images, random=random.images)
"""


def compare_with_stock(place: Path, exported: Path, run: Path, labels: torch.Tensor | None) -> float:
    """max |ours - theirs| on the same noise, in the pipeline's [0, 1]."""
    (place / "elsewhere").mkdir(exist_ok=True)
    result = fresh(
        "-I",
        "-c",
        FOREIGN,
        exported,
        "none" if labels is None else "labels",
        place / "out.npz",
        cwd=place / "elsewhere",
    )
    assert result.returncode == 0, result.stderr
    out = np.load(place / "out.npz")
    assert np.isfinite(out["random"]).all()
    student = StudentRun.read(run)
    denoiser, steps = denoiser_from(student.load_network(), student.scheduler), student.steps
    with torch.no_grad():
        images = denoiser(steps.start * torch.from_numpy(out["noise"]), torch.tensor(steps.sigmas[0]), labels)
    ours = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - 0.5).mean() > 0.01  # not a grey plane
    return float(np.abs(ours - out["images"]).max())


@pytest.mark.slow
def test_a_conditional_student_loads_where_this_library_does_not_exist(place: Path) -> None:
    save_teacher(place / "three", 3, seed=2)
    config = write_config(place, TRAIN, teacher={"path": "three"}, steps=4)
    assert distill("train", "--config", config, cwd=place).code == 0
    shutil.rmtree(place / "three")  # the run needs its teacher no more
    result = distill("export", "student", "exported", cwd=place)
    assert result.code == 0, result.err

    difference = compare_with_stock(place, place / "exported", place / "student", torch.tensor([0, 1, 2, 0, 1, 2]))
    assert difference <= 1e-5
    unet = json.loads((place / "exported/unet/config.json").read_text())
    assert unet["num_class_embeds"] == 3  # the null label is cut: the pipeline draws random labels from real classes
    scheduler = json.loads((place / "exported/scheduler/scheduler_config.json").read_text())
    assert (scheduler["sigma_max"], scheduler["sigma_data"], scheduler["clip_denoised"]) == (2.5, SIGMA_DATA, False)
    facts = json.loads((place / "exported/distill.json").read_text())
    steps = {"sigmas": [2.5], "start": 2.5, "floor": 0.01, "call": {"num_inference_steps": 1}}
    assert facts == {"kind": "student", "classes": ["0", "1", "2"], "null_label": None} | steps
    card = (place / "exported/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: ")
    assert "class_labels" in card
    texts = "".join(f.read_text() for f in (place / "exported").rglob("*") if f.suffix in (".json", ".md"))
    assert str(place) not in texts
    assert "three" not in texts


@pytest.mark.slow
def test_an_unconditional_student_of_a_folder_of_pictures(tmp_path: Path) -> None:
    """teach on RGB pictures without classes, train, export, load."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for k in range(5):
        pixels = rng.integers(0, 256, (12, 10 + k, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{k}.png")
    data = {"name": "folder", "path": "pictures", "size": 8, "channels": 3}
    teach = write_config(tmp_path, TEACH, "teach.yaml", data=data, steps=2)
    assert distill("teach", "--config", teach, cwd=tmp_path).code == 0
    train = write_config(tmp_path, TRAIN, teacher={"path": "teacher"}, steps=2)
    result = distill("train", "--config", train, cwd=tmp_path)
    assert result.code == 0, result.err
    assert distill("export", "student", "exported", cwd=tmp_path).code == 0
    assert compare_with_stock(tmp_path, tmp_path / "exported", tmp_path / "student", None) <= 1e-5
    assert "class_labels" not in (tmp_path / "exported/README.md").read_text()
    assert load_generator(tmp_path / "exported")(0, range(3)).shape == (3, 3, 8, 8)


def test_an_export_replaces_an_export_and_nothing_else(place: Path) -> None:
    assert distill("train", "--config", write_config(place, TRAIN, steps=1), cwd=place).code == 0
    for _ in range(2):
        assert distill("export", "student", "exported", cwd=place).code == 0
    (place / "mine").mkdir()
    (place / "mine/notes.txt").write_text("precious")
    (place / "exported/notes.txt").write_text("precious")
    (place / "file").write_text("precious")
    for target, message in (
        ("mine", "mine: holds notes.txt, which would be lost"),
        ("exported", "exported: holds notes.txt, which would be lost"),
        ("pipeline", "pipeline: holds a pipeline that is no student"),  # the teacher
        ("student", "student: holds checkpoints, which would be lost"),
        ("file", "file: is a file"),
    ):
        before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
        result = distill("export", "student", target, cwd=place)
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
        assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    (place / "empty").mkdir()
    assert distill("export", "student", "empty", cwd=place).code == 0


def test_what_cannot_be_exported_is_said(place: Path) -> None:
    assert distill("train", "--config", write_config(place, TRAIN, steps=2), cwd=place).code == 0
    (place / "bad").mkdir()
    (place / "bad/config.yaml").write_text("a: [")
    for source, message in (
        ("pipeline", "pipeline: is no run folder of `distill train`"),
        ("nowhere", "nowhere: is no run folder"),
        ("bad", "bad/config.yaml: is not YAML"),
    ):
        result = distill("export", source, "x", cwd=place)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert message in result.err
    shutil.rmtree(place / "student/checkpoints")
    assert "student: has no checkpoint yet" in distill("export", "student", "x", cwd=place).err
    assert not (place / "x").exists()


@pytest.mark.slow
def test_a_teacher_of_discrete_timesteps_is_distilled_and_exported(place: Path) -> None:
    """A DDPM, whose student starts at the timestep that is nearest to sigma_init."""
    from diffusers import DDPMPipeline, DDPMScheduler

    from tests.distill.tiny import unet

    DDPMPipeline(unet(None), DDPMScheduler()).save_pretrained(place / "ddpm")
    config = write_config(place, TRAIN, teacher={"path": "ddpm"}, noise={"sigma_min": None, "sigma_max": None}, steps=2)
    result = distill("train", "--config", config, cwd=place)
    assert result.code == 0, result.err
    assert distill("export", "student", "exported", cwd=place).code == 0
    assert compare_with_stock(place, place / "exported", place / "student", None) <= 1e-5
    run, other = load_generator(place / "student"), load_generator(place / "exported")
    assert torch.allclose(run(5, range(4)), other(5, range(4)), rtol=0, atol=1e-5)


def test_teach_writes_a_teacher_that_loads(tmp_path: Path) -> None:
    assert distill("teach", "--config", write_config(tmp_path, TEACH), cwd=tmp_path).code == 0
    teacher = Teacher.load(tmp_path / "teacher", guidance=2.0)
    assert (teacher.n_classes, teacher.null_label, teacher.shape) == (10, 10, (1, 8, 8))
    assert (teacher.sigma_min, teacher.sigma_max) == (0.01, SIGMA_MAX)
    assert teacher.denoiser.sigma_data == SIGMA_DATA
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())
    assert all(p.requires_grad for p in teacher.clone().parameters())
    labels = teacher.conditions(SampleNoise(0, range(400)))
    assert labels is not None
    assert sorted(set(labels.tolist())) == list(range(10))  # never the null label
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((3,), 2.0)
    cond, null = torch.tensor([1, 2, 3]), torch.full((3,), 10)
    with torch.no_grad():
        conditional, unconditional = teacher.denoiser(x, sigma, cond), teacher.denoiser(x, sigma, null)
        assert torch.allclose(
            teacher(x, sigma, cond), unconditional + 2 * (conditional - unconditional), rtol=0, atol=1e-5
        )
        low = torch.full((3,), 0.01)
        assert torch.allclose(teacher.denoiser(x, low, cond), x, rtol=0, atol=1e-6)


def test_the_teacher_is_what_was_trained(tmp_path: Path) -> None:
    """The folder holds the average of the last checkpoint, to the bit."""
    from distill import checkpoint

    assert distill("teach", "--config", write_config(tmp_path, TEACH), cwd=tmp_path).code == 0
    found = checkpoint.newest(tmp_path / "teacher/checkpoints")
    assert found is not None
    weights = checkpoint.load_weights(found, "average")
    network = Teacher.load(tmp_path / "teacher").denoiser.network
    for key, value in network.state_dict().items():
        assert torch.equal(value, weights[f"network.{key}"])


def test_a_students_images_do_not_depend_on_how_it_is_loaded(place: Path) -> None:
    assert distill("train", "--config", write_config(place, TRAIN, steps=3), cwd=place).code == 0
    assert distill("export", "student", "exported", cwd=place).code == 0
    run, other = load_generator(place / "student"), load_generator(place / "exported", guidance=2.0)
    assert run.nfe == other.nfe == 1
    assert (run.shape, run.n_classes) == (other.shape, other.n_classes) == ((1, 8, 8), 10)
    assert torch.allclose(run(5, range(4)), other(5, range(4)), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_learned_variance_is_left_behind(tmp_path: Path) -> None:
    """As DDPM's improved networks have one beside their prediction; a stock pipeline of students takes that alone."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = UNet2DModel(sample_size=[8, 8], in_channels=3, out_channels=6, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path / "learned")
    changes = {"teacher": {"path": "learned"}, "fake": {}, "noise": {}, "steps": 2}
    train = write_config(tmp_path, TRAIN, **changes)
    result = distill("train", "--config", train, cwd=tmp_path)
    assert result.code == 0, result.err
    result = distill("export", "student", "exported", cwd=tmp_path)
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "exported/unet/config.json").read_text())
    assert (config["out_channels"], config["sample_size"]) == (3, 8)
    assert compare_with_stock(tmp_path, tmp_path / "exported", tmp_path / "student", None) <= 1e-5

    of_adapters = (
        "--student.lora.rank",
        2,
        "--student.lora.targets",
        '["time_embedding.linear_1"]',
        "--run",
        "adapted",
    )
    result = distill("train", "--config", train, *of_adapters, cwd=tmp_path)
    assert result.code == 0, result.err
    assert_refused(distill("export", "adapted", "lora", "--lora", cwd=tmp_path), "learned a variance")
    assert distill("export", "adapted", "merged", cwd=tmp_path).code == 0
