"""The judge of the embedded digits: a 64-128-32-10 perceptron, trained on the training half only.

Its penultimate layer (32 numbers) plays the part that Inception plays for photographs: there the Fréchet distance
and precision/recall are taken. Its answers give the class entropy and accuracy of samples. The weights are shipped
and carry their seed, their accuracy and the command that makes them again:

    python -m tools.digits_classifier --out tools/weights/digits-classifier.safetensors
"""

import argparse
import functools
import hashlib
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data import digits
from samplers.atomic import atomic_write

WEIGHTS = Path(__file__).with_name("weights") / "digits-classifier.safetensors"
N_CLASSES = 10
IMAGE_SHAPE = (1, 8, 8)
FEATURE_DIM = 32


class DigitsClassifier(nn.Module):
    """Images [B, 1, 8, 8] in [-1, 1] -> logits [B, 10], through `features` [B, 32] (after the ReLU)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, FEATURE_DIM)
        self.last = nn.Linear(FEATURE_DIM, N_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer, [B, 32]. Raises ValueError for images of another shape."""
        if images.shape[1:] != IMAGE_SHAPE:
            raise ValueError(f"images: shape {list(images.shape)} is not [B, 1, 8, 8]")
        return F.relu(self.second(F.relu(self.first(images.flatten(1)))))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.features(images))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The most likely class of each image, [B] (int64)."""
        return self(images).argmax(dim=1)

    def fingerprint(self) -> str:
        """Eight hex digits of the sha256 of the weights: numbers of two different judges do not compare.

        Not of the file, in which safetensors writes the metadata in any order.
        """
        digest = hashlib.sha256()
        for name, weight in sorted(self.state_dict().items()):
            digest.update(name.encode() + weight.numpy().tobytes())
        return digest.hexdigest()[:8]

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> "DigitsClassifier":
        """The shipped classifier, or one that the command wrote; ready to judge (eval, no gradients).

        Raises ValueError, naming the file, when it does not hold these weights.
        """
        try:
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            classifier = cls()
            classifier.load_state_dict(state)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"weights: {path} does not hold the digits classifier ({type(error).__name__})") from error
        return classifier.eval().requires_grad_(False)


@functools.cache
def _shipped() -> DigitsClassifier:
    return DigitsClassifier.load()


def log_probability(images: Tensor, labels: Tensor | None) -> Tensor:
    """log p(label | image) by the shipped classifier, [B], in nats: a reward for `distill sample --target reward`.

    images: [B, 1, 8, 8]; labels: [B]. Raises ValueError without labels.
    """
    if labels is None:
        raise ValueError("labels: are None; the reward is the log-probability of a class")
    return _shipped().to(images.device)(images).log_softmax(1).gather(1, labels[:, None])[:, 0]


def train(
    seed: int = 0, epochs: int = 100, batch: int = 64, noise: float = 0.2, shift: float = 0.4
) -> DigitsClassifier:
    """Train on the digits' training half, with noise (standard deviation) and sub-pixel shifts (pixels) against
    learning it by heart. The same arguments give the same weights on the same machine and number of threads.
    """
    generator = torch.Generator().manual_seed(seed)
    data = digits("train")
    assert data.labels is not None
    with torch.random.fork_rng(devices=[]):  # the layers draw from the global generator
        torch.manual_seed(seed)
        classifier = DigitsClassifier()

    steps = epochs * (len(data) // batch)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator)
        for chosen in order[: len(order) // batch * batch].split(batch):
            images = _shifted(data.images[chosen], shift, generator)
            images = images + noise * torch.randn(images.shape, generator=generator)
            loss = F.cross_entropy(classifier(images), data.labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def _shifted(images: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `shift` pixels either way, bilinearly; the border is background (-1)."""
    height, width = images.shape[-2:]
    moves = (2 * torch.rand(len(images), 2, generator=generator) - 1) * shift
    affine = torch.eye(2, 3).repeat(len(images), 1, 1)
    affine[:, :, 2] = moves * torch.tensor([2 / width, 2 / height])
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def accuracy(classifier: DigitsClassifier) -> float:
    """The share of the held-out half that is classified rightly."""
    data = digits("held-out")
    assert data.labels is not None
    return float((classifier.predict(data.images) == data.labels).double().mean())


def main(argv: list[str] | None = None) -> int:
    """Train, report the held-out accuracy, and write the weights with what they are."""
    parser = argparse.ArgumentParser(prog="python -m tools.digits_classifier", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)  # sums are cut by the number of threads, and the last bits with them
    classifier = train(seed=arguments.seed)
    held_out = accuracy(classifier)
    metadata = {
        "command": f"python -m tools.digits_classifier --out tools/weights/{WEIGHTS.name} --seed {arguments.seed}",
        "held_out_accuracy": f"{held_out:.4f}",
        "seed": str(arguments.seed),
        "trained_on": "digits, training half (899 images)",
    }
    with atomic_write(arguments.out) as file:
        file.write(save(classifier.state_dict(), metadata))
    print(f"held-out accuracy {held_out:.4f}; wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
