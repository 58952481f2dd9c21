"""The upper tier: experts in a device's memory, taken from the cache in memory below it.

The same policy as below, LayerLRU, sees all lookups; the cache below sees those that missed here.
Which experts are handed out, copied and dropped follows from the lookups alone, so an offline
replay gives the counts of both tiers (`split.replay_tiers`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from moelite.cache.loader import ExpertCache
from moelite.cache.lru import LayerLRU
from moelite.cache.split import ALL_COPIED, Decision, Split, copied_of, decide
from moelite.cache.stats import CacheStats
from moelite.quant.base import PAGE
from moelite.store import ExpertKey


class Arrival(Protocol):
    """A copy that was started; moelite.gpu.device starts them."""

    def gate(self) -> None:
        """What is computed from now on waits for it."""
        ...

    def landed(self) -> bool:
        """Whether it is there."""
        ...

    def wait(self) -> None:
        """Returns once it is there: its source may then be overwritten."""
        ...


Send = Callable[[int, int, int], Arrival]  # (layer, slot below, slot here) -> a copy under way


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Experts that can be computed: on the device in these slots, or on the host."""

    experts: list[tuple[int, int]]
    host: bool = False
    arrivals: Sequence[Arrival] = ()

    def gate(self) -> None:
        """What is computed from now on waits until they are there."""
        for arrival in self.arrivals:
            arrival.gate()

    def pieces(self, most: int) -> Iterator[Batch]:
        """It in parts, to be gated one by one: of `most` experts, or of all that are there."""
        begin, count = 0, len(self.experts)
        while begin < count:
            end = min(count, begin + most) if self.arrivals else count
            while end < count and all(a.landed() for a in self.arrivals[begin : end + 1]):
                end += 1
            part = slice(begin, end)
            yield replace(self, experts=self.experts[part], arrivals=self.arrivals[part])
            begin = end


