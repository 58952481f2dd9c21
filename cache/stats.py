"""What the expert cache counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """A snapshot; subtract an earlier one to get what happened between the two.

    hits, misses: experts found and not found, each counted once per layer and call.
    bytes_read: bytes that arrived in slots.
    wait_s: seconds the caller was blocked on a read; overlap with its own work is not counted.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    wait_s: float = 0.0

    def __sub__(self, earlier: CacheStats) -> CacheStats:
        return CacheStats(
            hits=self.hits - earlier.hits,
            misses=self.misses - earlier.misses,
            bytes_read=self.bytes_read - earlier.bytes_read,
            wait_s=self.wait_s - earlier.wait_s,
        )

    @property
    def hit_rate(self) -> float:
        """Share of lookups that were hits; 0 where nothing was looked up."""
        return self.hits / max(1, self.hits + self.misses)
