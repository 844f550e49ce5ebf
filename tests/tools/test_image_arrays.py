"""Images in arrays: ADM's .npz and safetensors, row by row, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tools.test_image_files import everything, levels
from tools.sources import open_source


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_adms_files_are_read_by_rows(tmp_path: Path, save, order: str, channels: int) -> None:
    images, labels = levels(7, 6, 5, channels), torch.tensor([3, 0, 2, 2, 1, 0, 3])
    save(tmp_path / "a.npz", np.array(images.numpy(), order=order), labels.numpy().astype(np.int32))
    source = open_source(tmp_path / "a.npz")
    assert (source.count, source.shape, source.n_classes) == (7, (channels, 6, 5), 4)
    assert torch.equal(torch.stack(everything(source)), images.permute(0, 3, 1, 2))
    samples = source.read(5, [6, 0])
    assert torch.equal(samples.images[0], images[6].permute(2, 0, 1))
    assert torch.equal(samples.labels, torch.tensor([3, 3]))
    save(tmp_path / "b.npz", np.array(images.numpy(), order=order))
    assert open_source(tmp_path / "b.npz").read(0, [1]).labels is None


@pytest.mark.parametrize("last", [False, True])
def test_safetensors_of_both_layouts(tmp_path: Path, last: bool) -> None:
    images = levels(7, 3, 6, 5)
    stored = images.permute(0, 2, 3, 1).contiguous() if last else images
    save_file({"images": stored, "labels": torch.arange(7)}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    assert (source.count, source.shape, source.n_classes) == (7, (3, 6, 5), 7)
    assert torch.equal(torch.stack(everything(source)), images)
    assert source.read(0, [6, 2]).labels.tolist() == [6, 2]


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    def refused(message: str, **arrays: np.ndarray) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=rf"a\.npz: .*{message}"):
            open_source(tmp_path / "a.npz")

    images = levels(4, 6, 5, 3).numpy()
    refused("has mu, sigma, but no arr_0; it holds statistics", mu=np.zeros(2), sigma=np.eye(2))
    refused("has images, but no arr_0", images=images)
    refused(r"images are float32 \[4, 6, 5, 3\]; accepted are uint8", arr_0=images.astype(np.float32))
    refused(r"images are uint8 \[4, 6, 5\]", arr_0=images[..., 0])
    refused(r"images are uint8 \[4, 6, 5, 4\]", arr_0=levels(4, 6, 5, 4).numpy())
    refused(r"images are uint8 \[0, 6, 5, 3\]", arr_0=images[:0])
    refused(r"labels are float64 \[4\]", arr_0=images, arr_1=np.zeros(4))
    refused(r"labels are int64 \[3\]", arr_0=images, arr_1=np.zeros(3, np.int64))
    refused(r"labels are int64 \[4\]; accepted are classes \[4\] from 0", arr_0=images, arr_1=np.full(4, -1))
    refused("Python objects", arr_0=np.array([{"a": 1}], dtype=object))
    (tmp_path / "b.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"b\.npz: .*not a zip"):
        open_source(tmp_path / "b.npz")

    def tensors(message: str, **arrays: Tensor) -> None:
        save_file(arrays, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=rf"a\.safetensors: .*{message}"):
            open_source(tmp_path / "a.safetensors")

    tensors("has weight, but no images", weight=torch.zeros(2))
    tensors(r"images are F32 \[4, 3, 6, 5\]", images=torch.zeros(4, 3, 6, 5))
    (tmp_path / "b.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"b\.safetensors: "):
        open_source(tmp_path / "b.safetensors")


def test_an_array_that_changes_after_it_was_hashed_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", levels(4, 6, 5, 3).numpy())
    source = open_source(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", levels(4, 6, 5, 3, seed=1).numpy())
    os.utime(tmp_path / "a.npz", ns=(0, 1))
    with pytest.raises(ValueError, match=r"a\.npz: has changed since it was hashed"):
        source.read(0, [0])
    save_file({"images": levels(4, 3, 6, 5)}, tmp_path / "b.safetensors")
    source = open_source(tmp_path / "b.safetensors")
    save_file({"images": levels(4, 3, 6, 5, seed=1)}, tmp_path / "b.safetensors")
    os.utime(tmp_path / "b.safetensors", ns=(0, 1))
    with pytest.raises(ValueError, match=r"b\.safetensors: has changed since it was hashed"):
        source.read(0, [0])
