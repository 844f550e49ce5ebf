"""Images of annealed, guided, multiplied and rewarded laws: by (seed, number), and what is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from distill import Teacher
from distill.particles import TargetChoice, import_reward, load_particle_generator
from samplers import Corrector, Resampling, SampleNoise, ancestral, karras_sigmas, sample
from tests.distill.command import distill
from tests.distill.runs import assert_refused
from tests.distill.tiny import SIGMA_MAX, SIGMA_MIN, save_teacher


def brightness(images: Tensor, labels: Tensor | None) -> Tensor:
    return images.mean((1, 2, 3)) * (1.0 if labels is None else labels.double())


CHOICES = [
    TargetChoice("guided", particles=3),
    TargetChoice("annealed", beta=1.5, particles=3),
    TargetChoice("product", classes=(3, 8), particles=3),
    TargetChoice("reward", reward=brightness, steer=True, particles=3),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
def test_a_sample_does_not_depend_on_its_batch(pipeline: Path, choice: TargetChoice) -> None:
    generator = load_particle_generator(pipeline, choice, steps=3, guidance=2.0)
    together = generator(7, range(4))
    apart = torch.cat([generator(7, [k]) for k in range(4)])
    assert together.shape == (4, 1, 8, 8)
    assert torch.allclose(together, apart, rtol=0, atol=1e-4 * float(together.abs().max()))
    assert (generator(8, range(4)) - together).abs().amax((1, 2, 3)).min() > 0.01
    assert 1 <= generator.lowest_ess <= 3


def test_one_particle_of_the_model_itself_is_ancestral_sampling(pipeline: Path) -> None:
    generator = load_particle_generator(pipeline, TargetChoice("annealed", particles=1), steps=4)
    generator.corrector = Corrector(proposal="ancestral")
    sigmas, noise = karras_sigmas(4, SIGMA_MIN, SIGMA_MAX), SampleNoise(3, range(5), 8)
    with torch.no_grad():
        x = SIGMA_MAX * noise.normal((1, 8, 8))
        expected = sample(ancestral, Teacher.load(pipeline).denoiser, x, sigmas, torch.arange(5), noise)
    assert torch.allclose(generator(3, range(5)), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_evaluations_are_counted_on_the_network(pipeline: Path, choice: TargetChoice, guidance: float) -> None:
    if (choice.name, guidance) in (("guided", 1.0), ("product", 0.0)):
        with pytest.raises(ValueError, match="guidance: "):
            load_particle_generator(pipeline, choice, steps=3, guidance=guidance)
        return
    generator = load_particle_generator(pipeline, choice, steps=3, guidance=guidance)
    rows: list[int] = []
    generator.teacher.denoiser.network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    generator(0, range(2))
    terms = 2 if choice.name == "product" else 1
    terms += 1 if guidance == 2 else 0  # without a class, asked once for all classes
    products = 1 if choice.name != "guided" else 0  # a probe, or to steer
    assert sum(rows) / 2 == 3 * 3 * terms  # steps, particles
    assert generator.nfe == 3 * 3 * terms * (1 + 2 * products)


def test_a_reward_makes_images_that_have_more_of_it(pipeline: Path) -> None:
    plain = TargetChoice("reward", reward=lambda images, labels: 0 * images.sum((1, 2, 3)), particles=16)
    bright = TargetChoice("reward", reward=lambda images, labels: 200 * images.mean((1, 2, 3)), particles=16)
    means = [load_particle_generator(pipeline, c, steps=5)(0, range(20)).mean((1, 2, 3)) for c in (plain, bright)]
    gain = means[1] - means[0]
    assert gain.mean() > 4 * gain.std() / 20**0.5


@pytest.mark.slow
def test_the_command_writes_pictures_and_says_what_became_of_the_particles(pipeline: Path, tmp_path: Path) -> None:
    for words in (
        ("--target", "annealed", "--beta", 2),
        ("--target", "product", "--classes", 3, 8),
        ("--target", "guided", "--guidance", 3),
        ("--target", "reward", "--reward", "tools.digits_classifier:log_probability", "--scale", 2, "--steer"),
    ):
        shared = ("--steps", 3, "--n", 4, "--particles", 2, "--out", "grid.png")
        result = distill("sample", f"model={pipeline}", *words, *shared, cwd=tmp_path)
        assert result.code == 0, result.err
        assert "model: of 2 particles at least " in result.out
        assert "4 samples each of model, " in result.out
        assert Image.open(tmp_path / "grid.png").size[0] > 32
        (tmp_path / "grid.png").unlink()


def test_a_reward_is_found_beside_the_user_and_its_errors_are_told(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def bright(images, labels):\n    return images.mean((1, 2, 3))\n")
    (tmp_path / "broken.py").write_text("def bright(:\n")
    words = ("--target", "reward", "--steps", 2, "--n", 1, "--particles", 2, "--out", "grid.png")
    result = distill("sample", pipeline, *words, "--reward", "mine:bright", cwd=tmp_path)
    assert result.code == 0, result.err
    assert_refused(
        distill("sample", pipeline, *words, "--reward", "broken:bright", cwd=tmp_path), "reward", "SyntaxError"
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--beta", 2), ("--beta", "--target")),
        (("--target", "warm"), ("target", "warm", "annealed")),
        (("--target", "annealed", "--classes", 3, 8), ("--classes", "annealed")),
        (("--target", "annealed", "--beta", 0), ("beta", "0")),
        (("--target", "annealed", "--particles", 0), ("particles", "0")),
        (("--target", "product"), ("classes", "two")),
        (("--target", "product", "--classes", 3, 12), ("classes", "12", "10")),
        (("--target", "reward"), ("reward",)),
        (("--target", "reward", "--reward", "brightness"), ("reward", "MODULE:FUNCTION")),
        (("--target", "reward", "--reward", "no.such:thing"), ("reward", "no.such")),
        (("--target", "reward", "--reward", "math:pi"), ("reward", "not a function")),
        (("--target", "reward", "--reward", ".tools:f"), ("reward", "MODULE:FUNCTION")),
        (("--target", "annealed", "--sampler", "euler"), ("--sampler", "euler", "--target")),
        (("--target", "product", "--classes", 3, 8, "--guidance", 0), ("guidance", "0", "product")),
        (("--target", "guided"), ("guidance", "1")),
        (("--target", "guided", "--guidance", "nan"), ("guidance", "nan")),
    ],
)
def test_what_does_not_fit_is_refused(
    pipeline: Path, tmp_path: Path, words: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    assert_refused(distill("sample", pipeline, *words, "--out", "grid.png", cwd=tmp_path), *parts)
    assert not list(tmp_path.iterdir())


def test_classes_are_asked_of_models_that_have_them(tmp_path: Path) -> None:
    plain = save_teacher(tmp_path / "plain", None)
    with pytest.raises(ValueError, match="classes: 3; the model has no classes"):
        load_particle_generator(plain, TargetChoice("product", classes=(3, 8)), steps=2)
    with pytest.raises(ValueError, match=r"guidance: 2\.0 needs a null label"):
        load_particle_generator(plain, TargetChoice("guided"), steps=2, guidance=2.0)
    assert load_particle_generator(plain, TargetChoice("annealed", particles=2), steps=2)(0, range(2)).isfinite().all()


def test_a_reward_of_images_and_labels_is_found_by_its_name() -> None:
    reward = import_reward("tools.digits_classifier:log_probability")
    images = torch.rand(3, 1, 8, 8)
    values = torch.stack([reward(images, torch.full((3,), c)) for c in range(10)])
    assert torch.allclose(values.exp().sum(0), torch.ones(3), atol=1e-5)
    with pytest.raises(ValueError, match="labels: are None"):
        reward(images, None)


def test_resampling_can_be_chosen_in_code(pipeline: Path) -> None:
    generator = load_particle_generator(pipeline, TargetChoice("annealed", beta=3.0, particles=8), steps=4)
    generator.corrector = Corrector(resampling=Resampling(threshold=0.0))
    generator(0, range(2))
    assert generator.fewest_ancestors == 8
