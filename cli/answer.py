"""Shows an answer as it comes: thoughts dim, control characters left out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Literal

from moelite.cli.render import clean

OPEN, CLOSE = "<think>", "</think>"
_DIM, _PLAIN, _ERASE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
_PATIENCE_S = 0.5  # how long reading the prompt may take before it is mentioned

Kind = Literal["thought", "answer"]


class Thoughts:
    """Splits streamed text into thoughts (between <think> and </think>) and the answer.

    inside: the prompt itself opened a thought. thought, answer: the text so far.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self.thought = ""
        self.answer = ""
        self._inside = inside
        self._over = False  # a thought was there and has ended
        self._held = ""

    def push(self, text: str) -> Iterator[tuple[Kind, str]]:
        """The parts that are now certain."""
        self._held += text
        while mark := self._next_mark():
            at = self._held.find(mark)
            if at < 0:
                cut = len(self._held) - _begun(mark, self._held)
                part, self._held = self._held[:cut], self._held[cut:]
                yield from self._say(part)
                return
            part, self._held = self._held[:at], self._held[at + len(mark) :]
            yield from self._say(part)
            self._inside, self._over = not self._inside, self._inside
        yield from self.flush()

    def flush(self) -> Iterator[tuple[Kind, str]]:
        """What was held back, when nothing more comes."""
        part, self._held = self._held, ""
        yield from self._say(part)

    def _next_mark(self) -> str:
        """The mark that may come next: only the very beginning may open a thought."""
        if self._inside:
            return CLOSE
        start = (self.answer + self._held).lstrip()
        may_open = not self._over and (start.startswith(OPEN) or OPEN.startswith(start))
        return OPEN if may_open else ""

    def _say(self, part: str) -> Iterator[tuple[Kind, str]]:
        if not part:
            return
        if self._inside:
            self.thought += part
            yield "thought", part
        else:
            self.answer += part
            yield "answer", part


def _begun(mark: str, text: str) -> int:
    """Length of the longest end of `text` with which `mark` begins."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


class Paper:
    """stdout for an answer. Without a terminal: exactly the answer, no thoughts, no notes."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self._colour = self.terminal and not os.environ.get("NO_COLOR")
        self._started = 0.0
        self._shown = False
        self._last = "\n"

    def begin(self) -> None:
        """An answer is about to come."""
        self._started = time.monotonic()
        self._last = "\n"

    def reading(self, done: int, total: int) -> None:
        """Note how far the prompt is read, if it takes long."""
        if self.terminal and done < total and time.monotonic() - self._started > _PATIENCE_S:
            note = f"  reading {done:,} of {total:,} tokens ({100 * done // total} %)"
            self._write(_ERASE + self._dimmed(note))
            self._shown = True

    def text(self, kind: Kind, part: str) -> None:
        """Show a part of the answer."""
        self._erase()
        part = clean(part)
        if not part or (kind == "thought" and not self.terminal):
            return
        self._last = part[-1]
        self._write(self._dimmed(part) if kind == "thought" else part)

    def end(self) -> None:
        """The answer is complete: the cursor goes to a new line."""
        self._erase()
        if self._last != "\n":
            self._write("\n")

    def note(self, text: str) -> None:
        """A dim line for the person at the terminal."""
        if self.terminal:
            self._write(self._dimmed(text) + "\n")

    def _erase(self) -> None:
        if self._shown:
            self._write(_ERASE)
            self._shown = False

    def _dimmed(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._colour else text

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
