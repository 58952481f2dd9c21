"""Whether guessing the next layer's experts pays: decided by speed, on the tokens being generated.

A guess lets their reads begin while this layer is computed. Where the drive is busy anyway, the
wrong guesses only delay what is needed, and a router product more a layer is lost in any case: so
tokens with and without take turns, and what was faster is kept (others decided by recall and lost
half their speed; see docs/LOG.md). Guesses change no token.
"""

from __future__ import annotations

import statistics
from typing import Literal, get_args

from moelite.errors import UsageError

Choice = Literal["auto", "on", "off"]
CHOICES: tuple[str, ...] = get_args(Choice)

_BLOCK = 3  # tokens with, then as many without
_BLOCKS = 6  # of each
_AGAIN = 2000  # tokens until the next test: drives change
_STILL = 24  # tokens without a read, after which there is nothing to guess
_GAIN = 0.98  # of the time without, at most, to be worth it


class Lookahead:
    """Asked before and told after each token that is generated."""

    def __init__(self, choice: Choice) -> None:
        if choice not in CHOICES:
            raise UsageError(
                f"lookahead {choice!r} is not known", fix=f"name one of {', '.join(CHOICES)}"
            )
        self.choice = choice
        self.chosen: bool | None = None if choice == "auto" else choice == "on"
        self.seconds: tuple[float, float] | None = None  # a token without and with, as tested
        self._times: tuple[list[float], list[float]] = [], []
        self._tokens = self._still = 0
        self._reads = False
        self.guessed = self.right = 0  # experts, and how many of them the router then chose

    @property
    def recall(self) -> float | None:
        """Share of the experts chosen that were guessed; None before any guess."""
        return self.right / self.guessed if self.guessed else None

    def wanted(self) -> bool:
        """Whether the next token guesses."""
        if self.chosen is not None:
            return self.chosen
        if self._still >= _BLOCK:  # what was missing, if anything, was copied from the page cache
            return False
        return self._tokens // _BLOCK % 2 == 1

    def told(self, seconds: float, reads: int) -> None:
        """A token took so long, and so many experts were read for it, or ahead of need."""
        if self.choice != "auto":
            return
        self._tokens += 1
        self._still = 0 if reads else self._still + 1
        if self._still >= _STILL:
            self.chosen, self.seconds = False, None  # all that is used is in memory by now
        if self.chosen is not None:
            if self._tokens >= _AGAIN:
                self.chosen, self._tokens, self._times = None, 0, ([], [])
            return
        at = self._tokens - 1
        self._reads = self._reads or reads > 0
        if at % _BLOCK:  # the first of a block still pays for the one before
            self._times[at // _BLOCK % 2].append(seconds)
        if self._tokens < 2 * _BLOCK * _BLOCKS:
            return
        without, having = (statistics.median(times) for times in self._times)
        self.seconds = without, having
        self.chosen = self._reads and having < _GAIN * without
        self._tokens, self._reads = 0, False

    def state(self) -> str:
        """For a person: what is done, and why."""
        if self.chosen is None:
            return "being tested"
        text = "on" if self.chosen else "off"
        if self.choice == "auto" and self.seconds is not None:
            without, having = self.seconds
            text += f" (tested: {1e3 * having:.1f} ms a token with, {1e3 * without:.1f} without)"
        return text
