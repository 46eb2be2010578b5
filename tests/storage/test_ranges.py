"""What is fetched of remote files, in which order, and what is held of it."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from safeproj.errors import SafeprojError
from safeproj.storage import ranges, spool
from safeproj.storage.origins import Origin, StoppedError
from safeproj.storage.ranges import Fetching, RangeFile, fetch, forget
from safeproj.storage.spool import Kept


class Bytes(Origin):
    """An origin in memory, which notes what it is asked for."""

    def __init__(self, content: bytes, name: str = "file") -> None:
        super().__init__("memory", name)
        self.content, self.asked = content, list[tuple[int, int]]()
        self.size, self.identity = len(content), "one"
        self.gate = threading.Event()
        self.gate.set()

    def look(self, count: int = 1) -> bytes:
        return self.content[:count][:1]

    def _part(self, start: int, out: memoryview) -> Generator[int, None, None]:
        self.gate.wait()
        self.asked.append((start, start + len(out)))
        out[:] = self.content[start : start + len(out)]
        yield len(out)

    def download(self, path: Path) -> None:
        path.write_bytes(self.content)


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begin each test with no threads, and with small pieces."""
    monkeypatch.setattr(ranges, "PIECE", 1000)
    monkeypatch.setattr(spool, "PIECE", 1000)
    ranges._made.cache_clear()
    yield
    ranges._made.cache_clear()


def opened(content: bytes, download: str = "never", name: str = "file") -> tuple[RangeFile, Bytes]:
    origin = Bytes(content, name)

    def never() -> Path:
        raise AssertionError("downloaded")

    return RangeFile(origin, name, never, Fetching(download)), origin  # type: ignore[arg-type]


def read(file: RangeFile, start: int, stop: int) -> bytes:
    out = bytearray(stop - start)
    assert file.read(start, memoryview(out))
    return bytes(out)


CONTENT = random.Random(0).randbytes(20_000)


def test_any_ranges_read_the_same_bytes_and_none_twice() -> None:
    file, origin = opened(CONTENT)
    rng = random.Random(1)
    wanted = [sorted(rng.sample(range(20_001), 2)) for _ in range(10)]
    fetch((file, start, stop) for start, stop in wanted)
    for start, stop in wanted[::-1]:
        assert read(file, start, stop) == CONTENT[start:stop]
    needed = set[int]().union(*(range(start, stop) for start, stop in wanted))
    came = [i for start, stop in origin.asked for i in range(start, stop)]
    assert len(came) == len(set(came))
    assert needed <= set(came)
    assert len(came) <= 1.02 * len(needed)


def test_what_was_not_said_is_fetched_when_it_is_read() -> None:
    file, origin = opened(CONTENT)
    assert read(file, 100, 5100) == CONTENT[100:5100]
    assert sum(stop - start for start, stop in origin.asked) == 5000


def test_ranges_that_meet_or_nearly_do_are_one_request() -> None:
    file, origin = opened(CONTENT)
    fetch([(file, 0, 400), (file, 402, 800), (file, 810, 900)])
    assert read(file, 0, 400) + read(file, 402, 800) == CONTENT[:400] + CONTENT[402:800]
    assert read(file, 810, 900) == CONTENT[810:900]
    assert sorted(origin.asked) == [(0, 800), (810, 900)]


def test_pieces_come_in_the_order_in_which_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "CONNECTIONS", 1)
    one, first = opened(CONTENT, name="one")
    two, second = opened(CONTENT, name="two")
    log: list[tuple[str, int]] = []
    for origin in (first, second):
        origin.asked = Log(log, origin.name)
    fetch([(one, 15_000, 15_500), (two, 9_000, 9_500), (one, 0, 500), (two, 5_000, 5_500)])
    for file, start in ((two, 5_000), (one, 0), (two, 9_000), (one, 15_000)):
        read(file, start, start + 500)
    others = [each for each in log if each != ("two", 5_000)]  # which somebody waited for
    assert others == [("one", 15_000), ("two", 9_000), ("one", 0)]


class Log(list[tuple[int, int]]):
    def __init__(self, log: list[tuple[str, int]], name: str) -> None:
        super().__init__()
        self._log, self._name = log, name

    def append(self, asked: tuple[int, int]) -> None:
        self._log.append((self._name, asked[0]))


def test_no_more_is_fetched_ahead_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "AHEAD", 3000)
    file, origin = opened(CONTENT)
    fetch([(file, 0, 20_000)])
    time.sleep(0.5)
    assert len(origin.asked) == 3
    assert read(file, 0, 20_000) == CONTENT  # and all of it as it is read
    assert len(origin.asked) == 20


