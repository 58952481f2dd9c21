"""The expert cache: which experts are in memory, and how the others get there."""

from __future__ import annotations

if __name__ != "moelite.cache":
    raise ImportError("import moelite.cache, not cache (run `pip install -e .` first)")

from moelite.cache.loader import ExpertCache, allocate_arena
from moelite.cache.lru import LayerLRU, Lookup, replay
from moelite.cache.split import Split, replay_tiers
from moelite.cache.stats import CacheStats
from moelite.cache.trace import Trace, read_trace
from moelite.cache.upper import UpperCache

__all__ = [
    "CacheStats",
    "ExpertCache",
    "LayerLRU",
    "Lookup",
    "Split",
    "Trace",
    "UpperCache",
    "allocate_arena",
    "read_trace",
    "replay",
    "replay_tiers",
]
