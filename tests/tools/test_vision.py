"""CLIP and DINOv2 from folders that transformers itself wrote (tiny, random), against transformers and torchvision."""

import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from tools.features import load_extractor

IMAGENET = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BICUBIC = transforms.InterpolationMode.BICUBIC


def vision_config(size: int) -> CLIPVisionConfig:
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionConfig(**layers, image_size=size, patch_size=size // 4, projection_dim=16)


def shaken(model: nn.Module) -> nn.Module:
    """Weights large enough for the images to be told apart, the same each time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def clip224(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip224")
    shaken(CLIPVisionModelWithProjection(vision_config(224))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip336(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, as OpenAI's repositories hold it: the text half is not read."""
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("clip336")
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision_config(336).to_dict(), projection_dim=16)
    shaken(CLIPModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at 56 pixels and asked at 224, as the published one at 518."""
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("dinov2")
    shaken(Dinov2Model(Dinov2Config(**layers, image_size=56, patch_size=14))).save_pretrained(folder)
    return folder


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in ((300, 451), (61, 60))]


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def agree(ours: Tensor, theirs: Tensor, share: float) -> None:
    """To a share of the spread between the two images, which is what distances are made of."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < share * (theirs[0] - theirs[1]).abs().max()


@torch.no_grad()
def test_clip_clean_is_clean_fids_preparation(clip224: Path) -> None:
    prepare = transforms.Compose([transforms.Resize(224, BICUBIC), transforms.CenterCrop(224), transforms.ToTensor()])
    batch = torch.stack([CLIP(prepare(pil(image))) for image in images()])
    theirs = CLIPVisionModelWithProjection.from_pretrained(clip224)(pixel_values=batch).image_embeds
    extractor = load_extractor(f"clip-clean:{clip224}", None)
    extracted = extractor(images())
    agree(extracted.features, theirs, 1e-3)  # some pixels round the other way
    assert extracted.logits is None
    assert extractor.dim == 16
    assert extractor.name.endswith("|224x224 pil-bicubic-u8 crop clip|u8|f32")


@torch.no_grad()
@pytest.mark.parametrize(("preset", "antialias"), [("clip-cmmd", True), ("clip-cmmd-pytorch", False)])
def test_cmmds_preparation(clip336: Path, preset: str, antialias: bool) -> None:
    resized = [
        F.interpolate(image[None] / 255, (336, 336), mode="bicubic", antialias=antialias)[0] for image in images()
    ]
    model = CLIPModel.from_pretrained(clip336)
    pixels = torch.stack([CLIP(image) for image in resized])
    theirs = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    agree(load_extractor(f"{preset}:{clip336}", None)(images()).features, theirs, 1e-5)


@torch.no_grad()
def test_dinov2_gives_the_normalised_class_token(dinov2: Path) -> None:
    model = Dinov2Model.from_pretrained(dinov2)
    resized = [
        F.interpolate(image[None].float(), (224, 224), mode="bicubic", antialias=True)[0] / 255 for image in images()
    ]
    theirs = model(pixel_values=torch.stack([IMAGENET(image) for image in resized])).last_hidden_state[:, 0]
    edm2 = load_extractor(f"dinov2-edm2:{dinov2}", None)
    agree(edm2(images()).features, theirs, 1e-5)

    prepare = transforms.Compose([transforms.Resize((224, 224), BICUBIC), transforms.ToTensor(), IMAGENET])
    batch = torch.stack([prepare(pil(image)) for image in images()])
    theirs = model(pixel_values=batch).last_hidden_state[:, 0]
    dgm = load_extractor(f"dinov2-dgm:{dinov2}", None)
    agree(dgm(images()).features, theirs, 1e-3)
    assert edm2.name.split("|")[0] == dgm.name.split("|")[0]
    assert edm2.name != dgm.name


def test_the_name_follows_the_weights(dinov2: Path, tmp_path: Path) -> None:
    model = Dinov2Model.from_pretrained(dinov2)
    model.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    names = [load_extractor(f"dinov2-dgm:{path}", None).name for path in (tmp_path / "same", tmp_path / "other")]
    assert names[0] == load_extractor(f"dinov2-dgm:{tmp_path / 'same'}", (1, 8, 8)).name
    assert names[0] != names[1]


def test_half_precision_weights_are_computed_in_single(dinov2: Path, tmp_path: Path) -> None:
    model = Dinov2Model.from_pretrained(dinov2).half()
    model.save_pretrained(tmp_path)
    features = load_extractor(f"dinov2-edm2:{tmp_path}", None)(images()).features
    whole = load_extractor(f"dinov2-edm2:{dinov2}", None)(images()).features
    assert not torch.equal(features, features.half().float())
    agree(features, whole, 0.01)


def test_the_local_cache_is_searched(dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"facebook/dinov2-large is not in .*`hf download facebook/dinov2-large`"):
        load_extractor("dinov2-edm2", None)

    repository = tmp_path / "models--facebook--dinov2-large"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(dinov2)
    assert load_extractor("dinov2-edm2", None).name == load_extractor(f"dinov2-edm2:{dinov2}", None).name


def test_unfit_folders_raise(clip224: Path, clip336: Path, dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads 224 x 224 pixels, not 336"):
        load_extractor(f"clip-cmmd:{clip224}", None)
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_extractor(f"clip-cmmd:{tmp_path}", None)

    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((clip336 / "config.json").read_text())
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):
        load_extractor(f"clip-cmmd:{tmp_path / 'pickled'}", None)

    model = CLIPVisionModelWithProjection.from_pretrained(clip224)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path / "headless", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of CLIPVisionModelWithProjection.*visual_projection.weight"):
        load_extractor(f"clip-clean:{tmp_path / 'headless'}", None)
    with pytest.raises(ValueError, match=f"weights: {dinov2}"):
        load_extractor(f"clip-clean:{dinov2}", None)


def test_without_transformers_the_package_is_named(clip224: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="clip needs the package transformers"):
        load_extractor(f"clip-clean:{clip224}", None)
