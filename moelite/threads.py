"""A team of threads that run jobs together: see moelite.sync for how they share one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from moelite.step import JOB_WORDS, work
from moelite.sync import RING, slot_of, sync_size

# Between two jobs the caller spends 10 to 60 microseconds in Python, between two tokens up to some
# hundred. A helper polls for about that long before it sleeps: waking a sleeping thread takes 20 to
# 100, and it needs the interpreter for it. Polling through a read from the drive, five times as
# long, saved 2 of 105 ms a token and cost 30 of CPU time (docs/LOG.md).
_POLLS = 10_000


def default_threads() -> int:
    """Physical cores this process may use."""
    try:
        allowed = len(psutil.Process().cpu_affinity() or [0])
    except (AttributeError, OSError):  # macOS has no affinity
        allowed = psutil.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


class _Helper:
    """One thread besides the caller's."""

    def __init__(self) -> None:
        self.asleep = False
        self.bell: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: look again; False: end


class Team:
    """`size` threads, the caller included. Use from one thread at a time; close when done.

    phases: the most that a job has.
    """

    def __init__(self, size: int, phases: int) -> None:
        self.size = size
        self._sync = np.zeros(sync_size(size, phases), np.int64)
        self._jobs = np.zeros(RING * JOB_WORDS, np.int64)
        # what a job's words point to, until its slot is used again: a helper may be late
        self._kept: list[Any] = [None] * RING
        self._number = 0
        self._closing = False
        self._helpers = [_Helper() for _ in range(size - 1)]
        for tid, helper in enumerate(self._helpers, 1):
            threading.Thread(target=self._help, args=(tid, helper), daemon=True).start()

    def run(
        self, words: Sequence[int], phases: int, keep: Any = None, *, alone: bool = False
    ) -> None:
        """Runs a job (see moelite.step) of up to `phases` phases on every thread.

        keep: owns the arrays that the words name, if nothing else does for as long as the team.
        alone: on the caller's thread only. Returns when all pieces of the job are done.
        """
        self._number += 1
        row = self._number % RING
        while self._sync[slot_of(self._sync, self._number)]:
            time.sleep(0)  # a helper was put aside in the job RING before this one
        self._jobs[row * JOB_WORDS : row * JOB_WORDS + len(words)] = words
        self._kept[row] = keep
        team = 1 if alone else self.size
        for helper in self._helpers[: team - 1]:
            if helper.asleep:
                helper.asleep = False
                helper.bell.put(True)
        work(0, team, self._sync, self._jobs, self._number, phases, 0)

    def close(self) -> None:
        """Ends the helpers."""
        self._closing = True
        for helper in self._helpers:
            helper.bell.put(False)

    def _help(self, tid: int, helper: _Helper) -> None:
        last = 0
        while not self._closing:
            seen = work(tid, self.size, self._sync, self._jobs, last, 0, _POLLS)
            if seen != last:
                last = seen
                continue
            helper.asleep = True
            # a job opened just now rang no bell here; one opened from here on does
            idle = work(tid, self.size, self._sync, self._jobs, last, 0, 1) == last
            if idle and not helper.bell.get():
                return
            helper.asleep = False
