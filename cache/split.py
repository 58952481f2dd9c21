"""Which of a layer's misses are copied to a device, and which are computed where they are.

Integers and seconds only: `replay_tiers` gives the very counts of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from moelite.cache.lru import LayerLRU


class Split(NamedTuple):
    """How many of a layer's misses are copied; the rest are computed where they are.

    copy_s: to copy one expert; host_s: to compute one on the CPU; fixed_s: to hand a token over to
    it and its result back. Both sides run at once.
    """

    copy_s: float
    host_s: float
    fixed_s: float

    def copied(self, misses: int) -> int:
        """The number that ends soonest; on a tie the larger, which fills the cache."""

        def seconds(n: int) -> float:
            host = self.fixed_s + (misses - n) * self.host_s if n < misses else 0.0
            return max(n * self.copy_s if n else 0.0, host)  # 0 * inf is no number

        return min(range(misses, -1, -1), key=seconds)


ALL_COPIED = Split(0.0, float("inf"), 0.0)
NONE_COPIED = Split(float("inf"), 0.0, 0.0)


class Decision(NamedTuple):
    """What one lookup means: each needed expert once. host: computed where they are."""

    hits: list[int]
    copied: list[int]
    host: list[int]
    evicted: list[int]


def copied_of(lru: LayerLRU, misses: int, split: Split) -> int:
    """How many of a layer's misses are copied: as the split has it, or what the layer has room for
    as long as it is not full."""
    return max(min(misses, lru.capacity - len(lru.resident)), split.copied(misses))


def decide(lru: LayerLRU, experts: Sequence[int], split: Split) -> Decision:
    """Looks up `experts`, in the router's order; what is computed on the host does not enter."""
    once = list(dict.fromkeys(experts))
    misses = [e for e in once if e not in lru]
    copied = misses[: copied_of(lru, len(misses), split)]
    host = set(misses[len(copied) :])
    found = lru.lookup([e for e in once if e not in host])
    return Decision(found.hits, found.misses, misses[len(copied) :], found.evicted)


def replay_tiers(
    trace: Iterable[tuple[int, Sequence[int]]],
    upper: Mapping[int, int],
    below: Mapping[int, int],
    split: Split = ALL_COPIED,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(hits, misses) on the device and in memory of a trace of (layer, a token's experts), under
    quotas {layer: experts kept} of both."""
    device = {layer: LayerLRU(quota) for layer, quota in upper.items()}
    memory = {layer: LayerLRU(quota) for layer, quota in below.items()}
    counts = [0, 0, 0, 0]
    for layer, experts in trace:
        found = decide(device[layer], experts, split)
        missed = [*found.copied, *found.host]
        counts[0] += len(found.hits)
        counts[1] += len(missed)
        if missed:
            again = memory[layer].lookup(missed)
            counts[2] += len(again.hits)
            counts[3] += len(again.misses)
    return (counts[0], counts[1]), (counts[2], counts[3])
