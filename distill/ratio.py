"""What a configuration says of the ratio r: real samples, heads, what they add to the trainer, and its weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from distill import config as schemas
from distill import data, divergences
from distill.adversary import Adversary, FakeHeads, TeacherHeads
from distill.discriminator import Discriminator
from distill.noise import uncovered
from distill.progress import note
from distill.real import RealImages, RealMixture, RealRows, check_classes, tables_of, teacher_samples
from distill.sections import Data
from distill.subject import Subject
from distill.taps import Tap
from distill.weights import RatioWeight
from samplers import NetworkDenoiser, SampleNoise
from samplers.schedules import karras_index

UNCOVERED = 0.25  # of the student's noise levels, from where on a user is told
Reals = Callable[[SampleNoise, Any], Tensor]


def real_samples(config: schemas.Train, subject: Subject, accelerator: Accelerator) -> Reals | None:
    if config.real.name == "none":
        return None
    if subject.mixture is not None:
        return RealMixture(subject.mixture, accelerator.device)
    if config.real.name == "encoded":
        return real_rows(subject, accelerator.device)
    elif config.real.name == "data":
        found = real_images(config, subject)
        images = found if isinstance(found, data.Images) else found.load()
    else:
        images = teacher_samples(config, subject, accelerator)
    return RealImages(images, subject.shape, subject.n_conditions, accelerator.device)


def real_rows(subject: Subject, device: torch.device) -> RealRows:
    assert subject.rows is not None, "read with the subject"
    check_classes(subject.rows.classes, subject.classes)
    return RealRows(subject.rows, subject.shape, subject.n_conditions, device)


def real_images(config: schemas.Train, subject: Subject) -> data.Images | data.ImageFiles:
    """The images that a configuration names, not yet read. Raises ValueError for those that do not fit the subject."""
    if subject.latent:
        raise ValueError(
            "real.name: data; the teacher samples latents: accepted are encoded (`distill encode` makes latents of "
            "images) and teacher"
        )
    found = _unread(config.real.data)
    check_classes(found.classes, subject.classes)
    tables_of(found, subject.shape, subject.n_conditions)
    return found


def untrained_heads(config: schemas.Train, subject: Subject, device: torch.device) -> Discriminator | None:
    """Untrained heads that fit the features; sizes are read from one pass over one sample."""
    if config.real.name == "none":
        return None
    network, tap = _tapped(config, subject)
    network.to(device)
    where = device
    cond = subject.conditions(SampleNoise(config.seed, [0]), where)
    x, sigma = torch.zeros(1, *subject.shape, device=where), torch.full((1,), network.sigma_max, device=where)
    with torch.no_grad():
        features = tap.encode(lambda: network(x, sigma, cond))
    if any(len(maps) != 1 for maps in features):
        raise ValueError(
            f"discriminator: the features of a {type(network.network).__name__} have {len(features[0])} rows a sample; "
            "read are networks with one (images, not the frames of a video)"
        )
    torch.manual_seed(config.seed)
    return Discriminator(features, ratios=2 if config.target.ratio == "bridge" else 1).to(device)


def _tapped(config: schemas.Train, subject: Subject) -> tuple[NetworkDenoiser, Tap]:
    """The denoiser that a discriminator reads, and where."""
    network = subject.network if config.discriminator.features == "teacher" else subject.fake
    assert network is not None, "a toy has no teacher network: refused by the schema"
    return network, Tap(network.network, config.discriminator.levels)


def adversary_of(
    config: schemas.Train,
    subject: Subject,
    heads: Discriminator,
    train_heads: Callable[..., Tensor],
    reals: Reals,
    starts: Reals | None,
    level: Callable[[Tensor], Tensor],
) -> Adversary:
    choice = config.discriminator
    network, tap = _tapped(config, subject)
    shared: dict[str, Any] = {
        "network": network,
        "tap": tap,
        "heads": heads,
        "train_heads": train_heads,
        "reals": reals,
        "starts": starts,
        "weight": choice.weight,
        "r1": choice.r1,
        "r1_exact": choice.r1_form == "exact",
    }
    return FakeHeads(**shared) if choice.features == "fake" else TeacherHeads(**shared, level=level)


def ratio_weight_of(
    config: schemas.Train, low: float, high: float, parts: int, accelerator: Accelerator
) -> RatioWeight:
    choice, noise = config.divergence, config.noise
    trim = noise.trim if noise.name == "karras" else 0.0

    def index(sigma: Tensor) -> Tensor:
        """Where in the levels that are used, in [0, 1]."""
        return (karras_index(sigma, low, high, noise.rho) - trim) / (1 - 2 * trim)

    return RatioWeight(
        divergences.named(choice.name, choice.exponent),
        choice.clip,
        choice.normalise,
        choice.bins,
        choice.decay ** (1 / parts),
        index,
        partial(accelerator.reduce, reduction="sum"),
        free=config.target.ratio == "bridge",
    ).to(accelerator.device)


def check_normalised(config: schemas.Train, parts: int) -> None:
    """Weights are normalised over a part of the batch of all processes. Raises ValueError where that is one sample."""
    rows, choice = config.batch_size // parts, config.divergence
    if choice.constant or not choice.normalise:
        return
    if rows == 1:
        raise ValueError(
            f"divergence.normalise: over parts of one sample every divergence is reverse KL (batch_size: "
            f"{config.batch_size} in {parts} parts); accepted are larger parts, and False"
        )


def tell(config: schemas.Train, low: float, high: float, parts: int) -> None:
    """What a user should know of a run that is about to begin, and nothing refuses."""
    choice, rows = config.divergence, config.batch_size // parts
    if not choice.constant and choice.normalise and rows < 2 * choice.bins:
        note(
            f"{choice.name} is normalised over parts of {rows} samples in {choice.bins} bins, which pulls its weights "
            "to 1; fewer parts or bins help"
        )
    share = uncovered(config.fake, config.noise, low, high)
    if share > UNCOVERED:
        note(
            f"{share:.0%} of the student's noise levels lie above nearly all of fake.noise, where the fake score stays "
            "the teacher; accepted and better is fake.levels: student, a larger fake.noise, or a lower noise.sigma_max"
        )


def images_of(config: Data) -> data.Images:
    found = _unread(config)
    return found if isinstance(found, data.Images) else found.load()


def _unread(config: Data) -> data.Images | data.ImageFiles:
    if config.name == "digits":
        return data.digits("train")
    return data.image_files(str(config.path), config.size, config.channels)