def test_what_is_held_has_a_bound_and_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "SPOOL", 1000)  # at least 16 pieces
    file, origin = opened(CONTENT)
    assert read(file, 0, 20_000) == CONTENT
    assert read(file, 0, 20_000) == CONTENT
    assert len(origin.asked) > 20
    assert ranges._fetcher()._spool._count <= 16 + ranges.CONNECTIONS


def test_threads_read_together() -> None:
    file, origin = opened(CONTENT)
    found: list[bool] = []
    begin = threading.Barrier(6)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        begin.wait()
        for _ in range(50):
            start, stop = sorted(rng.sample(range(20_001), 2))
            found.append(read(file, start, stop) == CONTENT[start:stop])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 300
    assert all(found)
    assert sum(stop - start for start, stop in origin.asked) <= 20_000


def test_who_waits_can_be_told_to_stop() -> None:
    file, origin = opened(CONTENT)
    origin.gate.clear()
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(StoppedError):
        file.read(0, memoryview(bytearray(10)), stop)
    origin.gate.set()
    forget()
    assert read(file, 0, 10) == CONTENT[:10]


def test_a_worker_on_another_machine_downloads_what_is_sent_whole_alone(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(5_000)
    origin = Bytes(content)
    origin.honours = False
    place = tmp_path / "whole"

    def download() -> Path:
        origin.download(place)
        return place

    there = RangeFile.__new__(RangeFile)
    there.__setstate__(
        RangeFile(origin, "file", download, Fetching("auto", keep=True)).__getstate__()
    )
    waiting = threading.Thread(target=fetch, args=([(there, 0, 100)],), daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    assert there.local == place
    assert place.read_bytes() == content


def test_nothing_is_read_beyond_the_end() -> None:
    file, _ = opened(CONTENT)
    with pytest.raises(SafeprojError, match="20000 bytes"):
        file.read(19_999, memoryview(bytearray(2)))


@pytest.mark.parametrize(
    ("needed", "size", "whole"),
    [(100, 20_000, False), (9_000, 20_000, False), (10_000, 20_000, True), (100, 5_000, True)],
)
def test_a_file_is_downloaded_where_half_of_it_is_needed_or_it_is_small(
    needed: int, size: int, whole: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ranges, "WORTH", 6_000)
    origin = Bytes(CONTENT[:size])

    def download() -> Path:
        origin.download(tmp_path / "whole")
        return tmp_path / "whole"

    file = RangeFile(origin, "file", download, Fetching("auto"))
    fetch([(file, 0, needed)])
    assert (file.local is not None) == whole


# What is kept


def test_the_pieces_that_were_not_read_for_the_longest_time_go_first(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 1 << 20)
    places = []
    for number in range(8):
        directory = kept.directory("org/model", str(number % 2))
        places.append(kept.put(directory, 1000 * number, memoryview(bytes(1000))))
        os.utime(places[-1], (number, number))
    kept.touch(places[0])
    Kept(tmp_path, 5000).trim()
    assert [place.exists() for place in places] == [True, *[False] * 3, *[True] * 4]


def test_many_write_while_pieces_are_deleted(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", 3000)  # so that each piece is followed by a look at all
    failed: list[Exception] = []

    def work(number: int) -> None:
        directory = kept.directory("org/model", str(number % 2))
        try:
            for at in range(60):
                kept.put(directory, 1000 * (100 * number + at), memoryview(bytes(1000)))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    while any(each.is_alive() for each in threads):
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        time.sleep(0.2)
    assert failed == []


def test_what_a_killed_process_left_is_deleted_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    kept = Kept(tmp_path, 1)
    directory = kept.directory("org/model", "etag")
    kept.put(directory, 0, memoryview(b"all"))
    old, new = directory / ".new-old", directory / ".new-new"
    old.write_bytes(b"left")
    new.write_bytes(b"begun")
    os.utime(old, (0, 0))
    kept.trim()
    assert (old.exists(), new.exists()) == (False, True)


def test_only_whole_pieces_are_found(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 1 << 20)
    directory = kept.directory("org/model", "etag")
    place = kept.put(directory, 10, memoryview(b"twelve bytes"))
    (directory / "0-10").write_bytes(b"cut")
    (directory / ".new-x").write_bytes(b"x")
    (directory / "notes").write_bytes(b"x")
    assert list(kept.pieces(directory)) == [(10, 22, place)]
    out = bytearray(5)
    assert kept.get(place, 7, memoryview(out))
    assert out == b"bytes"
    place.unlink()
    assert not kept.get(place, 7, memoryview(out))


def test_other_content_and_other_names_have_other_directories(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 1)
    names = [("org/a", "1"), ("org/a", "2"), ("org--a", "1"), ("../../etc", "1"), ("", "1")]
    found = {kept.directory(*each) for each in names}
    assert len(found) == len(names)
    assert all(tmp_path in each.resolve().parents for each in found)
