"""Images by (seed, number): the same in any batch, by the solver and the guidance that were asked for."""

from pathlib import Path

import pytest
import torch

from distill import Teacher, load_generator
from distill.noise import GENERATION
from samplers import Guided, SampleNoise, euler, karras_sigmas, sample
from tests.distill.tiny import SIGMA_MAX, SIGMA_MIN, save_teacher


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
