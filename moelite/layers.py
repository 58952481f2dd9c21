"""The parts of a decoder layer over packed weights: linear, norm, attention, feed-forward, MoE.

Each takes its facts from an Arch and its numbers from a WeightSource; none knows a model or a
format. Routed experts come from an ExpertSource, which owns their memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from moelite import kernels, ops
from moelite.arch import Arch, Attention, GatedMLP, Linear, MoE, Norm, Rope, TensorRef
from moelite.kv import KVCache
from moelite.quant import FORMATS
from moelite.quant.base import F32, U8, Act, Job, Matrix, RecordLayout, pad
from moelite.routing import route
from moelite.threads import Team
from moelite.workspace import Workspace

# multiply-adds below which waking a second thread costs more than it saves (20 us at 10 G/s)
_ALONE = 200_000


def rows_of(act: Act, tokens: int) -> F32:
    """The first `tokens` rows of an Act's values, [T, width]."""
    return act.x[: tokens * act.width].reshape(tokens, act.width)


class WeightSource(Protocol):
    """Where dense weights come from: packed bytes and the format they are in."""

    def format_of(self, key: str) -> str: ...
    def read(self, key: str) -> U8: ...


class ExpertSource(Protocol):
    """Where routed experts are: slots of `record_bytes` in one arena."""

    arena: U8
    record_bytes: int

    def batches(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """(expert, slot) pairs, in groups, as they can be multiplied; each expert once."""
        ...


class Context:
    """What all parts share while a chunk of `tokens` tokens at position `start` is computed."""

    __slots__ = ("start", "team", "tokens", "work")

    def __init__(self, team: Team, work: Workspace) -> None:
        self.team, self.work = team, work
        self.tokens = self.start = 0


class Vector:
    """A float32 vector of the store, or nothing."""

    @staticmethod
    def load(source: WeightSource, ref: TensorRef | None) -> F32:
        return ops.EMPTY if ref is None else source.read(ref.key).view(np.float32)


class PackedLinear:
    """y = x @ W.T + bias, W packed in its format."""

    def __init__(self, spec: Linear, source: WeightSource) -> None:
        fmt = FORMATS[source.format_of(spec.weight.key)]
        self.quantized_input = fmt.quantized_input
        packed = source.read(spec.weight.key)
        self.matrix = Matrix(fmt.code, packed, 0, spec.rows, spec.cols)
        self.bias = Vector.load(source, spec.bias)

    def __call__(self, ctx: Context, act: Act, out: F32) -> None:
        """act of ctx.tokens rows -> out [T, >= rows padded to 8]. int8 blocks must be filled."""
        rows, matrix = ctx.work.rows, self.matrix
        job = Job(rows, rows, 0, ctx.tokens, out.reshape(-1), out.shape[1])
        alone = matrix.rows * matrix.cols * ctx.tokens < _ALONE
        ctx.team.run(kernels.linear_job, matrix, act, job, alone=alone)
        if self.bias.size:
            ops.add_bias(out[: ctx.tokens], self.bias)


class PackedNorm:
    """RMSNorm or LayerNorm with its weight."""

    def __init__(self, spec: Norm, source: WeightSource) -> None:
        self.spec = spec
        self.weight = Vector.load(source, spec.weight)
        if spec.offset:
            self.weight = self.weight + np.float32(spec.offset)
        self.bias = Vector.load(source, spec.bias)
        self.eps = np.float32(spec.eps)

    def __call__(self, x: F32, out: F32, groups: int = 1) -> None:
        """x [T, >= groups * size] -> out, likewise; `groups` runs of spec.size in a row."""
        size = self.spec.size
        if self.spec.kind == "rms":
            ops.rms_norm(x, size, groups, self.weight, self.eps, out)
        else:
            ops.layer_norm(x, size, self.weight, self.bias, self.eps, out)


class RopeTables:
    """cos and sin of every position of the context, once for each distinct Rope."""

    def __init__(self, arch: Arch, context: int) -> None:
        self.tables: dict[Rope, tuple[F32, F32]] = {}
        for layer in arch.layers:
            rope = layer.attention.rope
            if rope is None or rope in self.tables:
                continue
            freq = np.array(rope.inv_freq, np.float32)
            cos = np.empty((context, freq.size), np.float32)
            sin = np.empty((context, freq.size), np.float32)
            ops.rope_table(freq, rope.scale, 0, cos, sin)
            self.tables[rope] = cos, sin


def rope_bytes(arch: Arch, context: int) -> int:
    """Bytes of RopeTables."""
    ropes = {layer.attention.rope for layer in arch.layers} - {None}
    return sum(8 * context * len(rope.inv_freq) for rope in ropes if rope is not None)


class AttentionPart:
    """Grouped-query attention over the kv, from normed activations to ctx.work.y."""

    def __init__(self, spec: Attention, source: WeightSource, ropes: RopeTables) -> None:
        self.spec, self.ropes = spec, ropes
        self.q, self.k, self.v, self.o = (
            PackedLinear(part, source) for part in (spec.q, spec.k, spec.v, spec.o)
        )
        self.norms = [
            None if norm is None else PackedNorm(norm, source)
            for norm in (spec.q_norm, spec.k_norm)
        ]
        self.quantized_input = any(p.quantized_input for p in (self.q, self.k, self.v))

    def __call__(self, ctx: Context, layer: int, kv: KVCache) -> None:
        spec, work, tokens, start = self.spec, ctx.work, ctx.tokens, ctx.start
        if self.quantized_input:
            kernels.quantize_activations(work.normed, tokens)
        for part, out in ((self.q, work.q), (self.k, work.k), (self.v, work.v)):
            part(ctx, work.normed, out)
        self._shape_heads(ctx)
        shape = ops.AttentionShape(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            pad(spec.head_dim, 8),
            kv.context,
            spec.window or 0,
            np.float32(spec.scale),
        )
        ops.store_kv(work.k[:tokens], shape, start, kv.k[layer])
        ops.store_kv(work.v[:tokens], shape, start, kv.v[layer])
        blocks = pad(spec.o.cols, 32) // 32
        heads = work.attended._replace(width=blocks * 32, blocks=blocks)
        out = rows_of(heads, tokens)
        job = ops.AttentionJob(work.q[:tokens], kv.k[layer], kv.v[layer], start, work.scores, out)
        steps = tokens * (start + tokens) * spec.num_heads * spec.head_dim
        ctx.team.run(ops.attention_job, job, shape, alone=steps < _ALONE)
        if self.o.quantized_input:
            kernels.quantize_activations(heads, tokens)
        self.o(ctx, heads, work.y)

    def _shape_heads(self, ctx: Context) -> None:
        # norm, clip and rotate what the projections gave
        spec, work, tokens = self.spec, ctx.work, ctx.tokens
        sides = (
            (work.q, self.norms[0], spec.num_heads),
            (work.k, self.norms[1], spec.num_kv_heads),
        )
        for x, norm, heads in sides:
            if norm is not None:
                groups = heads if spec.qk_norm_over == "head" else 1
                norm(x[:tokens], x[:tokens], groups)
        if spec.clip is not None:
            for x, part in ((work.q, self.q), (work.k, self.k), (work.v, self.v)):
                ops.clamp(x[:tokens], part.matrix.rows, np.float32(spec.clip))
        if spec.rope is None:
            return
        cos, sin = (table[ctx.start : ctx.start + tokens] for table in self.ropes.tables[spec.rope])
        twisted = spec.rope.style == "interleaved"
        for x, _, heads in sides:
            ops.rope(x[:tokens], heads, spec.head_dim, cos, sin, twisted)


class DenseMLP:
    """down(silu(gate(x)) * up(x)), from normed activations (int8 blocks filled) to ctx.work.y."""

    def __init__(self, spec: GatedMLP, source: WeightSource) -> None:
        self.spec = spec
        self.gate, self.up, self.down = (
            PackedLinear(part, source) for part in (spec.gate, spec.up, spec.down)
        )
        self.quantized_input = self.gate.quantized_input or self.up.quantized_input

    def __call__(self, ctx: Context) -> None:
        hidden, up = ctx.work.mlp(self.spec, ctx.work.chunk)
        self.gate(ctx, ctx.work.normed, hidden.x.reshape(-1, hidden.width))
        self.up(ctx, ctx.work.normed, up.reshape(-1, hidden.width))
        other = up.reshape(-1, hidden.width)
        ops.silu_gate(rows_of(hidden, ctx.tokens), other, self.spec.gate.rows)
        if self.down.quantized_input:
            kernels.quantize_activations(hidden, ctx.tokens)
        self.down(ctx, hidden, ctx.work.y)


class MoEPart:
    """Routed experts, and the shared expert if there is one, added to the residual ctx.work.x."""

    def __init__(
        self, spec: MoE, source: WeightSource, experts: ExpertSource, layout: RecordLayout
    ) -> None:
        self.spec, self.experts = spec, experts
        fmt = FORMATS[layout.format]
        self.matrices = kernels.ExpertMatrices(
            fmt.code, layout.gate, layout.up, layout.down, layout.hidden_size, layout.expert_size
        )
        self.quantized_input = fmt.quantized_input
        self.router = PackedLinear(spec.router.linear, source)
        self.shared = None if spec.shared is None else DenseMLP(spec.shared, source)
        self.shared_gate = (
            None if spec.shared_gate is None else PackedLinear(spec.shared_gate, source)
        )

    def __call__(self, ctx: Context, layer: int) -> None:
        work, tokens = ctx.work, ctx.tokens
        self.router(ctx, work.normed, work.router_logits)
        logits = work.router_logits[:tokens, : self.spec.num_experts]
        selected, weights = route(self.spec.router, logits)
        if self.quantized_input or (self.shared is not None and self.shared.quantized_input):
            kernels.quantize_activations(work.normed, tokens)
        self._routed(ctx, layer, selected)
        parts = work.parts[: tokens * self.spec.router.top_k]
        kernels.combine(parts, weights, work.x[:tokens])
        if self.shared is not None:
            self._shared(ctx)

    def _routed(self, ctx: Context, layer: int, selected: np.ndarray) -> None:
        # every expert's output for every token that chose it, to work.parts[token * K + rank]
        work, top_k = ctx.work, self.spec.router.top_k
        flat = selected.reshape(-1)
        order = np.argsort(flat, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(flat, minlength=self.spec.num_experts))
        wanted = flat.tolist() if len(selected) == 1 else np.unique(flat).tolist()
        hidden, up = work.mlp(self.spec.experts, work.chunk * top_k)
        act_hidden = hidden if self.quantized_input else hidden._replace(q=hidden.q[:0])
        for batch in self.experts.batches(layer, wanted):
            runs = [order[ends[e - 1] if e else 0 : ends[e]] for e, _ in batch]
            target = np.concatenate(runs)
            job = kernels.ExpertJob(
                np.array([slot * self.experts.record_bytes for _, slot in batch], np.int64),
                np.cumsum([0, *map(len, runs)]),
                target // np.int32(top_k),
                target,
                work.rows,
                up,
                act_hidden,
                work.parts.reshape(-1),
                work.parts.shape[1],
            )
            arena = self.experts.arena
            alone = target.size * self.matrices.hidden * self.matrices.inner < _ALONE
            ctx.team.run(kernels.gate_up_job, arena, self.matrices, work.normed, job, alone=alone)
            ctx.team.run(kernels.down_job, arena, self.matrices, job, alone=alone)

    def _shared(self, ctx: Context) -> None:
        work, tokens = ctx.work, ctx.tokens
        assert self.shared is not None
        self.shared(ctx)
        y, size = work.y[:tokens], self.spec.experts.down.rows
        if self.shared_gate is not None:
            self.shared_gate(ctx, work.normed, work.shared_gate)
            ops.scale_by_sigmoid(y, size, work.shared_gate)
        ops.add_rows(work.x[:tokens], size, y)
