"""The jobs that compute experts as their records land: for one token from words made beforehand,
for a chunk from the positions of each expert's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moelite import ops
from moelite.arch import MoE
from moelite.layers import ExpertTiers
from moelite.program import FeedForwardJob, Sum
from moelite.quant.base import PAGE
from moelite.step import (
    EXPERTS,
    EXPERTS_PARTS,
    EXPERTS_TIERS,
    EXPERTS_TOKENS,
    EXPERTS_WEIGHTS,
)
from moelite.sync import RING
from moelite.words import I32, I64, words_of
from moelite.workspace import Workspace


class _Row:
    """One token's job: its words, and what owns the arrays that they name by address."""

    def __init__(self, arrays: tuple[I64, I32, I32], words: list[int], kept: object) -> None:
        self.base, self.tier, self.target = arrays
        self.words, self._kept = words, kept


class ExpertJobs:
    """Makes the words of EXPERTS jobs (moelite.step).

    program: the address of the model's words. tiers: of each MoE layer.
    """

    def __init__(self, program: int, work: Workspace, tiers: Mapping[int, ExpertTiers]) -> None:
        self._program, self._work, self._tiers = program, work, tiers
        self._tier_of = {layer: found.tier_of.tolist() for layer, found in tiers.items()}
        self._tiers_at = {layer: words_of(found.words) for layer, found in tiers.items()}
        self._rows: dict[int, list[_Row]] = {}  # by top_k
        self._turn = 0
        self._weights_at = [int(row.ctypes.data) for row in work.weights]

    def one(
        self, layer: int, mlp: MoE, experts: Sequence[tuple[int, int, int]], *, last: bool
    ) -> list[int]:
        """One token's experts, as (rank in the router's order, expert, page); last: then all are
        added up.

        Takes a few microseconds: it is done with every read that lands.
        """
        rows = self._rows.get(mlp.router.top_k)
        if rows is None:
            rows = self._rows[mlp.router.top_k] = [self._row(mlp) for _ in range(2 * RING)]
        # Twice the ring: before job n opens, everybody has left job n - RING, and so n - 2 RING.
        self._turn = (self._turn + 1) % (2 * RING)
        row, words, tier_of = rows[self._turn], rows[self._turn].words, self._tier_of[layer]
        for i, (rank, expert, page) in enumerate(experts):
            row.base[i] = page * PAGE
            row.tier[i] = tier_of[expert]
            row.target[i] = rank
        words[EXPERTS_TIERS : EXPERTS_TIERS + 2] = self._tiers_at[layer]
        words[EXPERTS_PARTS] = len(experts)
        words[EXPERTS_WEIGHTS] = self._weights_at[layer]
        words[EXPERTS_TOKENS] = 1 if last else 0
        return words

    def many(
        self,
        layer: int,
        mlp: MoE,
        experts: tuple[Sequence[int], Sequence[int]],
        positions: tuple[I32, I64],
        weights: np.ndarray,
        tokens: int,
    ) -> tuple[list[int], tuple[FeedForwardJob, Sum]]:
        """Experts (ids, pages) for many tokens; what owns the words' arrays.

        positions: (target [P], first [experts + 1]): those of expert j are
        target[first[j] : first[j + 1]], each token * K + rank. weights [T * K]. tokens: how many
        rows are then added up, 0 as long as experts are left.
        """
        target, first = positions
        base, tiers = np.array(experts[1], np.int64) * PAGE, self._tiers[layer]
        tier = tiers.tier_of[list(experts[0])]
        source = target // np.int32(mlp.router.top_k)
        arrays = base, tier, first, source, target
        return self._words(mlp, tiers.words, arrays, weights, tokens)

    def _row(self, mlp: MoE) -> _Row:
        k = mlp.router.top_k
        base, tier, first = np.zeros(k, np.int64), np.zeros(k, np.int32), np.arange(k + 1)
        target = np.zeros(k, np.int32)
        arrays = base, tier, first, self._work.zeros, target
        tiers = next(iter(self._tiers.values())).words  # every use names its layer's
        words, kept = self._words(mlp, tiers, arrays, self._work.weights[0, :k], 0)
        return _Row((base, tier, target), words, kept)

    def _words(
        self,
        mlp: MoE,
        tiers: I64,
        arrays: tuple[I64, I32, I64, I32, I32],
        weights: np.ndarray,
        tokens: int,
    ) -> tuple[list[int], tuple[FeedForwardJob, Sum]]:
        work, k = self._work, mlp.router.top_k
        hidden = work.mlp(mlp.experts, work.chunk * k)
        scratch, each = work.scratch.reshape(-1), work.scratch.shape[1]
        out, width = work.parts.reshape(-1), work.parts.shape[1]
        job = FeedForwardJob(*arrays, work.rows, hidden, scratch, each, out, width, arrays[0].size)
        x, size = work.x.reshape(-1), mlp.experts.down.rows
        total = Sum(x, work.x.shape[1], size, out, weights, k, ops.EMPTY)
        words = words_of((EXPERTS, self._program, tiers, job, work.normed, total, tokens))
        return words, (job, total)
