from pathlib import Path

import pytest
import torch
from torch import nn

from tools.features import dequantise, load_extractor

SOURCE = """
import torch
from torch import nn

class Means(nn.Module):
    "Each channel's mean, scaled; noisy while it learns."

    def __init__(self, scale: float = {scale}) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.noise = nn.Dropout(0.5)

    def forward(self, x):
        return self.noise({power} * self.scale * x.mean(dim=(2, 3)))

means = Means(3.0)
maps = nn.Conv2d(3, 4, 1)
number = 7

def make():
    return Means(5.0)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_features.py").write_text(SOURCE.format(scale=2.0, power=1))
    (tmp_path / "own_scaled.py").write_text(SOURCE.format(scale=4.0, power=1))
    (tmp_path / "own_changed.py").write_text(SOURCE.format(scale=2.0, power=-1))
    return tmp_path


def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("attribute", "scale"), [("Means", 2), ("means", 3), ("make", 5)])
def test_modules_classes_and_functions(attribute: str, scale: float) -> None:
    extractor = load_extractor(f"own_features:{attribute}", (3, 5, 6))
    extracted = extractor(images())
    assert extractor.dim == 3
    assert extracted.logits is None
    torch.testing.assert_close(extracted.features, scale * dequantise(images()).mean(dim=(2, 3)))
    assert extractor.name.startswith(f"own_features:{attribute}-")
    assert extractor.name.endswith("|3x5x6 x/127.5-1|u8|f32")


def test_modules_themselves() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, again = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(90, 7)) for _ in range(2))
    extractor = load_extractor(network, (3, 5, 6))
    assert torch.equal(extractor(images()).features, network(dequantise(images())).detach())
    assert extractor.name.startswith("Sequential-")

    assert load_extractor(again, (3, 5, 6)).name != extractor.name
    with pytest.raises(ValueError, match="Sequential reads images of one size"):
        load_extractor(network, None)


@pytest.mark.usefixtures("package")
def test_the_name_follows_weights_and_source() -> None:
    def digest(spec: str) -> str:
        return load_extractor(spec, (3, 5, 6)).name.split("|")[0].removeprefix(spec)

    digests = [digest(f"own_{module}:Means") for module in ("features", "scaled", "changed")]
    assert digest("own_features:Means") == digests[0]
    digests += [digest("own_features:means"), digest("own_features:make")]  # one source, other weights
    assert len(set(digests)) == 5


@pytest.mark.usefixtures("package")
def test_what_is_no_feature_network_raises() -> None:
    for spec, message in (
        (
            "own_absent:Means",
            r"own_absent:Means cannot be imported \(No module named 'own_absent'\); is it on PYTHONPATH",
        ),
        ("own_features:Absent", r"own_features:Absent cannot be imported \(module .* has no attribute 'Absent'\)"),
        ("own_features:number", r"own_features:number is int; accepted: a torch module"),
        ("own_features:maps", r"maps \[2, 3, 5, 6\] to \[2, 4, 5, 6\]; accepted: floats of shape \[2, dim\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_extractor(spec, (3, 5, 6))


def test_a_network_that_cannot_read_the_images_says_what_it_said() -> None:
    with pytest.raises(ValueError, match=r"cannot read \[2, 1, 8, 8\] \(RuntimeError: .*channels"):
        load_extractor(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), (1, 8, 8))


class Shifted(nn.Module):
    """Knows two numbers that are no weights."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = {"factor": torch.tensor(k)}
        self.register_buffer("shift", torch.tensor(k), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.k["factor"] * x.mean(dim=(2, 3)) + self.shift


def test_numbers_that_are_no_weights_are_in_the_name() -> None:
    one, again, other = (load_extractor(Shifted(k), (1, 8, 8)).name for k in (1.0, 1.0, 2.0))
    assert one == again != other
    for change in ("shift", "factor"):
        changed = Shifted(1.0)
        (changed.shift if change == "shift" else changed.k["factor"]).add_(1)
        assert load_extractor(changed, (1, 8, 8)).name != one


def test_a_network_typed_at_a_prompt_has_a_name_of_its_code() -> None:
    text = "class Net(nn.Module):\n    def forward(self, x):\n        return {} * x.mean(dim=(2, 3))\n"
    names = []
    for factor in (2, 2, 3):
        typed: dict = {"nn": nn, "__name__": "__main__"}
        exec(text.format(factor), typed)
        names.append(load_extractor(typed["Net"](), (1, 8, 8)).name)
    assert names[0] == names[1] != names[2]


def test_a_factory_that_fails_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"os\.path:join\(\) fails \(TypeError"):
        load_extractor("os.path:join", (1, 8, 8))
