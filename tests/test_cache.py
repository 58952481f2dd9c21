"""The LRU policy by hand and by replay; the loader with slow, failing and abandoned reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite.cache import CacheStats, ExpertCache, LayerLRU, allocate_arena, replay
from moelite.errors import StoreError
from moelite.store import ExpertKey

RECORD = 4096


class Reader:
    """Fills a slot with the key's own bytes; may wait, fail, or be held at a gate."""

    def __init__(self, delay_s: float = 0.0, fail: frozenset[ExpertKey] = frozenset()) -> None:
        self.delay_s = delay_s
        self.fail = fail
        self.error: Exception = OSError(5, "Input/output error")
        self.gate: threading.Event | None = None
        self.calls: list[ExpertKey] = []
        self.running = 0
        self.most_running = 0
        self._lock = threading.Lock()

    def __call__(self, key: ExpertKey, out: np.ndarray) -> int:
        with self._lock:
            self.calls.append(key)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            out[:] = 255  # a half-read slot must never be handed out
            if self.gate is not None:
                assert self.gate.wait(10)
            time.sleep(self.delay_s)
            if key in self.fail:
                raise self.error
            out[:] = mark(key)
            return out.size
        finally:
            with self._lock:
                self.running -= 1


def mark(key: ExpertKey) -> int:
    return (key.layer * 16 + key.expert) % 255


def make(read: Reader, quotas: dict[int, int], floating: int = 1, readers: int = 4) -> ExpertCache:
    slots = {RECORD: sum(quotas.values()) + floating}
    arena, sizes = allocate_arena(slots), dict.fromkeys(range(16), RECORD)
    return ExpertCache(
        arena=arena, slots=slots, sizes=sizes, quotas=quotas, read=read, readers=readers
    )


def use(cache: ExpertCache, layer: int, experts: Sequence[int]) -> list[list[int]]:
    """Run a layer as the decoder does: every handed-out slot must hold its expert."""
    batches = []
    for batch in cache.batches(layer, experts):
        assert batch
        for expert, slot in batch:
            assert (cache.slot_view(layer, slot) == mark(ExpertKey(layer, expert))).all()
        batches.append([expert for expert, _ in batch])
    return batches


def flat(batches: list[list[int]]) -> list[int]:
    return [expert for batch in batches for expert in batch]


