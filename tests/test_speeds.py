"""What is remembered of this machine, and what is measured where nothing is."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moelite import meter
from moelite import speeds as module
from moelite.cache.stats import CacheStats
from moelite.drive import DriveSpeed
from moelite.forecast import LAYER_S, Work, around, decode
from moelite.meter import Meter
from moelite.speeds import (
    FILE,
    Machine,
    Sample,
    Spent,
    drive_rate,
    from_page_cache,
    load_samples,
    probe_memory,
    record,
    sample_of,
    speeds,
)

HERE = Machine(threads=2, expert_format="int4", dense_format="int8", cpu="Test CPU")
DRIVE = around(1e9, 0.2, "measured")
WORK = Work(
    dense_bytes=1000,
    expert_bytes=500,
    record_bytes=512,
    layers=2,
    moe=((8, 2), (8, 2)),
    dense_macs=2000,
    expert_macs=1000,
)


def test_what_is_recorded_is_found_again_for_this_machine_only(tmp_path: Path) -> None:
    record(tmp_path, HERE, Sample(model="a", weight_bytes_s=2e9))
    record(tmp_path, HERE, Sample(model="b", miss_s=0.001))
    assert load_samples(tmp_path, HERE) == [
        Sample(model="a", weight_bytes_s=2e9),
        Sample(model="b", miss_s=0.001),
    ]
    for other in ("cpu", "threads", "expert_format", "dense_format"):
        changed = {**{n: getattr(HERE, n) for n in HERE.__slots__}, other: "other"}
        assert load_samples(tmp_path, Machine(**changed)) == []
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_run_that_showed_nothing_leaves_no_file(tmp_path: Path) -> None:
    record(tmp_path, HERE, Sample(model="a"))
    assert list(tmp_path.iterdir()) == []


def test_the_file_does_not_grow_without_end(tmp_path: Path) -> None:
    for i in range(40):
        record(tmp_path, HERE, Sample(model="a", weight_bytes_s=1e9 + i))
    kept = load_samples(tmp_path, HERE)
    assert len(kept) == 12
    assert kept[-1].weight_bytes_s == 1e9 + 39


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"text"',
        "[" * 100_000,
        json.dumps({HERE.key: 7}),
        json.dumps({HERE.key: ["x", {}, {"model": 3}]}),
    ],
)
def test_a_damaged_file_is_as_none_and_is_written_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert load_samples(tmp_path, HERE) == []
    record(tmp_path, HERE, Sample(model="a", weight_bytes_s=2e9))
    assert len(load_samples(tmp_path, HERE)) == 1


@pytest.mark.parametrize("value", [-1, 0, 1e300, True, "2e9", None, [1]])
def test_a_senseless_number_is_left_out(tmp_path: Path, value: object) -> None:
    entry = {"model": "a", "weight_bytes_s": value, "miss_s": 0.5}
    (tmp_path / FILE).write_text(json.dumps({HERE.key: [entry]}))
    assert load_samples(tmp_path, HERE) == [Sample(model="a", miss_s=0.5)]


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    record(tmp_path / "file" / "folder", HERE, Sample(model="a", weight_bytes_s=2e9))


def test_own_runs_count_before_others_and_both_before_an_estimate() -> None:
    samples = [Sample(model="mine", weight_bytes_s=v) for v in (9e9, 9e9, 9e9, 1e9, 2e9, 3e9, 4e9)]
    samples += [Sample(model="other", weight_bytes_s=8e9, miss_s=0.002)]
    mine = speeds(samples, HERE, "mine", None, DRIVE)
    assert mine.weight_bytes_s == around(3e9, 0.15, "measured")  # the median of the last five
    assert mine.miss_s == 0.002
    new = speeds(samples[-1:], HERE, "new", None, DRIVE)
    assert new.weight_bytes_s == around(8e9, 0.25, "measured")
    none = speeds([], HERE, None, around(10e9, 0.4, "estimated"), DRIVE)
    assert none.weight_bytes_s == around(7.5e9, 0.4, "estimated")
    assert none.prefill_macs_s.basis == "estimated"
    assert none.prefill_macs_s.low < none.prefill_macs_s.likely < none.prefill_macs_s.high


def test_a_short_probe_of_the_drive_is_steadied_by_recent_runs() -> None:
    now = time.time()

    def likely(probe: float, *runs: tuple[float, float]) -> float:
        seen = [Sample(model="x", weight_bytes_s=1e9, drive_bytes_s=v, at=t) for v, t in runs]
        memory = around(1e10, 0.4, "estimated")
        found = speeds(seen, HERE, "m", memory, around(probe, 0.2, "measured"))
        return found.drive_bytes_s.likely

    assert likely(1e9) == pytest.approx(1e9)
    assert likely(1e9, (2e9, now)) == pytest.approx(1.5e9)
    assert likely(1e9, (9e9, now), (2e9, now), (1.8e9, now)) == pytest.approx(1.8e9)
    assert likely(1e9, (2e9, now - 3600)) == pytest.approx(1e9)  # too long ago
    assert likely(1e8, (2e9, now), (2e9, now)) == pytest.approx(1e8)  # another drive by now


def test_a_sample_by_hand() -> None:
    """64 prompt tokens in 2 s, 20 more: 0.4 s of computing, 0.1 s of Python, 40 misses."""
    prefill = Spent(tokens=64, compute_s=2.0, python_s=1.0, misses=16)
    answer = Spent(tokens=20, compute_s=0.4, python_s=0.1, misses=40)
    found = sample_of("m", WORK, 64, prefill, answer)
    assert found.prefill_macs_s == pytest.approx(64 * (2000 + 4 * 1000) / 2.0)
    # 2 misses a token of 4 experts: it took 1 + 0.65 / 2 of the time that it takes without reads
    assert found.weight_bytes_s == pytest.approx(20 * (1000 + 4 * 500) / 0.4 * 1.325)
    assert found.miss_s == pytest.approx((0.1 - 20 * 2 * LAYER_S) / 40)


def test_too_little_says_nothing() -> None:
    long, none = (
        Spent(tokens=64, compute_s=1, python_s=1, misses=640),
        Spent(tokens=3, compute_s=1, python_s=1, misses=640),
    )
    assert sample_of("m", WORK, 64, none, none) == Sample(model="m")
    assert sample_of("m", WORK, 16, long, none) == Sample(model="m")  # 4 tokens of each expert
    few = Spent(tokens=20, compute_s=1, python_s=1, misses=19)
    assert sample_of("m", WORK, 64, none, few).miss_s is None


def test_the_meter_tells_prompt_and_answer_apart(tmp_path: Path, monkeypatch) -> None:
    spent = SimpleNamespace(clock=0.0, parts=0.0)
    model = SimpleNamespace(
        sizes=SimpleNamespace(threads=2, expert_format="int4", dense_format="int8", low=False),
        footprint=SimpleNamespace(chunk=64),
        lookahead=SimpleNamespace(guessed=4000, recall=0.75),
        store=SimpleNamespace(direct=True),
        forced=False,
        stats=lambda: CacheStats(bytes_read=int(spent.clock * 1e9), read_s=spent.clock / 2),
        part_seconds=lambda: {"experts": spent.parts},
    )
    large = replace(WORK, dense_bytes=1e9, expert_bytes=5e8, dense_macs=2e9, expert_macs=1e9)
    positions: list[int] = []

    def work_of(sizes: object, position: int) -> Work:
        positions.append(position)
        return large

    monkeypatch.setattr(meter, "work_of", work_of)
    monkeypatch.setattr(meter, "this_machine", lambda *_: HERE)
    clocks = SimpleNamespace(perf_counter=lambda: spent.clock, time=lambda: 77.0)
    monkeypatch.setattr(meter, "time", clocks)
    watch = Meter(model, "print", tmp_path)
    spent.clock, spent.parts = 5.0, 4.0
    watch.first_token()
    spent.clock, spent.parts = 6.0, 4.5
    watch.first_token()  # only the first counts
    spent.clock, spent.parts = 7.0, 5.0
    watch.done(100, 64, 20)
    (found,) = load_samples(tmp_path, HERE)
    assert found.model == "print"
    assert found.prefill_macs_s == pytest.approx(64 * 6e9 / 4.0)
    assert found.recall == 0.75
    assert (found.drive_bytes_s, found.at) == (pytest.approx(2e9), 77.0)
    assert found.weight_bytes_s == pytest.approx(20 * 3e9 / 1.0)
    assert positions == [110]
    Meter(model, "print", tmp_path).done(100, 64, 20)  # no token came
    assert len(load_samples(tmp_path, HERE)) == 1
    model.forced = True  # guesses of experts that no router chose
    watch = Meter(model, "print", tmp_path)
    watch.first_token()
    spent.clock, spent.parts = 9.0, 7.0
    watch.done(100, 64, 20)
    assert load_samples(tmp_path, HERE)[-1].weight_bytes_s is not None
    assert load_samples(tmp_path, HERE)[-1].recall is None


def test_the_probe_of_memory_is_quick_and_sane() -> None:
    assert 5e8 < probe_memory(2) < 1e12


def given(monkeypatch, drive: float, cached: float, share: float) -> None:
    found = DriveSpeed(direct=True, depth=4, bytes_s=drive, cached_bytes_s=cached)
    monkeypatch.setattr(module, "drive_speed", lambda path, size: found)
    monkeypatch.setattr(module, "_in_page_cache", lambda store: share)


def test_the_drive_counts_where_the_page_cache_has_no_room(monkeypatch, tmp_path) -> None:
    given(monkeypatch, 1e9, 8e9, 1.0)
    found = drive_rate(tmp_path, 4096, cacheable=False)
    assert found == (around(1e9, 0.2, "measured"), False)


def test_what_the_page_cache_holds_is_read_from_it(monkeypatch, tmp_path) -> None:
    given(monkeypatch, 1e9, 8e9, 0.75)
    rate, cached = drive_rate(tmp_path, 4096, cacheable=True)
    assert rate.likely == pytest.approx(1 / (0.75 / 8e9 + 0.25 / 1e9))
    assert rate.low < rate.likely < rate.high == 8e9
    assert not cached
    given(monkeypatch, 1e9, 8e9, 0.99)
    assert drive_rate(tmp_path, 4096, cacheable=True).cached


def test_a_miss_that_the_page_cache_holds_is_a_copy_that_nothing_hides() -> None:
    """Records of 8 MB at 8 GB/s: 1 ms each, and what handling takes; or as runs showed."""
    memory, rate = around(1e10, 0.4, "estimated"), around(8e9, 0.2, "measured")
    slow = speeds([], HERE, "m", memory, rate)
    found = from_page_cache(slow, [], "m", 8_000_000)
    assert found.miss_s == pytest.approx(1.07e-3)
    assert found.recall is None
    work = replace(WORK, record_bytes=8_000_000)
    token = decode(work, (4, 4), lambda share: 0.5, found, "likely")
    assert token.wait_s == 0
    assert token.handling_s == pytest.approx(2 * 1.07e-3)
    plain = decode(work, (8, 8), lambda share: 0.5, found, "likely")
    assert token.compute_s == pytest.approx(plain.compute_s)  # no reads beside it
    seen = [Sample(model="m", copied_s=3e-4), Sample(model="m", miss_s=9e-4)]
    assert from_page_cache(slow, seen, "m", 8_000_000).miss_s == pytest.approx(3e-4)


def test_a_sample_of_copies_counts_them_and_no_slowing() -> None:
    prefill = Spent(tokens=64, compute_s=2.0, python_s=1.0, misses=16)
    answer = Spent(tokens=20, compute_s=0.4, python_s=0.1, misses=40, wait_s=0.3)
    found = sample_of("m", WORK, 64, prefill, answer, cached=True)
    assert found.weight_bytes_s == pytest.approx(20 * (1000 + 4 * 500) / 0.4)
    assert found.copied_s == pytest.approx((0.4 - 20 * 2 * LAYER_S) / 40)
    assert found.miss_s is None


def test_an_unknown_drive_is_an_assumption(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(module, "noted_speed", lambda path, size: None)
    assert drive_rate(None, 4096, cacheable=True) == (around(1e9, 0.5, "estimated"), False)
    noted = DriveSpeed(direct=True, depth=4, bytes_s=3e9, cached_bytes_s=1e10)
    monkeypatch.setattr(module, "noted_speed", lambda path, size: noted)
    assert drive_rate(None, 4096, cacheable=True) == (around(3e9, 0.5, "estimated"), False)

    def broken(path: object, size: int) -> DriveSpeed:
        raise OSError("no such drive")

    monkeypatch.setattr(module, "drive_speed", broken)
    assert drive_rate(tmp_path, 4096, cacheable=True).bytes_s.basis == "estimated"


def test_what_was_just_written_is_in_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "experts-00000.safetensors").write_bytes(bytes(1 << 20))
    assert 0.0 <= module._in_page_cache(tmp_path) <= 1.0
    assert module._in_page_cache(tmp_path / "none") == 0.0
