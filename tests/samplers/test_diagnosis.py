"""What is said of a run: the table, the warnings that there should be and no others, and the plot."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from samplers import (
    Corrector,
    FeynmanKacState,
    Gaussian,
    GaussianMixture,
    Resampling,
    annealed,
    diagnose,
    feynman_kac,
    geometric_average,
    karras_sigmas,
    reward_tilted,
    start_particles,
)
from samplers.particles import Particles
from samplers.resampling import LogWeights


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FIRST = GaussianMixture(torch.ones(2), torch.tensor([[-2.0], [1.5]]).double(), torch.tensor([0.4, 0.6]).double())
SECOND = GaussianMixture(torch.ones(2), torch.tensor([[0.5], [3.0]]).double(), torch.tensor([0.5, 0.4]).double())
HALF = Resampling(threshold=0.5)
TRACE = Corrector(form="trace", proposal="ancestral", rule="trapezoid", probes=None, resampling=HALF)
SCORE = Corrector(form="score", zeta=1.0, proposal="ancestral", rule="trapezoid", resampling=HALF)


def run(target, corrector: Corrector, *, k: int = 64, groups: int = 2, steps: int = 30) -> Iterator[FeynmanKacState]:
    generator = seeded(1)
    x, log_weights = start_particles(target, (1,), 20.0, k, groups=groups, generator=generator, dtype=torch.float64)
    return feynman_kac(
        target,
        x,
        karras_sigmas(steps, 0.02, 20.0),
        generator=generator,
        groups=groups,
        log_weights=log_weights,
        corrector=corrector,
    )


def made(log_weights: Tensor, *, roots: Tensor | None = None, clipped: float = 0.0, sigma: float = 0.5):
    """A state with these weights, ancestors and clipped mass."""
    groups, k = log_weights.shape
    fresh = Particles.begin(LogWeights(log_weights.double()), sigma)
    particles = Particles(
        weights=fresh.weights,
        ancestors=fresh.ancestors,
        roots=fresh.roots if roots is None else roots.expand(groups, k),
        resampled=fresh.resampled,
        clipped=torch.full((groups,), clipped, dtype=torch.float64),
        collected=fresh.collected,
    )
    x = torch.zeros((groups * k, 1))
    return FeynmanKacState(x, torch.tensor(sigma), x, 0, particles)


def test_every_step_is_a_row_and_the_last_state_is_kept() -> None:
    states = list(run(geometric_average(FIRST, SECOND, 1.5), SCORE))
    found = diagnose(states)
    assert found.particles == 64
    assert found.last is states[-1]
    for name in ("ess", "unique_ancestors", "log_evidence"):
        assert torch.equal(getattr(found, name), torch.stack([getattr(state, name) for state in states]))
    assert torch.equal(found.sigma, torch.stack([state.sigma for state in states]))
    assert torch.equal(found.resampled, torch.stack([state.particles.resampled for state in states]))
    assert torch.equal(found.clipped, torch.zeros((30, 2), dtype=torch.float64))


def test_a_generator_and_the_list_of_its_states_give_the_same_words() -> None:
    target = geometric_average(FIRST, SECOND, 3.0)
    of_list, of_run = diagnose(list(run(target, SCORE))), diagnose(run(target, SCORE))
    assert str(of_list) == str(of_run)
    assert torch.equal(of_list.last.x, of_run.last.x)


def test_the_table_has_ten_rows_and_their_numbers() -> None:
    states = list(run(geometric_average(FIRST, SECOND, 1.5), SCORE))
    head, names, *rows, verdict = str(diagnose(states)).splitlines()
    assert head.startswith("2 groups of 64 particles, 30 steps, resampled ")
    assert names.split()[:5] == ["sigma", "ESS", "ancestors", "log-evidence", "clipped"]
    assert len(rows) == 10
    first, last = rows[0].split(), rows[-1].split()
    assert float(first[0]) == pytest.approx(float(states[0].sigma), rel=1e-3)
    assert float(last[0]) == 0
    assert float(last[1]) == pytest.approx(float(states[-1].ess.mean()), abs=0.05)
    assert float(last[2]) == pytest.approx(float(states[-1].unique_ancestors.double().mean()), abs=0.05)
    assert float(last[3]) == pytest.approx(float(states[-1].log_evidence.mean()), abs=0.0005)
    assert last[4] == "0.0%"
    assert verdict == "nothing speaks against this result"
    assert len(str(diagnose(states[:3])).splitlines()) == 2 + 3 + 1
    times = sum(state.particles.resampled.double().mean() for state in states)
    assert head.endswith(f"resampled {float(times):.1f} times")


def test_nothing_is_said_against_a_gaussian_by_the_trace_form() -> None:
    model = Gaussian(torch.zeros(1).double(), torch.eye(1).double(), torch.ones(1).double(), 0.0)
    found = diagnose(run(annealed(model, 3.0), TRACE))
    assert found.warnings == []
    assert found.trusted


def test_a_reward_that_few_particles_have_is_warned_of() -> None:
    """A hundred nats a unit, given all at once at the end."""
    target = reward_tilted(FIRST, lambda x: x[:, 0], lambda sigma: 100.0 if sigma == 0 else 0.0)
    found = diagnose(run(target, SCORE, k=256))
    assert not found.trusted
    assert len(found.warnings) == 1
    assert "of 256 particles carried weight at sigma 0:" in found.warnings[0]
    assert str(found).splitlines()[-1] == f"not to be trusted: {found.warnings[0]}"
    mild = reward_tilted(FIRST, lambda x: x[:, 0], lambda sigma: 0.3 if sigma == 0 else 0.0)
    assert diagnose(run(mild, SCORE, k=256)).trusted


def test_particles_of_one_ancestor_are_warned_of() -> None:
    """Guidance of 40 in the score form, with few particles."""
    target = geometric_average(FIRST, SECOND, 40.0)
    found = diagnose(run(target, SCORE, k=32, steps=40))
    left = int(found.unique_ancestors[-1].min())
    assert left < 10
    assert any(f"descend from {left} of the first 32" in warning for warning in found.warnings)


def test_clamping_is_warned_of_where_it_changed_weight() -> None:
    target = geometric_average(FIRST, SECOND, 6.0)
    tight = Corrector(form="score", zeta=1.0, proposal="ancestral", rule="left", resampling=Resampling(clamp=0.02))
    found = diagnose(run(target, tight, k=256))
    worst = int(found.clipped.amax(1).argmax())
    share, sigma = float(found.clipped.sum(0).max()), float(found.sigma[worst])
    assert share > 0.05
    told = f"{share:.2g} of the weight, summed over the steps (most at sigma {sigma:.3g})"
    assert [w for w in found.warnings if told in w]
    loose = Corrector(form="score", zeta=1.0, proposal="ancestral", rule="left", resampling=Resampling(clamp=50.0))
    assert not any("clamping" in w for w in diagnose(run(target, loose, k=256)).warnings)


EQUAL = torch.zeros((2, 100))


def test_warnings_begin_at_their_limits() -> None:
    """Weights of which n of 100 count; ancestors of which n are left; a share that was clamped."""

    def counting(n: int) -> FeynmanKacState:
        weights = torch.full((2, 100), -800.0)
        weights[0], weights[1, :n] = 0.0, 0.0  # in the second group only
        return made(weights, sigma=0.25)

    assert diagnose([made(EQUAL), counting(6), made(EQUAL)]).warnings == []
    (warning,) = diagnose([made(EQUAL), counting(4), made(EQUAL)]).warnings
    assert warning.startswith("only 4.0 of 100 particles carried weight at sigma 0.25:")

    def descended(n: int) -> FeynmanKacState:
        return made(EQUAL, roots=torch.arange(100) % n)

    assert diagnose([descended(10)]).warnings == []
    assert diagnose([descended(9), descended(10)]).warnings == []  # it is the end that counts
    (warning,) = diagnose([descended(9)]).warnings
    assert "descend from 9 of the first 100" in warning

    assert diagnose([made(EQUAL, clipped=0.02), made(EQUAL, clipped=0.02)]).warnings == []
    assert len(diagnose([made(EQUAL, clipped=0.03), made(EQUAL, clipped=0.03)]).warnings) == 1  # the sum counts
    (warning,) = diagnose([made(EQUAL, clipped=0.2, sigma=2.0), made(EQUAL)]).warnings
    assert "clamping moved 0.2 of the weight, summed over the steps (most at sigma 2):" in warning
    both = diagnose([counting(4), made(EQUAL, clipped=0.2, roots=torch.zeros(100).long())])
    assert len(both.warnings) == 3
    assert both.verdict.splitlines() == [f"not to be trusted: {warning}" for warning in both.warnings]
    assert str(both).endswith(both.verdict)
    assert diagnose([descended(10)]).verdict == "nothing speaks against this result"
    assert not both.trusted


@pytest.mark.parametrize("k", [1, 2, 4])
def test_few_particles_are_judged_by_their_number(k: int) -> None:
    """One particle has nothing to lose; of four equal ones nothing is missing."""
    assert diagnose([made(torch.zeros((3, k)))]).warnings == []
    if k == 4:
        lonely = made(torch.zeros((1, 4)), roots=torch.zeros(4).long())
        assert len(diagnose([lonely]).warnings) == 1
        heavy = made(torch.tensor([[0.0, -800, -800, -800]]))
        assert "only 1.0 of 4 particles" in diagnose([heavy]).warnings[0]


def test_the_plot_is_a_png_of_every_group(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    diagnose(run(geometric_average(FIRST, SECOND, 3.0), SCORE)).plot(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1200, 360)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert [file.name for file in tmp_path.iterdir()] == ["run.png"]


def test_no_states_are_refused() -> None:
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="states: there are none"):
            diagnose(nothing)


def test_log_evidence_in_the_table_is_that_of_the_target() -> None:
    """log of the integral of N(0, 1)^3, of a run to sigma = 0.02."""
    model = Gaussian(torch.zeros(1).double(), torch.eye(1).double(), torch.ones(1).double(), 0.0)
    target, generator = annealed(model, 3.0), seeded(2)
    x, log_weights = start_particles(target, (1,), 20.0, 8, gaussians=model, generator=generator, dtype=torch.float64)
    sigmas = karras_sigmas(400, 0.02, 20.0)[:-1]
    found = diagnose(feynman_kac(target, x, sigmas, generator=generator, log_weights=log_weights, corrector=TRACE))
    truth = -math.log(2 * math.pi) - 0.5 * math.log(3)
    assert float(found.log_evidence[-1]) == pytest.approx(truth, abs=0.01)