class UpperCache:
    """Routed experts of all layers in slots of a device's memory.

    below: the cache in memory. Slots are named, as there, by the page where they begin; slots,
    sizes and quotas: as of ExpertCache. send: starts a copy. experts: of each layer.

    One thread at a time, the one that uses `below`.
    """

    def __init__(
        self,
        below: ExpertCache,
        *,
        slots: Mapping[int, int],
        quotas: Mapping[int, int],
        experts: Mapping[int, int],
        send: Send,
        split: Split = ALL_COPIED,
    ) -> None:
        self.below, self.sizes, self.split = below, below.sizes, split
        self._send = send
        self._arrivals: dict[int, Arrival] = {}  # by the slot below that a copy reads from
        below.before_read = self._left
        # {layer: the byte where each expert begins, int64 [experts], -1: not here}; changed: since
        # whoever reads them last set it back
        self.bases = {n: np.full(count, -1, np.int64) for n, count in experts.items()}
        self.changed = True
        self.divide(slots, quotas)
        self.reset_stats()

    def divide(self, slots: Mapping[int, int], quotas: Mapping[int, int]) -> None:
        """Begins anew with these slots, all empty."""
        self._lru = {layer: LayerLRU(quota) for layer, quota in quotas.items()}
        self._slot: dict[ExpertKey, int] = {}
        for bases in self.bases.values():
            bases[:] = -1
        self.changed = True
        self._ahead: dict[ExpertKey, tuple[int, Arrival]] = {}
        self._coming: dict[ExpertKey, Arrival] = {}  # claimed, not handed out yet
        self._bringing = 0  # misses of the present layer whose copies have not begun
        self._free: dict[int, deque[int]] = {}
        self._floating: dict[int, int] = {}
        begin = 0
        for size, count in slots.items():
            kept = sum(n for layer, n in quotas.items() if self.sizes[layer] == size)
            if count <= kept:
                raise ValueError(f"{count} slots of {size} bytes: one beside {kept} must float")
            pages = range(begin, begin + count * size // PAGE, size // PAGE)
            self._free[size], self._floating[size] = deque(pages), count - kept
            begin = pages.stop

    @property
    def stats(self) -> CacheStats:
        """Counts since the start or the last reset; bytes_read: copied to the device."""
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            low=self._host,
            bytes_read=self._bytes,
            wait_s=self._wait_s,
            read_s=0.0,
            useful=self._useful,
            late=self._late,
            wasted=self._wasted,
        )

    def reset_stats(self) -> None:
        """Count from zero, here alone; what is resident stays."""
        self._hits = self._misses = self._host = self._bytes = 0
        self._useful = self._late = self._wasted = 0
        self._wait_s = 0.0

    def resident(self, layer: int) -> tuple[int, ...]:
        """Experts of `layer` on the device, the least recently used first."""
        return self._layer(layer).resident

    def slot_of(self, layer: int, expert: int) -> int:
        """Where an expert is, or -1."""
        return self._slot.get(ExpertKey(layer, expert), -1)

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """Counts experts as used and hit; all are here, as `bases` told."""
        found = self._layer(layer).lookup(experts)
        assert not found.misses
        assert not found.evicted
        self._hits += len(found.hits)
        for key in [k for k in self._ahead if k.layer == layer]:
            self._drop(key)

    def forget(self, layer: int, expert: int) -> None:
        """An expert whose bytes on the device are good for nothing is there no more."""
        self._layer(layer).discard(expert)
        self._release([ExpertKey(layer, expert)])

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Begins to bring experts that `layer` will perhaps need: to the device, or to memory.

        In the router's order, as far as it is guessed: what the host would compute stays below.
        Only into slots that nothing needs now; one stays free.
        """
        lru, free = self._layer(layer), self._free[self.sizes[layer]]
        away = [expert for expert in experts if expert not in lru]
        copied = copied_of(lru, len(away), self.split)
        absent = []
        for place, expert in enumerate(away):
            key = ExpertKey(layer, expert)
            page = self.below.slot_of(layer, expert)
            if page < 0:
                absent.append(expert)
            elif not self._bringing and place < copied and key not in self._ahead and len(free) > 1:
                slot = free.popleft()
                self._ahead[key] = slot, self._start(layer, page, slot)
        if absent:
            self.below.prefetch(layer, absent)

    def batches(
        self, layer: int, experts: Sequence[int], *, one: bool
    ) -> Generator[Batch, None, None]:
        """Yields every needed expert once: residents first, then what comes up from below.

        Copies are under way when a batch is handed out: start what may run beside them, then
        `gate` the batch, then compute. one: a single token's, of which some may be left to the
        host. A slot holds its expert until the next batch is asked for, or, on a device that
        computes later, until what was asked for by then is computed. Close the generator to stop
        early.
        """
        lru = self._layer(layer)
        found = decide(lru, experts, self.split if one else ALL_COPIED)
        misses = [*found.copied, *found.host]
        self._hits += len(found.hits)
        self._misses += len(misses)
        self._host += len(found.host)
        self._bringing = len(found.copied)
        evicted = {ExpertKey(layer, e) for e in found.evicted}
        hits = [ExpertKey(layer, e) for e in found.hits]
        try:
            self._release(evicted.difference(hits))
            for key in [k for k in self._ahead if k.layer == layer]:
                if key.expert not in found.copied:
                    self._drop(key)
            here = self._here(hits, evicted)
            if misses:
                yield from self._bring(layer, misses, found, here, one=one)
            yield from here
        finally:
            for arrival in self._coming.values():  # what was cut short may be a hit next time
                arrival.gate()
            self._coming.clear()
            self._bringing = 0
            self._release(evicted)
            for expert in found.copied:
                if ExpertKey(layer, expert) not in self._slot:
                    lru.discard(expert)

    def close(self) -> None:
        """Waits for copies that read from memory."""
        for arrival in self._arrivals.values():
            arrival.wait()
        self._arrivals.clear()

    def _here(self, hits: list[ExpertKey], evicted: set[ExpertKey]) -> Iterator[Batch]:
        if hits:
            yield Batch(experts=[(key.expert, self._slot[key]) for key in hits])
            self._release(evicted.intersection(hits))

    def _bring(
        self, layer: int, misses: list[int], found: Decision, here: Iterator[Batch], *, one: bool
    ) -> Iterator[Batch]:
        """What is missing, and between its first copies and its first batch those that are here."""
        size, host, ahead = self.sizes[layer], set(found.host), set(self._ahead)
        evicted = {ExpertKey(layer, e) for e in found.evicted}
        claimed: deque[ExpertKey] = deque()
        # half of the slots that float are computed while the others are filled
        most, half = self._floating[size], max(1, self._floating[size] // 2)

        def some(count: int) -> Iterator[Batch]:
            group = [claimed.popleft() for _ in range(min(count, len(claimed)))]
            arrivals = [self._coming[key] for key in group]
            pairs = [(key.expert, self._slot[key]) for key in group]
            yield Batch(experts=pairs, arrivals=arrivals)
            self._computed(group, evicted)

        if all(self.below.slot_of(layer, expert) < 0 for expert in misses):
            yield from here  # while they are read
        for landed in self.below.batches(layer, misses):
            # what was guessed is there sooner than what begins to come now
            for expert, page in sorted(landed, key=lambda x: ExpertKey(layer, x[0]) not in ahead):
                if expert in host:
                    continue
                full = len(claimed) >= most and not one
                if full or not self._has_free(size):
                    yield from here
                while claimed and (full or not self._has_free(size)):
                    full = False
                    yield from some(half)
                claimed.append(ExpertKey(layer, expert))
                self._claim(claimed[-1], page)
                self._bringing -= 1
            if computed := [pair for pair in landed if pair[0] in host]:
                yield from here
                yield Batch(experts=computed, host=True)  # while copies are under way
            yield from here
            while claimed:
                yield from some(len(claimed) if one else half)

    def _computed(self, group: list[ExpertKey], evicted: set[ExpertKey]) -> None:
        for key in group:
            del self._coming[key]
        self._release(evicted.intersection(group))

    def _has_free(self, size: int) -> bool:
        # a slot that a guess holds is as good as free, but for the last resort
        return bool(self._free[size]) or any(self.sizes[key.layer] == size for key in self._ahead)

    def _claim(self, key: ExpertKey, page: int) -> None:
        """Has an expert in a slot, or on its way to it."""
        ahead = self._ahead.pop(key, None)
        if ahead is None:
            size = self.sizes[key.layer]
            if not self._free[size]:
                self._drop(next(k for k in self._ahead if self.sizes[k.layer] == size))
            slot = self._free[size].popleft()
            self._coming[key] = self._start(key.layer, page, slot)
        else:
            slot, self._coming[key] = ahead
            if self._coming[key].landed():
                self._useful += 1
            else:
                self._late += 1
        self._slot[key] = slot
        self.bases[key.layer][key.expert] = slot * PAGE
        self.changed = True

    def _start(self, layer: int, page: int, slot: int) -> Arrival:
        arrival = self._arrivals[page] = self._send(layer, page, slot)
        self._bytes += self.sizes[layer]
        return arrival

    def _left(self, page: int) -> None:
        # a slot below is about to be overwritten: what is copied from it has to be through
        arrival = self._arrivals.pop(page, None)
        if arrival is not None:
            start = time.perf_counter()
            arrival.wait()
            self._wait_s += time.perf_counter() - start

    def _layer(self, layer: int) -> LayerLRU:
        return self._lru.setdefault(layer, LayerLRU(0))

    def _release(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
            slot = self._slot.pop(key, None)
            if slot is not None:
                self._free[self.sizes[key.layer]].append(slot)
                self.bases[key.layer][key.expert] = -1
                self.changed = True

    def _drop(self, key: ExpertKey) -> None:
        # a copy under way goes on; whatever is copied into its slot next comes after it
        slot, _ = self._ahead.pop(key)
        self._free[self.sizes[key.layer]].append(slot)
        self._wasted += 1
