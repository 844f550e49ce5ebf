"""Fit a Gaussian to images or latents as they stream by, on any number of processes: `distill gaussian`.

Chunk c of the images belongs to process c modulo their number; moments are merged in the order of the processes. The
samples that a jump's cost is judged by are chosen by the seed before the first image is read.
"""

import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from distill import data
from distill.config import FitGaussian
from distill.generate import usable_device
from distill.latents import Encoder, read_encoder
from distill.noise import JUDGED, LATENTS
from distill.progress import Progress
from distill.run import LIBRARIES
from distill.sections import Data
from distill.together import joined, together
from samplers import SampleNoise
from samplers.bound import bound_of, kept_count
from samplers.gaussian import Gaussian
from samplers.moments import Moments
from samplers.pipelines import vae_facts

Source = data.Images | data.ImageFiles


def fit_gaussian(config: FitGaussian) -> Gaussian | None:
    """Writes the Gaussian that the configuration asks for; returns it on the first process, None on the others.

    Raises ValueError, the same on all processes, for data, a rank or a pipeline that do not fit (before anything is
    read), an image that cannot be read, a latent that is not finite, and fewer samples than a covariance needs.
    """
    accelerator = joined()
    device = accelerator.device if config.device is None else usable_device(config.device)
    source = _source(config)
    encoder = None if config.pipeline is None else read_encoder(config.pipeline, device)
    fit = Fit(config, source, encoder)
    _check_writable(Path(config.out))

    processes, n = accelerator.num_processes, len(source)
    with Progress(n, "image") as progress:
        shown = -1
        for start in range(0, n, config.batch * processes):
            first = start + accelerator.process_index * config.batch
            together(fit.take, range(first, min(first + config.batch, n)), accelerator)
            done = min(n, start + config.batch * processes)
            if 100 * done // n > shown:  # where there is no bar, a line for every hundredth
                shown = 100 * done // n
                progress(done)

    parts = gather_object([(fit.moments.state(), fit.kept)])
    return together(lambda parts: _finish(config, fit.facts(), parts), parts, accelerator, only_first=True)


