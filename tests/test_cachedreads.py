"""Records in the page cache, copied by the team: the same bytes, or left to the reading threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
from test_cache import RECORD, Reader, check, flat, make, mark, use

import moelite
from moelite.cache import replay
from moelite.cache.reads import Reading
from moelite.cachedreads import CachedReads
from moelite.errors import StoreError
from moelite.step import READ_PART, READS
from moelite.store import ExpertKey, Place

pytestmark = pytest.mark.skipif(not CachedReads.available, reason="no reads that do not wait here")

IDS = np.random.default_rng(5).integers(0, 100, 30).tolist()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    tiny_checkpoint.write_checkpoint(folder / "checkpoint", tiny_checkpoint.QWEN3_MOE)
    (folder / "checkpoint" / "tokenizer.json").unlink()
    moelite.quantize(folder / "checkpoint", folder / "store", experts="int4", dense="int8")
    return folder / "store"


@pytest.fixture(params=[1, 2, 3])
def model(request: pytest.FixtureRequest, store: Path) -> Iterator[moelite.Model]:
    """Keeps two experts a layer."""
    how = {"context": 64, "threads": request.param}
    plan = moelite.footprint(store, ram="1GiB", **how)
    budget = plan.minimum_bytes + 4 * plan.record_bytes
    with moelite.load(store, ram=budget, reads="page-cache", **how) as loaded:
        yield loaded


# --- the copies ---


def readings_of(path: Path, sizes: list[int]) -> tuple[dict[ExpertKey, Place], list[Reading]]:
    fd, at, places, readings = os.open(path, os.O_RDONLY), 5, {}, []
    for expert, size in enumerate(sizes):
        key = ExpertKey(0, expert)
        places[key] = Place(fd, at, size)
        readings.append(Reading(key, expert, np.full(size + 7, 99, np.uint8)))
        at += size
    return places, readings


@pytest.mark.parametrize(
    "sizes",
    [[1], [READ_PART], [READ_PART + 1, 3], [4096, 5 * READ_PART - 1, READ_PART, 17], [100] * 9],
)
def test_every_byte_arrives_and_none_beyond(
    model: moelite.Model, tmp_path: Path, sizes: list[int]
) -> None:
    data = np.random.default_rng(0).integers(0, 256, sum(sizes) + 5).astype(np.uint8)
    (tmp_path / "records").write_bytes(data.tobytes())
    places, readings = readings_of(tmp_path / "records", sizes)
    read = model._decoder.cached_reads(places.get)
    assert read(readings) == [True] * len(sizes)
    for reading in readings:
        _, at, size = places[reading.key]
        np.testing.assert_array_equal(reading.view[:size], data[at : at + size])
        assert (reading.view[size:] == 99).all()
        assert reading.nbytes == size


def test_what_is_not_there_is_left_to_others(model: moelite.Model, tmp_path: Path) -> None:
    sizes = [3 * READ_PART, READ_PART, READ_PART, 2 * READ_PART]
    (tmp_path / "records").write_bytes(bytes(sum(sizes)))  # five short of the last one's end
    places, readings = readings_of(tmp_path / "records", sizes)
    closed = os.dup(places[readings[0].key].file)
    os.close(closed)
    places[readings[0].key] = Place(closed, 5, sizes[0])
    del places[readings[1].key]
    read = model._decoder.cached_reads(places.get)
    assert read(readings) == [False, False, True, False]
    assert [reading.nbytes for reading in readings] == [0, 0, READ_PART, 0]
    assert read(readings[:2]) == [False, False]


def test_what_the_drive_holds_alone_is_not_waited_for(model: moelite.Model, tmp_path: Path) -> None:
    places, readings = {}, []
    for expert in range(2):
        path = tmp_path / f"records{expert}"
        path.write_bytes(bytes(4 * READ_PART))
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        reading = Reading(ExpertKey(0, expert), expert, np.zeros(4 * READ_PART, np.uint8))
        places[reading.key] = Place(fd, 0, 4 * READ_PART)
        readings.append(reading)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        pytest.skip("this file system does not answer at once")
    else:
        pytest.skip("this file system keeps what it was told to let go of")
    assert model._decoder.cached_reads(places.get)(readings) == [True, False]


def test_the_system_is_told_not_to_wait(
    model: moelite.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "records").write_bytes(bytes(100))
    places, readings = readings_of(tmp_path / "records", [50])
    jobs, run = [], model.team.run
    monkeypatch.setattr(model.team, "run", lambda w, *a, **o: (jobs.append(w), run(w, *a, **o)))
    assert model._decoder.cached_reads(places.get)(readings) == [True]
    assert [(words[0], words[5]) for words in jobs] == [(READS, os.RWF_NOWAIT)]


# --- the cache ---


def test_the_cache_hands_out_what_was_there_with_what_is_resident() -> None:
    read = Reader()
    cache = make(read, {0: 2}, floating=3)
    use(cache, 0, [0, 1])
    asked: list[list[int]] = []

    def at_once(readings: list[Reading]) -> list[bool]:
        asked.append([reading.key.expert for reading in readings])
        for reading in readings:
            reading.view[:] = mark(reading.key) if reading.key.expert % 2 else 200
            reading.nbytes = RECORD if reading.key.expert % 2 else 0
        return [reading.key.expert % 2 == 1 for reading in readings]

    cache.at_once = at_once
    assert use(cache, 0, [1, 3, 4, 5]) == [[1, 3, 5], [4]]
    assert asked == [[3, 4, 5]]
    assert [key.expert for key in read.calls] == [0, 1, 4]
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.bytes_read) == (1, 5, 5 * RECORD)
    assert sorted(cache.resident(0)) == [4, 5]
    check(cache)
    cache.close()


def test_more_than_there_are_slots_comes_in_turns() -> None:
    cache = make(Reader(), {0: 1}, floating=2)

    def at_once(readings: list[Reading]) -> list[bool]:
        for reading in readings:
            reading.view[:] = mark(reading.key)
            reading.nbytes = RECORD
        return [True] * len(readings)

    cache.at_once = at_once
    assert sorted(flat(use(cache, 0, range(8)))) == list(range(8))
    assert cache.stats.bytes_read == 8 * RECORD
    check(cache)
    cache.close()


def test_a_copy_that_is_cut_short_gives_its_slots_back() -> None:
    cache = make(Reader(), {0: 2}, floating=2)

    def at_once(readings: list[Reading]) -> list[bool]:
        raise KeyboardInterrupt

    cache.at_once = at_once
    with pytest.raises(KeyboardInterrupt):
        use(cache, 0, [0, 1])
    assert cache.resident(0) == ()
    check(cache)
    cache.at_once = None
    assert sorted(flat(use(cache, 0, [0, 1]))) == [0, 1]
    assert len(cache._free[RECORD]) == 2
    cache.close()


# --- a model ---


def test_tokens_are_the_same_and_the_drive_is_left_alone(
    model: moelite.Model, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moelite.load(store, ram="1GiB", context=64) as whole:
        want = whole.forward(IDS)
    trace: list[tuple[int, list[int]]] = []
    model.on_route = lambda layer, chosen: trace.append((layer, chosen[0].tolist()))
    warm = model.session()
    for i in IDS:
        warm.append([i])
    model.experts.at_once, at_once = None, model.experts.at_once
    for expert in range(
        model.store.layers[2].experts
    ):  # now every expert has been read, and verified, once
        for layer in model.store.layers:
            model.store.load_record(ExpertKey(layer, expert), np.empty(1 << 20, np.uint8))
    model.experts.at_once = at_once
    monkeypatch.setattr(model.experts._pool, "submit", None)  # nobody reads
    before, session = model.stats(), model.session()
    got = np.concatenate([session.append([i]) for i in IDS])
    np.testing.assert_array_equal(got, want)
    seen = model.stats() - before
    assert seen.misses > len(IDS)
    assert seen.bytes_read == seen.misses * model.footprint.record_bytes
    assert seen.read_s == 0
    stats = model.stats()
    assert replay(trace, model.footprint.slots.quotas) == (stats.hits, stats.misses)


def test_an_expert_is_verified_before_it_is_copied(store: Path) -> None:
    opened = moelite.store.Store.open(store)
    key, room = ExpertKey(2, 1), np.empty(1 << 20, np.uint8)
    assert opened.cached_place(key) is None
    size = opened.load_record(key, room)
    place = opened.cached_place(key)
    assert place is not None
    assert place.nbytes == size
    assert os.pread(place.file, size, place.offset) == room[:size].tobytes()
    opened.close()
    assert opened.cached_place(key) is None  # its file is closed
    opened.direct = True
    with pytest.raises(StoreError, match="is not in this store"):
        opened.load_record(ExpertKey(2, 99), room)


def test_nothing_is_guessed_where_the_page_cache_has_it_all(model: moelite.Model) -> None:
    session = model.session()
    for expert in range(model.store.layers[2].experts):
        for layer in model.store.layers:
            model.store.load_record(ExpertKey(layer, expert), np.empty(1 << 20, np.uint8))
    for i in IDS:
        session.append([i])
    assert model.stats().misses > len(IDS)
    assert model.lookahead.guessed == 0
    assert model.lookahead.chosen is False
    assert model.experts.asked == 0
