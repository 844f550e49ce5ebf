import io

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import digits
from tools.digits_classifier import DigitsClassifier
from tools.features import EXTRACTORS, dequantise, quantise


def test_quantise_is_floor_of_the_stated_formula() -> None:
    x = torch.tensor([-9, -1, -0.9999, -1 / 255, 0, 1 / 255, 0.5, 0.9999, 1, 9])
    assert quantise(x[:, None]).flatten().tolist() == [0, 0, 0, 127, 128, 128, 191, 255, 255, 255]


def test_every_grey_level_survives_a_png() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    assert torch.equal(quantise(dequantise(levels)), levels)

    file = io.BytesIO()
    Image.fromarray(levels.numpy()).save(file, "PNG")
    assert torch.equal(torch.from_numpy(np.array(Image.open(file))), levels)


@pytest.mark.parametrize("name", EXTRACTORS)
def test_features_of_digits(name: str) -> None:
    features = EXTRACTORS[name]((1, 8, 8))
    images = digits("held-out").images
    rows = features(images)
    assert rows.shape == (898, features.dim)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(features(images[5:9]), rows[5:9])
    assert torch.equal(features(images + 1e-4), rows)  # finer than a grey level
    assert "1x8x8|u8" in features.name


def test_pixels_are_the_quantised_pixels() -> None:
    images = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    features = EXTRACTORS["pixels"]((3, 5, 6))
    assert features.dim == 90
    torch.testing.assert_close(features(images), images.clamp(-1, 1).flatten(1), rtol=0, atol=1 / 255 + 1e-6)


def test_digits_features_feed_the_classifiers_last_layer() -> None:
    classifier, images = DigitsClassifier.load(), digits("held-out").images
    rows = EXTRACTORS["digits"]((1, 8, 8))(images)
    assert torch.equal(classifier.last(rows).argmax(dim=1), classifier.predict(dequantise(quantise(images))))
    assert classifier.fingerprint() in EXTRACTORS["digits"]((1, 8, 8)).name


def test_other_shapes_and_values_raise() -> None:
    with pytest.raises(ValueError, match="digits reads images of 1x8x8, not 3x32x32"):
        EXTRACTORS["digits"]((3, 32, 32))
    features = EXTRACTORS["pixels"]((1, 8, 8))
    for shape in ((5, 3, 8, 8), (1, 8, 8), (5, 64)):
        with pytest.raises(ValueError, match=r"is not \['B', 1, 8, 8\]"):
            features(torch.zeros(shape))
    images = torch.zeros(5, 1, 8, 8)
    images[1, 0, 2, 3] = float("nan")
    images[4, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="2 of 5 have NaN or infinite"):
        features(images)
