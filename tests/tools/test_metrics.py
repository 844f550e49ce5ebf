"""Every metric by its name: that it is wired to the right numbers, in the right order. The formulas have tests of
their own (test_frechet.py, test_pairwise.py, test_vendi.py, test_classes.py)."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from distill.data import digits
from tools.features import Extracted, load_extractor
from tools.frechet import frechet_estimate
from tools.manifest import DEFAULT_METRICS, METRIC_NAMES
from tools.metrics import Reference, evaluate
from tools.pairwise import density_coverage, precision_recall
from tools.statistics import FeatureStatistics


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


REAL, FAKE = normal(90, 6), 1.2 * normal(70, 6, seed=1) + 0.3
LOGITS, LABELS = 2 * normal(70, 4, seed=2), torch.arange(70) % 4
ALL = (*METRIC_NAMES, "vendi@2", "vendi@inf")


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of(REAL, "noise")


def test_every_metric_is_found_by_its_name_in_the_order_it_is_asked_for(reference: Reference) -> None:
    found = evaluate(FAKE, reference, ALL, logits=LOGITS, labels=LABELS)
    assert tuple(found) == ALL
    assert tuple(evaluate(FAKE, reference, ALL[::-1], logits=LOGITS, labels=LABELS)) == ALL[::-1]
    assert tuple(evaluate(FAKE, reference)) == DEFAULT_METRICS
    for name, estimate in found.items():
        assert math.isfinite(estimate.value), name
        assert estimate.standard_error is not None, name
        assert estimate.standard_error > 0, name


def test_together_they_are_what_each_is_alone(reference: Reference) -> None:
    """To the bit: one pass over the pairs serves all that are asked for."""
    together = evaluate(FAKE, reference, ALL, logits=LOGITS, labels=LABELS)
    for name in ALL:
        assert evaluate(FAKE, reference, [name], logits=LOGITS, labels=LABELS)[name] == together[name], name


def test_the_values_are_those_of_the_definitions(reference: Reference) -> None:
    found = {n: e.value for n, e in evaluate(FAKE, reference, ALL, logits=LOGITS, labels=LABELS).items()}
    x, y = REAL.double().numpy(), FAKE.double().numpy()

    known = frechet_estimate(FAKE, reference.statistics)
    assert found["fd"] == known.value
    assert found["relative-fd"] == pytest.approx(100 * known.value / np.trace(np.cov(x.T)), rel=1e-12)

    def kernel_sums(kernel) -> tuple[float, float]:
        """Without the diagonals, and with them."""
        xx, xy, yy = kernel(x, x), kernel(x, y), kernel(y, y)
        without = [(k.sum() - np.trace(k)) / len(k) / (len(k) - 1) for k in (xx, yy)]
        return sum(without) - 2 * xy.mean(), xx.mean() + yy.mean() - 2 * xy.mean()

    assert found["kd"] == pytest.approx(kernel_sums(lambda a, b: (a @ b.T / 6 + 1) ** 3)[0], rel=1e-4)
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    assert found["clip-mmd"] == pytest.approx(1000 * kernel_sums(lambda a, b: np.exp((a @ b.T - 1) / 100))[1], rel=1e-3)

    values = np.linalg.eigvalsh(y.T @ y / 70)
    assert found["vendi"] == pytest.approx(np.exp(entropy(values)), rel=1e-10)
    assert found["vendi@2"] == pytest.approx(1 / (values**2).sum(), rel=1e-10)
    assert found["vendi@inf"] == pytest.approx(1 / values.max(), rel=1e-10)

    p = torch.softmax(LOGITS.double(), 1).numpy()
    assert found["inception-score"] == pytest.approx(np.exp(np.mean([entropy(q, p.mean(0)) for q in p])), rel=1e-12)
    predicted = LOGITS.argmax(1).numpy()
    assert found["class-entropy"] == pytest.approx(entropy(np.bincount(predicted)) / np.log(4), rel=1e-12)
    assert found["class-accuracy"] == pytest.approx((predicted == LABELS.numpy()).mean(), rel=1e-12)


def chosen(n: int, m: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:m].sort().values


def test_sets_that_are_sorted_by_class_are_judged_as_fairly() -> None:
    """Ten clusters, and a reference that has five times as many rows."""
    centres = 8 * normal(10, 6, seed=5)
    real = centres.repeat_interleave(100, 0) + normal(1000, 6, seed=6)
    fake = centres.repeat(20, 1) + normal(200, 6, seed=7)
    shuffled = real[torch.randperm(1000, generator=torch.Generator().manual_seed(1))]
    names = ["precision", "recall", "coverage"]
    sorted_, fair = (evaluate(fake, Reference.of(rows), names) for rows in (real, shuffled))
    for name in names:
        assert sorted_[name].value > 0.5
        assert abs(sorted_[name].value - fair[name].value) < 0.15


def test_the_reference_is_the_real_side_and_the_neighbours_are_of_equally_many(reference: Reference) -> None:
    """70 of its 90 rows; and 50 of the samples, where the reference has 50; which ones is drawn from the numbers."""
    fewer = Reference.of(REAL[:50], "noise")
    for against, m in ((reference, 70), (fewer, 50)):
        found = evaluate(FAKE, against, DEFAULT_METRICS)
        real, fake = (rows[chosen(len(rows), m)] for rows in (against.rows, FAKE))
        shares = precision_recall(real, fake)
        assert (found["precision"].value, found["recall"].value) == (shares.precision, shares.recall)
        assert shares.precision != shares.recall
        masses = density_coverage(real, fake)
        assert (found["density"].value, found["coverage"].value) == (masses.density, masses.coverage)
    all_of_both = evaluate(FAKE, fewer, ["kd"])["kd"]
    assert all_of_both != evaluate(FAKE[:50], fewer, ["kd"])["kd"]


def test_the_error_of_an_accuracy_is_that_of_a_share(reference: Reference) -> None:
    """Of 4000 coins; the jackknife over ten blocks knows it to 1 / sqrt(18), here four times that."""
    n = 4000
    features, right = normal(n, 6, seed=3), torch.rand(n, generator=torch.Generator().manual_seed(4)) < 0.8
    logits = torch.stack([right.float(), 1 - right.float()], 1)
    estimate = evaluate(features, reference, ["class-accuracy"], logits=logits, labels=torch.zeros(n).long())
    share = float(right.double().mean())
    assert estimate["class-accuracy"].value == pytest.approx(share, rel=1e-12)
    assert estimate["class-accuracy"].debiased == pytest.approx(share, rel=1e-12)
    assert estimate["class-accuracy"].standard_error == pytest.approx((share * (1 - share) / n) ** 0.5, rel=4 / 18**0.5)


def test_too_few_for_an_error_have_values(reference: Reference) -> None:
    found = evaluate(FAKE[:8], reference, ALL, logits=LOGITS[:8], labels=LABELS[:8])
    assert all(math.isfinite(estimate.value) for estimate in found.values())
    for name in ("fd", "class-accuracy", "precision"):
        assert found[name].standard_error is None
    assert found["fd"].warning is not None


def test_statistics_are_enough_where_no_pairs_are_needed(reference: Reference) -> None:
    alone = Reference(reference.statistics)
    names = ["fd", "relative-fd", "vendi", "inception-score", "class-entropy", "class-accuracy"]
    kept = evaluate(FAKE, reference, names, logits=LOGITS, labels=LABELS)
    assert evaluate(FAKE, alone, names, logits=LOGITS, labels=LABELS) == kept
    for name in sorted(set(METRIC_NAMES) - set(names)):
        with pytest.raises(ValueError, match=f"metrics: {name} needs the reference's images"):
            evaluate(FAKE, alone, ["fd", name])


def broken(*rows: int) -> Tensor:
    bad = FAKE.clone()
    bad[list(rows), 2] = float("nan")
    return bad


@pytest.mark.parametrize(
    ("features", "more", "message"),
    [
        (FAKE, {"metrics": ["fid"]}, "metrics: 'fid'; accepted are fd, relative-fd"),
        (FAKE, {"metrics": ["vendi@x"]}, "metrics: 'vendi@x'; accepted are"),
        (FAKE, {"metrics": ["fd@2"]}, "metrics: 'fd@2'; accepted are"),
        (FAKE, {"metrics": ["inception-score"]}, r"inception-score needs an extractor that classifies \(noise does"),
        (FAKE, {"metrics": ["class-entropy"]}, "class-entropy needs an extractor that classifies"),
        (FAKE, {"metrics": ["class-accuracy"], "logits": LOGITS}, "class-accuracy needs samples that were asked for"),
        (FAKE, {"metrics": ["class-accuracy"], "logits": LOGITS, "labels": LABELS[:9]}, r"labels: shape \[9\]; needed"),
        (FAKE, {"metrics": ["inception-score"], "logits": LOGITS[:9]}, r"logits: shape \[9, 4\]; needed are 70 rows"),
        (FAKE[:, :5], {}, r"features: shape \[70, 5\] is not \[N, 6\]"),
        (FAKE[0], {}, r"features: shape \[6\] is not \[N, 6\]"),
        (broken(3, 40), {"metrics": ["fd"]}, "features: 2 of 70 rows have NaN or infinite values: rows 3, 40"),
        (broken(*range(9)), {}, "features: 9 of 70 rows have NaN or infinite values: rows 0, 1, 2, 3, 4, ..."),
        (FAKE[:1], {"metrics": ["fd"]}, "1 rows have no covariance"),
        (FAKE[:3], {"metrics": ["precision", "recall"]}, "recall of 3 neighbours among 3|precision of 3 neighbours"),
    ],
)
def test_what_cannot_be_judged_is_refused(features: Tensor, more: dict, message: str, reference: Reference) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(features, reference, **more)


def test_a_reference_that_does_not_vary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all 9 samples have the same features \(noise\)"):
        Reference.of(torch.ones(9, 4), "noise")
    with pytest.raises(ValueError, match="1 rows have no covariance"):
        Reference.of(torch.ones(1, 4))
    constant = Reference(FeatureStatistics.of_moments(np.zeros(6), np.zeros((6, 6))))
    assert evaluate(FAKE, constant, ["fd"])["fd"].value > 0
    with pytest.raises(ValueError, match="relative-fd needs a reference that varies"):
        evaluate(FAKE, constant, ["relative-fd"])


# Digits: what the numbers say of images that people know


@pytest.fixture(scope="module")
def held_out() -> Extracted:
    return load_extractor("digits", (1, 8, 8))(digits("held-out").images)


@pytest.fixture(scope="module")
def real(held_out: Extracted) -> Reference:
    return Reference.of(held_out.features, "digits")


def gaussian(n: int) -> Tensor:
    """Samples of the Gaussian with the training half's mean and covariance: right moments, wrong digits."""
    rows = digits("train").images.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    samples = normal(n, 64).double() * values.clamp(min=0).sqrt() @ vectors.T + rows.mean(0)
    return samples.float().reshape(-1, 1, 8, 8)


