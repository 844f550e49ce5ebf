"""DisBack's first stage: when it ends, what it keeps, which of that become nodes, and that it fits the student."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.degradation import Degrader, Plateau, Probe, choose, is_candidate, mismatches, probe
from distill.losses import denoising_loss
from distill.methods import Degradation
from distill.mismatch import score_mismatch
from distill.noise import MISMATCH, PROBE, Share, log_normal_level
from distill.optim import Update
from distill.sections import LogNormal
from distill.student import OneStep
from distill.toy import SIGMA_MAX, SIGMA_MIN, AffineStudent, denoiser
from distill.trainer import train
from samplers import NetworkDenoiser, SampleNoise
from tests.truth import Counted, relative_error
from tools.bench_toys import BatchShare

# The end


def looks(plateau: Plateau, losses: list[float]) -> list[bool]:
    found = []
    for loss in losses:
        plateau.look(loss)
        found.append(plateau.reached)
    return found


def test_a_plateau_is_so_many_looks_in_a_row_without_a_fall() -> None:
    falling = [1.0, 0.5, 0.4, 0.3]
    assert looks(Plateau(0.1, 2), falling) == [False] * 4
    assert looks(Plateau(0.1, 2), [1.0, 0.95, 0.91]) == [False, False, True]
    assert looks(Plateau(0.1, 2), [1.0, 0.95, 0.8, 0.79, 0.5, 0.5, 0.5]) == [False] * 6 + [True]
    assert looks(Plateau(0.1, 1), [1.0, 0.91]) == [False, True]


def test_a_slow_fall_is_a_plateau_and_a_loss_that_rises_is_one_too() -> None:
    """The best loss counts, also where it fell by too little to count as a fall."""
    assert looks(Plateau(0.1, 3), [0.95**k for k in range(4)])[-1]
    assert looks(Plateau(0.1, 3), [1.0, 2.0, 1.5, 0.95])[-1]
    assert not looks(Plateau(0.0, 3), [0.95**k for k in range(40)])[-1]


def test_a_plateau_once_reached_stays_one() -> None:
    assert looks(Plateau(0.1, 1), [1.0, 1.0, 0.1, 0.01]) == [False, True, True, True]


def test_a_plateau_goes_on_from_its_state() -> None:
    losses = [1.0, 0.5, 0.49, 0.4, 0.41, 0.40, 0.42, 0.1]
    whole = looks(Plateau(0.1, 3), losses)
    assert whole == [False] * 6 + [True] * 2
    for stop in range(len(losses)):
        plateau, resumed = Plateau(0.1, 3), Plateau(0.1, 3)
        looks(plateau, losses[:stop])
        resumed.load_state_dict(plateau.state_dict())
        assert looks(resumed, losses[stop:]) == whole[stop:]


def test_a_loss_that_is_not_a_number_ends_the_stage() -> None:
    assert looks(Plateau(0.1, 2), [1.0, math.nan, math.nan])[-1]


# What is kept


def test_networks_are_kept_at_the_rounded_powers_of_the_square_root_of_two() -> None:
    expected = sorted({round(2 ** (k / 2)) for k in range(28)})
    assert expected[:8] == [1, 2, 3, 4, 6, 8, 11, 16]
    assert [n for n in range(1, 11_586) if is_candidate(n)] == expected


CANDIDATES = [0, 1, 2, 3, 4, 6, 8, 11, 16, 20]


def chosen(values: list[float], nodes: int, spacing: str = "mismatch", steps: list[int] | None = None) -> list[int]:
    config = Degradation.model_validate({"nodes": nodes, "spacing": spacing})
    return choose(values, CANDIDATES if steps is None else steps, config)


def test_nodes_by_mismatch_are_nearest_to_even_parts_of_it() -> None:
    values = [2.0, 1.9, 1.7, 1.45, 1.1, 0.7, 0.55, 0.3, 0.1, 0.0]
    assert chosen(values, 4) == [3, 4, 6, 9]  # 1.5, 1.0 and 0.5 are asked for
    assert chosen(values, 2) == [4, 9]
    assert chosen([100 * v for v in values], 4) == chosen(values, 4)  # a unit of the mismatch does not matter


def test_nodes_by_steps_are_nearest_to_even_parts_of_its_logarithm() -> None:
    for nodes in (1, 2, 3, 5):
        found = chosen([1.0] * 10, nodes, "steps")
        wanted = [21 ** (k / nodes) - 1 for k in range(1, nodes + 1)]
        nearest = [min(range(1, 10), key=lambda k: abs(math.log1p(CANDIDATES[k]) - math.log1p(w))) for w in wanted]
        assert found == nearest


@pytest.mark.parametrize("spacing", ["mismatch", "steps"])
@pytest.mark.parametrize("nodes", [1, 2, 5, 9, 30])
def test_the_last_network_is_always_a_node_and_none_is_twice(spacing: str, nodes: int) -> None:
    """There are fewer nodes than are asked for where there are fewer networks, or many fall on one."""
    tables = [[1 - k / 9 for k in range(10)], [1.0] * 9 + [0.0], [1.0] + [0.0] * 9, [1, 3, 2, 9, 1, 2, 1, 0.5, 2, 0.0]]
    for values in tables:
        found = chosen(values, nodes, spacing)
        assert found == sorted(set(found))
        assert found[-1] == 9
        assert found[0] >= 1  # the teacher is no node
        assert 1 <= len(found) <= min(nodes, 9)
    assert len(chosen(tables[0], 9)) == 9


def test_a_short_stage_has_the_nodes_that_there_are() -> None:
    assert chosen([1.0, 0.0], 5, steps=[0, 1]) == [1]
    assert chosen([1.0, 0.4, 0.0], 5, steps=[0, 1, 2]) == [1, 2]
    assert chosen([0.0, 0.0, 0.0], 3, steps=[0, 1, 2])[-1] == 2  # a teacher that fits already


def test_a_mismatch_of_predictions_is_the_relative_difference_of_scores() -> None:
    x, last = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[1.0, 1.0], [4.0, 0.0]])
    sigma = torch.tensor([0.5, 2.0])
    length = 2 / 0.5 + 4 / 2
    expected = [(1 / 0.5 + 4 / 2) / length, (8**0.5 / 0.5 + 8**0.5 / 2) / length, 0]
    assert mismatches([other, last + 2, last], x, sigma) == pytest.approx(expected)


# The exact case: the first student is Gaussian


NOISE = LogNormal(mean=-0.8, std=1.2)


def level(u: Tensor) -> Tensor:
    return log_normal_level(u, NOISE, SIGMA_MIN, SIGMA_MAX)


def still(step: int) -> float:
    return 0.0


def first_student(shift: float = 1.2, scale: float = 0.6) -> tuple[OneStep, AffineStudent]:
    """x = shift + scale z."""
    network = AffineStudent(1, scale)
    with torch.no_grad():
        network.shift.fill_(shift)
    return OneStep(network.requires_grad_(False), 2.5), network


def no_conditions(noise: SampleNoise, device: Any) -> None:
    return None


def probed(rows: int = 64, count: int = 100, seed: int = 0) -> Probe:
    return probe(first_student()[0], level, SampleNoise(seed, range(count), PROBE), (1,), no_conditions, rows, "cpu")


def test_a_probe_is_always_the_same_and_of_the_first_students_samples() -> None:
    one, other = probed(), probed(rows=7)
    assert torch.equal(one.x_sigma, other.x_sigma)
    assert not torch.equal(one.x0, probed(seed=1).x0)
    assert torch.equal(one.x_sigma, one.x0 + one.sigma[:, None].float() * one.eps)
    assert abs(float(one.x0.mean()) - 1.2) < 5 * 0.6 / 10
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    assert torch.equal(one.sigma, level(u))  # one in each hundredth of the distribution


def test_a_probe_is_judged_in_parts_with_its_conditions() -> None:
    """The conditions of a row stay its own; no pass has more rows than are asked for."""

    def labels(noise: SampleNoise, device: Any) -> Tensor:
        return noise.integers(10)

    def by_label(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return x + cond[:, None]

    noise = SampleNoise(0, range(20), PROBE)
    found = probe(OneStep(by_label, 2.5), level, noise, (1,), labels, 8, "cpu")
    counted = Counted(by_label)
    assert torch.equal(found.denoise(counted), found.x_sigma + found.cond[:, None])
    assert counted.batches == [8, 8, 4]
    plain = Counted(lambda x, sigma, cond=None: x)
    assert torch.equal(probed(30).denoise(plain), probed(30).x_sigma)
    assert plain.batches == [30, 30, 30, 10]


def test_the_loss_of_a_probe_is_the_denoising_loss() -> None:
    network = denoiser(1, 8, 1, 1.0)
    batch = probed()
    expected = denoising_loss(network, batch.x0, batch.sigma, batch.eps, None, 0.7).mean().detach()
    assert batch.loss(batch.denoise(network), 0.7) == pytest.approx(float(expected), rel=1e-5)


class Stage:
    """A stage 1 in which a network learns the first student."""

    def __init__(
        self,
        rate: Callable[[int], float] = lambda step: 5e-3,
        network: NetworkDenoiser | None = None,
        share: Share | BatchShare = Share(0, 64),  # noqa: B008
        law: tuple[float, float] = (1.2, 0.6),
    ) -> None:
        torch.manual_seed(0)
        self.network = network or denoiser(1, 32, 2, 1.0)
        self.student, self.affine = first_student(*law)
        optimizer = torch.optim.AdamW(self.network.parameters(), betas=(0.0, 0.99))
        self.degrader = Degrader(
            self.student,
            self.network,
            Update(optimizer, rate),
            level,
            share,  # type: ignore[arg-type]
            (1,),
            sigma_data=1.0,
        )

    def errors(self) -> list[float]:
        """The fake error, in which the student's law is exact, at four levels."""
        noise = SampleNoise(0, range(4096), MISMATCH)
        return score_mismatch({"fake": self.network}, self.student, [0.2, 0.5, 1.0, 3.0], noise, (1,))["fake"]


