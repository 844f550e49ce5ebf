"""The bound from data alone: against chi-square in closed form, and above the KL of mixtures."""

import math

import pytest
import torch
from torch import Tensor

from samplers import Gaussian, bound_of
from samplers.bound import Bound
from tests.samplers.mixtures import Labelled, mixture_and_gaussian

D = 6
LEVELS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(rank: int = D, n_classes: int | None = None, count: int | None = None) -> Gaussian:
    """The variances 2, 1, 1/2, and 1/4 in every other direction, so that all ranks above 2 are the same law."""
    components = torch.linalg.qr(torch.randn((D, D), generator=seeded(0), dtype=torch.float64))[0][:rank]
    variances = torch.tensor([2.0, 1.0, 0.5, 0.25, 0.25, 0.25], dtype=torch.float64)[:rank]
    mean = torch.randn((n_classes or 1, D), generator=seeded(1), dtype=torch.float64)
    return Gaussian(mean if n_classes else mean[0], components, variances, 0.25, n_classes=n_classes, count=count)


def dense(law: Gaussian, sigma: float) -> Tensor:
    across = torch.eye(D, dtype=torch.float64) - law.components.mT @ law.components
    within = law.components.mT @ torch.diag(law.variances) @ law.components
    return within + law.rest * across + sigma**2 * torch.eye(D, dtype=torch.float64)


def chi_square(shift: Tensor, law: Tensor, other: Tensor) -> float:
    """int p^2 / q - 1 for p = N(shift, law) and q = N(0, other), by completing the square."""
    p, q = torch.linalg.inv(law), torch.linalg.inv(other)
    both = 2 * p - q
    assert bool((torch.linalg.eigvalsh(both) > 0).all())
    b = 2 * p @ shift
    exponent = 0.5 * b @ torch.linalg.solve(both, b) - shift @ p @ shift
    logs = 0.5 * torch.logdet(other) - torch.logdet(law) - 0.5 * torch.logdet(both)
    return math.expm1(float(logs + exponent))


@pytest.mark.parametrize(("rank", "n_classes"), [(3, None), (D, None), (3, 3)])
def test_the_bound_is_the_exact_chi_square_and_two_of_its_standard_errors(rank, n_classes) -> None:
    """Data of another mean and covariance, 60 data sets of 800: the bound lies 1.6 of its own deviations above.

    Not 2, for the error is estimated too, and is large where the average is; of the 1.6, two standard errors are 0.4.
    """
    law, sets, n, levels = gaussian(rank, n_classes), 60, 800, (8.0, 2.0, 1.0)
    shift = torch.tensor([0.3, -0.2, 0.2, 0.1, 0.0, 0.1], dtype=torch.float64)
    scale = torch.tensor([1.1, 0.9, 1.0, 0.8, 1.1, 1.0], dtype=torch.float64)
    generator, bounds = seeded(2), []
    for _ in range(sets):
        labels = None if n_classes is None else torch.arange(n) % n_classes
        x = law.sample(n, cond=labels, generator=generator)
        mean = law.mean if labels is None else law.mean[labels]
        bounds.append(bound_of(mean + (x - mean) * scale + shift, law, labels, torch.tensor(levels)).kl)
    upper = torch.tensor(bounds, dtype=torch.float64).expm1()
    for k, sigma in enumerate(levels):
        noise = sigma**2 * torch.eye(D, dtype=torch.float64)
        expected = chi_square(shift, scale[:, None] * dense(law, 0.0) * scale + noise, dense(law, sigma))
        above = float((upper[:, k].mean() - expected) / upper[:, k].std())
        assert above == pytest.approx(1.6, abs=0.4)


