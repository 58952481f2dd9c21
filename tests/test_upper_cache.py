"""The cache on a device over the one in memory: what each lookup means, whose slot is whose, and
that both tiers count what an offline replay counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from moelite.cache import ExpertCache, Split, UpperCache, allocate_arena, replay_tiers
from moelite.cache.lru import LayerLRU
from moelite.cache.split import ALL_COPIED, NONE_COPIED, decide
from moelite.cache.upper import Batch
from moelite.errors import StoreError
from moelite.quant.base import PAGE
from moelite.store import ExpertKey

EXPERTS, TOP_K, LAYERS = 12, 3, 4


class Copy:
    """A copy that lands when it is waited for, or when it is told to."""

    def __init__(self, copy: Callable[[], None]) -> None:
        self._copy, self.done, self.gated = copy, False, False

    def land(self) -> None:
        if not self.done:
            self.done = True
            self._copy()

    def gate(self) -> None:
        self.gated = True
        self.land()

    def landed(self) -> bool:
        return self.done

    wait = land


class Tiers:
    """Both caches, with records that name their expert, and copies in the order they started."""

    def __init__(self, upper: int, below: int, split: Split, floating: int = 2) -> None:
        sizes = dict.fromkeys(range(LAYERS), PAGE)
        self.fail: set[ExpertKey] = set()

        def read(key: ExpertKey, out: np.ndarray) -> int:
            if key in self.fail:
                raise StoreError(f"{key} is damaged")
            out[:2] = key
            return PAGE

        arena = allocate_arena({PAGE: below * LAYERS + floating})
        self.below = ExpertCache(
            arena=arena,
            slots={PAGE: below * LAYERS + floating},
            sizes=sizes,
            quotas=dict.fromkeys(range(LAYERS), below),
            read=read,
        )
        self.device = np.zeros(((upper * LAYERS + floating), PAGE), np.uint8)
        self.copies: list[Copy] = []
        self.upper = UpperCache(
            self.below,
            slots={PAGE: upper * LAYERS + floating},
            quotas=dict.fromkeys(range(LAYERS), upper),
            experts=dict.fromkeys(range(LAYERS), EXPERTS),
            send=self._send,
            split=split,
        )

    def _send(self, layer: int, page: int, slot: int) -> Copy:
        def copy() -> None:
            for earlier in self.copies[: self.copies.index(made)]:
                earlier.land()  # one after another
            self.device[slot] = self.below.slot_view(layer, page)

        made = Copy(copy)
        self.copies.append(made)
        return made

    def use(self, layer: int, experts: list[int], *, one: bool = True) -> tuple[list[int], int]:
        """Experts in the order they were handed out, and how many of them on the host; each slot
        is looked into, then overwritten by what the device computes later."""
        order, host = [], 0
        for batch in self.upper.batches(layer, experts, one=one):
            batch.gate()
            for expert, page in batch.experts:
                where = self.below.arena[page * PAGE :] if batch.host else self.device[page]
                assert tuple(where[:2]) == (layer, expert)
                order.append(expert)
                host += batch.host
        return order, host


@contextmanager
def tiers(upper: int, below: int, split: Split = ALL_COPIED, floating: int = 2) -> Iterator[Tiers]:
    made = Tiers(upper, below, split, floating)
    try:
        yield made
    finally:
        made.upper.close()
        made.below.close()


def lookups(seed: int, count: int) -> list[tuple[int, list[int]]]:
    rng = np.random.default_rng(seed)
    skew = 1 / np.arange(1, EXPERTS + 1)
    found = []
    for i in range(count):
        chosen = rng.choice(EXPERTS, TOP_K, replace=False, p=skew / skew.sum())
        found.append((i % LAYERS, chosen.tolist()))
    return found


@pytest.mark.parametrize("split", [ALL_COPIED, NONE_COPIED, Split(3.0, 2.0, 1.0)])
@pytest.mark.parametrize(("upper", "below"), [(0, 0), (1, 2), (3, 4), (5, 3), (12, 12)])
@pytest.mark.parametrize("guess", [False, True])
def test_counts_are_those_of_a_replay(upper: int, below: int, split: Split, guess: bool) -> None:
    trace = lookups(1, 400)
    rng = np.random.default_rng(2)
    with tiers(upper, below, split, floating=4) as both:
        for layer, experts in trace:
            if guess:  # whatever is read ahead changes nothing
                both.upper.prefetch(layer, rng.choice(EXPERTS, 2, replace=False).tolist())
            order, _ = both.use(layer, experts)
            assert sorted(order) == sorted(experts)
        up, down = both.upper.stats, both.below.stats
    quotas = dict.fromkeys(range(LAYERS), upper), dict.fromkeys(range(LAYERS), below)
    want = replay_tiers(trace, *quotas, split)
    assert ((up.hits, up.misses), (down.hits, down.misses)) == want
    assert up.misses == down.hits + down.misses
    if guess and 0 < upper < 12 and split is not NONE_COPIED:
        assert up.useful + up.late > 0
        assert up.wasted > 0


def test_a_replay_worked_out_by_hand() -> None:
    trace = [(0, [1, 2]), (0, [1, 3]), (0, [2, 3]), (0, [1, 2])]
    # device, two experts: 1 2 miss | 1 hit, 3 misses, 2 leaves | 3 hit, 2 misses, 1 leaves | 2 hit
    # memory, three: misses 1 2, then 3, then finds 2, then 1
    assert replay_tiers(trace, {0: 2}, {0: 3}) == ((3, 5), (2, 3))
    # on the CPU once the device is full: 1 2 stay, 3 and 3 are computed below
    assert replay_tiers(trace, {0: 2}, {0: 3}, NONE_COPIED) == ((4, 4), (1, 3))


def test_misses_are_split_where_both_sides_end_soonest() -> None:
    assert [Split(1.0, 1.0, 0.0).copied(n) for n in range(5)] == [0, 1, 1, 2, 2]
    assert [Split(9.0, 1.0, 0.0).copied(n) for n in (1, 8, 10)] == [0, 0, 1]
    assert [Split(1.0, 9.0, 0.0).copied(n) for n in (1, 8, 10)] == [1, 8, 9]
    assert Split(1.0, 1.0, 10.0).copied(8) == 8  # handing over costs more than it saves
    assert [ALL_COPIED.copied(n) for n in (0, 3)] == [0, 3]
    assert [NONE_COPIED.copied(n) for n in (0, 3)] == [0, 0]


def test_what_the_host_computes_does_not_enter_a_full_cache() -> None:
    lru = LayerLRU(2)
    assert decide(lru, [5, 6, 7], NONE_COPIED) == ([], [5, 6], [7], [])
    assert decide(lru, [7, 5], NONE_COPIED) == ([5], [], [7], [])
    assert lru.resident == (6, 5)
    assert decide(lru, [8, 9], Split(1.0, 1.0, 0.0)) == ([], [8], [9], [6])


def test_a_chunk_of_more_experts_than_slots() -> None:
    with tiers(2, 3) as both:
        order, host = both.use(0, list(range(EXPERTS)), one=False)
        assert sorted(order) == list(range(EXPERTS))
        assert host == 0
        assert both.upper.resident(0) == (10, 11)
        for layer in range(LAYERS):
            assert sorted(both.use(layer, list(range(EXPERTS)), one=False)[0]) == list(range(12))


def test_a_copy_is_through_before_its_source_is_overwritten() -> None:
    with tiers(3, 0) as both:
        # nothing stays in memory: each read takes a slot that a copy may still read from
        both.upper.prefetch(0, [1])
        for layer in range(LAYERS):
            both.use(layer, [4, 5, 6])
        assert all(copy.done for copy in both.copies[:-3])


def test_what_was_guessed_is_handed_out_before_what_was_not() -> None:
    with tiers(0, EXPERTS, floating=8) as both:
        both.use(0, [1, 2, 3])  # memory has them
        both.upper.prefetch(0, [3, 2])
        assert both.use(0, [1, 2, 3])[0] == [2, 3, 1]
        assert both.upper.stats.late == 2


def test_what_has_landed_is_computed_at_once_and_the_rest_piece_by_piece() -> None:
    def made(landed: list[bool], most: int) -> list[int]:
        copies = [Copy(lambda: None) for _ in landed]
        for copy, done in zip(copies, landed, strict=True):
            copy.done = done
        batch = Batch(experts=[(e, 9 * e) for e in range(len(landed))], arrivals=copies)
        sizes, at = [], 0
        for piece in batch.pieces(most):
            assert piece.experts == batch.experts[at : at + len(piece.experts)]
            piece.gate()
            at += len(piece.experts)
            assert [copy.gated for copy in copies] == [True] * at + [False] * (len(copies) - at)
            sizes.append(len(piece.experts))
        assert at == len(copies)
        return sizes

    assert made([False] * 5, 1) == [1, 1, 1, 1, 1]
    assert made([False] * 5, 2) == [2, 2, 1]
    assert made([False] * 5, 9) == [5]
    assert made([True] * 5, 1) == [5]
    assert made([True, True, False, True, False], 1) == [2, 1, 1, 1]
    residents = Batch(experts=[(1, 0), (2, 1)], host=True)
    assert [*residents.pieces(1)] == [residents]


def test_bases_tell_where_experts_are() -> None:
    with tiers(2, 4) as both:
        both.use(1, [3, 4])
        assert both.upper.changed
        for expert in range(EXPERTS):
            at = both.upper.bases[1][expert]
            assert (at >= 0) == (expert in both.upper.resident(1))
            if at >= 0:
                assert tuple(both.device[at // PAGE][:2]) == (1, expert)
        both.upper.touch(1, [4])
        assert both.upper.resident(1) == (3, 4)
        both.use(1, [5])
        assert both.upper.bases[1][3] == -1
        both.upper.divide({PAGE: 6}, dict.fromkeys(range(LAYERS), 1))
        assert all((bases == -1).all() for bases in both.upper.bases.values())
        assert both.use(1, [5])[0] == [5]


def test_slots_of_guesses_are_taken_where_no_other_is_free() -> None:
    with tiers(0, EXPERTS, floating=3) as both:
        both.use(0, [1, 2, 3])
        both.use(1, [1, 2, 3])  # memory has them
        both.upper.prefetch(1, [1, 2])
        assert both.upper.slot_of(1, 1) == -1  # on its way, not used yet
        assert both.use(0, [1, 2, 3])[0] == [1, 2, 3]
        assert both.upper.stats.wasted == 2
        both.upper.prefetch(1, [1])
        both.upper.touch(1, [])
        assert both.upper.stats.wasted == 3  # that layer has been through


def test_after_a_read_that_failed_the_caches_hold_what_arrived() -> None:
    with tiers(3, 3) as both:
        both.use(0, [1])
        both.fail.add(ExpertKey(0, 2))
        with pytest.raises(StoreError, match="damaged"):
            both.use(0, [1, 2])
        assert 2 not in both.upper.resident(0)
        both.fail.clear()
        assert both.use(0, [2, 1])[0] == [1, 2]
        assert both.use(0, [2])[0] == [2]


def test_what_was_cut_short_is_there_before_it_is_used() -> None:
    with tiers(3, 3) as both:
        both.use(0, [1, 2, 3])  # memory has them
        both.use(0, [4, 5, 6])
        batches = both.upper.batches(0, [1, 2, 3], one=True)
        assert next(batches).arrivals
        batches.close()  # nobody waited
        assert both.upper.resident(0) == (1, 2, 3)
        for batch in both.upper.batches(0, [1, 2, 3], one=True):
            for expert, slot in batch.experts:  # hits: nothing to wait for
                assert tuple(both.device[slot][:2]) == (0, expert)


def test_slots_are_refused_that_leave_none_to_float() -> None:
    with tiers(1, 1) as both, pytest.raises(ValueError, match="float"):
        both.upper.divide({PAGE: 4}, dict.fromkeys(range(LAYERS), 1))
