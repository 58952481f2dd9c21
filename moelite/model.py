"""The decoder: embedding, layers, final norm, head, over packed weights and an expert source."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moelite import kernels
from moelite.arch import Arch, MoE
from moelite.dispatch import embed_rows, linear_job
from moelite.kv import KVCache
from moelite.layers import (
    AttentionPart,
    Context,
    DensePart,
    ExpertSource,
    MoEPart,
    RopeTables,
    WeightSource,
    load_matrix,
    load_norm,
)
from moelite.quant import FORMATS
from moelite.quant.base import F32, Job, Matrix, RecordLayout, pad
from moelite.threads import Team
from moelite.workspace import Workspace


class Decoder:
    """An Arch with its weights. Not thread-safe: one forward pass at a time."""

    def __init__(
        self,
        arch: Arch,
        source: WeightSource,
        experts: ExpertSource,
        layout: RecordLayout,
        *,
        work: Workspace,
        context: int,
        team: Team,
    ) -> None:
        self.arch, self.work = arch, work
        self.ctx = Context(team, work)
        ropes = RopeTables(arch, context)
        self.head = load_matrix(source, arch.head)
        self.norm = load_norm(source, arch.norm)
        embed = arch.embed.key
        packed = self.head.packed if arch.tied else source.read(embed)
        code = FORMATS[source.format_of(embed)].code
        self.embed = Matrix(code, packed, 0, arch.vocab_size, arch.hidden_size)
        self.layers: list[tuple[AttentionPart, DensePart | MoEPart]] = []
        for layer in arch.layers:
            mlp: DensePart | MoEPart
            if isinstance(layer.mlp, MoE):
                mlp = MoEPart(layer.mlp, source, work, experts, layout)
            else:
                mlp = DensePart(layer.mlp, source, work)
            self.layers.append((AttentionPart(layer, source, ropes, work), mlp))
        self.buffers = work.buffers(arch.layers[0].attention.o.cols)
        self.logit_row = np.zeros(pad(arch.vocab_size, 8), np.float32)

    def forward(
        self,
        ids: Sequence[int],
        start: int,
        kv: KVCache,
        each: Callable[[int, F32], None] | None = None,
    ) -> None:
        """Runs the tokens `ids` at positions start.. through all layers, filling the kv.

        ids must be at most work.chunk long. For every token, or for none if `each` is None,
        each(i, logits [V]) is called; the array is reused for the next token.
        """
        work, ctx = self.work, self.ctx
        rows = np.asarray(ids, np.int64)
        ctx.tokens, ctx.start = rows.size, start
        embed_rows(self.embed, rows, work.x)
        for i, (attention, mlp) in enumerate(self.layers):
            attention(ctx, i, kv)
            if isinstance(mlp, MoEPart):
                mlp(ctx, i)
            else:
                mlp(ctx)
        if each is not None:
            for i in range(rows.size):
                each(i, self.logits(i))

    def logits(self, row: int) -> F32:
        """logits [V] float32 of row `row` of the last chunk; overwritten by the next call."""
        kernels.norm_row(self.norm, self.buffers, row)
        rows = self.work.rows
        job = Job(rows, rows, 0, 1, self.logit_row, self.logit_row.size)
        self.ctx.team.run(linear_job, self.head, self.work.normed, job)
        return self.logit_row[: self.arch.vocab_size]