class Fit:
    """A process's part of a fit: moments, and the samples that are kept, by number."""

    def __init__(self, config: FitGaussian, source: Source, encoder: Encoder | None = None) -> None:
        self._config, self._source, self._encoder = config, source, encoder
        if config.classes and source.labels is None:
            raise ValueError(f"classes: true; {_named(config.data)} has no classes (sub-folders of images)")
        n_classes = len(source.classes) if config.classes else None
        shape = source.shape if encoder is None else encoder.shape(config.data.channels, config.data.size)
        spanned = len(source) * (1 + config.flip) - (n_classes or 1)
        if config.rank is not None and config.rank > spanned:
            raise ValueError(f"rank: {config.rank}; {len(source)} images span {max(0, spanned)} directions")
        self.moments = Moments(shape, n_classes, rank=config.rank)
        self.kept: dict[int, tuple[Tensor, int | None]] = {}
        kept = kept_count(self.moments.dim, n_classes)
        self._chosen = _chosen(len(source), kept, config.seed, config.flip)

    def take(self, numbers: range) -> None:
        """Add the images with these numbers. Raises ValueError, naming an image that is not fit for use."""
        if not numbers:
            return
        config, source = self._config, self._source
        images = source.read(numbers)
        labels = source.labels[list(numbers)] if config.classes and source.labels is not None else None
        noise = SampleNoise(config.seed, numbers, LATENTS)
        for mirrored in (False, True)[: 1 + config.flip]:
            x = images.flip(-1) if mirrored else images
            if self._encoder is not None:
                x = self._encoder(x, noise)
            for row, number in enumerate(numbers):
                if not bool(x[row].isfinite().all()):
                    raise ValueError(f"{source.name(number)}: its latent is not finite")
                if self._chosen.get(number) == mirrored:  # a copy: a view would keep the batch
                    self.kept[number] = (x[row].clone(), None if labels is None else int(labels[row]))
            self.moments.update(x, labels)

    def facts(self) -> dict[str, Any]:
        """What the file says of its origin: JSON."""
        config, encoder = self._config, self._encoder
        return {
            "data": _named(config.data),
            "range": [-1.0, 1.0] if encoder is None else None,
            "classes": list(self._source.classes) if config.classes else None,
            "vae": None if encoder is None else vae_facts(encoder.vae),
            "count": len(self._source),
            "flip": config.flip,
            "seed": config.seed,
            "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        }


def describe(gaussian: Gaussian, tolerance: float) -> list[str]:
    """What was fitted, and how far a jump may go, in two lines."""
    own = float(gaussian.variances.sum())
    total = own + (gaussian.dim - gaussian.rank) * gaussian.rest
    classes = "" if gaussian.n_classes is None else f", {gaussian.n_classes} classes"
    lines = [
        f"{gaussian.count} samples of {list(gaussian.shape)}{classes}: {gaussian.dim} dimensions, rank "
        f"{gaussian.rank} with {own / total if total else 1:.2%} of the variance"
    ]
    if gaussian.bound is not None:
        try:
            sigma = gaussian.bound.sigma_skip(tolerance)
            lines.append(
                f"a jump to sigma {sigma:.4g} costs {gaussian.bound.at(sigma):.3g} nats at most, by these samples"
            )
        except ValueError as error:
            lines.append(f"no jump is known to be within the tolerance without a network: {error}")
    return lines


def _finish(
    config: FitGaussian,
    facts: dict[str, Any],
    parts: list[tuple[dict[str, Tensor], dict[int, tuple[Tensor, int | None]]]],
) -> Gaussian:
    """Merges what the processes saw, judges the result by the kept samples, and writes it."""
    merged = Moments.from_state(parts[0][0])
    for state, _ in parts[1:]:
        merged.merge(Moments.from_state(state))
    gaussian = merged.gaussian(config.rank, config.tolerance, facts)
    _check_count(gaussian, config.tolerance)
    kept = sorted((number, *sample) for _, own in parts for number, sample in own.items())
    samples = torch.stack([x for _, x, _ in kept])
    labels = torch.tensor([label for _, _, label in kept]) if config.classes else None
    gaussian = gaussian.with_bound(bound_of(samples, gaussian, labels))
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    gaussian.save(config.out)
    return gaussian


def _check_count(gaussian: Gaussian, tolerance: float) -> None:
    """Raise ValueError, with how many would do, for samples too few for a jump from any usual start.

    That is where half the tolerance goes into their number at sixteen standard deviations of the data: Stable
    Diffusion's sigma_max is 15, EDM's is 160.
    """
    total = float(gaussian.variances.sum()) + (gaussian.dim - gaussian.rank) * gaussian.rest
    sigma = 16 * math.sqrt(total / gaussian.dim)
    if sigma and gaussian.sampling_kl(sigma) > tolerance / 2:
        needed = gaussian.samples_needed(sigma, tolerance / 2)
        raise ValueError(
            f"data: {gaussian.count} samples are too few for a Gaussian of {gaussian.dim} dimensions; about {needed} "
            f"are needed for a jump to sigma {sigma:.3g} within {tolerance:g} nats"
        )


def _chosen(n: int, kept: int, seed: int, flip: bool) -> dict[int, bool]:
    """Some of n images, without replacement, and whether each is mirrored: a function of its arguments only."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, JUDGED], np.uint64)))
    numbers = rng.permutation(n)[:kept].tolist()
    mirrored = rng.integers(2, size=len(numbers)).astype(bool).tolist()
    return {number: flip and m for number, m in zip(numbers, mirrored, strict=True)}


def _check_writable(out: Path) -> None:
    """Raises ValueError, before the work, for a place where no file can appear."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if out.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"out: {out} cannot be written")


def _source(config: FitGaussian) -> Source:
    if config.data.name == "digits":
        return data.digits("train")
    return data.image_files(str(config.data.path), config.data.size, config.data.channels)


def _named(choice: Data) -> str:
    """What to call a data set: the folder, or the name."""
    return choice.name if choice.path is None else choice.path
