"""`distill gaussian` in real processes: what it writes is what the data are, by exact moments in float64."""

import gc
import json
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import data
from distill.config import FitGaussian
from distill.gaussian import Fit, describe
from distill.latents import Encoder
from distill.noise import LATENTS
from samplers import SampleNoise
from samplers.bound import KEPT_NUMBERS, Bound, kept_count
from samplers.gaussian import Gaussian
from tests.distill.command import Running, distill, fresh, processor_time
from tests.distill.runs import assert_refused, entries, forked
from tests.truth import relative_error

OUT = "stats.safetensors"
KEPT = kept_count(3 * 8 * 8, None)


def exact(x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Means [K or 1, d], eigenvalues [d], falling, and eigenvectors [d, d] of the pooled covariance, in float64."""
    x = x.double().flatten(1)
    labels = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
    means = torch.stack([x[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    z = x - means[labels]
    values, vectors = torch.linalg.eigh(z.mT @ z / (len(x) - len(means)))
    return means, values.flip(0), vectors.flip(1).mT


def assert_moments(gaussian: Gaussian, x: Tensor, labels: Tensor | None = None, tolerance: float = 1e-5) -> None:
    """Mean, variances, rest and the jump from 80 to 20 are those of exactly these samples, cut at the same rank."""
    means, values, vectors = exact(x, labels)
    k, d = gaussian.rank, gaussian.dim
    assert gaussian.count == len(x)
    assert relative_error(gaussian.mean.reshape(-1, d), means) < tolerance
    assert relative_error(gaussian.variances, values[:k]) < tolerance
    rest = float(values[k:].mean()) if k < d else 0.0
    assert abs(gaussian.rest - rest) < tolerance * float(values.sum()) / d
    noise = 80 * torch.randn(16, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = None if labels is None else torch.arange(16) % len(means)
    mean = means[cond] if cond is not None else means
    cut = torch.cat([values[:k], torch.full((d - k,), rest, dtype=torch.float64)])
    gains = ((cut + 20**2) / (cut + 80**2)).sqrt()
    expected = mean + ((noise - mean) @ vectors.mT * gains) @ vectors
    jump = gaussian.transport(noise.reshape(16, *gaussian.shape), 80.0, 20.0, cond).flatten(1)
    assert relative_error(jump - noise / 4, expected - noise / 4) < 20 * tolerance  # of what the data add to it


@pytest.mark.parametrize("classes", [False, True])
def test_the_digits_are_fitted_exactly(tmp_path: Path, classes: bool) -> None:
    words = ("--data.name", "digits", "--out", OUT, "--classes", classes, "--rank", 20, "--batch", 50)
    result = distill("gaussian", *words, cwd=tmp_path)
    assert result.code == 0, result.err
    assert entries(tmp_path) == [OUT]
    gaussian = Gaussian.load(tmp_path / OUT)
    digits = data.digits("train")
    assert (gaussian.rank, gaussian.n_classes, gaussian.shape) == (20, 10 if classes else None, (1, 8, 8))
    assert_moments(gaussian, digits.images, digits.labels if classes else None)
    facts = gaussian.facts
    assert (facts["data"], facts["range"], facts["vae"], facts["count"]) == ("digits", [-1.0, 1.0], None, 899)
    assert facts["classes"] == (list("0123456789") if classes else None)
    assert facts["versions"]["torch"] == version("torch")

    share = float(gaussian.variances.sum() / exact(digits.images, digits.labels if classes else None)[1].sum())
    assert f"rank 20 with {share:.2%} of the variance" in result.out
    assert "899 samples of [1, 8, 8]" in result.out
    bound = gaussian.bound
    assert bound is not None
    sigma = bound.sigma_skip(0.05)
    assert 0.5 < sigma < 20  # the digits are no Gaussian, and look like one in that much noise
    assert f"a jump to sigma {sigma:.4g} costs {bound.at(sigma):.3g} nats at most" in result.out


def test_a_tolerance_moves_rank_and_bound_and_the_seed_is_told(tmp_path: Path) -> None:
    fits = {}
    for tolerance in ("0.5", "0.02"):
        out = f"{tolerance}.safetensors"
        result = distill("gaussian", "--out", out, "--tolerance", tolerance, "--seed", 3, cwd=tmp_path)
        assert result.code == 0, result.err
        fits[tolerance] = Gaussian.load(tmp_path / out), result.out
    assert fits["0.5"][0].facts["seed"] == 3
    loose, tight = (fits[t][0].bound.sigma_skip(float(t)) for t in ("0.5", "0.02"))
    assert loose < tight
    unknown = describe(fits["0.5"][0].with_bound(Bound((9.0,), (2.0,))), 0.5)
    assert "no jump is known to be within the tolerance" in unknown[1]


def png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def pictures(root: Path, n: int = 40, size: int = 8, classes: Sequence[str] = ("",), channels: int = 3) -> Path:
    """n real files: smooth random patterns, brighter on the left, and of another brightness in every class."""
    rng = np.random.default_rng(0)
    for k in range(n):
        slope = 60 * rng.standard_normal(3)[:, None, None] + np.array([0, 0, -40])[:, None, None]
        basis = np.stack(np.broadcast_arrays(1.0, *np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]))
        image = (
            128
            + 25 * (k % len(classes))
            + (slope * basis).sum(0)[..., None]
            + 12 * rng.standard_normal((size, size, channels))
        )
        pixels = image.clip(0, 255).astype(np.uint8)
        png(root / classes[k % len(classes)] / f"{k:04d}.png", pixels[..., 0] if channels == 1 else pixels)
    return root


FOLDER = ("--data.name", "folder", "--data.path", "images", "--data.size", 8, "--data.channels", 3, "--out", OUT)


def test_a_folder_is_fitted_by_class_and_with_its_mirror_images(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 60, classes=("zebra", "ant"))
    found = data.folder(tmp_path / "images", 8, 3)
    images = data.continuous(found.images)
    assert distill("gaussian", *FOLDER, "--rank", 12, cwd=tmp_path).code == 0
    assert_moments(Gaussian.load(tmp_path / OUT), images)

    result = distill("gaussian", *FOLDER, "--rank", 12, "--classes", "true", "--flip", "true", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "120 samples of [3, 8, 8], 2 classes" in result.out
    gaussian = Gaussian.load(tmp_path / OUT)  # in place of the first
    assert found.labels is not None
    both = torch.cat([images, images.flip(-1)])
    assert_moments(gaussian, both, torch.cat([found.labels, found.labels]))
    assert gaussian.facts["classes"] == ["ant", "zebra"]
    assert (gaussian.facts["data"], gaussian.facts["flip"]) == ("images", True)
    assert relative_error(gaussian.mean, gaussian.mean.flip(-1)) < 1e-6
    assert relative_error(gaussian.mean[0], gaussian.mean[1]) > 0.1


def test_fewer_samples_than_a_jump_needs_are_refused_with_how_many_would_do(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 12, size=16)
    words = ("--data.name", "folder", "--data.path", "images", "--data.size", 16, "--data.channels", 3, "--out", OUT)
    refused = distill("gaussian", *words, cwd=tmp_path)
    assert_refused(refused, "12 samples are too few for a Gaussian of 768 dimensions")
    needed = int(re.search(r"about (\d+) are needed", refused.err)[1])  # type: ignore[index]
    assert 12 < needed < 2000
    assert OUT not in entries(tmp_path)
    assert distill("gaussian", *words, "--tolerance", 0.05 * needed / 12 * 1.1, cwd=tmp_path).code == 0


def test_a_file_says_what_options_say(tmp_path: Path) -> None:
    config = {"command": "gaussian", "data": {"name": "digits"}, "out": OUT, "rank": 5, "classes": True}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert distill("gaussian", "--config", "c.yaml", "--rank", 6, cwd=tmp_path).code == 0
    gaussian = Gaussian.load(tmp_path / OUT)
    assert (gaussian.rank, gaussian.n_classes) == (6, 10)


# --- latents


def save_vae(folder: Path, pipeline_class: str = "StableDiffusionPipeline", **changes: Any) -> Any:
    """A pipeline folder as far as its VAE: a real AutoencoderKL of random weights that halves the size."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    settings = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4} | changes
    levels = len(settings["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    vae = AutoencoderKL(**blocks, **settings).eval()
    vae.save_pretrained(folder / "vae")
    index = {"_class_name": pipeline_class, "_diffusers_version": "0.35.0", "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return vae


# How the stock pipelines turn latents into what they decode (diffusers' pipeline_*.py, at the call of vae.decode).
MEAN, STD = (0.3, -0.2, 0.1, 0.0), (1.5, 0.5, 2.0, 1.0)
STOCK: dict[str, tuple[dict[str, Any], Any]] = {
    "StableDiffusionPipeline": ({}, lambda z: z / 0.18215),
    "DiTPipeline": ({"scaling_factor": 0.5}, lambda z: 1 / 0.5 * z),
    "StableDiffusionXLPipeline": (
        {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
        lambda z: z * torch.tensor(STD).view(1, 4, 1, 1) / 0.5 + torch.tensor(MEAN).view(1, 4, 1, 1),
    ),
    "StableDiffusion3Pipeline": ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, lambda z: z / 1.5305 + 0.0609),
    "FluxPipeline": ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, lambda z: z / 0.3611 + 0.1159),
}


@pytest.mark.parametrize("pipeline_class", STOCK)
def test_latents_are_what_the_stock_pipeline_decodes(tmp_path: Path, pipeline_class: str) -> None:
    """Decoded as that pipeline does, they are the posterior samples of their images, whatever the batches were."""
    changes, decoded = STOCK[pipeline_class]
    vae = save_vae(tmp_path / "pipe", pipeline_class, **changes)
    pictures(tmp_path / "images", 40)
    images = data.continuous(data.folder(tmp_path / "images", 8, 3).images)
    with torch.no_grad():
        posterior = vae.encode(torch.cat([images, images.flip(-1)])).latent_dist
    noise = SampleNoise(5, range(40), LATENTS)
    z = posterior.mean + posterior.std * torch.cat([noise.normal((4, 4, 4)), noise.normal((4, 4, 4))])
    assert float(posterior.std.mean()) > 0.1  # else the noise would not be tested

    words = ("--pipeline", "pipe", "--seed", 5, "--rank", 10)
    result = distill("gaussian", *FOLDER, *words, "--flip", "true", "--batch", 7, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "80 samples of [4, 4, 4]" in result.out
    gaussian = Gaussian.load(tmp_path / OUT)
    scale = float(decoded(torch.ones(1, 4, 1, 1))[0, 0] - decoded(torch.zeros(1, 4, 1, 1))[0, 0])
    assert scale != 1
    means = exact(z)[0].reshape(1, 4, 4, 4)
    assert relative_error(decoded(gaussian.mean[None]), means) < 1e-5
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (changes.get("latents_mean", (0.0,) * 4), (1.0,) * 4))
    if "latents_std" in changes:
        std = torch.tensor(STD).view(1, 4, 1, 1)
    latents = (z - mean - changes.get("shift_factor", 0.0)) * changes.get("scaling_factor", 0.18215) / std
    assert_moments(gaussian, latents, tolerance=3e-5)

    facts = gaussian.facts
    assert facts["range"] is None
    assert facts["vae"]["scaling_factor"] == changes.get("scaling_factor", 0.18215)
    assert facts["vae"]["shift_factor"] == changes.get("shift_factor")
    assert facts["vae"]["class"] == "AutoencoderKL"
    assert [len(digest) for digest in facts["vae"]["sha256"].values()] == [64, 64, 64]  # single and both halves


@pytest.mark.parametrize(
    ("pipeline_class", "shifted"),
    [
        ("StableDiffusionInpaintPipeline", False),
        ("StableDiffusionXLInpaintPipeline", False),
        ("PixArtSigmaPAGPipeline", False),
        ("StableDiffusion3Img2ImgPipeline", True),
        ("FluxFillPipeline", True),
        ("SomeLaterPipeline", True),
    ],
)
def test_a_pipeline_shifts_its_latents_as_the_one_that_its_name_begins_as(
    tmp_path: Path, pipeline_class: str, shifted: bool
) -> None:
    vae = save_vae(tmp_path / "pipe", shift_factor=0.5)
    if shifted:
        latents = Encoder(vae, pipeline_class)(torch.zeros(1, 3, 8, 8), SampleNoise(0, [0]))
        plain = Encoder(save_vae(tmp_path / "plain"), pipeline_class)(torch.zeros(1, 3, 8, 8), SampleNoise(0, [0]))
        torch.testing.assert_close(plain - latents, torch.full_like(latents, 0.5 * 0.18215))
    else:
        with pytest.raises(ValueError, match=f"its VAE has shift_factor, which a {pipeline_class} does not apply"):
            Encoder(vae, pipeline_class)


def test_the_seed_of_latents_matters_and_the_batches_do_not(tmp_path: Path) -> None:
    save_vae(tmp_path / "pipe")
    pictures(tmp_path / "images", 20)
    means = []
    for seed, batch in ((0, 20), (0, 3), (1, 20)):
        words = ("--pipeline", "pipe", "--rank", 4, "--seed", seed, "--batch", batch)
        assert distill("gaussian", *FOLDER, *words, cwd=tmp_path).code == 0
        means.append(Gaussian.load(tmp_path / OUT).mean)
    assert relative_error(means[1], means[0]) < 1e-5
    assert relative_error(means[2], means[0]) > 1e-2


# --- what is wrong is said in one line, and leaves nothing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", OUT, "--data.name", "folder"], "path: None does not go with name: folder"),
        (["--out", OUT, "--data.name", "folder", "--data.path", "nowhere"], "data.path: nowhere is not a folder"),
        ([*FOLDER, "--classes", "true"], "classes: true; images has no classes (sub-folders of images)"),
        ([*FOLDER, "--rank", 12], "rank: 12; 12 images span 11 directions"),
        ([*FOLDER, "--rank", 1000, "--flip", "true"], "rank: 1000"),
        ([*FOLDER, "--rank", 0], "rank: Input should be greater than or equal to 1"),
        ([*FOLDER, "--tolerance", 0], "tolerance: Input should be greater than 0"),
        ([*FOLDER, "--batch", 0], "batch: Input should be greater than or equal to 1"),
        ([*FOLDER, "--device", "abacus"], "device: 'abacus' cannot be used here"),
        ([*FOLDER, "--ranks", 3], "ranks: unknown key; the nearest known one is rank"),
        ([*FOLDER, "--resume"], "resume: unknown key"),
        ([], "required: gaussian.out"),
        (["--out", "stats.pt"], "out: stats.pt is not named .safetensors"),
        (["--out", "file/stats.safetensors"], "out: file/stats.safetensors cannot be written"),
        (["--out", "folder.safetensors"], "out: folder.safetensors cannot be written"),
        ([*FOLDER, "--pipeline", "nowhere"], "nowhere: there is no such folder"),
        ([*FOLDER, "--pipeline", "images"], "images: is no pipeline folder of diffusers"),
        ([*FOLDER, "--pipeline", "pixels"], "pipeline: pixels: has no VAE"),
        ([*FOLDER, "--pipeline", "other"], "pipeline: other: its VAE is a VQModel; supported is an AutoencoderKL"),
        (
            [*FOLDER, "--pipeline", "pipe", "--data.channels", 1],
            "data.channels: 1; the pipeline's VAE takes images of 3",
        ),
        ([*FOLDER, "--pipeline", "deep", "--data.size", 12], "data.size: 12; the pipeline's VAE takes multiples of 8"),
        ([*FOLDER, "--pipeline", "shifted"], "its VAE has shift_factor, which a StableDiffusionPipeline does not"),
        ([*FOLDER, "--pipeline", "centred"], "its VAE has latents_mean and latents_std, which a FluxPipeline does not"),
        (["--out", OUT, "--data.name", "folder", "--data.path", "one"], "too few for a covariance"),
        (["--out", OUT, "--data.name", "folder", "--data.path", "broken"], "broken/b.png cannot be read as an image"),
        (["--out", OUT, "--data.name", "folder", "--data.path", "deep16"], "deep16/a.png cannot be read as an image"),
        (["--config", "train.yaml", "--out", OUT], "is for `distill train`, not for `distill gaussian`"),
    ],
    ids=lambda v: None if isinstance(v, list) else v[:40],
)
def test_what_cannot_be_fitted(bad_place: Path, words: list[Any], message: str) -> None:
    before = entries(bad_place)
    assert_refused(distill("gaussian", *words, cwd=bad_place), message)
    assert entries(bad_place) == before


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bad")
    pictures(place / "images", 12)
    pictures(place / "one", 1)
    pictures(place / "broken", 12)
    whole = (place / "broken/0000.png").read_bytes()
    (place / "broken/b.png").write_bytes(whole[: len(whole) // 2])
    png(place / "deep16/a.png", np.full((8, 8), 40_000, np.uint16))
    (place / "file").write_text("")
    (place / "folder.safetensors").mkdir()
    (place / "train.yaml").write_text("command: train\n")
    save_vae(place / "pipe")
    save_vae(place / "shifted", shift_factor=0.1)
    save_vae(place / "centred", "FluxPipeline", latents_mean=MEAN, latents_std=STD)
    save_vae(place / "deep", block_out_channels=(8,) * 4)
    for name, part in (("pixels", {}), ("other", {"vae": ["diffusers", "VQModel"]})):
        (place / name).mkdir()
        index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], **part}
        (place / name / "model_index.json").write_text(json.dumps(index))
    return place


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("truncated", "pipeline: pipe/vae: cannot be read"),
        ("missing key", "pipeline: pipe/vae: its weights are not those of its config.json: encoder.conv_in.weight"),
        ("no weights", "pipeline: pipe/vae: cannot be read"),
        ("pickled", "pipeline: pipe/vae: has no safetensors that are read"),
        ("index", "pipeline: pipe: its model_index.json is not JSON"),
        ("not finite", "images/0000.png: its latent is not finite"),
    ],
)
def test_a_vae_that_cannot_be_used(tmp_path: Path, harm: str, message: str) -> None:
    save_vae(tmp_path / "pipe")
    pictures(tmp_path / "images", 12)
    weights = tmp_path / "pipe/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    if harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif harm == "missing key":
        del tensors["encoder.conv_in.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif harm == "no weights":
        weights.unlink()
    elif harm == "pickled":
        torch.save(tensors, weights.with_suffix(".bin"))
        weights.unlink()
    elif harm == "index":
        (tmp_path / "pipe/model_index.json").write_text("[")
    else:
        tensors["encoder.conv_out.bias"][0] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
    before = entries(tmp_path)
    assert_refused(distill("gaussian", *FOLDER, "--pipeline", "pipe", cwd=tmp_path), message)
    assert entries(tmp_path) == before


def test_a_full_disk_or_a_kill_leaves_the_older_file(tmp_path: Path) -> None:
    assert distill("gaussian", "--out", OUT, cwd=tmp_path).code == 0
    older = (tmp_path / OUT).read_bytes()
    assert_refused(distill("gaussian", "--out", OUT, "--rank", 3, cwd=tmp_path, file_limit=1000))
    running = Running(("gaussian", "--out", OUT, "--rank", 3, "--batch", 1), tmp_path)
    while running.process.is_alive() and not any(f.stat().st_size for f in tmp_path.glob(".out.*")):
        time.sleep(0.001)
    running.kill()
    assert running.wait().code == -9  # with the first images taken
    assert entries(tmp_path) == [OUT]
    assert (tmp_path / OUT).read_bytes() == older


# --- streaming


class Endless:
    """A source that makes image k when it is read: nothing of it is in memory."""

    labels = None
    classes = ()

    def __init__(self, n: int, size: int = 8) -> None:
        self._n, self.shape = n, (3, size, size)

    def __len__(self) -> int:
        return self._n

    def read(self, numbers: Sequence[int]) -> Tensor:
        return SampleNoise(0, numbers).normal(self.shape)

    def name(self, number: int) -> str:
        return f"image {number}"


def live_bytes() -> int:
    """Of all tensors that anybody holds, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images() -> None:
    config = FitGaussian(out=OUT)
    gc.collect()
    before, peaks = live_bytes(), []
    for n in (2 * KEPT, 5 * KEPT):
        fit, peak = Fit(config, Endless(n)), 0  # type: ignore[arg-type]
        for start in range(0, n, 64):
            fit.take(range(start, start + 64))
            if start % 1024 == 0 or start + 64 == n:
                peak = max(peak, live_bytes() - before)
        assert len(fit.kept) == KEPT
        peaks.append(peak)
        del fit
    image = 4 * 3 * 8 * 8
    assert peaks[0] > KEPT * image  # what is kept was seen by the measure
    assert peaks[1] < peaks[0] + 16 * 64 * image, peaks  # 16 batches; there are 96 more of images


def test_the_kept_samples_are_uniform_and_the_seeds_own() -> None:
    """Each of n images is kept with the same chance, mirrored with one half, and the choice is that of the seed."""
    n, seeds = 3 * KEPT, 8
    config = FitGaussian(out=OUT, flip=True)
    chosen = [Fit(config.model_copy(update={"seed": s}), Endless(n))._chosen for s in range(seeds)]  # type: ignore[arg-type]
    assert all(len(c) == KEPT for c in chosen)
    numbers = torch.tensor([list(c) for c in chosen]).double()
    assert abs(float(numbers.mean()) - (n - 1) / 2) < 5 * n / (12 * KEPT * seeds) ** 0.5
    mirrored = torch.tensor([list(c.values()) for c in chosen]).double()
    assert abs(float(mirrored.mean()) - 0.5) < 5 * 0.5 / (KEPT * seeds) ** 0.5
    assert len(set(chosen[0]) & set(chosen[1])) < KEPT / 2
    assert Fit(config, Endless(n))._chosen == chosen[0]  # type: ignore[arg-type]
    large = Fit(config, Endless(n, 128))  # type: ignore[arg-type]
    assert len(large._chosen) * 4 * large.moments.dim <= 4 * KEPT_NUMBERS  # bytes


# --- processes, and the command line


@pytest.mark.slow
def test_two_processes_fit_what_one_does(tmp_path: Path) -> None:
    save_vae(tmp_path / "pipe")
    pictures(tmp_path / "images", 45, classes=("b", "a"))
    for words in (("--classes", "true"), ("--pipeline", "pipe", "--flip", "true")):
        shared = (*FOLDER[:-1], "one.safetensors", "--batch", 4, *words)
        assert distill("gaussian", *shared, cwd=tmp_path).code == 0
        text = forked(tmp_path, "gaussian", *shared, "--out", "two.safetensors")
        assert text.startswith("0\n"), text
        assert text.count("samples of [") == 1, text
        one, two = (Gaussian.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
        assert (two.rank, two.count, two.facts["classes"]) == (one.rank, one.count, one.facts["classes"])
        x = 80 * torch.randn(8, *one.shape, generator=torch.Generator().manual_seed(0))
        cond = torch.arange(8) % 2 if one.n_classes else None
        jumps = [g.transport(x, 80.0, 20.0, cond) for g in (one, two)]
        assert relative_error(jumps[1], jumps[0]) < 1e-5
        assert relative_error(two.mean, one.mean) < 1e-5
        assert one.bound is not None
        assert two.bound is not None
        finite = [k for k, v in enumerate(one.bound.kl) if v < float("inf")]
        assert torch.allclose(*(torch.tensor([b.kl[k] for k in finite]) for b in (one.bound, two.bound)), rtol=1e-3)


@pytest.mark.slow
def test_what_goes_wrong_on_the_second_process_is_said_at_once(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 40)
    (tmp_path / "images/0005.png").write_bytes(b"no image")
    text = forked(tmp_path, "gaussian", *FOLDER, "--batch", 4)
    assert not text.startswith("0\n")
    assert text.count("distill: error: data.path: images/0005.png cannot be read as an image") == 1, text
    assert "image 8/40" not in text
    assert entries(tmp_path)[-1].startswith("images/")


def test_help_says_what_a_kill_leaves_and_answers_at_once(tmp_path: Path) -> None:
    for words, shown in ((["--help"], "distill gaussian"), (["gaussian", "--help"], "killed leaves no file")):
        begun = processor_time()
        result = fresh("-m", "distill.cli", *words, cwd=Path(__file__).parents[2])
        assert processor_time() - begun < 2
        assert shown in result.stdout, result.stderr


@pytest.mark.slow
def test_the_memory_of_a_stream_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    """The peak of resident memory over 2,100 images of 64x64, and over twice as many: 103 MB of pixels apart."""
    code = (
        "import resource; from distill import data, gaussian; from distill.config import FitGaussian\n"
        "source = data.image_files('images', 64)\n"
        "fit = gaussian.Fit(FitGaussian(out='stats.safetensors', rank=8), source)\n"
        "for k in range(0, len(source), 16):\n    fit.take(range(k, min(k + 16, len(source))))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"  # judging the fit takes more, whatever its data
    )
    pictures(tmp_path / "images", 2100, 64)
    peaks = []
    for _ in range(2):
        result = fresh("-c", code, cwd=tmp_path, PYTHONPATH=str(Path(__file__).parents[2]))
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout) * 1024)
        for file in list((tmp_path / "images").glob("*.png")):
            (tmp_path / "images" / f"again-{file.name}").write_bytes(file.read_bytes())
    assert peaks[1] - peaks[0] < 30e6, peaks
