"""Reads ahead of need, their order, and the drive's probe. What may go wrong must not show."""

from __future__ import annotations

import os
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import RECORD, Reader, check, flat, make, use

from moelite import drive, notes
from moelite.cache import replay
from moelite.cache.reads import Reading, ReadPool
from moelite.crc import crc32
from moelite.errors import UsageError
from moelite.lookahead import Lookahead
from moelite.store import ExpertKey

# --- the pool ---


def test_what_is_needed_overtakes_what_is_read_ahead() -> None:
    read = Reader()
    read.gate = threading.Event()
    pool = ReadPool(read, 1)
    view = np.zeros(RECORD, np.uint8)
    readings = [Reading(ExpertKey(0, e), e, view) for e in range(5)]
    pool.submit(readings[0], urgent=True)  # holds the only thread
    for reading in readings[1:4]:
        pool.submit(reading, urgent=False)
    pool.submit(readings[4], urgent=True)
    pool.hurry(readings[3])
    assert pool.cancel(readings[1])
    read.gate.set()
    order = [pool.landed.get(timeout=10).key.expert for _ in range(4)]
    assert order == [0, 4, 3, 2]
    assert not pool.cancel(readings[2])  # it has landed
    assert pool.busy_s > 0
    pool.close()


def test_busy_time_counts_overlapping_reads_once() -> None:
    pool = ReadPool(Reader(delay_s=0.1), 4)
    view = np.zeros(RECORD, np.uint8)
    for e in range(4):
        pool.submit(Reading(ExpertKey(0, e), e, view), urgent=True)
    for _ in range(4):
        pool.landed.get(timeout=10)
    assert 0.09 <= pool.busy_s < 0.35
    pool.close()


# --- read ahead ---


def settled(cache: object, count: int) -> None:
    """Waits until `count` reads have landed and nobody has looked at them."""
    for _ in range(2000):
        if cache._pool.landed.qsize() >= count:  # type: ignore[attr-defined]
            return
        time.sleep(0.002)
    raise AssertionError("the reads did not land")


def test_a_right_guess_is_useful_and_still_a_miss() -> None:
    read = Reader()
    cache = make(read, {0: 2, 1: 2}, floating=4)
    cache.prefetch(1, [3, 4])
    settled(cache, 2)
    assert use(cache, 1, [3, 4]) == [[3, 4]]
    assert (cache.stats.hits, cache.stats.misses) == (0, 2)
    assert (cache.stats.useful, cache.stats.late, cache.stats.wasted) == (2, 0, 0)
    assert len(read.calls) == 2
    check(cache)
    cache.close()


def test_a_wrong_guess_is_wasted_and_gives_its_slot_back() -> None:
    cache = make(Reader(), {0: 2, 1: 2}, floating=4)
    cache.prefetch(1, [5])
    settled(cache, 1)
    use(cache, 1, [3])
    assert cache.stats.wasted == 1
    assert cache.stats.bytes_read == 2 * RECORD
    check(cache)
    assert len(cache._free[RECORD]) == cache.arena.size // RECORD - 1
    cache.close()


def test_a_guess_under_way_is_waited_for_not_read_twice() -> None:
    read = Reader()
    read.gate = threading.Event()
    cache = make(read, {0: 2}, floating=2)
    cache.prefetch(0, [1])
    threading.Timer(0.05, read.gate.set).start()
    assert use(cache, 0, [1]) == [[1]]
    assert (cache.stats.late, cache.stats.useful) == (1, 0)
    assert len(read.calls) == 1
    cache.close()


def test_a_guess_that_failed_is_read_again() -> None:
    read = Reader(fail=frozenset({ExpertKey(0, 1)}))
    cache = make(read, {0: 2}, floating=2)
    cache.prefetch(0, [1])
    settled(cache, 1)
    read.fail = frozenset()
    assert use(cache, 0, [1]) == [[1]]
    check(cache)
    cache.close()


def test_residents_and_the_last_free_slot_are_not_taken() -> None:
    read = Reader()
    cache = make(read, {0: 2}, floating=2)
    use(cache, 0, [0, 1])
    cache.prefetch(0, [0, 1])
    assert len(read.calls) == 2
    cache.prefetch(0, [2, 3, 4])
    assert len(cache._ahead) == 1
    assert len(cache._free) == 1
    cache.close()


def test_needed_reads_get_the_slots_of_guesses() -> None:
    cache = make(Reader(delay_s=0.01), {0: 0, 1: 0}, floating=3)
    cache.prefetch(1, [7, 8])
    assert sorted(flat(use(cache, 0, range(6)))) == list(range(6))
    assert sorted(flat(use(cache, 1, [8, 9]))) == [8, 9]
    check(cache)
    cache.close()


steps = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.lists(st.integers(0, 9), min_size=1, max_size=8),
        st.lists(st.integers(0, 9), max_size=6),
        st.booleans(),
    ),
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(steps=steps, quotas=st.tuples(*[st.integers(0, 5)] * 3), floating=st.integers(1, 5))
def test_guesses_change_no_count_and_lose_no_slot(
    steps: list[tuple[int, list[int], list[int], bool]], quotas: tuple[int, ...], floating: int
) -> None:
    by_layer = dict(enumerate(quotas))
    read = Reader()
    cache = make(read, by_layer, floating, 3)
    trace = []
    for layer, experts, guess, pause in steps:
        for batch in cache.batches(layer, experts):
            cache.prefetch((layer + 1) % 3, guess)
            for expert, slot in batch:
                assert (cache.slot_view(layer, slot) == (layer * 16 + expert) % 255).all()
        trace.append((layer, experts))
        if pause:
            time.sleep(0.002)
        while cache._dropping.total():
            cache._take(cache._pool.landed.get())
        cache._take_landed()
        check(cache)
    stats = cache.stats
    assert (stats.hits, stats.misses) == replay(trace, by_layer)
    assert stats.useful + stats.late <= stats.misses
    cache.close()


