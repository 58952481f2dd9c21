"""A team of threads that run one kernel together: see moelite.sync for how they share it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from moelite import sync

# Between two kernels of a step the caller spends 20 to 60 microseconds in Python. A helper polls
# for about twice that before it sleeps: waking a sleeping thread takes 20 to 100.
_POLLS = 4000


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
    """`size` threads, the caller included. Use from one thread at a time; close when done."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._sync = np.zeros(sync.SIZE, np.int64)
        self._number = -1  # of the job that is or was open last: 1, 3, 5, ...
        self._job: tuple[int, Callable[..., Any], tuple[Any, ...]] | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._helpers = [_Helper() for _ in range(size - 1)]
        for tid, helper in enumerate(self._helpers, 1):
            threading.Thread(target=self._help, args=(tid, helper), daemon=True).start()

    def run(self, function: Callable[..., Any], *args: Any, alone: bool = False) -> None:
        """function(tid, sync, *args) on every thread, or the caller alone.

        Returns when the caller's share is done, which is when all pieces of the last phase are.
        """
        self._number += 2
        if not alone and self._helpers:
            # before it opens: a helper that sees a number open must find what it stands for
            self._job = (self._number, function, args)
        sync.open_job(self._sync)
        if self._job is not None:
            for helper in self._helpers:
                if helper.asleep:
                    helper.asleep = False
                    helper.bell.put(True)
        try:
            function(0, self._sync, *args)
        finally:
            sync.close_job(self._sync)
            self._job = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Ends the helpers."""
        self._closing = True
        for helper in self._helpers:
            helper.bell.put(False)

    def _help(self, tid: int, helper: _Helper) -> None:
        last = 0
        while not self._closing:
            found = sync.await_job(self._sync, last, _POLLS)
            if not found:
                helper.asleep = True
                # a job opened just now rang no bell here; one opened from here on does
                if sync.await_job(self._sync, last, 1) == 0 and not helper.bell.get():
                    return
                helper.asleep = False
                continue
            last = found
            job = self._job
            if job is None or job[0] != found or not sync.enter(self._sync, found):
                continue
            try:
                job[1](tid, self._sync, *job[2])
            except BaseException as error:  # noqa: BLE001  handed to the caller, never lost
                self._error = error
            finally:
                sync.leave(self._sync)