def check(cache: ExpertCache) -> None:
    """Every slot is free or resident, once; residents are what the policy says."""
    held = {key: slot for key, slot in cache._slot.items()}
    ahead = [reading.slot for reading in cache._ahead.values()]
    free = [page for pages in cache._free.values() for page in pages]
    if set(cache._free) == {RECORD}:  # a page each
        assert sorted([*free, *held.values(), *ahead]) == list(range(cache.arena.size // RECORD))
    assert not cache._reading
    assert not cache._waiting
    assert {k for k in held} == {ExpertKey(i, e) for i in cache._lru for e in cache.resident(i)}
    for key, slot in held.items():
        assert (cache.slot_view(key.layer, slot) == mark(key)).all()


# --- policy ---


def test_lookup_uses_all_then_evicts_the_oldest() -> None:
    lru = LayerLRU(3)
    assert lru.lookup([1, 2, 3]) == ([], [1, 2, 3], [])
    assert lru.lookup([1, 4]) == ([1], [4], [2])
    assert lru.resident == (3, 1, 4)


def test_a_hit_may_be_evicted_by_its_own_lookup() -> None:
    lru = LayerLRU(2)
    lru.lookup([0, 1])
    # 0 is resident at the start, so it counts as a hit, though 2 and 3 push it out
    assert lru.lookup([0, 2, 3]) == ([0], [2, 3], [1, 0])
    assert lru.resident == (2, 3)


def test_misses_beyond_the_capacity_do_not_stay() -> None:
    lru = LayerLRU(2)
    assert lru.lookup([5, 6, 7, 8]) == ([], [5, 6, 7, 8], [5, 6])


def test_capacity_zero_keeps_nothing() -> None:
    lru = LayerLRU(0)
    assert lru.lookup([1, 1, 2]) == ([], [1, 2], [1, 2])
    assert lru.resident == ()


def test_an_expert_needed_twice_counts_once() -> None:
    lru = LayerLRU(4)
    assert lru.lookup([2, 1, 2]) == ([], [2, 1], [])
    assert lru.resident == (1, 2)  # the last use counts


def test_admit_says_who_left() -> None:
    lru = LayerLRU(1)
    assert lru.admit(3) is None
    assert lru.admit(3) is None
    assert lru.admit(4) == 3
    assert 4 in lru
    assert 3 not in lru


def test_negative_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        LayerLRU(-1)


def test_replay_by_hand() -> None:
    trace = [(0, [1, 2]), (1, [1, 2]), (0, [2, 3]), (0, [1]), (1, [1])]
    # layer 0 keeps 2: 1 2 miss, 2 hits 3 misses (1 leaves), 1 misses; layer 1 keeps 1: only 2 stays
    assert replay(trace, {0: 2, 1: 1}) == (1, 7)


def test_lookup_is_the_same_as_the_slowest_model() -> None:
    rng = np.random.default_rng(1)
    lru, order = LayerLRU(5), []
    for _ in range(500):
        needed = [int(e) for e in rng.choice(12, rng.integers(1, 9), replace=False)]
        found = lru.lookup(needed)
        assert found.hits == [e for e in needed if e in order]
        order = [e for e in order if e not in needed] + needed
        order = order[-5:]
        assert list(lru.resident) == order


def test_stats_subtract() -> None:
    late = CacheStats(hits=5, misses=3, bytes_read=300, wait_s=2.0)
    early = CacheStats(hits=1, misses=2, bytes_read=100, wait_s=0.5)
    assert late - early == CacheStats(hits=4, misses=1, bytes_read=200, wait_s=1.5)
    assert (late - early).hit_rate == 0.8
    assert CacheStats().hit_rate == 0


# --- loader ---


def test_arena_is_page_aligned_and_zero() -> None:
    arena = allocate_arena({4096: 3})
    assert arena.size == 3 * 4096
    assert arena.ctypes.data % 4096 == 0
    assert not arena.any()
    arena[5] = 1


def test_an_arena_without_floating_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="float"):
        make(Reader(), {0: 2, 1: 2}, floating=0)


def test_residents_come_first_while_reads_already_run() -> None:
    read = Reader()
    cache = make(read, {0: 4}, floating=2)
    use(cache, 0, [0, 1])
    read.gate = threading.Event()
    batches = cache.batches(0, [2, 0, 3, 1])
    first = next(batches)
    assert [e for e, _ in first] == [0, 1]
    for _ in range(1000):  # reads were begun before the first batch was handed out
        if read.running == 2:
            break
        time.sleep(0.005)
    assert read.running == 2
    read.gate.set()
    assert sorted(e for batch in batches for e, _ in batch) == [2, 3]
    check(cache)
    cache.close()


def test_waiting_counts_only_while_blocked() -> None:
    cache = make(Reader(delay_s=0.05), {0: 1}, floating=3)
    use(cache, 0, [0])
    assert 0.04 <= cache.stats.wait_s < 0.9
    cache.reset_stats()
    for batch in cache.batches(0, [0, 1]):
        if batch[0][0] == 0:
            time.sleep(0.3)  # the read of 1 lands meanwhile
    assert cache.stats.wait_s < 0.04
    assert cache.stats.bytes_read == RECORD
    cache.close()


def test_a_slot_is_not_overwritten_while_its_expert_is_multiplied() -> None:
    cache = make(Reader(), {0: 0}, floating=2)
    for batch in cache.batches(0, range(8)):
        held = [(expert, slot, cache.slot_view(0, slot).copy()) for expert, slot in batch]
        time.sleep(0.01)
        for expert, slot, before in held:
            assert (cache.slot_view(0, slot) == before).all(), expert
    cache.close()


def test_evicted_hits_survive_until_they_are_multiplied() -> None:
    cache = make(Reader(), {0: 2}, floating=1)
    use(cache, 0, [0, 1])
    batches = cache.batches(0, [0, 1, 2, 3, 4])
    first = next(batches)
    time.sleep(0.05)
    assert [e for e, _ in first] == [0, 1]
    for expert, slot in first:
        assert (cache.slot_view(0, slot) == mark(ExpertKey(0, expert))).all()
    assert sorted(e for batch in batches for e, _ in batch) == [2, 3, 4]
    assert cache.resident(0) == (3, 4)
    check(cache)
    cache.close()


@pytest.mark.parametrize("readers", [1, 4])
def test_prefill_of_many_experts_through_one_floating_slot(readers: int) -> None:
    read = Reader()
    cache = make(read, {0: 0, 1: 3}, floating=1, readers=readers)
    for layer in (0, 1, 0, 1):
        batches = use(cache, layer, range(15))
        assert sorted(flat(batches)) == list(range(15))
        check(cache)
    assert cache.resident(1) == (12, 13, 14)
    assert read.most_running <= 4
    cache.close()


def test_reads_run_side_by_side() -> None:
    read = Reader(delay_s=0.03)
    cache = make(read, {0: 0}, floating=8, readers=4)
    use(cache, 0, range(8))
    assert read.most_running == 4
    cache.close()


traces = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 9), min_size=1, max_size=12)),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    trace=traces,
    quotas=st.tuples(*[st.integers(0, 5)] * 3),
    floating=st.integers(1, 4),
    readers=st.integers(1, 4),
)
def test_counts_equal_replay(
    trace: list[tuple[int, list[int]]], quotas: tuple[int, ...], floating: int, readers: int
) -> None:
    by_layer = dict(enumerate(quotas))
    cache = make(Reader(), by_layer, floating, readers)
    policy = {i: LayerLRU(q) for i, q in by_layer.items()}
    for layer, experts in trace:
        batches = use(cache, layer, experts)
        assert sorted(flat(batches)) == sorted(set(experts))
        policy[layer].lookup(experts)
        assert cache.resident(layer) == policy[layer].resident
        check(cache)
    stats = cache.stats
    assert (stats.hits, stats.misses) == replay(trace, by_layer)
    assert stats.bytes_read == stats.misses * RECORD
    cache.close()