@pytest.mark.slow
def test_stage_one_ends_with_a_network_that_fits_the_first_student() -> None:
    """It is a teacher at first: the same updates have taught it N(-2, 0.3^2)."""
    steps = 400
    stages: dict[str, Any] = {
        "rate": lambda step: 1e-2 * (1 - step / steps),
        "network": denoiser(1, 32, 2, 1.0),
        "share": BatchShare(0, 256),
    }
    list(train(Stage(law=(-2.0, 0.3), **stages).degrader, steps))
    stage = Stage(**stages)
    before = stage.errors()
    assert min(before) > 1, before
    losses = [float(metrics["loss"]) for metrics in train(stage.degrader, steps)]
    assert sum(losses[-50:]) < 0.6 * sum(losses[:50])
    assert max(stage.errors()) < 0.3, stage.errors()


def test_a_step_is_a_function_of_its_number_and_leaves_the_student_alone() -> None:
    one, other = Stage(), Stage()
    before = {key: tensor.clone() for key, tensor in one.affine.state_dict().items()}
    losses = [[float(stage.degrader.step(n)["loss"]) for n in (0, 1, 2)] for stage in (one, other)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
    weights = [stage.network.state_dict() for stage in (one, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert all(torch.equal(before[key], tensor) for key, tensor in one.affine.state_dict().items())


def test_a_step_is_the_denoising_loss_at_the_levels_of_the_fake_score() -> None:
    stage, noise = Stage(still), Share(0, 64).noise(3)
    x0 = stage.student(noise.normal((1,)))
    sigma = level(noise.uniform())
    expected = denoising_loss(stage.network, x0, sigma, noise.normal((1,)), None, 1.0).mean()
    assert relative_error(stage.degrader.step(3)["loss"], expected.detach()) < 1e-6


def test_shares_of_two_processes_are_the_batch() -> None:
    """The mean of both losses is the loss of the whole batch."""
    whole = float(Stage(still).degrader.step(5)["loss"])
    halves = []
    for rank in range(2):
        halves.append(float(Stage(still, share=Share(0, 64, rank, 2)).degrader.step(5)["loss"]))
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-5)
