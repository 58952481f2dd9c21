"""A team of threads that run one kernel together.

Kernels release the GIL and hand themselves work through a shared counter, so the team only starts
them and waits. Waking a helper costs about 20 microseconds; work below `alone` runs on the caller.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil


def default_threads() -> int:
    """Physical cores this process may use."""
    try:
        allowed = len(psutil.Process().cpu_affinity() or [0])
    except (AttributeError, OSError):  # macOS has no affinity
        allowed = psutil.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


class Team:
    """`size` threads, the caller included. Use from one thread at a time; close when done."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._counter = np.zeros(8, np.int64)  # alone on its cache line
        self._todo: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(size - 1)]
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for tid in range(1, size):
            threading.Thread(target=self._work, args=(tid,), daemon=True).start()

    def _work(self, tid: int) -> None:
        todo = self._todo[tid - 1]
        while (job := todo.get()) is not None:
            function, args = job
            try:
                function(tid, self._counter, *args)
            except BaseException as error:  # noqa: BLE001  handed to the caller, never lost
                self._done.put(error)
            else:
                self._done.put(None)

    def run(self, function: Callable[..., Any], *args: Any, alone: bool = False) -> None:
        """function(tid, counter, *args) on every thread, or the caller alone; waits for all."""
        self._counter[0] = 0
        if alone or self.size == 1:
            function(0, self._counter, *args)
            return
        for todo in self._todo:
            todo.put((function, args))
        try:
            function(0, self._counter, *args)
        finally:
            errors = [self._done.get() for _ in self._todo]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        for todo in self._todo:
            todo.put(None)