@settings(max_examples=60, deadline=None)
@given(
    trace=traces,
    quotas=st.tuples(*[st.integers(0, 4)] * 3),
    floating=st.integers(1, 3),
    bad=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=6),
    stops=st.lists(st.integers(0, 3), min_size=25, max_size=25),
)
def test_failures_and_early_ends_leave_it_consistent(
    trace: list[tuple[int, list[int]]],
    quotas: tuple[int, ...],
    floating: int,
    bad: set[tuple[int, int]],
    stops: list[int],
) -> None:
    read = Reader(fail=frozenset(ExpertKey(*key) for key in bad))
    cache = make(read, dict(enumerate(quotas)), floating, 3)
    named = []
    for (layer, experts), stop in zip(trace, stops, strict=False):
        broken = {e for i, e in bad if i == layer}
        batches = cache.batches(layer, experts)
        try:
            for count, batch in enumerate(batches, 1):
                assert not broken.intersection(e for e, _ in batch)
                if count == stop:
                    break
            else:
                assert not broken.intersection(experts)
        except StoreError as error:
            assert broken.intersection(experts)
            named.append(f"layer {layer} expert" in str(error))
        batches.close()  # type: ignore[attr-defined]
        check(cache)
    assert all(named)
    read.fail = frozenset()
    for layer in range(3):
        assert sorted(flat(use(cache, layer, range(10)))) == list(range(10))
        check(cache)
    cache.close()


def test_a_store_error_comes_through_as_it_is() -> None:
    read = Reader(fail=frozenset({ExpertKey(0, 1)}))
    read.error = StoreError("experts-00000.safetensors ends inside layer 0 expert 1")
    cache = make(read, {0: 2}, floating=1)
    with pytest.raises(StoreError, match="ends inside") as caught:
        use(cache, 0, [1])
    assert caught.value is read.error
    check(cache)
    cache.close()


def test_keyboard_interrupt_inside_the_callers_work() -> None:
    def work(batches: Iterator[list[tuple[int, int]]]) -> None:
        for _ in batches:
            raise KeyboardInterrupt

    cache = make(Reader(delay_s=0.01), {0: 3}, floating=2)
    with pytest.raises(KeyboardInterrupt):
        work(cache.batches(0, range(6)))
    check(cache)
    use(cache, 0, range(6))
    cache.close()


def test_two_layers_at_once_are_a_bug() -> None:
    cache = make(Reader(), {0: 1, 1: 1}, floating=1)
    first = cache.batches(0, [0])
    next(first)
    with pytest.raises(RuntimeError, match="another layer"):
        next(cache.batches(1, [0]))
    first.close()  # type: ignore[attr-defined]
    use(cache, 1, [0])
    cache.close()


def test_a_layer_without_quota_keeps_nothing() -> None:
    cache = make(Reader(), {0: 2}, floating=1)
    assert sorted(flat(use(cache, 7, [3, 4]))) == [3, 4]
    assert cache.resident(7) == ()
    check(cache)
    cache.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_read_that_ctrl_c_kept_from_being_asked_for_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, *, ahead: bool
) -> None:
    cache = make(Reader(), {0: 1, 1: 1}, floating=4)
    done: list[int] = []

    def interrupted(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    def run() -> None:
        begin = cache.prefetch if ahead else lambda *what: use(cache, *what)
        with pytest.raises(KeyboardInterrupt):
            begin(1, [2])
        done.extend(flat(use(cache, 1, [2, 3])))

    monkeypatch.setattr(cache._pool, "submit", interrupted)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert sorted(done) == [2, 3]
    cache.close()
