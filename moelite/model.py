"""The decoder: embedding, layers, final norm, head, over packed weights and an expert source."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moelite import kernels, ops
from moelite.arch import Arch, MoE
from moelite.kv import KVCache
from moelite.layers import (
    AttentionPart,
    Context,
    DenseMLP,
    ExpertSource,
    MoEPart,
    PackedLinear,
    PackedNorm,
    RopeTables,
    WeightSource,
    rows_of,
)
from moelite.quant import FORMATS
from moelite.quant.base import F32, Matrix, RecordLayout, pad
from moelite.threads import Team
from moelite.workspace import Workspace


class DecoderLayer:
    """x += attention(norm(x)); x += mlp(norm(x)), in ctx.work.x."""

    def __init__(
        self,
        index: int,
        arch: Arch,
        source: WeightSource,
        experts: ExpertSource,
        layout: RecordLayout,
        ropes: RopeTables,
    ) -> None:
        spec = arch.layers[index]
        self.index = index
        self.input_norm = PackedNorm(spec.input_norm, source)
        self.attention = AttentionPart(spec.attention, source, ropes)
        self.post_norm = PackedNorm(spec.post_norm, source)
        self.mlp: DenseMLP | MoEPart
        if isinstance(spec.mlp, MoE):
            self.mlp = MoEPart(spec.mlp, source, experts, layout)
        else:
            self.mlp = DenseMLP(spec.mlp, source)

    def __call__(self, ctx: Context, kv: KVCache) -> None:
        work, size = ctx.work, self.input_norm.spec.size
        x, y = work.x[: ctx.tokens], work.y[: ctx.tokens]
        normed = rows_of(work.normed, ctx.tokens)
        self.input_norm(x, normed)
        self.attention(ctx, self.index, kv)
        ops.add_rows(x, size, y)
        self.post_norm(x, normed)
        if isinstance(self.mlp, MoEPart):
            self.mlp(ctx, self.index)
            return
        if self.mlp.quantized_input:
            kernels.quantize_activations(work.normed, ctx.tokens)
        self.mlp(ctx)
        ops.add_rows(x, size, y)


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
        self.head = PackedLinear(arch.head, source)
        embed = arch.embed.key
        packed = self.head.matrix.packed if arch.tied else source.read(embed)
        code = FORMATS[source.format_of(embed)].code
        self.embed = Matrix(code, packed, 0, arch.vocab_size, arch.hidden_size)
        self.norm = PackedNorm(arch.norm, source)
        self.layers = [
            DecoderLayer(i, arch, source, experts, layout, ropes) for i in range(len(arch.layers))
        ]
        self.logit_rows = np.zeros((1, pad(arch.vocab_size, 8)), np.float32)

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
        kernels.embed_rows(self.embed, rows, work.x)
        for layer in self.layers:
            layer(ctx, kv)
        if each is not None:
            for i in range(rows.size):
                each(i, self.logits(i))

    def logits(self, row: int) -> F32:
        """logits [V] float32 of row `row` of the last chunk; overwritten by the next call."""
        work, ctx = self.work, self.ctx
        self.norm(work.x[row : row + 1], rows_of(work.normed, 1))
        if self.head.quantized_input:
            kernels.quantize_activations(work.normed, 1)
        before, ctx.tokens = ctx.tokens, 1
        self.head(ctx, work.normed, self.logit_rows)
        ctx.tokens = before
        return self.logit_rows[0, : self.arch.vocab_size]
