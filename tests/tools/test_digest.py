"""Hashes name bytes and settings: the same for the same, another for others, whoever asks and however often."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import digest
from tools.digest import HashCache, digest_file, digest_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files just written count as old."""
    monkeypatch.setattr(digest, "_SETTLED", -(10**18))


@given(JSON, JSON)
def test_settings_have_one_digest_after_a_file_and_whatever_their_order(value, other) -> None:
    again = json.loads(json.dumps(value))
    if isinstance(again, dict):
        again = dict(reversed(again.items()))
    assert digest_json(again) == digest_json(value)
    if json.dumps(other, sort_keys=True) != json.dumps(value, sort_keys=True):
        assert digest_json(other) != digest_json(value)


def test_the_canonical_form_is_the_one_that_others_can_compute() -> None:
    text = b'{"a":[1.0,null,"\\u00e9"],"b":{"c":true}}'
    assert digest_json({"b": {"c": True}, "a": (1.0, None, "é")}) == hashlib.sha256(text).hexdigest()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            digest_json({"a": bad})


def test_a_file_is_hashed_once_for_as_long_as_it_is_the_same(tmp_path: Path, settled, monkeypatch) -> None:
    file, cache = tmp_path / "a", tmp_path / "cache/hashes.json"
    file.write_bytes(b"one")
    assert HashCache(cache).digest(file) == hashlib.sha256(b"one").hexdigest() == digest_file(file)
    hashed: list[Path] = []
    monkeypatch.setattr(digest, "digest_file", lambda path: hashed.append(path) or digest_file(path))
    assert HashCache(cache).digest(file) == hashlib.sha256(b"one").hexdigest()
    assert HashCache(cache).digest(os.path.relpath(file)) == hashlib.sha256(b"one").hexdigest()
    assert not hashed

    before = file.stat()
    file.write_bytes(b"two")  # in place, of the same size, with its time set back
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert HashCache(cache).digest(file) == hashlib.sha256(b"two").hexdigest()
    assert hashed == [file]

    other = tmp_path / "b"
    other.write_bytes(b"three")
    other.replace(file)
    assert HashCache(cache).digest(file) == hashlib.sha256(b"three").hexdigest()


def test_a_file_that_may_still_be_written_to_is_not_remembered(tmp_path: Path) -> None:
    file, cache = tmp_path / "a", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    HashCache(cache).digest(file)
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")

    def meanwhile(path: Path) -> str:
        found = digest_file(path)
        file.write_bytes(b"longer")
        return found

    monkeypatch.setattr(digest, "digest_file", meanwhile)
    with pytest.raises(ValueError, match=r"a: has changed .*3 bytes then, 6 now"):
        HashCache().digest(file)


def test_a_file_that_is_another_or_gone_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    (hashed,) = HashCache().hash_all([file])
    hashed.check()
    os.utime(file, ns=(0, time.time_ns() + 10**9))
    with pytest.raises(ValueError, match="a: has changed since it was hashed"):
        hashed.check()
    file.unlink()
    with pytest.raises(ValueError, match="a: cannot be read any more"):
        hashed.check()


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": [[1], "x"]}', '{"a": [["x", 0, 0, 0], "x"]}'])
def test_a_cache_that_is_none_is_replaced(tmp_path: Path, settled, text: str) -> None:
    file, cache = tmp_path / "a", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    cache.write_text(text)
    assert HashCache(cache).digest(file) == hashlib.sha256(b"one").hexdigest()
    assert hashlib.sha256(b"one").hexdigest() in cache.read_text()


def test_a_cache_that_cannot_be_written_only_forgets(tmp_path: Path, settled) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", file / "below"):
        assert HashCache(place).digest(file) == hashlib.sha256(b"one").hexdigest()


def test_what_others_wrote_since_is_kept(tmp_path: Path, settled) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    caches = [HashCache(tmp_path / "hashes.json") for _ in range(2)]
    for cache, name in zip(caches, "ab", strict=True):
        cache.digest(tmp_path / name)
    assert len(json.loads((tmp_path / "hashes.json").read_text())) == 2


SHARED = """
import sys
from pathlib import Path
from tools import digest
digest._SETTLED = -(10**18)
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(first, last):
    digest.HashCache(folder / "hashes.json").digest(folder / f"{number}.bin")
"""


@pytest.mark.slow
def test_processes_that_share_a_cache_leave_it_whole(tmp_path: Path, settled) -> None:
    for number in range(60):
        (tmp_path / f"{number}.bin").write_bytes(bytes([number]))
    commands = [[sys.executable, "-c", SHARED, str(tmp_path), str(20 * k), str(20 * k + 20)] for k in range(3)]
    root = Path(__file__).parents[2]
    running = [subprocess.Popen(command, cwd=root) for command in commands]
    assert [process.wait() for process in running] == [0, 0, 0]
    entries = json.loads((tmp_path / "hashes.json").read_text())
    assert len(entries) >= 20
    for name, (_, sha256) in entries.items():
        assert sha256 == hashlib.sha256(Path(name).read_bytes()).hexdigest()
    assert not list(tmp_path.glob(".*.tmp"))
