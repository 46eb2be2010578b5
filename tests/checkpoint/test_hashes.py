"""Hashing what is read, and the names of hashes in records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safeproj.checkpoint import Reader
from safeproj.checkpoint.hashes import NEW, Hash, digest, hash_of, merged, record, tensors_of

EMPTY: dict[Hash, str] = {
    "blake3": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
}
"""The digests of nothing, as those who made the hashes publish them."""

ABC: dict[Hash, str] = {
    "blake3": "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
    "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
}
"""Those of `abc`."""


def test_the_hashes_are_those_of_the_publications() -> None:
    for name, expected in EMPTY.items():
        assert digest(name, b"") == expected
        assert digest(name, b"abc") == ABC[name]


def test_a_label_is_fed_in_order_until_the_next_start(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "x").write_bytes(content)
    reader = Reader()
    reader.start([NEW])
    for start in range(0, len(content), 1000):
        part = memoryview(bytearray(min(1000, len(content) - start)))
        reader.read("x", tmp_path / "x", start, part)
    reader.close()
    assert reader.digests == {"blake3": {"x": digest("blake3", content)}}
    assert reader.nbytes == len(content)
    reader.start()
    assert reader.digests == {}


def test_digests_are_put_together_by_hash() -> None:
    parts: list[Any] = [{"blake3": {"a": "1"}}, {}, {"blake3": {"b": "2"}, "sha256": {"a": "3"}}]
    assert merged(parts) == {"blake3": {"a": "1", "b": "2"}, "sha256": {"a": "3"}}


def test_a_record_says_which_hash() -> None:
    new = record({"blake3": {"w": "1"}}, files={"config.json": "2"})
    assert new == {"sha256": {"files": {"config.json": "2"}}, "blake3": {"tensors": {"w": "1"}}}
    old = record({"sha256": {"w": "1"}}, files={"config.json": "2"})
    assert old == {"sha256": {"files": {"config.json": "2"}, "tensors": {"w": "1"}}}
    assert (tensors_of(new), tensors_of(old)) == ({"blake3": {"w": "1"}}, {"sha256": {"w": "1"}})
    assert (hash_of(new, new), hash_of(old), hash_of({"source": "x"})) == ("blake3", "sha256", None)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (({"blake3": {"tensors": {}}, "sha256": {"tensors": {}}},), "by blake3, sha256"),
        (({"blake3": {"tensors": {}}}, {"sha256": {"tensors": {}}}), "by blake3, sha256"),
        (({"md5": {"tensors": {}}},), r"by md5, expected blake3 or sha256; use the version"),
        (({"\n\x1b[2J" * 100: {"tensors": {}}},), r"by \\n.{,80}, expected blake3 or sha256"),
    ],
)
def test_one_hash_that_is_known_is_expected(found: tuple[dict[str, Any], ...], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        hash_of(*found)
    assert str(caught.value).isprintable()