@pytest.mark.parametrize("n_classes", [None, 3])
def test_rest_directions_count_as_those_with_components_do(n_classes) -> None:
    labels = None if n_classes is None else torch.arange(200) % n_classes
    x = gaussian(D, n_classes).sample(200, cond=labels, generator=seeded(3))
    full, low, none = (bound_of(x, gaussian(rank, n_classes), labels, LEVELS).kl for rank in (D, 3, 0))
    assert low == pytest.approx(full, rel=1e-10)
    assert none != pytest.approx(full, rel=0.1)  # variance 1/4 everywhere is another law
    flat = gaussian(D, n_classes)
    shaped = Gaussian(
        flat.mean.reshape(-1, 2, 3)[0 if n_classes is None else slice(None)],
        flat.components,
        flat.variances,
        flat.rest,
        n_classes=n_classes,
    )
    assert bound_of(x.reshape(-1, 2, 3), shaped, labels, LEVELS).kl == pytest.approx(full, rel=1e-12)
    assert bound_of(x.float(), gaussian(3, n_classes), labels, LEVELS).kl == pytest.approx(full, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rotated", [False, True])
def test_the_bound_lies_above_the_kl_of_the_truth_to_a_gaussian_fitted_to_few_samples(rotated) -> None:
    """At every level and for the very samples of the fit; KL by log-densities, of which four standard errors."""
    mixture, _ = mixture_and_gaussian(rotated=rotated)
    for count in (200, 800):
        fitted = Gaussian.fit([mixture.sample(count, generator=seeded(count))], rank=32)
        bound = fitted.bound
        assert bound is not None
        assert bound.sigma[0] > 10 * bound.sigma_skip(0.2)
        checked = 0
        for sigma, kl in zip(bound.sigma, bound.kl, strict=True):
            if not 1e-3 < kl < math.inf:
                continue
            x = mixture.sample(2000, sigma, generator=seeded(4))
            log_ratio = mixture.log_density(x, sigma) - fitted.log_density(x, sigma)
            assert float(log_ratio.mean()) - 4 * float(log_ratio.std()) / math.sqrt(2000) < kl
            checked += 1
        assert checked >= 5


def test_the_bound_of_few_samples_has_their_cost_twice_on_top() -> None:
    x = gaussian().sample(100, generator=seeded(5))
    few, known = (bound_of(x, gaussian(count=count), sigmas=LEVELS) for count in (50, None))
    for sigma, ours, theirs in zip(LEVELS.tolist(), few.kl, known.kl, strict=True):
        assert ours - theirs == pytest.approx(2 * gaussian(count=50).sampling_kl(sigma), rel=1e-6)


def test_the_bound_is_infinite_from_where_the_average_is_no_longer_one() -> None:
    """Far data: chi-square is above 1 from some level down, and stays unknown below whatever the average says."""
    law = gaussian()
    x = law.sample(100, generator=seeded(6)) + 5.0
    assert len(bound_of(x, law).sigma) == 40
    bound = bound_of(x, law, sigmas=64 * 2.0 ** -torch.arange(20.0))  # at the lowest, no pair is near: an average of 0
    finite = [math.isfinite(kl) for kl in bound.kl]
    first = finite.index(False)
    assert first > 0
    assert not any(finite[first:])
    assert all(kl <= math.log(2) for kl in bound.kl[:first])
    assert all(a < b for a, b in zip(bound.kl[:first], bound.kl[1:first], strict=False))


def test_the_bound_is_infinite_where_the_cost_of_few_samples_is_not_known() -> None:
    x = gaussian().sample(100, generator=seeded(5))
    few, known = (bound_of(x, gaussian(count=count), sigmas=LEVELS) for count in (12, None))
    costs = [gaussian(count=12).sampling_kl(sigma) for sigma in LEVELS.tolist()]
    assert [math.isinf(kl) for kl in few.kl] == [cost > 0.25 for cost in costs]
    assert all(math.isfinite(kl) for kl in known.kl)
    assert any(math.isinf(kl) for kl in few.kl)


def test_with_classes_the_bound_lies_above_the_kl_of_each_class_to_its_own_gaussian_averaged() -> None:
    """By log-densities, less four standard errors; and it is not so far above that it says nothing."""
    law = Labelled()
    labels = torch.arange(1600) % 4
    bound = bound_of(law.sample(labels, 0.0, seeded(7)), law.gaussian, labels)
    levels = [sigma for sigma, kl in zip(bound.sigma, bound.kl, strict=True) if 1e-3 < kl < math.inf]
    assert len(levels) >= 5
    for sigma in levels:
        x = law.sample(labels, sigma, seeded(8))
        own = torch.stack([part.log_density(x, sigma) for part in law.classes])[labels, torch.arange(1600)]
        log_ratio = own - law.gaussian.log_density(x, sigma, labels)
        error = float(log_ratio.std()) / 40
        assert float(log_ratio.mean()) - 4 * error < bound.at(sigma)
    assert bound.sigma_skip(0.2) < 2.0


def test_at_is_the_bound_of_the_next_level_below() -> None:
    bound = Bound((8.0, 4.0, 2.0), (0.01, 0.1, math.inf))
    assert [bound.at(sigma) for sigma in (100.0, 8.0, 5.0, 4.0)] == [0.01, 0.01, 0.1, 0.1]
    assert [bound.at(sigma) for sigma in (3.0, 2.0, 1.0)] == [math.inf] * 3


def test_the_level_to_jump_to_is_the_lowest_with_nothing_dearer_above() -> None:
    bound = Bound((16.0, 8.0, 4.0, 2.0), (0.001, 0.2, 0.1, math.inf))
    assert bound.sigma_skip(0.01) == bound.sigma_skip(0.1) == 16.0
    assert bound.sigma_skip(0.2) == 4.0
    with pytest.raises(ValueError, match=r"0.0001 nats is met at no noise level; .* 0.001 nats, at sigma 16"):
        bound.sigma_skip(1e-4)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance"):
            bound.sigma_skip(bad)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("samples", {"samples": torch.zeros(7, D).double()}),
        ("samples", {"samples": torch.zeros(20, D + 1).double()}),
        ("samples", {"samples": torch.zeros(20, 2, D // 2).double()}),
        ("samples", {"samples": torch.full((20, D), math.inf).double()}),
        ("samples", {"samples": torch.zeros((20, D), dtype=torch.int64)}),
        ("sigmas", {"sigmas": torch.tensor([1.0, 2.0])}),
        ("sigmas", {"sigmas": torch.tensor([1.0, 0.0])}),
        ("sigmas", {"sigmas": torch.tensor([math.nan])}),
        ("sigmas", {"sigmas": torch.tensor([])}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_raises(field, bad) -> None:
    given = {"samples": gaussian().sample(20, generator=seeded(8))} | bad
    with pytest.raises(ValueError, match=f"^{field}:"):
        bound_of(given["samples"], gaussian(), sigmas=given.get("sigmas"))


def test_labels_are_needed_where_there_are_classes() -> None:
    with pytest.raises(ValueError, match="class labels"):
        bound_of(torch.zeros(20, D).double(), gaussian(n_classes=3))


def test_classes_of_two_points_each_are_seen_where_their_pool_is_normal() -> None:
    """Class c is at plus or minus a_c: the pooled residuals are a Gaussian's, and every class is far from one."""
    points = torch.randn((50, 2), generator=seeded(0))
    labels = torch.arange(4000) % 50
    sign = 2.0 * torch.randint(2, (4000, 1), generator=seeded(1)) - 1
    x = points[labels] * sign
    gaussian = Gaussian(
        torch.zeros(50, 2), torch.eye(2), torch.linalg.eigvalsh(torch.cov(points.T)).flip(0), 0.0, n_classes=50
    )
    for level in (2.0, 1.4):
        noised = x + level * torch.randn(x.shape, generator=seeded(2))
        each = torch.stack([noised + points[labels], noised - points[labels]]).square().sum(2) / (-2 * level**2)
        own = each.logsumexp(0) - math.log(2) - math.log(2 * math.pi * level**2)
        nats = own - gaussian.log_density(noised, level, labels)
        bound = bound_of(x, gaussian, labels, torch.tensor([level], dtype=torch.float64)).kl[0]
        assert float(nats.mean() - 4 * nats.std() / 4000**0.5) > 0.01
        assert float(nats.mean()) < bound


def test_classes_without_a_pair_say_nothing() -> None:
    labels = torch.arange(9)
    gaussian = Gaussian(torch.zeros(9, 2), torch.eye(2), torch.ones(2), 0.0, n_classes=9)
    assert bound_of(torch.randn((9, 2), generator=seeded(0)), gaussian, labels).kl[0] == math.inf
