"""The cache of features: what is kept is what would be computed again, and nothing else is ever read from it."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distill.tiny import save_teacher
from tests.tools.batches import SHAPE, save_pictures
from tools.cache import Cache, Stream
from tools.features import Extractor, load_extractor
from tools.sources import SourceSettings, open_source


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "pipeline")


def sampled(teacher: Path, n: int = 10, chunk: int = 4, batch: int = 2, seed: int = 3) -> Stream:
    source = open_source(teacher, SourceSettings("euler", 2))
    facts = {"source": source.facts, "which": {"seed": seed}, "device": "cpu"}
    return Stream(source, seed, range(n), facts, chunk, batch)


def pictured(folder: Path, numbers: Sequence[int]) -> Stream:
    source = open_source(folder)
    facts = {"source": source.facts, "which": {"order": list(numbers)}, "device": "cpu"}
    return Stream(source, 0, numbers, facts, 4, 2)


def computed(cache: Cache, stream: Stream, *specs: str) -> list[Extractor]:
    extractors = [load_extractor(spec, stream.source.shape) for spec in specs]
    for chunk in range(stream.chunks):
        cache.compute(stream, cache.missing(stream, extractors, chunk), chunk)
    return extractors


def test_rows_are_those_of_the_samples_in_their_order(teacher: Path, tmp_path: Path) -> None:
    """Also of a last chunk that is no full batch; labels and logits beside them."""
    cache, stream = Cache(tmp_path), sampled(teacher, n=11)
    digits, pixels = computed(cache, stream, "digits", "pixels")
    samples = [stream.source.read(3, [k, k + 1]) for k in range(0, 12, 2)]
    images = [image for pair in samples for image in pair.images][:11]
    raw = cache.read(stream, pixels.name)
    assert torch.equal(raw.rows, (torch.stack(images).flatten(1).float() - 127.5) / 127.5)
    assert raw.logits is None
    assert raw.labels is not None
    assert raw.labels.tolist() == [*range(10), 0]
    assert raw.seconds > 0
    kept, expected = cache.read(stream, digits.name), digits(images)
    torch.testing.assert_close(kept.rows, expected.features, rtol=1e-5, atol=1e-6)  # batches of two, and of eleven
    assert kept.logits is not None
    assert kept.logits.argmax(1).tolist() == expected.logits.argmax(1).tolist()


def test_a_streams_key_is_what_decides_its_rows(teacher: Path, tmp_path: Path) -> None:
    stream = sampled(teacher)
    shutil.copytree(teacher, tmp_path / "elsewhere")
    assert sampled(tmp_path / "elsewhere").key == stream.key == sampled(teacher, n=30).key
    others = [sampled(teacher, chunk=2), sampled(teacher, batch=4), sampled(teacher, seed=4)]
    others += [sampled(save_teacher(tmp_path / "other", seed=1))]
    assert len({stream.key, *(other.key for other in others)}) == 5


def test_a_longer_stream_shares_the_full_chunks_of_a_shorter_one(teacher: Path, tmp_path: Path) -> None:
    cache, short, long = Cache(tmp_path), sampled(teacher, n=10), sampled(teacher, n=14)
    (pixels,) = computed(cache, short, "pixels")
    made = {chunk: cache.file(short, pixels.name, chunk).stat().st_mtime_ns for chunk in range(2)}
    assert [bool(cache.missing(long, [pixels], chunk)) for chunk in range(4)] == [False, False, True, True]
    computed(cache, long, "pixels")
    assert {chunk: cache.file(long, pixels.name, chunk).stat().st_mtime_ns for chunk in range(2)} == made
    assert torch.equal(cache.read(long, pixels.name).rows[:10], cache.read(short, pixels.name).rows)


def test_a_second_extractor_adds_to_a_chunk_and_leaves_the_first(tmp_path: Path) -> None:
    cache, stream = Cache(tmp_path / "cache"), pictured(save_pictures(tmp_path / "a", 6), [4, 0, 5, 2])
    (pixels,) = computed(cache, stream, "pixels")
    before = cache.file(stream, pixels.name, 0).stat()
    pixels, digits = computed(cache, stream, "pixels", "digits")
    assert cache.file(stream, pixels.name, 0).stat().st_mtime_ns == before.st_mtime_ns
    assert not cache.missing(stream, [pixels, digits], 0)
    images = stream.source.read(0, [4, 0, 5, 2]).images
    assert torch.equal(cache.read(stream, pixels.name).rows, pixels(images).features)
    assert cache.read(stream, pixels.name).labels is None


def test_a_changed_cut_or_moved_chunk_is_refused_by_name(teacher: Path, tmp_path: Path) -> None:
    cache, stream, other = Cache(tmp_path), sampled(teacher, n=8), sampled(teacher, n=8, seed=4)
    pixels, digits = computed(cache, stream, "pixels", "digits")
    computed(cache, other, "pixels")
    file = cache.file(stream, pixels.name, 0)
    whole = file.read_bytes()
    wrong = {
        "empty": b"",
        "cut": whole[:-1],
        "longer": whole + b"\0",
        "text": b"words" * 100,
        "of another seed": cache.file(other, pixels.name, 0).read_bytes(),
        "of another chunk": cache.file(stream, pixels.name, 1).read_bytes(),
        "of another extractor": cache.file(stream, digits.name, 0).read_bytes(),
    }
    for name, content in wrong.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"cache: .*{file.name}.* delete it") as refused:
            cache.read(stream, pixels.name)
        assert str(file) in str(refused.value), name
    file.unlink()
    with pytest.raises(ValueError, match=rf"cache: .*{file.name} cannot be read"):
        cache.read(stream, pixels.name)
    computed(cache, stream, "pixels")
    assert len(cache.read(stream, pixels.name).rows) == 8
    rows = cache.file(replace(stream, numbers=range(6)), pixels.name, 1)
    rows.write_bytes(cache.file(stream, pixels.name, 1).read_bytes())
    with pytest.raises(ValueError, match=rf"cache: .*{rows.name} has 4 rows, not 2"):
        cache.read(replace(stream, numbers=range(6)), pixels.name)


def test_no_changed_byte_is_read(tmp_path: Path) -> None:
    """Every byte of the header, and some of the rows: refused by name, never other rows, labels or seconds."""
    cache, stream = Cache(tmp_path / "cache"), pictured(save_pictures(tmp_path / "a", 4), range(4))
    (pixels,) = computed(cache, stream, "pixels")
    file = cache.file(stream, pixels.name, 0)
    whole, kept = file.read_bytes(), cache.read(stream, pixels.name)
    rows = kept.rows.numel() * 4
    for place in [*range(len(whole) - rows), *range(len(whole) - rows, len(whole), 97)]:
        for flip in (1, 128):
            changed = bytearray(whole)
            changed[place] ^= flip
            file.write_bytes(changed)
            with pytest.raises(ValueError, match=rf"cache: .*{file.name}"):
                cache.read(stream, pixels.name)


def test_rows_that_are_not_finite_are_counted_and_named(tmp_path: Path) -> None:
    cache, stream = Cache(tmp_path / "cache"), pictured(save_pictures(tmp_path / "a", 12), [7, 11, 3, 9])
    pixels = load_extractor("pixels", SHAPE)

    class Broken:
        name, dim = "broken", pixels.dim

        def __call__(self, images: Tensor) -> tuple[Tensor, None]:
            features = images.flatten(1).clone()
            features[1] = torch.nan  # of each batch of two
            return features, None

    broken = replace(pixels, network=Broken(), name="broken|1x8x8")
    with pytest.raises(ValueError, match=r"2 of 4 samples of a have NaN or infinite broken\|1x8x8 .*\(samples 11, 9\)"):
        cache.compute(stream, [broken], 0)
    assert not list((tmp_path / "cache/features").rglob("*.*"))


def test_samples_are_told_once_each_as_they_are(teacher: Path, tmp_path: Path) -> None:
    stream, told = sampled(teacher, n=7), {}
    for chunk in range(stream.chunks):
        Cache(tmp_path).compute(stream, [], chunk, keep=lambda k, image: told.update({k: image}))
    assert list(told) == list(range(7))
    assert torch.equal(told[6], stream.source.read(3, [6, 7]).images[0])
    assert not (tmp_path / "features").exists()


def test_a_model_is_asked_for_full_batches_only(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of another size may have other bits: the last one is filled up, and cut after it was made."""
    stream, asked = sampled(teacher, n=7, chunk=4, batch=4), []
    read = stream.source.read
    monkeypatch.setattr(stream.source, "read", lambda seed, numbers: asked.append(list(numbers)) or read(seed, numbers))
    (pixels,) = computed(Cache(tmp_path), stream, "pixels")
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(Cache(tmp_path).read(stream, pixels.name).rows) == 7


