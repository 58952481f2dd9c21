"""Hit rates of a recorded routing under a policy and cache size, without a model. Integers only.

lru is the very LayerLRU of the engine. belady (MIN) knows the future and so bounds every policy
of the same granularity: one lookup covers all experts of a token, hits are those resident at its
start, and afterwards any of the residents and of the experts just used may stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moelite.cache.lru import LayerLRU, Lookup
from moelite.cache.trace import Trace
from moelite.errors import UsageError


class Policy(Protocol):
    """One layer's cache: told the experts of one token after another."""

    def lookup(self, experts: Iterable[int], /) -> Lookup: ...


class LayerMIN:
    """Belady's policy for a layer whose lookups, all of them, are known beforehand.

    After each lookup the `capacity` experts whose next use is nearest stay.
    """

    def __init__(self, capacity: int, lookups: Sequence[Sequence[int]]) -> None:
        if capacity < 0:
            raise ValueError(f"a layer cannot keep {capacity} experts")
        self.capacity = capacity
        self._resident: set[int] = set()
        self._next: dict[int, int] = {}  # the next use of each expert seen so far
        self._now, never = 0, len(lookups)
        self._later: list[list[int]] = []  # for each lookup and expert: its next use after that
        seen: dict[int, int] = {}
        for now in range(len(lookups) - 1, -1, -1):
            self._later.append([seen.get(e, never) for e in lookups[now]])
            seen |= dict.fromkeys(lookups[now], now)
        self._later.reverse()

    def lookup(self, experts: Iterable[int]) -> Lookup:
        """Use all of `experts`, which are those of the next known lookup."""
        needed = list(dict.fromkeys(experts))
        hits = [e for e in needed if e in self._resident]
        misses = [e for e in needed if e not in self._resident]
        self._next |= dict(zip(needed, self._later[self._now], strict=True))
        self._now += 1
        kept = sorted(self._resident.union(needed), key=self._next.__getitem__)
        self._resident = set(kept[: self.capacity])
        return Lookup(hits, misses, kept[self.capacity :][::-1])


def _lru(capacity: int, lookups: Sequence[Sequence[int]]) -> Policy:
    return LayerLRU(capacity)


POLICIES: dict[str, Callable[[int, Sequence[Sequence[int]]], Policy]] = {
    "lru": _lru,
    "belady": LayerMIN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Experts found in the cache and not."""

    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """Share of lookups that were hits; 0 where nothing was looked up."""
        return self.hits / max(1, self.hits + self.misses)


def count(trace: Trace, quotas: Sequence[int], *, policy: str = "lru", skip: int = 0) -> Counts:
    """Hits and misses of a trace from empty caches, one lookup a layer and token.

    quotas: experts kept, for each MoE layer in order (the values of moelite.budget.quotas). skip:
    first tokens that fill the caches but are not counted. Raises UsageError for an unknown policy,
    for quotas of another number of layers, and where no token is left to count.
    """
    if policy not in POLICIES:
        raise UsageError(f"unknown policy {policy!r}", fix=f"use {' or '.join(POLICIES)}")
    if len(quotas) != trace.layers:
        raise UsageError(f"{len(quotas)} quotas do not fit {trace.layers} MoE layers")
    if not 0 <= skip < trace.tokens:
        raise UsageError(
            f"--skip {skip} leaves nothing of {trace.tokens} tokens to count",
            fix=f"--skip 0 to {trace.tokens - 1}",
        )
    hits = 0
    for layer, quota in enumerate(quotas):
        lookups = trace.of_layer(layer)
        cache = POLICIES[policy](quota, lookups)
        for token, experts in enumerate(lookups):
            found = cache.lookup(experts)
            hits += len(found.hits) if token >= skip else 0
    total = (trace.tokens - skip) * trace.layers * trace.top_k
    return Counts(hits=hits, misses=total - hits)


def kept(fraction: float, experts: int) -> int:
    """How many of a layer's experts a fraction of them is: to the nearest, but at least one.

    Raises UsageError for a fraction outside 0..1.
    """
    if not 0 < fraction <= 1:
        raise UsageError(
            f"a cache of {fraction} of the experts is not in 0..1",
            fix="write 0.25 for a quarter of each layer's experts, or 16 for so many",
        )
    return max(1, int(fraction * experts + 0.5))


def curve(
    trace: Trace, fractions: Sequence[float], *, policy: str = "lru", skip: int = 0
) -> list[float]:
    """The hit rate where each of `fractions` (0..1] of every layer's experts is cached."""
    sizes = [kept(fraction, trace.experts) for fraction in fractions]
    return [
        count(trace, [size] * trace.layers, policy=policy, skip=skip).hit_rate for size in sizes
    ]


def overlap(trace: Trace) -> float:
    """Share of a token's experts that the token before used too, over all layers."""
    same = 0
    for layer in range(trace.layers):
        used = [set(experts) for experts in trace.of_layer(layer)]
        same += sum(len(now & before) for before, now in itertools.pairwise(used))
    return same / max(1, trace.routes[1:].size)
