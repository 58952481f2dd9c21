"""Experts of one token on the CPU, where they lie in memory, by the compiled kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from moelite import ops
from moelite.arch import Arch, MoE
from moelite.dispatch import NO_MATRIX, round_row
from moelite.expertjobs import ExpertJobs
from moelite.layers import ExpertTiers, tiers_of
from moelite.program import Program
from moelite.quant.base import F32, U8
from moelite.step import LAYER_PHASES, part_address
from moelite.storefile import LayerEntry
from moelite.threads import Team
from moelite.words import words_of
from moelite.workspace import Workspace

_NO_NORM = ops.NormWeights(ops.EMPTY, ops.EMPTY, 0, np.float32(0), False)


class HostExperts:
    """Multiplies one token's activations by experts in the cache's arena, on `threads` threads."""

    def __init__(
        self, arch: Arch, layers: Mapping[int, LayerEntry], arena: U8, threads: int
    ) -> None:
        self._arch = arch
        self._work = work = Workspace(arch, 1, threads)
        self._team = Team(threads, LAYER_PHASES)
        tiers: dict[int, ExpertTiers] = {
            layer: tiers_of(entry, arena, None) for layer, entry in layers.items()
        }
        program = Program(
            table=np.zeros(0, np.int64),
            layers=0,
            attention=0,
            feed=part_address("feed"),
            embed=NO_MATRIX,
            norm=_NO_NORM,
            head=NO_MATRIX,
            buffers=work.buffers(arch.layers[0].attention.o.cols),
            ahead=work.ahead,
            logits=np.zeros(8, np.float32),
            state=np.zeros(8, np.int64),
            times=np.zeros(8, np.int64),
        )
        # words name arrays by their addresses: these own them
        self._program = np.array(words_of(program), np.int64)
        self._kept = program, tiers
        self._jobs = ExpertJobs(int(self._program.ctypes.data), work, tiers)
        self.seconds = 0.0

    def compute(self, layer: int, x: F32, experts: Sequence[tuple[int, int, int]]) -> F32:
        """x [H] -> [n, H], a row for each (rank, expert, page)."""
        start = time.perf_counter()
        mlp, act = self._arch.layers[layer].mlp, self._work.normed
        assert isinstance(mlp, MoE)
        act.x[: x.size] = x
        round_row(act)
        words = self._jobs.one(layer, mlp, experts, last=False)
        self._team.run(words, LAYER_PHASES)
        size = mlp.experts.down.rows
        found: F32 = self._work.parts[[rank for rank, _, _ in experts], :size].copy()
        self.seconds += time.perf_counter() - start
        return found

    def close(self) -> None:
        """Ends its threads."""
        self._team.close()
