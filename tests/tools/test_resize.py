"""Resizing against the libraries whose resizing it repeats: PIL, clean-fid's resizers, torchvision, TensorFlow 1."""

import numpy as np
import pytest
import torch
from cleanfid.resize import make_resizer
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from tools.resize import FILTERS, resize

# Up, down, far down, not square, one side kept, nothing to do.
SIZES = [(32, 32, 299), (512, 512, 299), (700, 400, 64), (33, 97, 48), (48, 97, 48), (48, 48, 48)]


def levels(height: int, width: int, batch: int = 2) -> Tensor:
    """Noise of whole grey levels with edges that overshoot: whole blocks of 0 and 255."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    images = torch.randint(0, 256, (batch, 3, height, width), generator=generator).float()
    images[:, :, : height // 3] = 255
    images[:, :, height // 3 : height // 2] = 0
    return images


def one_by_one(images: Tensor, resizer: object) -> Tensor:
    """clean-fid's resizers map [H, W, 3] arrays of uint8."""
    arrays = images.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return torch.stack([torch.from_numpy(np.array(resizer(array))) for array in arrays]).permute(0, 3, 1, 2).float()  # type: ignore[operator]


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_pil_bicubic_is_clean_fids_to_a_thousandth_of_a_grey_level(height: int, width: int, size: int) -> None:
    images = levels(height, width)
    expected = one_by_one(images, make_resizer("PIL", False, "bicubic", (size, size)))
    ours = resize(images, size, "pil-bicubic")
    assert (ours - expected).abs().max() < 1e-4  # promised: 1e-3
    if (height, width) != (size, size):
        assert (resize(images, size, "torch-bicubic") - expected).abs().max() > 10  # what antialias decides
        assert (F.interpolate(images, (size, size), mode="bicubic", antialias=True) - expected).abs().max() > 1  # clip


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_pil_bicubic_on_bytes_is_pils(height: int, width: int, size: int) -> None:
    images = levels(height, width)
    expected = one_by_one(images, make_resizer("PIL", True, "bicubic", (size, size)))
    differ = (resize(images, size, "pil-bicubic-u8") - expected).abs()
    assert differ.max() <= 1  # PIL's weights have 22 bits: what falls within them of a half may round the other way
    assert differ.count_nonzero() <= 1e-4 * differ.numel()


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_torch_bilinear_is_clean_fids_legacy_pytorch(height: int, width: int, size: int) -> None:
    images = levels(height, width)
    expected = one_by_one(images, make_resizer("PyTorch", False, "bilinear", (size, size)))
    assert (resize(images, size, "torch-bilinear") - expected).abs().max() < 1e-4


def nvidia_tf1(images: Tensor, size: int) -> Tensor:
    """As the published TorchScript file does it: a shifted affine grid and bilinear sampling."""
    height, width = images.shape[-2:]
    theta = torch.eye(2, 3, dtype=images.dtype)
    theta[0, 2] += 1 / width - 1 / size
    theta[1, 2] += 1 / height - 1 / size
    grid = F.affine_grid(theta[None].expand(len(images), -1, -1), [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_tf1_bilinear_is_the_affine_grid_of_the_published_file(height: int, width: int, size: int) -> None:
    images = levels(height, width)
    ours = resize(images, size, "tf1-bilinear")
    assert (ours - nvidia_tf1(images.double(), size)).abs().max() < 1e-3


def test_tf1_bilinear_has_no_half_pixel() -> None:
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    at = torch.arange(299) * (32 / 299)
    ours = resize(ramp, 299, "tf1-bilinear")
    torch.testing.assert_close(ours[0, 0, 5], at.clamp(max=31), atol=1e-5, rtol=0)
    torch.testing.assert_close(resize(ramp.mT, 299, "tf1-bilinear")[0, 0, :, 7], at.clamp(max=31), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("height", "width"), [(300, 451), (450, 301), (61, 60), (224, 500), (224, 225), (229, 224), (40, 93)]
)
def test_cropping_is_torchvisions(height: int, width: int) -> None:
    transform = transforms.Compose(
        [transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    images = levels(height, width)
    expected = one_by_one(images, lambda array: transform(Image.fromarray(array)))
    differ = (resize(images, 224, "pil-bicubic-u8", crop=True) - expected).abs()
    assert differ.max() <= 1
    assert differ.count_nonzero() <= 1e-4 * differ.numel()


@pytest.mark.parametrize("how", FILTERS)
def test_an_image_does_not_depend_on_its_batch_or_channels(how: str) -> None:
    images = levels(37, 53, batch=5)
    together = resize(images, 48, how)
    assert torch.equal(together[3:4], resize(images[3:4], 48, how))
    assert torch.equal(together[:, 1:2], resize(images[:, 1:2], 48, how))
    assert torch.equal(resize(torch.full((1, 1, 9, 9), 77.0), 48, how).round(), torch.full((1, 1, 48, 48), 77.0))


def test_unknown_filters_raise() -> None:
    with pytest.raises(ValueError, match=r"filter: 'lanczos'; accepted: pil-bicubic, .*tf1-bilinear"):
        resize(levels(8, 8), 4, "lanczos")
