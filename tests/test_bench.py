"""The benchmark's arithmetic on a model that takes known time and counts its own traffic."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from moelite import bench as module
from moelite import process
from moelite.bandwidth import read_speed
from moelite.bench import WARM_TOKENS, bench
from moelite.cache.stats import CacheStats
from moelite.cache.trace import Trace
from moelite.errors import UsageError

PREFILL_S, DECODE_S, V = 0.03, 0.005, 7


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time passes only where a SlowModel computes."""
    SlowModel.now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: SlowModel.now))


class SlowModel:
    """Prefill takes 30 ms, each later run's 10 ms more; a decode step 5 ms; t + 1 follows t."""

    now = 0.0

    def __init__(self) -> None:
        self.arch = SimpleNamespace(vocab_size=V)
        self.context = 256
        self.fed: list[list[list[int]]] = []
        self.counted = CacheStats()
        self.seconds = {"experts": 0.0, "head": 0.0}

    def session(self) -> SlowModel:
        self.fed.append([])
        return self

    def advance(self, ids: Sequence[int]) -> np.ndarray:
        self.fed[-1].append(list(ids))
        later = 0.01 * (len(self.fed) - 2)
        passed = PREFILL_S + later if len(ids) > 1 else DECODE_S
        SlowModel.now += passed
        self.seconds["experts"] += 0.5 * passed
        self.seconds["head"] += 0.125 * passed
        c = self.counted
        self.counted = CacheStats(
            hits=c.hits + 3 * len(ids),
            misses=c.misses + len(ids),
            bytes_read=c.bytes_read + 4096 * len(ids),
            wait_s=c.wait_s + 0.5,
            read_s=c.read_s + 0.25,
        )
        return np.eye(V, dtype=np.float32)[(ids[-1] + 1) % V]

    def stats(self) -> CacheStats:
        return self.counted

    def part_seconds(self) -> dict[str, float]:
        return dict(self.seconds)

    token_bytes = 1000

    def memory_speed(self) -> float:
        return 400_000.0

    def drive_speed(self) -> float | None:
        return 32768.0


def test_the_drive_is_compared_with_what_it_gives_right_after() -> None:
    report = bench(SlowModel(), prompt=30, gen=11, repeat=3)
    assert report.drive_bytes_s == 32768.0
    assert report.drive_share == pytest.approx(4096 / 0.25 / 32768)  # of decode steps alone

    class Resident(SlowModel):
        def drive_speed(self) -> float | None:
            return None

    assert bench(Resident(), prompt=30, gen=11, repeat=1).drive_share is None


def test_speeds_are_tokens_over_time() -> None:
    report = bench(SlowModel(), prompt=30, gen=11, repeat=3)
    assert (report.prompt_tokens, report.generated_tokens, len(report.runs)) == (30, 11, 3)
    assert [run.ttft_s for run in report.runs] == pytest.approx([0.03, 0.04, 0.05])
    assert report.runs[0].prefill_tok_s == pytest.approx(30 / 0.03)
    assert report.decode_tok_s == pytest.approx(1 / DECODE_S)


def test_parts_and_the_rest_make_up_a_token() -> None:
    class Resident(SlowModel):
        def stats(self) -> CacheStats:
            return CacheStats()

    report = bench(Resident(), prompt=30, gen=11, repeat=3)
    decode = {"experts": 2.5, "head": 0.625, "read wait": 0, "interpreter": 1.875}
    assert report.decode_ms == pytest.approx(decode)
    assert sum(report.prefill_ms.values()) == pytest.approx(1e3 * 0.04 / 30)
    assert report.runs[0].prefill_ms["experts"] == pytest.approx(0.5)


def test_the_share_of_memory_speed() -> None:
    report = bench(SlowModel(), prompt=30, gen=11, repeat=3)
    assert (report.token_bytes, report.memory_bytes_s) == (1000, 400_000)
    assert report.bandwidth == pytest.approx(1000 / DECODE_S / 400_000)


def test_memory_speed_is_of_this_machine() -> None:
    """A gigabyte a second is below any computer, a thousand above."""
    block = np.ones(1 << 26, np.uint8)
    for threads in (1, 2):
        assert 1e9 < read_speed(block, threads) < 1e12


def test_the_medians_are_of_the_runs() -> None:
    report = bench(SlowModel(), prompt=5, gen=2, repeat=3)
    assert report.ttft_s == pytest.approx(0.04)
    for name in ("prefill_tok_s", "decode_tok_s", "ttft_s"):
        assert getattr(report, name) == sorted(getattr(r, name) for r in report.runs)[1]