def test_drafts_of_the_dead_go_when_their_chunk_is_made(tmp_path: Path) -> None:
    cache, stream = Cache(tmp_path / "cache"), pictured(save_pictures(tmp_path / "a", 8), range(8))
    pixels = load_extractor("pixels", SHAPE)
    file = cache.file(stream, pixels.name, 1)
    file.parent.mkdir(parents=True)
    (file.parent / f".{file.name}.0badcafe.tmp").write_bytes(b"half")
    computed(cache, stream, "pixels")
    assert sorted(f.name for f in file.parent.iterdir()) == [cache.file(stream, pixels.name, k).name for k in (0, 1)]


def _hold(folder: Path, told: "multiprocessing.connection.Connection") -> None:
    with Cache(folder).claim("chunk") as mine:
        told.send(mine)
        signal.pause()


def test_a_claim_is_one_process_own_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, theirs))
    holder.start()
    try:
        assert ours.recv() is True
        with Cache(tmp_path).claim("chunk") as mine, Cache(tmp_path).claim("another") as free:
            assert (mine, free) == (False, True)
    finally:
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    with Cache(tmp_path).claim("chunk") as mine:
        assert mine
        with Cache(tmp_path).claim("chunk") as again:
            assert not again  # of one process twice, as by two threads
    with pytest.raises(KeyError), Cache(tmp_path).claim("chunk"):
        raise KeyError
    with Cache(tmp_path).claim("chunk") as mine:
        assert mine
