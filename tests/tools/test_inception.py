"""Inception from weight files with random numbers and the real interfaces, against clean-fid reading the same files."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.features import feature_extractor
from cleanfid.fid import get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import inception_v3

from tools.features import load_extractor
from tools.inception import VARIABLE, Weights, find_weights

CPU = torch.device("cpu")


class Layers(nn.Module):
    """Small enough for tests, and as wide as Inception."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 7, stride=4)
        self.second = nn.Conv2d(16, 32, 5, stride=4)
        self.last = nn.Linear(32 * 4, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return F.relu(self.last(F.adaptive_avg_pool2d(x, 2).flatten(1)))


class Published(nn.Module):
    """The interface of inception-2015-12-05.pt: it resizes as TensorFlow 1, `layers` are the rest."""

    def __init__(self, width: int = 2048, classes: int = 1008) -> None:
        super().__init__()
        self.layers = Layers(width)
        self.output = nn.Linear(width, classes)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        theta = torch.eye(2, 3)
        theta[0, 2] += 1 / img.shape[3] - 1 / 299
        theta[1, 2] += 1 / img.shape[2] - 1 / 299
        grid = F.affine_grid(theta[None].repeat(img.shape[0], 1, 1), [img.shape[0], img.shape[1], 299, 299], False)
        x = F.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128)
        if return_features:
            return features
        logits = features @ self.output.weight.t() if no_output_bias else self.output(features)
        return F.softmax(logits, dim=1)


def seeded(make: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
    torch.jit.script(seeded(Published)).save(str(path))
    return path


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict whose features are neither tiny nor all alike: batch statistics of noise, as training leaves them.

    In the checkpoints folder of a torch hub, where clean-fid looks for it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).train()
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = None
        with torch.no_grad():
            network(torch.randn(3, 3, 299, 299))
    folder = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), path)
    return path


