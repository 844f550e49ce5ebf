"""What the student is pulled towards: the teacher, paths to it, and when they move."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.nodes import Weights
from distill.targets import Backtracking, Fixed, Nodes, ScoreInterpolation, WeightInterpolation, score_difference
from distill.toy import denoiser
from samplers import GaussianMixture, NetworkDenoiser
from samplers.denoiser import score
from tests.truth import Counted, relative_error

SIGMA = torch.tensor([0.1, 0.5, 2.0, 8.0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0, hidden: int = 8) -> NetworkDenoiser:
    """A denoiser of points [B, 2], no weight of which is 0."""
    found = denoiser(2, hidden, 2, 1.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return found.requires_grad_(False).eval()


def output(target: Callable[..., Tensor]) -> Tensor:
    return target(normal(4, 2), SIGMA, None)


def weights(seed: int) -> Weights:
    return network(seed).state_dict()


def test_a_fixed_target_is_its_denoiser_and_never_another() -> None:
    teacher = network()
    target = Fixed(teacher)
    assert (target.final, target.fraction) == (True, 1.0)
    assert [target.begin(n) for n in range(3)] == [False] * 3
    assert torch.equal(output(target), output(teacher))
    assert target.observe(normal(4, 2), SIGMA, normal(4, 2), normal(4, 2)) == {}


# Nodes


def nodes(count: int = 4, load: Callable[[int], Weights] = weights) -> Nodes:
    return Nodes(network(99), load, count)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_nodes_come_from_the_last_but_one_to_the_first_each_for_an_even_share(count: int) -> None:
    path, seen, updates = nodes(count), [], 60
    for n in range(updates):
        path.move((n + 1) / (updates + 1))
        seen.append(path.node)
    assert list(dict.fromkeys(seen)) == list(range(count - 1, 0, -1))
    shares = [seen.count(k) for k in range(1, count)]
    assert max(shares) - min(shares) <= 1


def test_a_place_on_a_path_of_nodes_is_the_network_of_its_node_bit_for_bit() -> None:
    path = nodes(4)
    for fraction, node in ((0.0, 3), (0.3, 3), (0.34, 2), (0.66, 2), (0.67, 1), (0.999, 1), (0.1, 3)):
        path.move(fraction)
        assert path.node == node
        assert torch.equal(output(path), output(network(node)))
        assert all(relative_error(output(network(k)), output(path)) > 0.01 for k in (0, 1, 2, 3, 99) if k != node)


def test_a_node_is_read_once_and_only_when_it_is_reached() -> None:
    read: list[int] = []

    def load(k: int) -> Weights:
        read.append(k)
        return weights(k)

    path = nodes(4, load)
    assert read == []
    for fraction in (0.1, 0.2, 0.5, 0.6, 0.9):
        path.move(fraction)
    assert read == [3, 2, 1]


def test_a_node_that_is_the_target_before_it_is_refused() -> None:
    """The first one, too: the network comes with the weights of the last node."""
    path = nodes(4, lambda k: weights(99 if k == 3 else k))
    with pytest.raises(ValueError, match=r"target\.path: node 3 is the same network as the target before it"):
        path.move(0.0)
    path = nodes(4, lambda k: weights(3 if k == 2 else k))
    path.move(0.0)
    with pytest.raises(ValueError, match="node 2 is the same network"):
        path.move(0.5)


def test_a_node_that_differs_in_one_weight_is_another_target() -> None:
    almost = copy.deepcopy(weights(3))
    almost["network.leave.bias"][0] += 1e-3
    path = nodes(4, lambda k: almost if k == 2 else weights(k))
    path.move(0.0)
    before = output(path)
    path.move(0.5)
    assert not torch.equal(output(path), before)


@pytest.mark.parametrize("change", ["missing", "more", "renamed"])
def test_nodes_are_loaded_strictly(change: str) -> None:
    """Under other names the published code matched nothing, and said nothing."""
    loaded = dict(weights(3))
    first = next(iter(loaded))
    if change != "more":
        tensor = loaded.pop(first)
    if change != "missing":
        loaded[f"module.{first}"] = tensor if change == "renamed" else torch.zeros(1)
    with pytest.raises(ValueError, match=r"does not fit this network: (module\.)?network\."):
        nodes(4, lambda k: loaded).move(0.0)


def test_one_node_is_no_path_of_nodes() -> None:
    with pytest.raises(ValueError, match=r"target\.path: has 1 node; target\.name: nodes needs 2 or more"):
        nodes(1)
    nodes(2).move(0.0)


# Interpolations


def between_weights() -> WeightInterpolation:
    return WeightInterpolation(network(99), weights(1), weights(2))


def test_weights_are_interpolated_from_the_last_node_to_the_teacher() -> None:
    path = between_weights()
    for fraction in (0.5, 0.0, 0.25, 1.0):
        path.move(fraction)
        expected = network()
        expected.load_state_dict({k: (1 - fraction) * weights(1)[k] + fraction * weights(2)[k] for k in weights(1)})
        assert relative_error(output(path), output(expected)) < 1e-5
        assert path.node == 1 - fraction
    for fraction, end in ((0.0, 1), (1.0, 2)):
        path.move(fraction)
        assert torch.equal(output(path), output(network(end)))


def test_the_ends_of_an_interpolation_of_weights_are_not_changed_by_its_walk() -> None:
    start, end = weights(1), weights(2)
    path = WeightInterpolation(network(99), start, end)
    for fraction in (0.0, 0.7, 0.2):
        path.move(fraction)
    assert all(torch.equal(a, b) for a, b in zip(start.values(), weights(1).values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(end.values(), weights(2).values(), strict=True))


def test_counters_are_not_interpolated() -> None:
    module = nn.BatchNorm1d(3)
    start, end = (copy.deepcopy(module.state_dict()) for _ in range(2))
    start["weight"] = start["weight"] + 1
    end["num_batches_tracked"] += 5
    WeightInterpolation(module, start, end).move(0.5)
    assert int(module.num_batches_tracked) == 5  # type: ignore[arg-type]
    assert module.weight.tolist() == [1.5] * 3


def test_networks_of_two_architectures_are_not_interpolated() -> None:
    wider, deeper = network(1, hidden=16).state_dict(), denoiser(2, 8, 3, 1.0).state_dict()
    for other in (wider, deeper, dict(list(weights(1).items())[1:])):
        for ends in ((other, weights(2)), (weights(2), other)):
            with pytest.raises(ValueError, match=r"weight-interpolation; its ends are networks of different architect"):
                WeightInterpolation(network(), *ends)


def test_an_interpolation_from_the_teacher_to_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target\.path: its last node is the teacher itself"):
        WeightInterpolation(network(), weights(2), weights(2))


def test_scores_are_interpolated_by_one_pass_of_each() -> None:
    ends = [Counted(network(seed)) for seed in (1, 2)]
    path = ScoreInterpolation(*ends)
    for fraction in (0.0, 0.25, 0.9):
        path.move(fraction)
        start, teacher = (output(end.denoiser) for end in ends)
        assert relative_error(output(path), (1 - fraction) * start + fraction * teacher) < 1e-6
        assert path.node == 1 - fraction
    assert [end.batches for end in ends] == [[4] * 3] * 2


def gaussian(mean: float, variance: float) -> GaussianMixture:
    means = torch.full((1, 2), mean, dtype=torch.float64)
    return GaussianMixture(torch.ones(1), means, torch.tensor([variance], dtype=torch.float64))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_between_two_gaussians_the_score_is_that_of_the_geometric_bridge(fraction: float, sigma: float) -> None:
    """p_N^(1 - f) p_0^f of N(m, v) at noise sigma is Gaussian: its precisions are interpolated, and theirs of means."""
    (mean_start, start), (mean_end, end) = (-1.0, 0.3), (2.0, 1.5)
    path = ScoreInterpolation(gaussian(mean_start, start), gaussian(mean_end, end))
    path.move(fraction)
    precisions = (1 - fraction) / (start + sigma**2), fraction / (end + sigma**2)
    precision = sum(precisions)
    mean = (precisions[0] * mean_start + precisions[1] * mean_end) / precision
    x = 3 * normal(50, 2).double()
    found = score(path, x, torch.tensor(sigma, dtype=torch.float64))
    assert relative_error(found, (mean - x) * precision) < 1e-9


# Backtracking


def walk(
    updates: int = 12, count: int = 4, kind: str = "nodes", **options: Any
) -> tuple[Backtracking, NetworkDenoiser]:
    """A path of toy networks and its teacher, which has the weights of node 0."""
    teacher = network(0)
    paths: dict[str, Callable[[], Any]] = {
        "nodes": lambda: Nodes(network(99), weights, count),
        "weights": lambda: WeightInterpolation(network(99), weights(9), weights(0)),
        "scores": lambda: ScoreInterpolation(network(9), teacher),
    }
    return Backtracking(paths[kind](), teacher, updates, **options), teacher


KINDS = pytest.mark.parametrize("kind", ["nodes", "weights", "scores"])


@KINDS
@pytest.mark.parametrize("updates", [1, 7, 12])
def test_a_fixed_schedule_makes_exactly_its_updates_before_the_teacher(kind: str, updates: int) -> None:
    target, teacher = walk(updates, count=2, kind=kind)
    for n in range(updates):
        target.begin(n)
        assert not target.final
        assert 0 < target.fraction < 1
        assert not torch.equal(output(target), output(teacher))
    target.begin(updates)
    assert (target.final, target.fraction) == (True, 1.0)
    assert torch.equal(output(target), output(teacher))


@KINDS
@pytest.mark.parametrize("stages", [None, 3])
def test_the_last_target_is_the_teacher_bit_for_bit_and_stays_it(kind: str, stages: int | None) -> None:
    """Whatever the path; and the teacher's own weights have not been touched on the way."""
    target, teacher = walk(12, kind=kind, stages=stages)
    for n in range(20):
        target.begin(n)
        observe(target)
    assert target.final
    assert torch.equal(output(target), output(network(0)))
    assert all(torch.equal(t, weights(0)[k]) for k, t in teacher.state_dict().items())
    assert not target.begin(21)


