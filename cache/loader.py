"""The expert cache: one arena of slots, records read straight into them on threads.

Layers whose records differ in size have slots of their own size; a slot serves all layers of its
size. The policy (`lru.py`) decides hits, misses and who stays before the first read starts, so
counts do not depend on which read lands first, nor on what was read ahead. A slot, named by the
page of the arena where it begins, is in one of five places:
free, resident, being read, read ahead, or handed out and to be freed once the caller has multiplied
by it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from moelite.cache.lru import LayerLRU
from moelite.cache.reads import Read, Reading, ReadPool
from moelite.cache.stats import CacheStats
from moelite.errors import StoreError
from moelite.machine import allocate
from moelite.quant.base import PAGE, U8
from moelite.store import ExpertKey

I32 = npt.NDArray[np.int32]


def allocate_arena(slots: Mapping[int, int]) -> U8:
    """Memory for {bytes of a slot: how many}, as moelite.machine.allocate gives it."""
    if not all(size > 0 and size % PAGE == 0 and count > 0 for size, count in slots.items()):
        raise ValueError(f"no arena holds slots {dict(slots)}: whole pages, at least one each")
    return allocate(sum(size * count for size, count in slots.items()))


class ExpertCache:
    """Routed experts of all layers in one arena.

    slots: {bytes of a slot, whole pages: how many}; arena uint8 holds them one after another.
    sizes: {layer: bytes of a slot of its experts}. quotas: {layer: experts kept}; a layer not named
    keeps none. Slots of a size beyond the sum of its layers' quotas float: misses are read into
    them first, and what is read ahead. At least one must.
    read: fills a slot and returns how many bytes it read; called on `readers` threads.

    One thread at a time may run `batches`, `prefetch` and `touch`.
    """

    def __init__(
        self,
        *,
        arena: U8,
        slots: Mapping[int, int],
        sizes: Mapping[int, int],
        quotas: Mapping[int, int],
        read: Read,
        readers: int = 4,
    ) -> None:
        for size, count in slots.items():
            kept = sum(n for layer, n in quotas.items() if sizes[layer] == size)
            if count <= kept:
                raise ValueError(
                    f"{count} slots of {size} bytes hold no more than the quotas {kept}:"
                    " one must float"
                )
        self.arena = arena
        self.sizes = dict(sizes)
        self.before_read: Callable[[int], None] | None = None  # told a slot to be overwritten
        # reads what needs no drive, on the caller's thread: which of the readings it did
        self.at_once: Callable[[Sequence[Reading]], Sequence[bool]] | None = None
        self._lru = {layer: LayerLRU(quota) for layer, quota in quotas.items()}
        self._slot: dict[
            ExpertKey, int
        ] = {}  # of residents, and of evicted hits not yet multiplied
        self._tables: dict[int, I32] = {}
        self.asked = 0  # reads that the pool was asked for
        self._free: dict[int, list[int]] = {}  # by size
        begin = 0
        for size, count in slots.items():
            pages = range(begin, begin + count * size // PAGE, size // PAGE)
            self._free[size] = list(reversed(pages))
            begin = pages.stop
        self._waiting: deque[ExpertKey] = deque()  # needed now, no slot free yet
        self._reading: dict[ExpertKey, Reading] = {}  # needed now
        self._ahead: dict[ExpertKey, Reading] = {}  # perhaps needed by a layer to come
        # reads under way that nobody wants, by the size of their slots, which will come back
        self._dropping: Counter[int] = Counter()
        self._pool = ReadPool(read, readers)
        self._running = False
        self.reset_stats()

    @property
    def stats(self) -> CacheStats:
        """Counts since the start or the last reset."""
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            low=self._low,
            bytes_read=self._bytes,
            wait_s=self._wait_s,
            read_s=self._pool.busy_s - self._busy_before,
            useful=self._useful,
            late=self._late,
            wasted=self._wasted,
        )

    def reset_stats(self) -> None:
        """Count from zero; what is resident stays."""
        self._hits = self._misses = self._low = self._bytes = 0
        self._useful = self._late = self._wasted = 0
        self._wait_s, self._busy_before = 0.0, self._pool.busy_s

    def resident(self, layer: int) -> tuple[int, ...]:
        """Experts of `layer` in memory, the least recently used first."""
        return self._layer(layer).resident

    def slots_of(self, layer: int, experts: int) -> I32:
        """[experts] int32: the page where each expert of a layer begins, -1 if it is not in memory;
        kept up to date."""
        if layer not in self._tables:
            self._tables[layer] = np.full(experts, -1, np.int32)
        return self._tables[layer]

    def slot_of(self, layer: int, expert: int) -> int:
        """The page where a resident expert begins, or -1."""
        return self._slot.get(ExpertKey(layer, expert), -1)

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """Counts experts as used and hit; all are in memory, as `slots_of` told."""
        found = self._layer(layer).lookup(experts)
        assert not found.misses
        assert not found.evicted
        self._hits += len(found.hits)
        if self._ahead:
            self._drop(layer)

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Counts experts as used, those not in memory in few bits, and begins to read the latter.

        Nobody waits: what lands is taken in by `admit`. Reads that find no free slot are left out.
        """
        lru = self._layer(layer)
        resident = [expert for expert in experts if expert in lru]
        missing = [expert for expert in experts if expert not in lru]
        lru.lookup(resident)
        self._hits += len(resident)
        self._misses += len(missing)
        self._low += len(missing)
        if lru.capacity:
            self.prefetch(layer, missing)

    def admit(self) -> None:
        """Takes in what was read after `used`; the least recently used leave for it."""
        self._take_landed()
        for key in [key for key, reading in self._ahead.items() if reading.landed]:
            reading = self._ahead.pop(key)
            if reading.error is not None:
                self._give(key, reading.slot)
                self._fail(reading)
            evicted = self._layer(key.layer).admit(key.expert)
            if evicted is not None:
                self._release([ExpertKey(key.layer, evicted)])
            self._useful += 1
            self._keep(reading)

    def slot_view(self, layer: int, slot: int) -> U8:
        """The bytes of a slot of a layer's size."""
        return self.arena[slot * PAGE : slot * PAGE + self.sizes[layer]]

    def close(self) -> None:
        """Wait for running reads and end the threads. The arena stays the caller's."""
        self._pool.close()

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begins to read experts that `layer` will perhaps need, after all that is needed now.

        Only into slots that nothing needs now, so the last ones may be left out; one stays free.
        """
        for expert in experts:
            if self._waiting or len(self._free[self.sizes[layer]]) < 2:
                return
            key = ExpertKey(layer, expert)
            if key not in self._slot and key not in self._ahead and key not in self._reading:
                self._ahead[key] = self._submit(self._begin(key), urgent=False)

    def batches(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Yield [(expert, slot)] until every needed expert was handed out once.

        Residents come first, as one batch, while reads of the others already run; then whatever has
        landed. A slot holds its expert until the next batch is asked for, so multiply before that.
        Close the generator to stop early. Raises StoreError when a read fails; the cache then holds
        only experts whose bytes arrived.
        """
        if self._running:
            raise RuntimeError("the batches of another layer are still being handed out")
        self._release(self._settle())
        lru = self._layer(layer)
        found = lru.lookup(experts)
        hits = [ExpertKey(layer, e) for e in found.hits]
        misses = [ExpertKey(layer, e) for e in found.misses]
        evicted = {ExpertKey(layer, e) for e in found.evicted}
        self._hits += len(hits)
        self._misses += len(misses)
        self._running = True
        try:
            self._release(evicted.difference(hits))
            ready = [*hits, *self._claim(layer, misses)]
            ready += self._start()
            if ready:
                yield [(key.expert, self._slot[key]) for key in ready]
                self._release(evicted.intersection(ready))
            while self._waiting or self._reading:
                ready = self._start() or self._collect()
                yield [(key.expert, self._slot[key]) for key in ready]
                self._release(evicted.intersection(ready))
        finally:
            self._waiting.clear()
            try:
                self._settle()
            finally:  # also when Ctrl-C cuts the settling short: the next call settles the rest
                self._release(evicted)
                for key in misses:
                    if key not in self._slot:
                        lru.discard(key.expert)
                self._running = False

    def _place(self, key: ExpertKey, slot: int) -> None:
        table = self._tables.get(key.layer)
        if table is not None:
            table[key.expert] = slot

    def _layer(self, layer: int) -> LayerLRU:
        return self._lru.setdefault(layer, LayerLRU(0))

    def _release(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
            slot = self._slot.pop(key, None)
            if slot is not None:
                self._give(key, slot)
                self._place(key, -1)

    def _give(self, key: ExpertKey, slot: int) -> None:
        # a slot that held `key` is free
        self._free[self.sizes[key.layer]].append(slot)

    def _begin(self, key: ExpertKey) -> Reading:
        slot = self._free[self.sizes[key.layer]].pop()
        if self.before_read is not None:
            self.before_read(slot)
        return Reading(key, slot, self.slot_view(key.layer, slot))

    def _submit(self, reading: Reading, *, urgent: bool) -> Reading:
        # before it is noted anywhere: whoever waits for what is noted would wait for ever for a
        # read that Ctrl-C kept from being asked for
        self._pool.submit(reading, urgent=urgent)
        self.asked += 1
        return reading

    def _claim(self, layer: int, misses: Sequence[ExpertKey]) -> list[ExpertKey]:
        # what was read ahead of these misses: those that have landed. The others wait, for their
        # read or for a slot. Guesses that did not come true are dropped.
        ready = []
        self._take_landed()
        for key in misses:
            reading = self._ahead.pop(key, None)
            if reading is None:
                self._waiting.append(key)
            elif not reading.landed:
                self._late += 1
                self._reading[key] = reading
                self._pool.hurry(reading)
            elif reading.error is not None:  # read again: it is needed now
                self._give(key, reading.slot)
                self._waiting.append(key)
            else:
                self._useful += 1
                self._keep(reading)
                ready.append(key)
        self._drop(layer)
        return ready

    def _drop(self, layer: int | None = None) -> None:
        # gives up what was read ahead for a layer, or for any
        for key in [key for key in self._ahead if layer is None or key.layer == layer]:
            reading = self._ahead.pop(key)
            if reading.landed or self._pool.cancel(reading):
                self._give(key, reading.slot)
                self._wasted += reading.landed
            else:
                reading.dropped = True
                self._dropping[self.sizes[key.layer]] += 1
                self._wasted += 1

    def _start(self) -> list[ExpertKey]:
        # begins as many reads as there are free slots; those that were there at once
        if not self._waiting:
            return []
        size = self.sizes[self._waiting[0].layer]  # all that wait are of one layer
        free = self._free[size]
        if not free and not self._reading:
            self._drop()  # slots that guesses hold are needed
            while not free and self._dropping[size]:
                self._take(self._pool.landed.get())
        begun = []
        while self._waiting and free:
            begun.append(self._begin(self._waiting.popleft()))
        ready = self._at_once(begun) if self.at_once is not None and begun else []
        for reading in begun:
            if not reading.landed:
                self._reading[reading.key] = self._submit(reading, urgent=True)
        return ready

    def _at_once(self, begun: Sequence[Reading]) -> list[ExpertKey]:
        assert self.at_once is not None
        start, ready = time.perf_counter(), []
        try:
            there = self.at_once(begun)
        except BaseException:  # Ctrl-C: none of them is anywhere else yet
            for reading in begun:
                self._give(reading.key, reading.slot)
            raise
        for reading, landed in zip(begun, there, strict=True):
            if landed:
                reading.landed = True
                self._bytes += reading.nbytes
                self._keep(reading)
                ready.append(reading.key)
        self._wait_s += time.perf_counter() - start
        return ready

    def _collect(self) -> list[ExpertKey]:
        """Wait until a needed read has landed, then take all that have."""
        assert self._reading, "no slot is free and none will be"
        ready = self._take_landed()
        while not ready:
            start = time.perf_counter()
            reading = self._pool.landed.get()
            self._wait_s += time.perf_counter() - start
            if self._take(reading):
                ready = [reading.key, *self._take_landed()]
        return ready

    def _take_landed(self) -> list[ExpertKey]:
        ready = []
        while not self._pool.landed.empty():
            reading = self._pool.landed.get()
            if self._take(reading):
                ready.append(reading.key)
        return ready

    def _take(self, reading: Reading) -> bool:
        # Whether a read that has landed was needed. StoreError if it was and failed.
        reading.landed, error = True, reading.error
        self._bytes += reading.nbytes
        if reading.dropped:
            self._dropping[self.sizes[reading.key.layer]] -= 1
            self._give(reading.key, reading.slot)
            return False
        if self._reading.pop(reading.key, None) is None:
            return False  # read ahead: it stays where it is until it is needed or dropped
        if error is not None:
            self._give(reading.key, reading.slot)
            self._fail(reading)
        self._keep(reading)
        return True

    def _fail(self, reading: Reading) -> NoReturn:
        if isinstance(reading.error, StoreError):
            raise reading.error
        key = reading.key
        raise StoreError(
            f"layer {key.layer} expert {key.expert} could not be read: {reading.error!r}",
            fix="check the disk, then `moelite verify` the store",
        ) from reading.error

    def _keep(self, reading: Reading) -> None:
        self._slot[reading.key] = reading.slot
        self._place(reading.key, reading.slot)

    def _settle(self) -> list[ExpertKey]:
        """Cancel what has not begun, wait for the rest; the experts whose bytes arrived."""
        for key, reading in list(self._reading.items()):
            if self._pool.cancel(reading):
                del self._reading[key]
                self._give(key, reading.slot)
        arrived = []
        while self._reading:
            reading = self._pool.landed.get()
            try:
                if self._take(reading):
                    arrived.append(reading.key)
            except StoreError:
                continue  # its slot is free again; the call that wanted it has its own error
        return arrived
