"""Which experts of a layer stay in memory: least recently used goes first. Integers only, no I/O.

One `lookup` covers all experts that a layer needs for one token or one chunk. Every needed expert
is used in the order given, the misses enter, and only then the least recently used leave until the
layer is within its quota. The outcome depends on nothing but the trace, so `replay` gives the very
counts of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Lookup(NamedTuple):
    """Each needed expert once, in the order given; `evicted` from the least recently used on.

    An expert may be a hit and evicted by the same lookup, or a miss that is not kept: it is then in
    `evicted` too.
    """

    hits: list[int]
    misses: list[int]
    evicted: list[int]


class LayerLRU:
    """The resident experts of one layer, at most `capacity` between two lookups."""

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"a layer cannot keep {capacity} experts")
        self.capacity = capacity
        self._order: dict[int, None] = {}  # oldest first

    @property
    def resident(self) -> tuple[int, ...]:
        """Experts in memory, the least recently used first."""
        return tuple(self._order)

    def __contains__(self, expert: object) -> bool:
        return expert in self._order

    def lookup(self, experts: Iterable[int]) -> Lookup:
        """Use all of `experts`; misses enter, the least recently used leave."""
        needed = list(experts)
        once = list(dict.fromkeys(needed))
        hits = [e for e in once if e in self._order]
        misses = [e for e in once if e not in self._order]
        for expert in needed:
            self._order.pop(expert, None)
            self._order[expert] = None
        evicted = list(self._order)[: max(0, len(self._order) - self.capacity)]
        for expert in evicted:
            del self._order[expert]
        return Lookup(hits, misses, evicted)

    def admit(self, expert: int) -> int | None:
        """Use one expert; the one that had to leave for it, or None."""
        evicted = self.lookup([expert]).evicted
        return evicted[0] if evicted else None

    def discard(self, expert: int) -> None:
        """Forget an expert whose bytes did not arrive."""
        self._order.pop(expert, None)


def replay(
    trace: Iterable[tuple[int, Sequence[int]]], quotas: Mapping[int, int]
) -> tuple[int, int]:
    """(hits, misses) of a trace of (layer, experts needed) under `quotas` {layer: experts kept}."""
    layers = {layer: LayerLRU(quota) for layer, quota in quotas.items()}
    hits = misses = 0
    for layer, experts in trace:
        found = layers[layer].lookup(experts)
        hits += len(found.hits)
        misses += len(found.misses)
    return hits, misses
