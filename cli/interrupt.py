"""Ctrl-C while an answer is written: a wish, looked at between tokens."""

from __future__ import annotations

import signal
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

AGAIN_S = 1.0  # a second Ctrl-C within this time means now


class Interrupt:
    """Turns the first Ctrl-C into `asked`; a second one at once is KeyboardInterrupt as ever.

    Raising inside a computation would leave it half done. Outside the main thread it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at = 0.0

    def __enter__(self) -> Interrupt:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._at < AGAIN_S:
            raise KeyboardInterrupt
        self.asked, self._at = True, now

    def check(self, *_: object) -> None:
        """Raise Stopped if Ctrl-C was pressed. Fits where a progress function is wanted."""
        if self.asked:
            raise Stopped


@contextmanager
def silent_keys() -> Iterator[None]:
    """What is typed meanwhile (^C, too) is not echoed into the answer; the next prompt gets it."""
    if not sys.stdin.isatty():
        yield
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    silent = before[:]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(number, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


class Stopped(Exception):
    """The user stopped the answer before its first token."""
