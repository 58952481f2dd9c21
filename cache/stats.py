"""What the expert cache counted."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """A snapshot; subtract an earlier one to get what happened between the two.

    hits, misses: experts found and not found, each counted once per layer and call, whether or not
    a miss was read ahead.
    bytes_read: bytes that arrived in slots.
    wait_s: seconds the caller was blocked on a read; overlap with its own work is not counted.
    read_s: seconds in which at least one read was under way.
    low: experts used in few bits because they were not in memory; misses, too.
    useful, late, wasted: reads ahead of need that had landed when they were needed, that were
    still under way, and that were not needed.
    upper: of the cache in a device's memory, whose misses this one looked up; its bytes_read were
    copied to the device, its `low` experts computed on the CPU.
    """

    hits: int = 0
    misses: int = 0
    low: int = 0
    bytes_read: int = 0
    wait_s: float = 0.0
    read_s: float = 0.0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    upper: CacheStats | None = None

    def __sub__(self, earlier: CacheStats) -> CacheStats:
        names = [field.name for field in fields(self) if field.name != "upper"]
        less = {name: getattr(self, name) - getattr(earlier, name) for name in names}
        upper = self.upper
        if upper is not None and earlier.upper is not None:
            upper = upper - earlier.upper
        return CacheStats(**less, upper=upper)

    @property
    def hit_rate(self) -> float:
        """Share of lookups that were hits; 0 where nothing was looked up."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def read_bytes_s(self) -> float:
        """Bytes a second while reading; 0 where nothing was read."""
        return self.bytes_read / self.read_s if self.read_s > 0 else 0.0
