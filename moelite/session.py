"""A conversation's memory: the tokens whose keys and values are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from moelite.arch import Arch
from moelite.errors import UsageError
from moelite.lookahead import Lookahead
from moelite.quant.base import F32
from moelite.words import I32

Progress = Callable[[int, int], None]


class Decoding(Protocol):
    """What runs the tokens of a session: see moelite.model.Decoder."""

    arch: Arch
    lookahead: Lookahead
    on_route: Callable[[int, I32], None] | None

    @property
    def routes(self) -> I32 | None:
        """Experts that tokens take, whatever the router says."""
        ...

    @routes.setter
    def routes(self, routes: I32 | None) -> None: ...
    @property
    def context(self) -> int: ...
    @property
    def chunk(self) -> int:
        """The most tokens that `forward` takes."""
        ...

    def forward(
        self, ids: Sequence[int], start: int, each: Callable[[int, F32], None] | None = None
    ) -> None: ...
    def logits(self, row: int) -> F32: ...
    def part_seconds(self) -> dict[str, float]: ...


class Session:
    """Tokens appended one after another, and the logits they give.

    A model has memory for one kv: a new session takes it over, and the old one then says so.
    """

    def __init__(self, decoder: Decoding, owner: Callable[[], Session | None]) -> None:
        self.ids: list[int] = []
        self._decoder, self._owner = decoder, owner

    @property
    def context(self) -> int:
        """The most tokens this session can hold."""
        return self._decoder.context

    def append(self, ids: Sequence[int], *, progress: Progress | None = None) -> F32:
        """Appends tokens; logits [T, V] float32 after each of them.

        The result takes 4 * T * V bytes outside the memory budget.
        """
        out = np.empty((len(ids), self._decoder.arch.vocab_size), np.float32)

        def keep(i: int, logits: F32) -> None:
            out[i] = logits

        self._run(ids, keep, progress)
        return out

    def each(self, ids: Sequence[int], use: Callable[[int, F32], None]) -> None:
        """Appends tokens; use(i, logits [V]) for each. The array is reused: copy what you keep."""
        self._run(ids, use, None)

    def advance(self, ids: Sequence[int], *, progress: Progress | None = None) -> F32:
        """Appends tokens; logits [V] float32 after the last one."""
        self._run(ids, None, progress)
        return self._decoder.logits((len(ids) - 1) % self._decoder.chunk).copy()

    def truncate(self, length: int) -> None:
        """Forgets the tokens from position `length` on."""
        del self.ids[length:]

    def _run(
        self,
        ids: Sequence[int],
        use: Callable[[int, F32], None] | None,
        progress: Progress | None,
    ) -> None:
        self._check(ids)
        chunk = self._decoder.chunk
        for at in range(0, len(ids), chunk):
            piece = list(ids[at : at + chunk])
            each = None if use is None else lambda i, row, at=at: use(at + i, row)
            self._decoder.forward(piece, len(self.ids), each)
            self.ids += piece
            if progress is not None:
                progress(at + len(piece), len(ids))

    def _check(self, ids: Sequence[int]) -> None:
        if self._owner() is not self:
            raise UsageError(
                "this session's memory was taken over by a newer one",
                fix="keep one session open at a time, or load the model twice",
            )
        if len(ids) == 0:
            raise UsageError("no tokens were given", fix="append at least one")
        if len(self.ids) + len(ids) > self.context:
            raise UsageError(
                f"{len(self.ids)} + {len(ids)} tokens do not fit the context of {self.context}",
                fix="load the model with a larger context, or truncate the session",
            )
        vocab = self._decoder.arch.vocab_size
        if min(ids) < 0 or max(ids) >= vocab:
            raise UsageError(f"token ids must be 0..{vocab - 1}, not {min(ids)}..{max(ids)}")