@KINDS
def test_the_path_is_let_go_when_the_teacher_is_reached(kind: str) -> None:
    target, teacher = walk(3, kind=kind)
    path = target._path
    held = [weakref.ref(m) for m in vars(path).values() if isinstance(m, nn.Module) and m is not teacher]
    assert len(held) == 1
    del path
    for n in range(3):
        target.begin(n)
    gc.collect()
    assert held[0]() is not None
    target.begin(3)
    gc.collect()
    assert held[0]() is None


def test_its_state_is_two_small_buffers() -> None:
    """Neither the path's network nor the teacher's is part of a checkpoint, or of what an optimizer could find."""
    target, _ = walk()
    assert {key: t.numel() for key, t in target.state_dict().items()} == {"state": 4, "seen": 2}
    assert list(target.parameters()) == []


def test_a_fixed_schedule_of_nodes_switches_where_the_node_is_another() -> None:
    target, _ = walk(12)
    assert [n for n in range(16) if target.begin(n)] == [4, 8, 12]


def test_within_an_interpolation_the_target_drifts_and_switches_only_to_the_teacher() -> None:
    for kind in ("weights", "scores"):
        target, _ = walk(12, kind=kind)
        assert [n for n in range(16) if target.begin(n)] == [12]


def test_each_switch_changes_the_output() -> None:
    target, _ = walk(12)
    seen: list[Tensor] = []
    for n in range(16):
        if target.begin(n) or not n:
            seen.append(output(target))
    assert len(seen) == 4
    assert all(relative_error(a, b) > 0.01 for k, a in enumerate(seen) for b in seen[:k])