def test_every_run_is_a_fresh_session_with_the_same_tokens() -> None:
    model = SlowModel()
    bench(model, prompt=9, gen=4, repeat=2, seed=3)
    warm, one, two = model.fed
    assert len(warm[0]) == WARM_TOKENS
    assert one == two
    assert [len(ids) for ids in one] == [9, 1, 1, 1]
    last = one[0][-1]
    assert [ids[0] for ids in one[1:]] == [(last + i) % V for i in (1, 2, 3)]
    assert all(0 <= i < V for i in one[0])


def test_the_prompt_follows_the_seed() -> None:
    prompts = []
    for seed in (1, 1, 2):
        model = SlowModel()
        bench(model, prompt=40, gen=2, repeat=1, seed=seed)
        prompts.append(model.fed[-1][0])
    assert prompts[0] == prompts[1] != prompts[2]


def test_traffic_leaves_the_warm_up_out() -> None:
    report = bench(SlowModel(), prompt=10, gen=3, repeat=2)
    tokens = 10 + 2  # the last generated token is not fed back
    assert report.runs[0].experts.misses == tokens
    assert report.experts.hits == 2 * 3 * tokens
    assert report.experts.bytes_read == 2 * 4096 * tokens
    assert report.experts.wait_s == pytest.approx(2 * 3 * 0.5)
    assert report.experts.hit_rate == 0.75


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": 0}, "--prompt 0"),
        ({"gen": 1}, "--gen 1"),
        ({"repeat": 0}, "--repeat 0"),
        ({"prompt": 250, "gen": 7}, "exceed the context of 256"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, says) -> None:
    with pytest.raises(UsageError, match=says):
        bench(SlowModel(), **arguments)


def test_peak_memory_rises_with_use_and_stays() -> None:
    before = process.peak_rss_bytes()
    block = np.ones(64 << 20, np.uint8)
    during = process.rss_bytes()
    del block
    after = process.peak_rss_bytes()
    assert during >= 64 << 20
    assert after >= max(before, during - (4 << 20))


def test_peak_memory_of_a_child_does_not_count_its_parent() -> None:
    """A small program started by a large one reports its own peak."""
    code = (
        "import numpy as np, subprocess, sys; block = np.ones(400 << 20, np.uint8); "
        "child = 'from moelite.process import peak_rss_bytes; print(peak_rss_bytes())'; "
        "done = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True); "
        "print(done.stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < 200 << 20


def test_the_processor_has_a_name() -> None:
    assert process.cpu_name().strip()


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_units_of_the_fallback(platform, monkeypatch, tmp_path) -> None:
    """Without a status file: ru_maxrss is bytes on macOS and KiB elsewhere."""
    monkeypatch.setattr(process, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(process.sys, "platform", platform)
    usage = SimpleNamespace(ru_maxrss=3 << 20)
    monkeypatch.setattr(process.resource, "getrusage", lambda who: usage)
    assert process.peak_rss_bytes() == (3 << 20) * (1 if platform == "darwin" else 1024)


class RoutedModel(SlowModel):
    """Remembers which routes each run had."""

    routes: object = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def force_routes(self, routes: object) -> None:
        self.routes = routes

    def advance(self, ids: Sequence[int]) -> np.ndarray:
        self.seen.append(self.routes)
        return super().advance(ids)


def test_a_route_holds_for_every_run_and_not_longer() -> None:
    model, routes = RoutedModel(), np.zeros((1, 1, 1), np.int32)
    report = bench(model, prompt=8, gen=3, route=Trace(routes=routes, experts=1, name="t.jsonl"))
    assert report.route == "t.jsonl"
    assert all(seen is routes for seen in model.seen)
    assert len(model.seen) == 2 + 3 * 3
    assert model.routes is None
    model.seen.clear()
    assert bench(model, prompt=8, gen=3).route is None
    assert set(model.seen) == {None}


def test_decode_traffic_is_told_apart() -> None:
    report = bench(SlowModel(), prompt=10, gen=3, repeat=2)
    assert report.runs[0].decode_experts.misses == 2
    assert report.decode_experts.hits == 2 * 3 * 2
    assert report.decode_experts.bytes_read == 2 * 2 * 4096
    assert report.decode_experts.wait_s == pytest.approx(2 * 2 * 0.5)
