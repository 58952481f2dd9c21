"""Threads that read records into slots. What is needed now overtakes what is read ahead."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from moelite.quant.base import U8
from moelite.store import ExpertKey

Read = Callable[[ExpertKey, U8], int]  # returns the bytes it read


class Reading:
    """One read of an expert into a slot. Its fields belong to the pool until it has landed."""

    __slots__ = ("began", "dropped", "error", "key", "landed", "nbytes", "slot", "view")

    def __init__(self, key: ExpertKey, slot: int, view: U8) -> None:
        self.key, self.slot, self.view = key, slot, view
        self.began, self.nbytes = False, 0
        self.error: BaseException | None = None
        # the cache's own marks: its bytes are there; nobody wants them any more
        self.landed = self.dropped = False


class ReadPool:
    """`threads` reads at a time. landed: every read that has ended, well or not."""

    def __init__(self, read: Read, threads: int) -> None:
        self._read = read
        self.landed: SimpleQueue[Reading] = SimpleQueue()
        self._urgent: deque[Reading] = deque()
        self._ahead: deque[Reading] = deque()
        self._signal: SimpleQueue[bool] = SimpleQueue()  # one True for each read put in a queue
        self._lock = threading.Lock()
        self._active, self._since, self._busy_s = 0, 0.0, 0.0
        self._team = [
            threading.Thread(target=self._work, name=f"moelite-read-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._team:
            thread.start()

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one read was under way."""
        with self._lock:
            now = time.perf_counter() - self._since if self._active else 0.0
            return self._busy_s + now

    def submit(self, reading: Reading, *, urgent: bool) -> None:
        """Reads in order, urgent ones first."""
        (self._urgent if urgent else self._ahead).append(reading)
        self._signal.put(True)

    def hurry(self, reading: Reading) -> None:
        """Makes a read urgent that was not."""
        with self._lock, contextlib.suppress(ValueError):  # it is under way, or has landed
            self._ahead.remove(reading)
            self._urgent.append(reading)

    def cancel(self, reading: Reading) -> bool:
        """Whether the read could be kept from beginning; if so, it will not land."""
        with self._lock:
            for waiting in (self._urgent, self._ahead):
                if reading in waiting:
                    waiting.remove(reading)
                    return True
        return False

    def close(self) -> None:
        """Ends the threads after the reads that are under way."""
        with self._lock:
            self._urgent.clear()
            self._ahead.clear()
        for _ in self._team:
            self._signal.put(False)
        for thread in self._team:
            thread.join()

    def _next(self) -> Reading | None:
        with self._lock:  # while `hurry` moves a read it is in neither queue
            if self._urgent:
                return self._urgent.popleft()
            return self._ahead.popleft() if self._ahead else None  # None: it was cancelled

    def _work(self) -> None:
        while self._signal.get():
            reading = self._next()
            if reading is None:
                continue
            reading.began = True
            self._count(1)
            try:
                reading.nbytes = self._read(reading.key, reading.view)
            except BaseException as problem:  # noqa: BLE001 - told to who waits for it
                reading.error = problem
            self._count(-1)
            self.landed.put(reading)

    def _count(self, step: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._active == 0:
                self._since = now
            self._active += step
            if self._active == 0:
                self._busy_s += now - self._since