@pytest.mark.parametrize("stages", [None, 3])
@KINDS
def test_a_resumed_walk_is_at_the_same_place_and_does_not_switch_for_that(kind: str, stages: int | None) -> None:
    """A copy that loads the buffers at any update goes on as the one that was never stopped."""
    gaps = (1.0, 0.9, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1)
    for stop in range(1, 14):
        whole, _ = walk(12, kind=kind, stages=stages, window=2)
        for n in range(stop):
            whole.begin(n)
            observe(whole, gaps[n % 8])
        resumed, _ = walk(12, kind=kind, stages=stages, window=2)
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        for n in range(stop, 16):
            assert resumed.begin(n) == whole.begin(n), (stop, n)
            assert (resumed.final, resumed.fraction) == (whole.final, whole.fraction)
            assert torch.equal(output(resumed), output(whole))
            for target in (whole, resumed):
                observe(target, gaps[n % 8])


def observe(target: Backtracking, mismatch: float = 1.0) -> dict[str, Tensor]:
    """Tells the target of an update whose mismatch is that number, exactly."""
    x, fake = torch.zeros(3, 2), torch.tensor([[1.0, 0.0]] * 3)
    return target.observe(x, torch.tensor([0.1, 1.0, 7.0]), fake, fake + torch.tensor([0.0, mismatch]))


