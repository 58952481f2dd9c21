"""The expert cache: one arena of equal slots, records read straight into them on threads.

The policy (`lru.py`) decides hits, misses and who stays before the first read starts, so counts do
not depend on which read lands first. A slot is in one of four places: free, resident, being read,
or handed out and to be freed once the caller has multiplied by it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from moelite.cache.lru import LayerLRU
from moelite.cache.stats import CacheStats
from moelite.errors import StoreError
from moelite.machine import allocate
from moelite.quant.base import U8
from moelite.store import ExpertKey

I32 = npt.NDArray[np.int32]
Read = Callable[[ExpertKey, U8], None]


def allocate_arena(slots: int, record_bytes: int) -> U8:
    """[slots * record_bytes] uint8, as moelite.machine.allocate gives it."""
    if slots < 1 or record_bytes < 1:
        raise ValueError(f"an arena of {slots} slots of {record_bytes} bytes is empty")
    return allocate(slots * record_bytes)


class ExpertCache:
    """Routed experts of all layers in one arena.

    arena: [slots * record_bytes] uint8.
    quotas: {layer: experts kept}; a layer not named keeps none.
    Slots beyond the sum of the quotas float: misses are read into them first. At least one must.
    read: fills a view of record_bytes bytes; called on `readers` threads.

    One thread at a time may run `batches`.
    """

    def __init__(
        self,
        *,
        arena: U8,
        record_bytes: int,
        quotas: Mapping[int, int],
        read: Read,
        readers: int = 4,
    ) -> None:
        slots = arena.size // record_bytes
        if slots <= sum(quotas.values()):
            raise ValueError(
                f"{slots} slots hold no more than the quotas {sum(quotas.values())}: one must float"
            )
        self.arena = arena
        self.record_bytes = record_bytes
        self.slots = slots
        self._read = read
        self._lru = {layer: LayerLRU(quota) for layer, quota in quotas.items()}
        self._slot: dict[
            ExpertKey, int
        ] = {}  # of residents, and of evicted hits not yet multiplied
        self._tables: dict[int, I32] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._reading: dict[Future[None], tuple[ExpertKey, int]] = {}
        self._landed: SimpleQueue[Future[None]] = SimpleQueue()
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="moelite-read")
        self._running = False
        self.reset_stats()

    @property
    def stats(self) -> CacheStats:
        """Counts since the start or the last reset."""
        return CacheStats(
            hits=self._hits, misses=self._misses, bytes_read=self._bytes, wait_s=self._wait_s
        )

    def reset_stats(self) -> None:
        """Count from zero; what is resident stays."""
        self._hits = self._misses = self._bytes = 0
        self._wait_s = 0.0

    def resident(self, layer: int) -> tuple[int, ...]:
        """Experts of `layer` in memory, the least recently used first."""
        return self._layer(layer).resident

    def slots_of(self, layer: int, experts: int) -> I32:
        """[experts] int32: where each expert of a layer is, -1 if it is not; kept up to date."""
        if layer not in self._tables:
            self._tables[layer] = np.full(experts, -1, np.int32)
        return self._tables[layer]

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """Counts experts as used and hit; all are in memory, as `slots_of` told."""
        found = self._layer(layer).lookup(experts)
        assert not found.misses
        assert not found.evicted
        self._hits += len(found.hits)

    def slot_view(self, slot: int) -> U8:
        """The [record_bytes] bytes of a slot."""
        return self.arena[slot * self.record_bytes : (slot + 1) * self.record_bytes]

    def close(self) -> None:
        """Wait for running reads and end the threads. The arena stays the caller's."""
        self._pool.shutdown(wait=True, cancel_futures=True)

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
            waiting = deque(misses)
            self._start(waiting)
            if hits:
                yield [(key.expert, self._slot[key]) for key in hits]
                self._release(evicted)
            while waiting or self._reading:
                self._start(waiting)
                ready = self._collect()
                yield [(key.expert, self._slot[key]) for key in ready]
                self._release(evicted.intersection(ready))
        finally:
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
                self._free.append(slot)
                self._place(key, -1)

    def _start(self, waiting: deque[ExpertKey]) -> None:
        """Begin as many reads as there are free slots."""
        while waiting and self._free:
            key, slot = waiting.popleft(), self._free.pop()
            future = self._pool.submit(self._read, key, self.slot_view(slot))
            self._reading[future] = (key, slot)
            future.add_done_callback(self._landed.put)

    def _collect(self) -> list[ExpertKey]:
        """Wait for one read, then take all that have landed."""
        assert self._reading, "no slot is free and none will be"
        if self._landed.empty():
            start = time.perf_counter()
            future = self._landed.get()
            self._wait_s += time.perf_counter() - start
        else:
            future = self._landed.get()
        ready = [self._take(future)]
        while not self._landed.empty():
            ready.append(self._take(self._landed.get()))
        return ready

    def _take(self, future: Future[None]) -> ExpertKey:
        key, slot = self._reading.pop(future)
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or error is not None:
            self._free.append(slot)
            if isinstance(error, StoreError):
                raise error
            raise StoreError(
                f"layer {key.layer} expert {key.expert} could not be read: {error!r}",
                fix="check the disk, then `moelite verify` the store",
            ) from error
        self._slot[key] = slot
        self._place(key, slot)
        self._bytes += self.record_bytes
        return key

    def _settle(self) -> list[ExpertKey]:
        """Cancel what has not begun, wait for the rest; the experts whose bytes arrived."""
        for future in self._reading:
            future.cancel()
        arrived = []
        while self._reading:
            try:
                arrived.append(self._take(self._landed.get()))
            except StoreError:
                continue  # its slot is free again; the call that wanted it has its own error
        return arrived