def test_the_reference_against_itself_is_perfect(real: Reference, held_out: Extracted) -> None:
    labels = digits("held-out").labels
    names = ["fd", "relative-fd", "precision", "recall", "coverage", "class-entropy", "class-accuracy"]
    found = {
        name: estimate.value
        for name, estimate in evaluate(held_out.features, real, names, logits=held_out.logits, labels=labels).items()
    }
    assert (found["fd"], found["relative-fd"]) == (pytest.approx(0, abs=1e-10), pytest.approx(0, abs=1e-10))
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["class-entropy"] == pytest.approx(1, abs=0.001)
    assert found["class-accuracy"] > 0.97


def test_the_ladder_of_baselines(real: Reference) -> None:
    """Real digits are better than a Gaussian with their moments, and that is better than noise, by every number."""
    extractor = load_extractor("digits", (1, 8, 8))
    floor, fitted, nothing = (
        {name: estimate.value for name, estimate in evaluate(extractor(images).features, real, names).items()}
        for names in [["relative-fd", "precision", "recall", "kd", "density", "coverage"]]
        for images in (digits("train").images, gaussian(2000), normal(2000, 1, 8, 8))
    )
    assert floor["relative-fd"] < 0.5 < 5 < fitted["relative-fd"] < 20 < nothing["relative-fd"]
    assert floor["precision"] > 0.85 > 0.6 > fitted["precision"] > nothing["precision"]
    assert floor["recall"] > 0.85 > fitted["recall"] > nothing["recall"]
    assert floor["kd"] < fitted["kd"] < nothing["kd"]
    assert floor["density"] > fitted["density"] > nothing["density"]
    assert floor["coverage"] > fitted["coverage"] > nothing["coverage"]


