"""Images by (seed, number): the same in any batch, by the solver and the guidance that were asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from distill import Teacher, load_generator
from distill.data import digits
from distill.noise import GENERATION
from distill.recipe import Sampling, read_recipe
from samplers import Gaussian, Guided, SampleNoise, euler, heun, karras_sigmas, sample, teleported
from tests.distill.tiny import SIGMA_MAX, SIGMA_MIN, save_teacher
from tests.samplers.networks import unet
from tests.samplers.tiny_pipelines import ddim


@pytest.mark.parametrize(("sampler", "guidance"), [("heun", 1.0), ("ancestral", 1.0), ("euler", 2.0)])
def test_a_sample_does_not_depend_on_its_batch(pipeline: Path, sampler: str, guidance: float) -> None:
    generator = load_generator(pipeline, sampler, steps=3, guidance=guidance)
    together = generator(7, range(6))
    apart = torch.cat([generator(7, [k]) for k in range(6)])
    rounding = 1e-5 * float(together.abs().max())  # convolutions of other batch sizes sum in another order
    assert torch.allclose(together, apart, rtol=0, atol=rounding)
    assert torch.allclose(generator(7, [5, 2]), together[[5, 2]], rtol=0, atol=rounding)
    assert (generator(8, range(6)) - together).abs().amax((1, 2, 3)).min() > 0.01


def test_it_is_the_solver_with_the_labels_that_it_says(pipeline: Path) -> None:
    teacher = Teacher.load(pipeline)
    generator = load_generator(pipeline, "euler", steps=4, guidance=1.5)
    labels = torch.tensor([3, 3, 9])
    sigmas = karras_sigmas(4, SIGMA_MIN, SIGMA_MAX)
    z = SampleNoise(1, [10, 11, 12], GENERATION).normal((1, 8, 8))
    with torch.no_grad():
        expected = sample(euler, Guided(teacher.denoiser, 1.5, 10), sigmas[0] * z, sigmas, labels)
    assert torch.equal(generator(1, [10, 11, 12], labels), expected)
    assert generator.labels([10, 11, 12, 23]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance", "nfe"),
    [
        ("heun", 18, 1.0, 35),
        ("heun", 18, 2.0, 70),
        ("euler", 5, 1.0, 5),
        ("dpmpp_2m", 5, 3.0, 10),
        ("euler", 5, 0.0, 10),
    ],
)
def test_evaluations_are_counted_on_the_network(
    pipeline: Path, sampler: str, steps: int, guidance: float, nfe: int
) -> None:
    generator = load_generator(pipeline, sampler, steps, guidance)
    rows: list[int] = []
    denoiser = getattr(generator.denoiser, "denoiser", generator.denoiser)
    denoiser.network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    generator(0, range(2))
    assert generator.nfe == nfe == sum(rows) / 2


def test_an_unconditional_teacher(tmp_path: Path) -> None:
    generator = load_generator(save_teacher(tmp_path / "plain", None), steps=2)
    assert generator.labels(range(3)) is None
    assert generator(0, range(3)).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match=r"guidance: 2\.0 needs a null label"):
        load_generator(tmp_path / "plain", guidance=2.0)


def test_what_is_not_known_is_refused(pipeline: Path) -> None:
    with pytest.raises(ValueError, match="sampler: 'eulr'; accepted are euler, heun"):
        load_generator(pipeline, "eulr")
    with pytest.raises(ValueError, match="guidance: nan"):
        load_generator(pipeline, guidance=float("nan"))
    with pytest.raises(ValueError, match="device: 'abacus'"):
        load_generator(pipeline, device="abacus")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' Gaussian, with class means, in a file."""
    half = digits("train")
    file = tmp_path_factory.mktemp("gaussian") / "digits.safetensors"
    Gaussian.fit([(half.images, half.labels)], n_classes=10).save(file)
    return file


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_jump_is_the_one_of_the_library(pipeline: Path, fitted: Path, guidance: float) -> None:
    generator = load_generator(pipeline, "heun", 6, guidance, teleport=fitted, sigma_skip=2.5)
    teacher, gaussian = Teacher.load(pipeline, guidance), Gaussian.load(fitted)
    sigmas, labels = karras_sigmas(6, SIGMA_MIN, SIGMA_MAX), torch.tensor([0, 1, 2, 3])
    z = SampleNoise(5, range(4), GENERATION).normal((1, 8, 8))
    expected = sample(teleported(heun, gaussian, 2.5), teacher.guided, sigmas[0] * z, sigmas, labels)
    assert torch.equal(generator(5, range(4)), expected)
    assert not torch.equal(load_generator(pipeline, "heun", 6, guidance)(5, range(4)), expected)

    rows: list[int] = []
    teacher = getattr(generator.denoiser, "denoiser", generator.denoiser)
    teacher.network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    generator(0, range(2))
    assert generator.nfe == sum(rows) / 2
    assert generator.nfe < load_generator(pipeline, "heun", 6, guidance).nfe


