"""Several stores judged against one reference, which is run once.

The reference's logits at the scored positions go to a file, as float32, unrounded: 4 bytes for each
token and entry of the vocabulary. So only one model is in memory at a time, each with the whole
budget, and a reference bigger than memory is read once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np

from moelite.agreement import I32, Choices, listen, restore
from moelite.errors import UsageError
from moelite.evaluate import Progress, ScoringModel, pieces, windows
from moelite.scores import F32, Scores

# of a row of another tool's results, with its types
_COLUMNS = ("name", str), ("bits_per_parameter", (int, float)), ("kld_mean", (int, float))


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Logits [len(ids), V] float32 at `offset` of the file, and the experts chosen meanwhile."""

    ids: tuple[int, ...]
    offset: int
    routes: dict[int, I32]


class Recording:
    """A model's answers to one text, as `evaluate.compare` asks for them: it takes its place."""

    def __init__(
        self, file: IO[bytes], vocab_size: int, pieces: Sequence[Piece], seconds: float
    ) -> None:
        self.vocab_size, self.pieces = vocab_size, pieces
        self.seconds = seconds  # inside the model, while it was recorded
        self.on_route: Any = None
        self._file = file

    def session(self) -> RecordedSession:
        return RecordedSession(self)

    def read(self, piece: Piece) -> F32:
        """logits [T, V] of a piece; read, not mapped, so that they are no memory of ours."""
        size = 4 * len(piece.ids) * self.vocab_size
        raw = os.pread(self._file.fileno(), size, piece.offset)
        return np.frombuffer(raw, np.float32).reshape(-1, self.vocab_size)


class RecordedSession:
    """Gives a Recording's pieces in their order; ValueError for any other tokens."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._at = recording, 0

    def append(self, ids: Sequence[int]) -> F32:
        recording = self._recording
        known = self._at < len(recording.pieces)
        if not known or recording.pieces[self._at].ids != tuple(ids):
            raise ValueError("these tokens were not recorded next")
        piece = recording.pieces[self._at]
        self._at += 1
        if recording.on_route is not None:
            for layer, experts in piece.routes.items():
                recording.on_route(layer, experts)
        return recording.read(piece)

    def advance(self, ids: Sequence[int]) -> F32:
        return np.empty(0, np.float32)

    def truncate(self, length: int) -> None:
        """A window's start: the next piece is the first of it."""


def recorded_bytes(tokens: int, context: int, protocol: str, vocab_size: int) -> int:
    """What a recording of a text of `tokens` takes on the disk."""
    scored = context - 1 - context // 2 if protocol == "llama" else context - 1
    return tokens // context * scored * vocab_size * 4


def record(
    model: ScoringModel,
    ids: Sequence[int],
    file: IO[bytes],
    *,
    context: int,
    protocol: Literal["llama", "paper"],
    bos_id: int | None = None,
    progress: Progress | None = None,
) -> Recording:
    """Runs `model` over the windows of `ids` and keeps what it says in `file`, opened for both."""
    cut = windows(ids, context=context, protocol=protocol, bos_id=bos_id)
    session, scores, choices = model.session(), Scores(), Choices()
    found: list[Piece] = []
    vocab = 0
    before = listen([model], [choices])
    try:
        for done, window in enumerate(cut):
            start = window.first - 1
            for [logits], targets in pieces([session], window, [scores], [choices]):
                vocab = logits.shape[1]
                stop = start + len(targets)
                offset = file.tell()
                file.write(np.ascontiguousarray(logits, np.float32).tobytes())
                found.append(
                    Piece(ids=window.ids[start:stop], offset=offset, routes=choices.take())
                )
                start = stop
            if progress:
                progress((done + 1) * context, len(cut) * context)
    finally:
        restore([model], before)
    file.flush()
    return Recording(file, vocab, found, scores.seconds)


def undominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (bits, divergence): whether no other point is as small and as near, and better in one."""
    return [
        not any(
            other != point and other[0] <= point[0] and other[1] <= point[1] for other in points
        )
        for point in points
    ]


def check_points(rows: Any, source: str) -> list[dict[str, Any]]:
    """Rows of other tools: [{"name", "bits_per_parameter", "kld_mean", ...}].

    UsageError naming `source` and what a row lacks.
    """
    if not isinstance(rows, list):
        raise UsageError(f"{source} holds no list of rows")
    for i, row in enumerate(rows):
        for key, kind in _COLUMNS:
            found = row.get(key) if isinstance(row, dict) else None
            if not isinstance(found, kind):
                raise UsageError(
                    f"{source}: row {i} has no proper {key!r}",
                    fix='rows are {"name": "Q4_0", "bits_per_parameter": 4.6, "kld_mean": 0.02}',
                )
    return rows
