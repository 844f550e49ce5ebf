"""The benchmark of teleportation at a small size: arms are what they are named, tables what was measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from samplers import Gaussian, GaussianMixture, dpmpp_2m, euler, heun, karras_sigmas, nfe, sample
from tests.truth import Counted, relative_error
from tools import bench_teleport as bench


def gaussian(dim: int) -> tuple[Gaussian, GaussianMixture]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)
    variances = 1 / torch.arange(1, dim + 1, dtype=torch.float64)
    own = Gaussian(mean, torch.eye(dim, dtype=torch.float64), variances, 0.0)
    return own, GaussianMixture(torch.ones(1), mean[None], variances[None])


def test_unipc_is_a_solver_of_the_same_flow() -> None:
    own, exact = gaussian(6)
    x = 80 * torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = own.transport(x, 80.0, 0.002)
    errors = [relative_error(sample(bench.unipc, exact, x, karras_sigmas(n)), truth) for n in (10, 20, 40)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # of order 2, at least
    assert errors[2] < relative_error(sample(euler, exact, x, karras_sigmas(40)), truth) / 10
    counted = Counted(exact)
    sample(bench.unipc, counted, x, karras_sigmas(10))
    assert len(counted.batches) == 10


@pytest.mark.parametrize("jump", [False, True], ids=["plain", "teleported"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc", "gaussian"])
def test_an_arm_makes_no_more_evaluations_than_it_says_and_ends_at_the_same_image(name: str, jump: bool) -> None:
    own, exact = gaussian(6)
    counted = Counted(exact)
    x = 80 * torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case = bench.Case("toy", counted, own, 8.4, 0.002, 80.0, lambda n, seed: (x[:n], None))
    made = bench.end(case, name, jump, 35, x, None)
    assert len(counted.batches) == 35
    assert relative_error(made, own.transport(x, 80.0, 0.0)) < 0.05
    counted.batches.clear()
    bench.end(case, name, jump, 10, x, None)
    assert len(counted.batches) == (9 if name == "heun" else 10)


def test_mixtures_are_like_images_and_rotated_ones_have_full_covariances() -> None:
    aligned, rotated = (bench.image_like(64, 8, rotated, seed=0) for rotated in (False, True))
    for mixture in (aligned, rotated):
        spread = mixture.sample(4000, generator=torch.Generator().manual_seed(2)).var(0)
        assert float(spread.mean()) == pytest.approx(0.25, rel=0.35)  # eight means of an eighth of the weight each
        assert float(spread[:8].mean()) > 4 * float(spread[-32:].mean())


def rows() -> list[dict[str, Any]]:
    made = []
    for seed in (0, 1):
        for name in ("dpmpp_2m", "gaussian"):
            for jump in (False, True):
                for evaluations in (*bench.EVALUATIONS, 16):
                    error = (0.5 if jump else 1.0) / evaluations + 0.01 * seed
                    row = {"solver": name, "jump": jump, "nfe": evaluations, "seed": seed, "error": error}
                    made.append(row | {"median": error})
    return made


def test_tables_pair_by_seed_and_say_what_was_measured() -> None:
    table = bench.error_table(rows(), "toy")
    assert "| dpmpp_2m | 0.2550 ± 0.0050 |" in table
    assert "| gaussian + teleport | 0.1300 ± 0.0050 |" in table
    saving = bench.saving_table(rows(), ("error",))
    assert "| dpmpp_2m, error | -0.0417 ± 0.0000 |" in saving  # 0.5 / 4 - 1 / 6, whatever the seed adds to both
    assert "of dpmpp_2m at 16: 1.0000 ± 0.0000" in saving


@pytest.mark.slow
def test_what_was_measured_is_kept_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", ((32, 2, True),))
    monkeypatch.setattr(bench, "EVALUATIONS", (4, 8))
    monkeypatch.setattr(bench, "SAVING", ((8, 4),))
    first = bench.mixtures_table(tmp_path, [0], n=4, fine=10)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(files) == 5 * 2 * 2 + 1
    assert (tmp_path / "rotated-32.png").stat().st_size > 1000
    assert bench.mixtures_table(tmp_path, [0], n=4, fine=10) == first
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")} == files


def test_the_schedule_after_a_jump_starts_where_it_landed() -> None:
    own, exact = gaussian(3)
    case = bench.Case("toy", exact, own, 8.4, 0.002, 80.0, lambda n, seed: (torch.zeros(n, 3), None))
    seen: list[float] = []

    def watch(x: torch.Tensor, sigma: torch.Tensor, cond: Any = None) -> torch.Tensor:
        seen.append(float(sigma))
        return exact(x, sigma, cond)

    bench.end(replace(case, denoiser=watch), "dpmpp_2m", True, 6, torch.zeros(2, 3, dtype=torch.float64), None)
    assert seen == pytest.approx(karras_sigmas(6, 0.002, 8.4)[:-1].tolist(), rel=1e-6)
    assert nfe(heun, karras_sigmas(5)) == 9
    assert dpmpp_2m in bench.arms(own).values()


def test_a_network_that_errs_by_an_affine_map_leaves_an_affine_residual_that_is_its_own_error() -> None:
    own, exact = gaussian(4)
    case = bench.Case(
        "toy", lambda x, sigma, cond=None: exact(x, sigma) + 0.3, own, 8.4, 0.002, 80.0, lambda n, s: None
    )
    x0 = exact.sample(4000, generator=torch.Generator().manual_seed(3))
    rows = [[float(v) for v in line.split("|")[1:-1]] for line in bench.residual_table(case, x0, None).splitlines()[2:]]
    for sigma, unexplained, rms, affine, error in rows:
        assert rms == pytest.approx(0.3, rel=1e-3)
        assert affine == pytest.approx(1, abs=0.01)
        assert error == pytest.approx(
            1, abs=0.2
        )  # four standard errors: 4 x 1.1 / 0.3 / sqrt(4 x 4000) where sigma is 20
        assert unexplained < (1 if sigma < 1 else 0.3)


def test_the_shape_of_the_data_is_neither_affine_nor_an_error() -> None:
    generator = torch.Generator().manual_seed(4)
    mixture = GaussianMixture(torch.ones(2), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.full((2,), 0.01))
    case = bench.Case("toy", mixture, Gaussian.fit([mixture.sample(8000, generator=generator)]), 8, 0.002, 80.0, None)  # type: ignore[arg-type]
    table = bench.residual_table(case, mixture.sample(4000, generator=generator), None)
    rows = {float(line.split("|")[1]): [float(v) for v in line.split("|")[2:-1]] for line in table.splitlines()[2:]}
    _, rms, affine, error = rows[0.6]
    assert rms > 0.1
    assert abs(affine) < 0.1
    assert abs(error) < 0.1
