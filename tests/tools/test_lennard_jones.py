"""LJ-13: the energy and its minimum, exact laws by tempering, an equivariant denoiser, annealing end to end."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.truth import relative_error
from tools import bench_lj
from tools import lennard_jones as lj
from tools.egnn import EquivariantDenoiser, train


def harmonic(y: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * y.square().sum((-2, -1)), y


def some(count: int, n: int = 13, seed: int = 0) -> Tensor:
    return lj.gas(count, n, torch.Generator().manual_seed(seed), width=1.2, apart=0.7)


def moved(y: Tensor, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """y after a rotation with a reflection and a permutation, which are returned too, and a shift."""
    generator = torch.Generator().manual_seed(seed)
    n = y.shape[-2] + 1
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(n, generator=generator)
    x = (lj.positions(y) @ turn)[..., order, :] + torch.randn(3, generator=generator, dtype=torch.float64)
    return lj.coordinates(x), turn, order


def test_the_minimum_has_the_energy_of_the_literature_and_no_pair_force() -> None:
    y = lj.icosahedron()
    energy, slope = lj.lennard_jones(y)
    assert float(energy - harmonic(y)[0]) == pytest.approx(-2 * 44.326801, abs=1e-5)  # ordered pairs: twice the well
    assert float((slope - y).abs().max()) < 1e-10
    close = lj.distances(y) < 1.2
    assert int(close.sum()) == 12 + 30  # the middle touches all, and an icosahedron has 30 edges


def test_the_energy_is_the_sum_over_ordered_pairs_and_forces_are_its_gradient() -> None:
    y = some(8).requires_grad_()
    energy, slope = lj.lennard_jones(y)
    x = lj.positions(y)
    r = (x[:, :, None] - x[:, None]).norm(dim=-1)[:, ~torch.eye(13, dtype=torch.bool)]
    plain = (r**-12 - 2 * r**-6).sum(1) + 0.5 * (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    assert relative_error(energy.detach(), plain.detach()) < 1e-12
    assert relative_error(slope, torch.autograd.grad(plain.sum(), y)[0]) < 1e-10


def test_the_energy_does_not_change_with_rotation_translation_and_permutation() -> None:
    y = some(8)
    assert relative_error(lj.lennard_jones(moved(y)[0])[0], lj.lennard_jones(y)[0]) < 1e-9


def test_coordinates_are_orthonormal_and_without_centre_of_mass() -> None:
    basis = lj.helmert(13)
    assert relative_error(basis.mT @ basis, torch.eye(12, dtype=torch.float64)) < 1e-14
    assert float(basis.sum(0).abs().max()) < 1e-14
    y = some(4)
    assert relative_error(lj.coordinates(lj.positions(y) + 3.0), y) < 1e-14


def test_gas_keeps_particles_apart() -> None:
    y = some(50)
    assert y.shape == (50, 12, 3)
    assert float(lj.distances(y).min()) > 0.7


def test_parallel_tempering_of_a_trap_alone_has_its_variance_and_its_heat() -> None:
    temperatures, chains, every = (0.5, 1.0, 2.0), 100, 20
    start = 3 * torch.ones(3, chains, 4, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    kept, last = [], None
    for count, last in enumerate(lj.parallel_tempering(harmonic, start, temperatures, 700, 200, generator, step=0.05)):
        if count >= 200 and count % every == 0:
            kept.append(last)
    assert last is not None
    assert bool(((last.accepted - 0.57).abs() < 0.1).all())
    assert bool((last.swapped > 0.05).all())
    for i, t in enumerate(temperatures):
        y = torch.stack([k.y[i] for k in kept], 1)  # ladders are independent: errors are over them
        for value, truth in ((y.square().mean((1, 2, 3)), t), (y.mean((1, 2, 3)), 0.0)):
            assert abs(float(value.mean()) - truth) < 5 * float(value.std()) / chains**0.5
        assert float(y.square().mean()) == pytest.approx(t, rel=0.05)
        assert relative_error(torch.stack([k.energy[i] for k in kept], 1), harmonic(y)[0]) < 1e-12


def test_parallel_tempering_of_two_particles_has_the_exact_law_of_their_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.full((2, 400, 1, 3), 0.8, dtype=torch.float64)
    replicas = list(lj.parallel_tempering(lj.lennard_jones, start, (0.7, 1.5), 1500, 700, generator))[-1]
    r = torch.linspace(0.6, 8, 4000, dtype=torch.float64)
    for i, t in enumerate((0.7, 1.5)):
        density = r**2 * (-(2 * (r**-12 - 2 * r**-6) + r**2 / 4) / t).exp()  # |y|^2 = r^2 / 2
        law = (density.cumsum(0) / density.sum()).numpy()
        found = np.interp(lj.distances(replicas.y[i]).flatten().numpy(), r.numpy(), law)
        assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_a_denoiser_turns_with_its_particles_and_does_not_know_their_order() -> None:
    torch.manual_seed(0)
    denoiser = EquivariantDenoiser(13, 0.9, hidden=16)
    for layer in denoiser.layers:
        torch.nn.init.normal_(layer.pull.weight, std=0.3)  # as it is after training: what it does is not small
    y = some(6)
    other, turn, order = moved(y)
    sigma = torch.tensor([0.02, 0.1, 0.5, 1.0, 3.0, 10.0])
    out = denoiser(y.float(), sigma)
    turned = lj.coordinates((lj.positions(out.double()) @ turn)[..., order, :])
    assert relative_error(denoiser(other.float(), sigma).double(), turned) < 1e-5
    plain = 0.9**2 / (0.9**2 + sigma**2)
    assert relative_error(out, plain[:, None, None] * y.float()) > 0.05
    assert relative_error(denoiser(y.float(), torch.tensor(0.5))[2], out[2]) < 1e-5


def test_training_finds_the_denoiser_of_a_trap_and_saves_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = 1.5**0.5 * torch.randn(2000, 3, 3, generator=generator)
    torch.manual_seed(0)
    denoiser = EquivariantDenoiser(4, 1.0, hidden=16, layers=2, radial=8)
    y, sigma = samples[:200] + torch.randn(200, 3, 3, generator=generator), torch.tensor(1.0)
    exact = y * 1.5 / 2.5
    before = float((denoiser(y, sigma) - exact).square().mean())
    losses = list(train(denoiser, samples, 150, generator, batch=64))
    assert len(losses) == 150
    assert float((denoiser(y, sigma) - exact).square().mean()) < before / 3
    denoiser.save(tmp_path / "d.safetensors", {"a": 1})
    loaded, about = EquivariantDenoiser.load(tmp_path / "d.safetensors")
    assert about == {"a": 1}
    assert torch.equal(loaded(y, sigma), denoiser(y, sigma))
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="denoiser"):
        EquivariantDenoiser.load(tmp_path / "d.safetensors")


@pytest.mark.parametrize("p", [1, 2])
def test_wasserstein_is_the_distance_of_quantiles(p: int) -> None:
    a, b = (torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (300, 200))
    weights = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(0)
    if p == 1:
        truth = stats.wasserstein_distance(a.numpy(), b.numpy(), weights.numpy())
        assert bench_lj.wasserstein(a, b, 1, weights) == pytest.approx(truth, rel=1e-9)
    assert bench_lj.wasserstein(a, a.flip(0) + 2, p) == pytest.approx(2, rel=1e-9)
    assert bench_lj.wasserstein(a, a.repeat(3), p) == pytest.approx(0, abs=1e-7)
    doubled = torch.cat([a[:100], a]).sort().values  # a weight of two is a sample of two
    twice = torch.cat([torch.full((100,), 2.0), torch.ones(200)]).double() / 400
    assert bench_lj.wasserstein(a, b, p, twice) == pytest.approx(bench_lj.wasserstein(doubled, b, p), rel=1e-9)


class Trap:
    """The denoiser of a trap at T = 2, exactly."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
        return 2 / (2 + sigma**2) * x