def test_without_a_level_the_jump_goes_where_the_gaussians_bound_says(pipeline: Path, fitted: Path) -> None:
    bound = Gaussian.load(fitted).bound
    for tolerance in (0.2, 0.5):
        recipe = read_recipe(pipeline, Sampling(teleport=str(fitted), tolerance=tolerance))
        assert recipe.sigma_skip == bound.sigma_skip(tolerance)
        expected = load_generator(pipeline, teleport=fitted, sigma_skip=recipe.sigma_skip)(1, range(2))
        assert torch.equal(load_generator(pipeline, teleport=fitted, tolerance=tolerance)(1, range(2)), expected)


def test_a_jump_that_cannot_be_right_is_refused(pipeline: Path, fitted: Path, tmp_path: Path) -> None:
    def refused(message: str, gaussian: Gaussian | None = None, **options: Any) -> None:
        file = fitted if gaussian is None else tmp_path / "g.safetensors"
        if gaussian is not None:
            gaussian.save(file)
        with pytest.raises(ValueError, match=message):
            load_generator(pipeline, teleport=file, **options)

    x = torch.randn((40, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    refused(r"sigma_skip: 20; accepted are levels of the schedule, \[0.01, 20\)", sigma_skip=20.0)
    refused("sigma_skip: 0.001; accepted", sigma_skip=0.001)
    refused("guidance 0 takes away", sigma_skip=3.0, guidance=0.0)
    refused(r"the Gaussian is of \[1, 4, 4\]; what is sampled is \[1, 8, 8\]", Gaussian.fit([x[..., :4, :4]]))
    refused("the Gaussian has no bound", Gaussian.fit([x]).with_bound(None))
    refused("the Gaussian has 3 classes; the model 10", Gaussian.fit([(x, torch.arange(40) % 3)], n_classes=3))
    refused("was fitted to latents", Gaussian.fit([x], facts={"vae": {"class": "AutoencoderKL"}}))
    refused(r"pixels in \[0.0, 1.0\]", Gaussian.fit([x], facts={"range": [0.0, 1.0]}))
    with pytest.raises(ValueError, match=r"teleport: .*nowhere is not a file"):
        load_generator(pipeline, teleport=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read as a Gaussian"):
        load_generator(pipeline, teleport=pipeline / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("kind", ["classes", "plain", "ddim", "consistency"])
def test_what_is_known_before_the_network_is_what_the_network_has(kind: str, tmp_path: Path) -> None:
    if kind in ("classes", "plain"):
        folder = save_teacher(tmp_path / kind, 10 if kind == "classes" else None)
    elif kind == "ddim":
        ddim().save_pretrained(folder := tmp_path / kind)
    else:
        scheduler = CMStochasticIterativeScheduler(sigma_max=20.0)
        ConsistencyModelPipeline(unet(torch.float32, 4), scheduler).save_pretrained(folder := tmp_path / kind)
    recipe, teacher = read_recipe(folder, Sampling("euler", 5)), Teacher.load(folder)
    assert (recipe.shape, recipe.n_classes) == (teacher.shape, teacher.n_classes)
    assert (recipe.student is not None) == (kind == "consistency")
    assert float(recipe.sigmas[0]) == pytest.approx(teacher.sigma_max, rel=1e-12)
    assert recipe.nfe == load_generator(folder, "euler", 5).nfe == (1 if recipe.student is not None else 5)
    names = {str(file.relative_to(folder)) for file in recipe.files}
    needed = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    assert names == needed | ({"distill.json"} if kind in ("classes", "plain") else set())


def test_pipelines_of_other_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline", "transformer": ["diffusers", "X"]}')
    with pytest.raises(ValueError, match=r"is a WanPipeline .*supported are pipelines of a UNet2DModel in pixels"):
        load_generator(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"its model_index\.json holds no keys"):
        load_generator(tmp_path)
