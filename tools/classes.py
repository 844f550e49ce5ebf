"""What a classifier says of samples: the Inception Score, how even the classes are, whether they are those asked for.

Inception Score: Salimans et al. 2016, "Improved techniques for training GANs", section 4: exp E KL(p(y|x) || p(y)).
"""

import math

import torch
from torch import Tensor

from tools.gram import few
from tools.jackknife import BLOCKS, Estimate, jackknife, of_blocks


def inception_score(logits: Tensor, blocks: Tensor | None = None) -> Estimate:
    """From 1 to C, of the logits [N, C] of all N samples at once (published values are means over ten splits).

    KL is E sum p log p - sum pbar log pbar: sums over samples, in float64, so the errors by `blocks` [N] (None:
    `block_of`) cost nothing. Fewer than ten samples have no errors. Raises ValueError for another shape, no samples,
    and logits that are not finite.
    """
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits: shape {list(logits.shape)} is not [N, C] with N and C of 1 or more")
    bad = (~logits.isfinite().all(dim=1)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"logits: {len(bad)} of {len(logits)} rows have NaN or infinite values: {few(bad)}")

    several = blocks is not None or len(logits) >= BLOCKS
    block = of_blocks(blocks, len(logits)) if several else torch.zeros(len(logits), dtype=torch.int64)
    return score_of_sums(*block_sums(logits, block))


def block_sums(logits: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of samples with logits [N, C] in blocks [N]: probabilities [10, C] and entropies [10] summed, counts [10]."""
    probabilities, block = torch.softmax(logits.detach().double(), dim=1), block.to(logits.device)
    entropies = torch.special.entr(probabilities).sum(dim=1)
    marginals = probabilities.new_zeros(BLOCKS, logits.shape[1]).index_add_(0, block, probabilities)
    conditionals = probabilities.new_zeros(BLOCKS).index_add_(0, block, entropies)
    return marginals, conditionals, torch.bincount(block, minlength=BLOCKS)


def score_of_sums(marginals: Tensor, conditionals: Tensor, counts: Tensor) -> Estimate:
    """The Inception Score from `block_sums`, added up over batches or ranks; without an error if a block is empty.

    Raises ValueError for no samples.
    """
    marginal, conditional, n = marginals.sum(dim=0), conditionals.sum(), int(counts.sum())
    if not n:
        raise ValueError("logits: 0 samples have no score (1 or more)")
    value = _score(marginal, conditional, n)
    if int(counts.min()) < 1:
        return Estimate(value)
    left = [_score(marginal - marginals[b], conditional - conditionals[b], n - int(counts[b])) for b in range(BLOCKS)]
    return jackknife(value, left)


def _score(marginal: Tensor, conditional: Tensor, n: int) -> float:
    """From the sums over n samples of the probabilities [C] and of their entropies."""
    divergence = torch.special.entr(marginal.clamp(min=0) / n).sum() - conditional / n
    return math.exp(max(float(divergence), 0.0))  # below 0 by rounding only


def class_entropy(labels: Tensor, n_classes: int) -> float:
    """The entropy of the histogram of labels [N] over ln n_classes: 1 when all classes are equally frequent.

    Raises ValueError for no labels, fewer than two classes, or a label outside 0 ... n_classes - 1.
    """
    if n_classes < 2:
        raise ValueError(f"n_classes: {n_classes} (2 or more)")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels: shape {list(labels.shape)} is not [N] with N of 1 or more")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(f"labels: {int(labels.min())} to {int(labels.max())} are not all in 0 to {n_classes - 1}")
    shares = torch.bincount(labels.cpu(), minlength=n_classes).double() / len(labels)
    return float(torch.special.entr(shares).sum()) / math.log(n_classes)


def class_accuracy(predicted: Tensor, asked: Tensor) -> float:
    """The share of the samples [N] that are of the class asked for. Raises ValueError for unequal shapes or none."""
    if predicted.ndim != 1 or predicted.shape != asked.shape or not len(asked):
        raise ValueError(
            f"labels: shapes {list(predicted.shape)} and {list(asked.shape)} are not [N] with N of 1 or more"
        )
    return float((predicted.cpu() == asked.cpu()).double().mean())
