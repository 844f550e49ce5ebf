import math

import pytest
import torch

from distill.data import digits
from tools.scores import Estimate, Reference, Score, estimate, score, summarise


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of(digits("held-out").images)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gaussian(n: int) -> torch.Tensor:
    """Samples of the Gaussian with the training half's mean and covariance: right moments, wrong digits."""
    rows = digits("train").images.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    samples = noise(n, 64).double() * values.clamp(min=0).sqrt() @ vectors.T + rows.mean(0)
    return samples.float().reshape(-1, 1, 8, 8)


def test_the_reference_against_itself_is_perfect(reference: Reference) -> None:
    held_out = digits("held-out")
    row = score(held_out.images, reference, held_out.labels)
    assert row.fd == pytest.approx(0, abs=1e-10)
    assert row.pixel_fd == pytest.approx(0, abs=1e-10)
    assert (row.precision, row.recall, row.n) == (1, 1, 898)
    assert row.class_entropy == pytest.approx(1, abs=0.001)
    assert row.class_accuracy is not None
    assert row.class_accuracy > 0.97


def test_the_ladder_of_baselines(reference: Reference) -> None:
    """Real digits are better than a Gaussian with their moments, and that is better than noise, by every number."""
    floor = score(digits("train").images, reference)
    fitted, nothing = score(gaussian(2000), reference), score(noise(2000, 1, 8, 8), reference)
    assert floor.fd < 0.5 < 5 < fitted.fd < 20 < nothing.fd
    assert floor.pixel_fd < 0.4 < 0.8 < fitted.pixel_fd < 2 < nothing.pixel_fd
    assert floor.precision > 0.85 > 0.6 > fitted.precision > nothing.precision
    assert floor.recall > 0.85 > fitted.recall > nothing.recall
    assert floor.class_accuracy is None


def test_fd_is_scaled_by_the_references_spread(reference: Reference) -> None:
    """A constant set at the reference's mean would get 100; the reference's spread is all it lacks."""
    images = digits("held-out").images[:1].expand(10, -1, -1, -1)
    row = score(images, reference)
    spread = float(reference.statistics.covariance.trace())
    away = float((reference.features(images[:1])[0].double() - reference.statistics.mean).square().sum())
    assert row.fd == pytest.approx(100 * (1 + away / spread), rel=1e-6)
    assert row.class_entropy == 0


def test_class_accuracy_is_the_share_of_labels_that_came_true(reference: Reference) -> None:
    held_out = digits("held-out")
    assert held_out.labels is not None
    shifted = (held_out.labels + 1) % 10
    half = torch.where(torch.arange(898) % 2 == 0, held_out.labels, shifted)
    full, half_right, none = (
        score(held_out.images, reference, labels).class_accuracy for labels in (held_out.labels, half, shifted)
    )
    assert full > 0.97
    assert half_right == pytest.approx(full / 2, abs=0.01)
    assert none < 0.03


def test_a_score_does_not_depend_on_the_batches(reference: Reference, monkeypatch) -> None:
    whole = score(digits("train").images, reference)
    monkeypatch.setattr("tools.scores.BATCH", 37)
    cut = score(digits("train").images, reference)
    assert cut.fd == pytest.approx(whole.fd, rel=1e-4)
    assert (cut.precision, cut.recall) == (whole.precision, whole.recall)


def test_precision_and_recall_use_equally_many_of_both(reference: Reference) -> None:
    images = gaussian(2000)
    first = score(images[:898], reference)
    both = score(images, reference)
    assert (both.precision, both.recall) == (first.precision, first.recall)
    assert both.fd != first.fd


def test_pixels_alone_judge_other_images() -> None:
    reference = Reference.of(noise(60, 3, 4, 4).clamp(-1, 1), features="pixels")
    row = score(noise(50, 3, 4, 4, seed=1), reference, labels=torch.zeros(50, dtype=torch.int64))
    assert row.fd == pytest.approx(100 * row.pixel_fd / float(reference.pixel_statistics.covariance.trace()))
    assert row.class_entropy is row.class_accuracy is None


def test_what_cannot_be_judged_raises(reference: Reference) -> None:
    with pytest.raises(ValueError, match="'inception' is not one of digits, pixels"):
        Reference.of(torch.zeros(9, 1, 8, 8), features="inception")
    with pytest.raises(ValueError, match="digits reads images of 1x8x8"):
        Reference.of(torch.zeros(9, 3, 8, 8))
    with pytest.raises(ValueError, match="N of 4 or more"):
        Reference.of(torch.zeros(3, 1, 8, 8))
    with pytest.raises(ValueError, match="all 9 images have the same"):
        Reference.of(torch.zeros(9, 1, 8, 8))
    with pytest.raises(ValueError, match=r"labels: shape \[4\] is not \[9\]"):
        score(torch.zeros(9, 1, 8, 8), reference, torch.zeros(4))


def test_summary_is_mean_and_sample_deviation() -> None:
    rows = [Score(fd, 1.0, 0.5, 0.25, 1.0, None, 100) for fd in (1.0, 2.0, 6.0)]
    summary = summarise(rows)
    assert summary["fd"] == Estimate(3.0, math.sqrt(7))
    assert summary["recall"] == Estimate(0.25, 0.0)
    assert summary["class_accuracy"] is None
    assert "n" not in summary
    assert summarise(rows[:1])["fd"] == Estimate(1.0, None)


def test_draws_that_do_not_belong_together_raise() -> None:
    with pytest.raises(ValueError, match="0 draws"):
        summarise([])
    with pytest.raises(ValueError, match=r"2 draws with n of \[99, 100\]"):
        summarise([Score(1, 1, 1, 1, None, None, n) for n in (100, 99)])
    with pytest.raises(ValueError, match="1 of 2 draws lack"):
        estimate([1.0, None])