def test_relative_fd_is_in_hundredths_of_the_references_spread(real: Reference) -> None:
    """A constant set at the reference's mean would get 100; the reference's spread is all it lacks."""
    assert real.rows is not None
    rows = real.rows[:1].expand(40, -1)
    away = float((rows[0].double() - real.statistics.mean).square().sum())
    spread = float(real.statistics.covariance.trace())
    assert evaluate(rows, real, ["relative-fd"])["relative-fd"].value == pytest.approx(
        100 * (1 + away / spread), rel=1e-6
    )


def test_class_accuracy_is_the_share_of_labels_that_came_true(real: Reference, held_out: Extracted) -> None:
    labels = digits("held-out").labels
    assert labels is not None
    shifted = (labels + 1) % 10
    half = torch.where(torch.arange(898) % 2 == 0, labels, shifted)
    full, half_right, none = (
        evaluate(held_out.features, real, ["class-accuracy"], logits=held_out.logits, labels=asked)[
            "class-accuracy"
        ].value
        for asked in (labels, half, shifted)
    )
    assert full > 0.97
    assert half_right == pytest.approx(full / 2, abs=0.01)
    assert none < 0.03


def test_without_errors_the_values_are_the_same(reference: Reference) -> None:
    names = ["fd", "vendi"]
    fast, full = (evaluate(FAKE, reference, names, errors=errors) for errors in (False, True))
    for name in names:
        assert fast[name].value == pytest.approx(full[name].value, rel=1e-12)
        assert fast[name].standard_error is None
        assert full[name].standard_error is not None
