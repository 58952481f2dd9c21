"""Recorded routing of a model, replayed: how often an expert is found for each share in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moelite.errors import UsageError

if TYPE_CHECKING:
    from moelite.cache.trace import Trace
    from moelite.forecast import HitRate, Hits

_LEAST = 32  # tokens
_WARM = 8  # the first of so many parts of the tokens is not counted: the lists are empty then


def recorded_hits(file: Path, experts: int) -> Hits:
    """The hit rates of the routing in `file`, for a model with `experts` a layer."""
    from moelite.cache.trace import read_trace

    return replayed(read_trace(file, experts=experts))


def replayed(trace: Trace) -> Hits:
    """The hit rates of a recording."""
    from moelite.hitrates import recorded

    if trace.tokens < _LEAST:
        raise UsageError(
            f"{trace.name} has {trace.tokens} tokens, too few to tell hit rates from",
            fix=f"record {_LEAST} or more",
        )
    about = f"replay of {trace.tokens:,} tokens in {Path(trace.name).name}"
    return recorded(replay_rate(trace), about)


def replay_rate(trace: Trace) -> HitRate:
    """Hits over lookups with a list of any share of the experts for each layer."""
    from moelite.cache.policy import count

    known: dict[int, float] = {trace.experts: 1.0}
    warm = trace.tokens // _WARM

    def kept(capacity: int) -> float:
        if capacity not in known:
            known[capacity] = count(trace, [capacity] * trace.layers, skip=warm).hit_rate
        return known[capacity]

    def rate(share: float) -> float:
        exact = min(max(share, 0.0), 1.0) * trace.experts
        low = min(int(exact), trace.experts - 1)
        return kept(low) + (exact - low) * (kept(low + 1) - kept(low))

    return rate
