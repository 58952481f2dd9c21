"""The jobs that compute experts as their records land: for one token from words made beforehand,
for a chunk from the positions of each expert's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moelite import ops
from moelite.arch import MoE
from moelite.program import FeedForward, FeedForwardJob, Sum
from moelite.step import EXPERTS, EXPERTS_PARTS, EXPERTS_TOKENS, EXPERTS_WEIGHTS
from moelite.sync import RING
from moelite.words import I32, I64, words_of
from moelite.workspace import Workspace


class _Row:
    """One token's job: its words, and what owns the arrays that they name by address."""

    def __init__(self, base: I64, target: I32, words: list[int], kept: object) -> None:
        self.base, self.target, self.words, self._kept = base, target, words, kept


class ExpertJobs:
    """Makes the words of EXPERTS jobs (moelite.step).

    program: the address of the model's words. parts: the matrices of the arena's first record.
    """

    def __init__(
        self, program: int, work: Workspace, parts: FeedForward, record_bytes: int
    ) -> None:
        self._program, self._work, self._parts = program, work, parts
        self._record_bytes = record_bytes
        self._rows: dict[int, list[_Row]] = {}  # by top_k
        self._turn = 0
        self._weights_at = [int(row.ctypes.data) for row in work.weights]

    def one(
        self, layer: int, mlp: MoE, experts: Sequence[tuple[int, int]], *, last: bool
    ) -> list[int]:
        """One token's experts, as (rank in the router's order, slot); last: then all are added up.

        Takes a few microseconds: it is done with every read that lands.
        """
        rows = self._rows.get(mlp.router.top_k)
        if rows is None:
            rows = self._rows[mlp.router.top_k] = [self._row(mlp) for _ in range(2 * RING)]
        # Twice the ring: before job n opens, everybody has left job n - RING, and so n - 2 RING.
        self._turn = (self._turn + 1) % (2 * RING)
        row, words = rows[self._turn], rows[self._turn].words
        for i, (rank, slot) in enumerate(experts):
            row.base[i] = slot * self._record_bytes
            row.target[i] = rank
        words[EXPERTS_PARTS] = len(experts)
        words[EXPERTS_WEIGHTS] = self._weights_at[layer]
        words[EXPERTS_TOKENS] = 1 if last else 0
        return words

    def many(
        self,
        mlp: MoE,
        slots: Sequence[int],
        positions: tuple[I32, I64],
        weights: np.ndarray,
        tokens: int,
    ) -> tuple[list[int], tuple[FeedForwardJob, Sum]]:
        """Experts in `slots` for many tokens; what owns the words' arrays.

        positions: (target [P], first [experts + 1]): those of expert j are
        target[first[j] : first[j + 1]], each token * K + rank. weights [T * K]. tokens: how many
        rows are then added up, 0 as long as experts are left.
        """
        target, first = positions
        base = np.array(slots, np.int64) * self._record_bytes
        source = target // np.int32(mlp.router.top_k)
        return self._words(mlp, (base, first, source, target), weights, tokens)

    def _row(self, mlp: MoE) -> _Row:
        k = mlp.router.top_k
        base, first = np.zeros(k, np.int64), np.arange(k + 1)
        target = np.zeros(k, np.int32)
        arrays = base, first, self._work.zeros, target
        words, kept = self._words(mlp, arrays, self._work.weights[0, :k], 0)
        return _Row(base, target, words, kept)

    def _words(
        self, mlp: MoE, arrays: tuple[I64, I64, I32, I32], weights: np.ndarray, tokens: int
    ) -> tuple[list[int], tuple[FeedForwardJob, Sum]]:
        work, k = self._work, mlp.router.top_k
        hidden = work.mlp(mlp.experts, work.chunk * k)
        scratch, each = work.scratch.reshape(-1), work.scratch.shape[1]
        out, width = work.parts.reshape(-1), work.parts.shape[1]
        job = FeedForwardJob(*arrays, work.rows, hidden, scratch, each, out, width, arrays[0].size)
        x, size = work.x.reshape(-1), self._parts.down.rows
        total = Sum(x, work.x.shape[1], size, out, weights, k, ops.EMPTY)
        words = words_of((EXPERTS, self._program, self._parts, job, work.normed, total, tokens))
        return words, (job, total)
