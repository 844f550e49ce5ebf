"""What several tests of the command judge: pictures, tiny models, and a batch of them, each made once a module."""

from pathlib import Path

import pytest
from PIL import Image

from distill.data import digits
from tests.distill.tiny import save_teacher
from tests.tools.batches import forked, manifest, save_pictures, save_student, write_manifest
from tools.features import quantise


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
