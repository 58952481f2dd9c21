"""Records that the page cache holds, read by the threads that compute.

Such a read is a copy in memory: reading threads would take the cores from those that compute, and
hand every record over through the interpreter (.17 ms a miss, docs/LOG.md). So the team copies a
layer's missing records together and multiplies by them while they are in the processor's cache. The
system is asked not to wait (RWF_NOWAIT): what it would have to fetch from the drive is left to the
reading threads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence

import numpy as np

from moelite.cache.reads import Reading
from moelite.step import READ_FAILED, READ_PART, READ_WORDS, READS
from moelite.store import ExpertKey, Place
from moelite.threads import Team

_ALONE = 3  # parts that are copied before a helper is awake


def _preadv2() -> int:
    """The address of the system's preadv2, 0 where it or RWF_NOWAIT is missing."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 0
    try:
        found = ctypes.CDLL(None).preadv2
    except (AttributeError, OSError):
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value or 0


class CachedReads:
    """Reads records on a team, where the system has them in memory.

    program: the address of the model's words (moelite.step). place: where a record is, or None if
    it must not be read this way.
    """

    _system = _preadv2()
    available = bool(_system)

    def __init__(
        self, program: int, team: Team, place: Callable[[ExpertKey], Place | None]
    ) -> None:
        self._program, self._team, self._place = program, team, place

    def __call__(self, readings: Sequence[Reading]) -> list[bool]:
        """Which of the readings are done; the others' slots hold anything. Sets their bytes."""
        found = [(i, r, p) for i, r in enumerate(readings) if (p := self._place(r.key)) is not None]
        done = [False] * len(readings)
        if not found:
            return done
        parts = -(-max(place.nbytes for _, _, place in found) // READ_PART)
        rows: list[int] = []
        for _, reading, place in found:
            rows += place.file, place.offset, reading.view.ctypes.data, place.nbytes, 0
        table = np.empty(len(rows) + 2 * parts * len(found), np.int64)
        table[: len(rows)] = rows
        job = [self._system, os.RWF_NOWAIT, len(found), parts]
        words = [READS, self._program, table.ctypes.data, table.size, *job]
        self._team.run(words, 1, table, alone=len(found) * parts <= _ALONE)
        failed = table[READ_FAILED : len(rows) : READ_WORDS].tolist()
        for (i, reading, place), missing in zip(found, failed, strict=True):
            if not missing:
                reading.nbytes, done[i] = place.nbytes, True
        return done