def test_an_update_says_the_node_and_the_gap_to_it() -> None:
    target, _ = walk(12)
    for n, node in ((0, 3), (5, 2), (11, 1), (12, 0)):
        target.begin(n)
        metrics = observe(target, 0.25)
        assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
            {"node": node, "target_mismatch": 0.25}
        )
    drifting, _ = walk(3, kind="scores")
    seen = []
    for n in range(4):
        drifting.begin(n)
        seen.append(float(observe(drifting)["node"]))
    assert seen == pytest.approx([0.75, 0.5, 0.25, 0.0])


def stages_of(target: Backtracking, mismatches: list[float]) -> list[float]:
    """The stage at every update."""
    found = []
    for n, mismatch in enumerate(mismatches):
        target.begin(n)
        found.append(float(target.state[0]))
        observe(target, mismatch)
    return found


@KINDS
def test_an_adaptive_schedule_goes_on_when_the_mismatch_has_halved(kind: str) -> None:
    """In windows of two: the first fixes what is halved; the mean of a later one has to be below."""
    target, _ = walk(3000, kind=kind, stages=3, window=2)
    found = stages_of(target, [1.2, 0.8, 0.5, 0.52, 0.6, 0.38, 9.0, 9.0, 4.0, 5.01, 4.0, 4.9, 0.1, 0.1])
    assert found == [0] * 6 + [1] * 6 + [2] * 2
    assert not target.final


def test_a_mismatch_that_is_exactly_half_does_not_switch() -> None:
    target, _ = walk(3000, stages=3, window=1)
    assert stages_of(target, [1.0, 0.5, 0.5, 0.49, 1.0]) == [0, 0, 0, 0, 1]


@KINDS
def test_an_adaptive_schedule_goes_on_at_the_latest_after_its_share(kind: str) -> None:
    target, teacher = walk(12, kind=kind, stages=3, window=5)
    assert stages_of(target, [1.0] * 15) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 3
    assert target.final
    assert torch.equal(output(target), output(teacher))


@pytest.mark.parametrize(
    ("updates", "stages"),
    [(5, 5), (12, 3), (10, 3), (7, 4), (11, 2), (3, 5)],
)
def test_an_adaptive_schedule_never_takes_longer_than_its_updates(updates: int, stages: int) -> None:
    """Also where they do not divide among the stages: a run of updates + 1 steps ends with the teacher."""
    target, _ = walk(updates, kind="scores", stages=stages)
    assert stages_of(target, [1.0] * (updates + 1))[-1] == stages
    assert target.final


def test_an_adaptive_schedule_switches_at_every_stage_once() -> None:
    for kind in ("nodes", "weights", "scores"):
        target, _ = walk(12, kind=kind, stages=3)
        switches = []
        for n in range(16):
            if target.begin(n):
                switches.append(n)
            observe(target)
        assert switches == [4, 8, 12], kind


def test_adaptive_stages_of_nodes_are_the_nodes() -> None:
    target, _ = walk(12, stages=3)
    seen = []
    for n in range(14):
        target.begin(n)
        seen.append(float(observe(target)["node"]))
    assert seen == [3.0] * 4 + [2.0] * 4 + [1.0] * 4 + [0.0] * 2


def test_the_mismatch_of_all_processes_decides() -> None:
    """`average` is given what a process saw in an update, once for each update."""
    asked: list[float] = []

    def average(tensor: Tensor) -> Tensor:
        asked.append(float(tensor[0] / tensor[1]))
        return torch.tensor([0.1 ** len(asked), 1.0])

    target, _ = walk(3000, stages=3, window=2, average=average)
    assert stages_of(target, [1.0] * 8) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert asked == pytest.approx([1.0] * 8)


def test_a_mismatch_that_is_not_a_number_does_not_stop_the_walk() -> None:
    """The trainer's own checks stop the run; the walk goes on by its share."""
    target, _ = walk(12, stages=3, window=2)
    assert stages_of(target, [math.nan] * 13)[-1] == 3


def test_no_update_makes_no_path() -> None:
    with pytest.raises(ValueError, match="updates: 0; at least 1 is needed"):
        walk(0)


def test_a_difference_is_that_of_scores_times_the_noise() -> None:
    x, sigma = 2 * normal(4, 2).double(), SIGMA.double()
    ends = gaussian(-1.0, 0.3), gaussian(2.0, 1.5)
    one, other = (score(end, x, sigma) for end in ends)
    expected = torch.stack([(sigma * s.norm(dim=1)).mean() for s in (one - other, other)])
    found = score_difference(ends[0](x, sigma), ends[1](x, sigma), x, sigma)
    assert relative_error(found, expected) < 1e-9