def photographs(sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Smooth colours with noise, [3, H, W] in grey levels."""
    generator = torch.Generator().manual_seed(1)
    images = []
    for height, width in sizes:
        coarse = torch.rand(1, 3, 4, 4, generator=generator) * 255
        smooth = F.interpolate(coarse, (height, width), mode="bilinear")[0]
        noise = 20 * torch.randn(3, height, width, generator=generator)
        images.append((smooth + noise).clamp(0, 255).to(torch.uint8))
    return images


def save(images: list[Tensor], folder: Path) -> None:
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:03d}.png")


MIXED = [(32, 32), (400, 350), (32, 32), (299, 299), (64, 300)]


def test_clean_is_clean_fid_on_a_folder_of_mixed_sizes(script: Path, tmp_path: Path) -> None:
    images = photographs(MIXED)
    save(images, tmp_path / "images")
    network = InceptionV3W(str(script.parent), download=False, resize_inside=False)
    theirs = get_folder_features(
        str(tmp_path / "images"), network, num_workers=0, batch_size=2, device=CPU, mode="clean", verbose=False
    )

    extractor = load_extractor(f"inception-clean:{script}", None)
    ours = extractor(images)
    assert ours.features.dtype == torch.float32
    assert ours.features.shape == (5, extractor.dim) == (5, 2048)
    scale = np.abs(theirs).max()
    assert np.abs(ours.features.numpy() - theirs).max() < 1e-6 * scale

    other = load_extractor(f"inception-torchmetrics:{script}", None)(images).features
    assert np.abs(other.numpy() - theirs).max() > 1e-3 * scale  # what a filter does


def test_tf1_is_the_files_own_resizing(script: Path) -> None:
    network = torch.jit.load(str(script))
    images = torch.stack(photographs([(32, 32)] * 3))
    ours = load_extractor(f"inception-tf1:{script}", (3, 32, 32))(images)
    theirs = network(images, return_features=True)
    assert (ours.features - theirs).abs().max() < 1e-6 * theirs.abs().max()

    assert ours.logits is not None
    torch.testing.assert_close(ours.logits.softmax(1), network(images, no_output_bias=True), rtol=1e-5, atol=1e-8)


def test_a_call_gives_the_same_bits_whatever_was_called_before(script: Path) -> None:
    extractor = load_extractor(f"inception-clean:{script}", (3, 32, 32))
    images = photographs([(32, 32)] * 2)
    first = extractor(images).features
    for _ in range(4):  # TorchScript compiles after the second call
        assert torch.equal(extractor(images).features, first)


def test_grey_images_are_grey_colours(script: Path) -> None:
    extractor = load_extractor(f"inception-clean:{script}", None)
    grey = [image[:1] for image in photographs([(40, 50)] * 2)]
    assert torch.equal(extractor(grey).features, extractor([image.expand(3, -1, -1) for image in grey]).features)


@pytest.mark.filterwarnings("error")
def test_names_say_network_weights_and_preparation(script: Path) -> None:
    digest = hashlib.sha256(script.read_bytes()).hexdigest()[:8]
    names = {
        preset: load_extractor(f"{preset}:{script}", None).name
        for preset in ("inception-clean", "inception-tf1", "inception-pytorch", "inception-torchmetrics")
    }
    assert len(set(names.values())) == 4
    assert names["inception-clean"] == f"inception-own-{digest}|299x299 pil-bicubic x/128-1|u8|f32"
    assert names["inception-pytorch"] == f"inception-own-{digest}|299x299 torch-bilinear x/127.5-1|u8|f32"


@pytest.mark.slow
def test_pytorch_is_clean_fid_in_legacy_mode(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = photographs([(32, 32), (300, 350), (64, 300)])
    save(images, tmp_path / "images")
    monkeypatch.setenv("TORCH_HOME", str(state.parents[2]))  # from where clean-fid takes the file
    network = feature_extractor("pytorch_inception", device=CPU, use_dataparallel=False)
    theirs = get_folder_features(
        str(tmp_path / "images"), network, num_workers=0, device=CPU, mode="legacy_pytorch", verbose=False
    )

    ours = load_extractor(f"inception-pytorch:{state}", None)(images)
    scale = np.abs(theirs).max()
    assert np.std(theirs, axis=0).max() > 1e-2 * scale  # the images are told apart
    assert np.abs(ours.features.numpy() - theirs).max() < 2e-6 * scale

    weight = torch.load(state, weights_only=True)["fc.weight"]
    assert ours.logits is not None
    torch.testing.assert_close(ours.logits, torch.from_numpy(theirs) @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine without weights."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path


def test_missing_weights_list_every_place(nowhere: Path) -> None:
    with pytest.raises(ValueError, match="no Inception here") as error:
        load_extractor("inception-clean", (3, 32, 32))
    for place in (
        f"${VARIABLE} (not set)",
        str(nowhere / "temporary" / "inception-2015-12-05.pt"),
        str(nowhere / "torch/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"),
        str(nowhere / "torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"),
        str(nowhere / "xdg/k-diffusion/inception-2015-12-05.pt"),
    ):
        assert place in str(error.value)


def test_weights_of_ones_own_are_used_only_when_named(
    nowhere: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = nowhere / "temporary" / "inception-2015-12-05.pt"
    cached.write_bytes(script.read_bytes())
    with pytest.raises(ValueError, match=r"inception-2015-12-05.pt \(not a published file: sha256 [0-9a-f]{8}"):
        find_weights()

    monkeypatch.setenv(VARIABLE, str(cached))
    assert find_weights().path == cached
    assert find_weights(script).path == script  # what is said on the spot comes first
    monkeypatch.setenv(VARIABLE, str(nowhere / "absent.pt"))
    with pytest.raises(ValueError, match=rf"absent.pt \(\${VARIABLE}\) is not a file"):
        find_weights()


@dataclass
class Trap:
    """Whoever unpickles it makes a file."""

    path: Path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_files_that_are_not_inception_raise_their_name(script: Path, tmp_path: Path) -> None:
    narrow, no_layers = tmp_path / "narrow.pt", tmp_path / "layers.pt"
    torch.jit.script(Published(width=64)).save(str(narrow))
    torch.jit.script(Layers(2048)).save(str(no_layers))
    torn, linear, text = tmp_path / "torn.pt", tmp_path / "linear.pth", tmp_path / "text.pth"
    torn.write_bytes(script.read_bytes()[:-1000])
    torch.save(nn.Linear(2, 2).state_dict(), linear)
    text.write_text("no weights\n")
    pickled, trace = tmp_path / "pickled.pth", tmp_path / "trace"
    torch.save({"fc.weight": Trap(trace)}, pickled)

    images = photographs([(16, 16)])
    with pytest.raises(ValueError, match="gives 64 features; accepted: 2048"):
        load_extractor(f"inception-clean:{narrow}", None)(images)
    with pytest.raises(ValueError, match=r"layers.pt has no `layers`"):
        load_extractor(f"inception-clean:{no_layers}", None)
    for path in (torn, linear, text, pickled):
        with pytest.raises(ValueError, match=rf"{path.name} holds neither TorchScript nor Inception's state dict"):
            load_extractor(f"inception-clean:{path}", None)
    assert not trace.exists()
    with pytest.raises(ValueError, match=r"absent.pt \(given\) is not a file"):
        load_extractor(f"inception-clean:{tmp_path / 'absent.pt'}", None)


def test_published_files_are_known_by_their_hash() -> None:
    nvidia = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
    assert Weights(Path("any.pt"), nvidia).name == "inception-f58cb9b6"
    assert Weights(Path("any.pth"), "6726825d" + 56 * "0").name == "inception-6726825d"
    assert Weights(Path("any.pt"), nvidia[:-1] + "5").name == "inception-own-f58cb9b6"  # every digit that is known
