import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import digits
from tools.digits_classifier import WEIGHTS, DigitsClassifier
from tools.features import NETWORKS, dequantise, load_extractor, quantise
from tools.presets import PRESET_NAMES, PRESETS, RANGES
from tools.resize import FILTERS


def colours(*shapes: tuple[int, int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]


def test_quantise_is_floor_of_the_stated_formula() -> None:
    x = torch.tensor([-9, -1, -0.9999, -1 / 255, 0, 1 / 255, 0.5, 0.9999, 1, 9])
    assert quantise(x[:, None]).flatten().tolist() == [0, 0, 0, 127, 128, 128, 191, 255, 255, 255]


def test_every_grey_level_survives_a_png() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    assert torch.equal(quantise(dequantise(levels)), levels)

    file = io.BytesIO()
    Image.fromarray(levels.numpy()).save(file, "PNG")
    assert torch.equal(torch.from_numpy(np.array(Image.open(file))), levels)


def test_presets_are_whole() -> None:
    assert len({(preset.network, preset.preparation((3, 8, 8))) for preset in PRESETS.values()}) == len(PRESETS)
    for preset in PRESETS.values():
        assert preset.network in NETWORKS
        assert preset.range in RANGES
        assert (preset.filter in FILTERS) == (preset.size is not None)


def test_the_names_of_presets_need_no_torch() -> None:
    code = "import sys, tools.presets; assert 'torch' not in sys.modules; print(*tools.presets.PRESET_NAMES)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert tuple(printed.split()) == PRESET_NAMES == tuple(PRESETS)


@pytest.mark.parametrize("name", ["digits", "pixels"])
def test_features_of_digits(name: str) -> None:
    extractor = load_extractor(name, (1, 8, 8))
    images = digits("held-out").images
    rows = extractor(images).features
    assert rows.shape == (898, extractor.dim)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(extractor(images[5:9]).features, rows[5:9])
    assert torch.equal(extractor(images + 1e-4).features, rows)  # finer than a grey level
    assert torch.equal(extractor(quantise(images)).features, rows)
    assert torch.equal(extractor(list(quantise(images))).features, rows)
    assert extractor.name.endswith("|1x8x8 x/127.5-1|u8|f32")


def test_pixels_are_the_quantised_pixels() -> None:
    images = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    extractor = load_extractor("pixels", (3, 5, 6))
    assert extractor.dim == 90
    extracted = extractor(images)
    torch.testing.assert_close(extracted.features, images.clamp(-1, 1).flatten(1), rtol=0, atol=1 / 255 + 1e-6)
    assert extracted.logits is None


def test_digits_features_feed_the_classifiers_last_layer() -> None:
    classifier, images = DigitsClassifier.load(), digits("held-out").images
    extractor = load_extractor("digits", (1, 8, 8))
    extracted = extractor(images)
    assert extracted.logits is not None
    assert torch.equal(extracted.logits, classifier.last(extracted.features))
    assert torch.equal(extracted.logits.argmax(dim=1), classifier.predict(dequantise(quantise(images))))
    assert extractor.name.startswith(f"digits-{classifier.fingerprint()}|")
    assert load_extractor(f"digits:{WEIGHTS}", (1, 8, 8)).name == extractor.name


def test_images_of_other_shapes_raise_with_both() -> None:
    extractor = load_extractor("pixels", (3, 8, 8))
    with pytest.raises(ValueError, match=r"number 1 is 3x9x8; pixels\|3x8x8 x/127.5-1\|u8\|f32 reads 3x8x8"):
        extractor(colours((3, 8, 8), (3, 9, 8)))
    with pytest.raises(ValueError, match=r"number 0 is 1x8x8; .* reads 3x8x8"):
        extractor(torch.zeros(5, 1, 8, 8))
    for shape in ((4, 8, 8), (2, 8, 8), (8, 8), (3, 0, 8)):
        with pytest.raises(ValueError, match=r"number 0 is uint8 of shape .*; accepted: uint8 \[C, H, W\] with 1 or 3"):
            extractor([torch.zeros(shape, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"number 0 is float32 of shape \[3, 8, 8\]"):
        extractor([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match=r"number 0 is int64"):
        extractor(torch.zeros(2, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="images: none"):
        extractor([])


def test_pixels_that_are_no_numbers_raise() -> None:
    images = torch.zeros(5, 1, 8, 8)
    images[1, 0, 2, 3] = float("nan")
    images[4, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="2 of 5 have NaN or infinite"):
        load_extractor("pixels", (1, 8, 8))(images)


def test_extractors_that_do_not_read_the_images_raise() -> None:
    with pytest.raises(ValueError, match="digits reads images of 1x8x8, not 3x32x32"):
        load_extractor("digits", (3, 32, 32))
    for spec in ("digits", "pixels", "torch.nn:Flatten"):
        with pytest.raises(ValueError, match=r"reads images of one size, and these have several"):
            load_extractor(spec, None)
    with pytest.raises(ValueError, match="inception-clean reads images of 1 or 3 channels, not 4x32x32"):
        load_extractor("inception-clean", (4, 32, 32))
    with pytest.raises(
        ValueError, match=r"features: 'inception'; accepted: digits, pixels, inception-clean, .*:attrib"
    ):
        load_extractor("inception", (3, 32, 32))
    with pytest.raises(ValueError, match=r"pixels has no weights, and 'a.pt' was given"):
        load_extractor("pixels:a.pt", (3, 32, 32))
    with pytest.raises(ValueError, match=r"a.safetensors does not hold the digits classifier"):
        load_extractor("digits:a.safetensors", (1, 8, 8))
