"""Bars of bytes on one scale, told apart by sign as well as by colour; progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.text import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of a bar. sign: one character; plain: the same where only ASCII can be shown."""

    name: str
    bytes: int
    sign: str
    plain: str
    style: str


def cells(sizes: Sequence[int], scale_bytes: int, width: int) -> list[int]:
    """Characters for each size where `scale_bytes` take `width`: by largest remainder.

    A size above zero gets at least one character, taken from the longest.
    """
    exact = [size * width / scale_bytes for size in sizes]
    out = [int(e) for e in exact]
    left = round(sum(exact)) - sum(out)
    for i in sorted(range(len(sizes)), key=lambda i: out[i] - exact[i])[:left]:
        out[i] += 1
    for i, size in enumerate(sizes):
        if size > 0 and out[i] == 0:
            longest = max(range(len(out)), key=lambda j: out[j])
            out[i] = 1
            out[longest] -= out[longest] > 1
    return out


def bar(segments: Sequence[Segment], scale_bytes: int, width: int, *, ascii_only: bool) -> Text:
    """The segments end to end."""
    text = Text()
    for segment, n in zip(
        segments, cells([s.bytes for s in segments], scale_bytes, width), strict=True
    ):
        text.append((segment.plain if ascii_only else segment.sign) * n, style=segment.style)
    return text


@contextmanager
def progress_on_stderr(what: str, unit: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar with the time left, as a callable (done, total); None off a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(unit), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)

        def update(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total)

        yield update