# --- checksums ---


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 30), size=st.integers(0, 2000), skip=st.integers(0, 64))
def test_checksums_are_zlibs(seed: int, size: int, skip: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, size + skip, dtype=np.uint8)[skip:]
    assert crc32(data) == zlib.crc32(data.tobytes())


def test_checksums_of_whole_records_are_zlibs() -> None:
    for data in (np.zeros(1 << 20, np.uint8), np.full(999_999, 255, np.uint8)):
        assert crc32(data) == zlib.crc32(data.tobytes())


# --- whether it pays ---


def drive_tokens(ahead: Lookahead, without: float, having: float, misses: int) -> list[bool]:
    asked = []
    for _ in range(200):
        wanted = ahead.wanted()
        asked.append(wanted)
        ahead.told(having if wanted else without, misses)
    return asked


def test_the_faster_way_is_kept() -> None:
    ahead = Lookahead("auto")
    asked = drive_tokens(ahead, 0.05, 0.04, 3)
    assert asked[-100:] == [True] * 100
    assert set(asked[:12]) == {False, True}
    assert ahead.state().startswith("on (tested: 40.0 ms a token with, 50.0 without)")
    slower = Lookahead("auto")
    assert drive_tokens(slower, 0.05, 0.0495, 3)[-100:] == [False] * 100


def test_nothing_missing_needs_no_lookahead() -> None:
    assert drive_tokens(Lookahead("auto"), 0.05, 0.03, 0)[-1] is False


def test_tokens_without_a_read_do_without_it_while_it_is_tested() -> None:
    ahead = Lookahead("auto")
    assert drive_tokens(ahead, 0.05, 0.03, 0) == [False] * 200


def test_it_ends_when_nothing_is_missing_any_more() -> None:
    ahead = Lookahead("auto")
    drive_tokens(ahead, 0.05, 0.04, 3)
    assert ahead.wanted()
    drive_tokens(ahead, 0.05, 0.04, 0)
    assert not ahead.wanted()
    assert ahead.state() == "off"


def test_a_choice_is_kept_whatever_it_costs() -> None:
    assert all(drive_tokens(Lookahead("on"), 0.04, 0.05, 3))
    assert not any(drive_tokens(Lookahead("off"), 0.05, 0.04, 3))
    with pytest.raises(UsageError, match="perhaps"):
        Lookahead("perhaps")  # type: ignore[arg-type]


# --- the drive ---


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(notes, "user_cache_path", lambda name: tmp_path / "kept")
    return tmp_path / "kept"


def test_a_drive_is_measured_once_and_its_speed_again(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "small").write_bytes(b"x")
    (folder / "large").write_bytes(os.urandom(1 << 22))
    found = drive.drive_speed(folder, 1 << 18)
    assert found.depth in drive.DEPTHS
    assert found.bytes_s > 1e6
    assert found.cached_bytes_s > 1e8
    assert drive.drive_speed(folder, 1 << 18) == found  # kept, and fresh
    monkeypatch.setattr(drive, "_FRESH_S", -1.0)
    monkeypatch.setattr(drive._Trial, "choose", lambda self: pytest.fail("chosen again"))
    again = drive.drive_speed(folder, 1 << 18)
    assert (again.direct, again.depth) == (found.direct, found.depth)
    assert again.bytes_s != found.bytes_s


@pytest.mark.parametrize(("seen", "told"), [([3e8, 9e8], 9e8), ([3e8, 2e8], 3e8), ([6e8], 6e8)])
def test_a_stall_is_no_slow_drive(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[float], told: float
) -> None:
    """A drive that gave 1 GB/s is asked once more where it seems to give less than half."""
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    known = drive.DriveSpeed(direct=True, depth=4, bytes_s=1e9, cached_bytes_s=1e10)
    monkeypatch.setattr(drive._Trial, "choose", lambda self: known)
    drive.drive_speed(file, 1 << 16)
    left = iter(seen)
    monkeypatch.setattr(drive._Trial, "again", lambda self, was: replace(was, bytes_s=next(left)))
    monkeypatch.setattr(drive, "_FRESH_S", -1.0)
    assert drive.drive_speed(file, 1 << 16).bytes_s == told
    assert next(left, None) is None


@pytest.mark.parametrize("damage", ["", "[]", '{"x": 3}', "\0"])
def test_damaged_notes_are_measured_anew(kept: Path, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    kept.mkdir()
    (kept / "drives.json").write_text(damage)
    assert drive.drive_speed(file, 1 << 16).bytes_s > 0


def test_where_there_are_no_direct_reads_the_page_cache_serves(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = drive.open_for_reading

    def refuse(path: Path, *, direct: bool) -> int:
        if direct:
            raise OSError(22, "Invalid argument")
        return real(path, direct=False)

    monkeypatch.setattr(drive, "open_for_reading", refuse)
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    assert not drive.drive_speed(file, 1 << 16).direct


def test_a_file_without_a_page_measures_nothing(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OSError, match="too small"):
        drive.drive_speed(tmp_path / "file", 1 << 16)