@pytest.mark.parametrize("arm", bench_lj.ARMS, ids=lambda arm: arm.name)
def test_annealing_a_trap_cools_it_and_only_with_the_weights_by_as_much_as_asked(arm: bench_lj.Arm) -> None:
    settings = bench_lj.Settings(particles=4000, steps=300, sigma_max=20.0)
    y = 2**0.5 * torch.randn(4000, 3, 1, generator=torch.Generator().manual_seed(0))
    ended = bench_lj.anneal(Trap(), y, 2.5, arm, settings, 0)
    assert float(ended["weights"].sum()) == pytest.approx(1)
    variance = float((ended["weights"][:, None, None] * ended["y"].square()).sum()) / 3
    if arm.form == "trace":
        assert variance == pytest.approx(0.8, rel=0.065)  # five standard errors
    elif arm.threshold is None:  # s dv (1 + zeta^2) B / 2 with noise of zeta^2 dv ends too narrow
        assert variance < 0.72
    elif not arm.tempered:  # (of tempered noise the weights have no variance: nothing to expect)
        assert variance == pytest.approx(0.8, rel=0.15)


def test_energies_above_the_reference_are_counted_and_left_out() -> None:
    reference = some(200)
    overlapping = reference[:20].clone()
    overlapping[:, 1] = overlapping[:, 0] / 3**0.5  # two particles all but in one place
    assert bool((lj.lennard_jones(overlapping)[0] > lj.lennard_jones(reference)[0].max()).all())
    row = bench_lj.scores(torch.cat([reference, overlapping]), reference)
    assert row["above"] == pytest.approx(20 / 220)
    assert row["energy_w2"] == pytest.approx(0, abs=1e-4)
    assert row["distance_w2"] > 0.01
    alone = bench_lj.scores(overlapping, reference, torch.full((20,), 1 / 20))
    assert alone["above"] == pytest.approx(1)
    assert alone.keys() == {"above", "distance_w2"}


def test_a_run_anneals_from_the_temperature_of_its_denoiser_to_that_of_its_reference(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = {t: t**0.5 * torch.randn(4000, 3, 3, generator=generator) for t in (2.0, 0.8)}
    settings = bench_lj.Settings(particles=2000, steps=60, sigma_max=20.0)
    row = bench_lj.run(tmp_path, Trap(), lj.References(samples, ""), 0.8, bench_lj.ARMS[-1], settings, 0)
    apart = bench_lj.scores(samples[2.0], samples[0.8])["distance_w2"]
    assert row["distance_w2"] < 0.1 * apart


@pytest.mark.slow
def test_the_table_is_made_from_nothing_and_again_from_what_is_kept(tmp_path: Path) -> None:
    tiny = bench_lj.Settings(ladders=4, tempering=80, burn_in=40, hidden=8, training=3, batch=8, particles=16, steps=6)
    table = bench_lj.lj_table(tmp_path, [0, 1], tiny)
    assert all(arm.name in table for arm in bench_lj.ARMS)
    assert "nan" not in table
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    assert len(times) == 2 + 2 * (1 + 2 * len(bench_lj.ARMS))
    assert bench_lj.lj_table(tmp_path, [0, 1], tiny) == table
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")} == times
    other = replace(tiny, steps=7)
    assert bench_lj.lj_table(tmp_path, [0, 1], other) != table
