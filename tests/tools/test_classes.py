"""The Inception Score by its definition, and counts of classes."""

import math

import pytest
import scipy.special
import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore

from tools.classes import class_accuracy, class_entropy, inception_score
from tools.jackknife import BLOCKS, block_of, jackknife


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(logits: Tensor) -> float:
    p = scipy.special.softmax(logits.numpy(), axis=1)
    return math.exp(scipy.special.rel_entr(p, p.mean(axis=0)).sum(axis=1).mean())


# The Inception Score


def test_it_and_its_error_are_the_definition() -> None:
    logits = 2 * normal(83, 7) + torch.arange(7) / 3
    found = inception_score(logits)
    left = [definition(logits[block_of(range(83)) != b]) for b in range(BLOCKS)]
    assert found.value == pytest.approx(definition(logits), rel=1e-12)
    assert found.leave_one_out == pytest.approx(left, rel=1e-12)
    expected = jackknife(found.value, left)
    assert found.debiased == pytest.approx(expected.debiased, rel=1e-10)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-10)
    assert found.interval == pytest.approx(expected.interval, rel=1e-10)


class Says(torch.nn.Module):
    """The logits of image k, whose pixels are k."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


def test_torchmetrics_agrees_on_one_split() -> None:
    logits = normal(60, 5).float()
    theirs = InceptionScore(feature=Says(logits), splits=1)
    theirs.update(torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 2, 2))
    assert inception_score(logits).value == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_it_is_one_for_equal_samples_and_the_number_of_classes_for_sure_and_even_ones() -> None:
    assert inception_score(normal(1, 6).repeat(30, 1)).value == pytest.approx(1, abs=1e-14)
    assert inception_score(normal(1, 6).repeat(30, 1)).value >= 1
    assert inception_score(1000 * torch.eye(6).repeat(5, 1)).value == pytest.approx(6, rel=1e-14)
    assert inception_score(normal(30, 1)).value == 1
    assert inception_score(normal(1, 4)).value == pytest.approx(1, abs=1e-14)
    assert inception_score(normal(9, 4)).standard_error is None


@pytest.mark.parametrize("scale", [1e30, 1e300])
def test_extreme_logits_are_sure_answers(scale: float) -> None:
    logits = normal(40, 4)
    sure = inception_score(scale * logits)
    shares = torch.bincount(logits.argmax(dim=1), minlength=4) / 40
    assert sure.value == pytest.approx(math.exp(float(torch.special.entr(shares.double()).sum())), rel=1e-6)
    shifted = inception_score(logits + scale)  # in which the differences are lost, and not more
    assert shifted.value == pytest.approx(1, abs=1e-12)
    assert inception_score(1.7e308 * (2 * torch.eye(2).double() - 1)).value == pytest.approx(2)


def test_it_is_the_same_in_any_order_and_with_blocks_that_are_given() -> None:
    logits, order = normal(50, 3), torch.randperm(50, generator=torch.Generator().manual_seed(1))
    one, other = inception_score(logits), inception_score(logits[order], block_of(range(50))[order])
    assert one.leave_one_out == pytest.approx(other.leave_one_out, rel=1e-13)
    assert inception_score(logits.float().requires_grad_()).value == pytest.approx(one.value, rel=1e-6)


def test_it_names_what_it_cannot_use() -> None:
    bad = normal(12, 3)
    bad[5, 1], bad[7, 0] = float("nan"), -float("inf")
    for logits, blocks, message in (
        (bad, None, "logits: 2 of 12 rows have NaN or infinite values: rows 5, 7"),
        (bad[0], None, r"logits: shape \[3\]"),
        (bad[:0], None, r"logits: shape \[0, 3\]"),
        (normal(12, 3), torch.zeros(12, dtype=torch.int64), "10 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            inception_score(logits, blocks)


# Classes


def test_class_entropy_is_that_of_the_histogram() -> None:
    assert class_entropy(torch.arange(40) % 10, 10) == pytest.approx(1, abs=1e-15)
    assert class_entropy(torch.full((7,), 3), 10) == 0
    assert class_entropy(torch.tensor([0, 0, 1, 1]), 4) == pytest.approx(0.5)
    assert class_entropy(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(2 - 0.75 * math.log2(3))


def test_class_entropy_names_what_it_cannot_use() -> None:
    for labels, n_classes, message in (
        ([0, 4], 4, "0 to 4 are not all in 0 to 3"),
        ([-1, 2], 4, "-1 to 2 are not all"),
        ([], 4, r"labels: shape \[0\]"),
        ([0], 1, "n_classes: 1"),
    ):
        with pytest.raises(ValueError, match=message):
            class_entropy(torch.tensor(labels, dtype=torch.int64), n_classes)


def test_class_accuracy_is_the_share_of_those_asked_for() -> None:
    assert class_accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])) == 0.75
    for predicted, asked in (
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(1, 2),) * 2,
    ):
        with pytest.raises(ValueError, match="labels: shapes"):
            class_accuracy(predicted, asked)
