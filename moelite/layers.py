"""The parts of a decoder layer over packed weights: attention, feed-forward, MoE.

Each takes its facts from an Arch and its numbers from a WeightSource, and hands both to one kernel;
none knows a model or a format. Routed experts come from an ExpertSource, which owns their memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from moelite import kernels, ops
from moelite.arch import Arch, Attention, GatedMLP, Layer, Linear, MoE, Norm, Rope, TensorRef
from moelite.dispatch import linear_job
from moelite.kv import KVCache
from moelite.quant import FORMATS
from moelite.quant.base import F32, U8, Job, Matrix, RecordLayout, pad
from moelite.routing import route
from moelite.threads import Team
from moelite.workspace import Workspace

# multiply-adds below which a second thread costs more than it saves (5 us at 20 G/s)
_ALONE = 100_000

_NOTHING = Matrix(0, np.zeros(0, np.uint8), 0, 0, 0)
_NO_NORM = ops.NormWeights(ops.EMPTY, ops.EMPTY, 0, np.float32(0), False)


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


def load_vector(source: WeightSource, ref: TensorRef | None) -> F32:
    """A float32 vector, empty if there is none."""
    return ops.EMPTY if ref is None else source.read(ref.key).view(np.float32)


def load_matrix(source: WeightSource, part: Linear) -> Matrix:
    """A packed matrix of [rows, cols]; its bias is loaded apart."""
    code = FORMATS[source.format_of(part.weight.key)].code
    return Matrix(code, source.read(part.weight.key), 0, part.rows, part.cols)


def load_norm(source: WeightSource, norm: Norm | None) -> ops.NormWeights:
    """What a kernel needs of a norm; size 0 if there is none."""
    if norm is None:
        return _NO_NORM
    weight = load_vector(source, norm.weight)
    if norm.offset:
        weight = weight + np.float32(norm.offset)
    bias, eps = load_vector(source, norm.bias), np.float32(norm.eps)
    return ops.NormWeights(weight, bias, norm.size, eps, norm.kind == "layer")


class RopeTables:
    """cos and sin of every position of the context, once for each distinct Rope."""

    def __init__(self, arch: Arch, context: int) -> None:
        empty = np.zeros((context, 0), np.float32)
        self.tables: dict[Rope | None, tuple[F32, F32]] = {None: (empty, empty)}
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


def load_attention(
    source: WeightSource, layer: Layer, ropes: RopeTables
) -> kernels.AttentionWeights:
    """One layer's norms, attention and router matrix."""
    spec, mlp = layer.attention, layer.mlp
    cos, sin = ropes.tables[spec.rope]
    return kernels.AttentionWeights(
        load_norm(source, layer.input_norm),
        load_matrix(source, spec.q),
        load_matrix(source, spec.k),
        load_matrix(source, spec.v),
        load_matrix(source, spec.o),
        load_vector(source, spec.q.bias),
        load_vector(source, spec.k.bias),
        load_vector(source, spec.v.bias),
        load_vector(source, spec.o.bias),
        load_norm(source, spec.q_norm),
        load_norm(source, spec.k_norm),
        np.float32(np.inf if spec.clip is None else spec.clip),
        cos,
        sin,
        spec.rope is not None and spec.rope.style == "interleaved",
        load_norm(source, layer.post_norm),
        load_matrix(source, mlp.router.linear) if isinstance(mlp, MoE) else _NOTHING,
    )


class AttentionPart:
    """x += attention(norm(x)); normed = norm(x); router logits."""

    def __init__(
        self, layer: Layer, source: WeightSource, ropes: RopeTables, work: Workspace
    ) -> None:
        self.weights = load_attention(source, layer, ropes)
        self.spec = layer.attention
        self.buffers = work.buffers(self.spec.o.cols)

    def __call__(self, ctx: Context, layer: int, kv: KVCache) -> None:
        cache, place = (kv.k[layer], kv.v[layer]), (ctx.tokens, ctx.start)
        shape = _shape(self.spec, kv.context)
        alone = ctx.tokens * self.spec.q.rows * self.spec.q.cols < _ALONE
        ctx.team.run(
            kernels.attention_block,
            self.weights,
            shape,
            self.buffers,
            cache,
            place,
            alone=alone,
        )


def _shape(spec: Attention, context: int) -> ops.AttentionShape:
    d8, scale = pad(spec.head_dim, 8), np.float32(spec.scale)
    heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
    return ops.AttentionShape(*heads, d8, context, spec.window or 0, scale)


class DensePart:
    """x += down(silu(gate(normed)) * up(normed)), times a gate's sigmoid where there is one."""

    def __init__(
        self, spec: GatedMLP, source: WeightSource, work: Workspace, gate: Linear | None = None
    ) -> None:
        self.weights = kernels.FeedForward(
            *(load_matrix(source, part) for part in (spec.gate, spec.up, spec.down))
        )
        self.gate = None if gate is None else load_matrix(source, gate)
        self.hidden, self.up = work.mlp(spec, work.chunk)

    def __call__(self, ctx: Context) -> None:
        work, tokens, rows = ctx.work, ctx.tokens, ctx.work.rows
        gates = ops.EMPTY
        if self.gate is not None:
            gates = work.shared_gate.reshape(-1)
            to_gates = Job(rows, rows, 0, tokens, gates, 8)
            ctx.team.run(linear_job, self.gate, work.normed, to_gates, alone=True)
        y, down = work.y.reshape(-1), self.weights.down
        job = kernels.FeedForwardJob(
            _FIRST,
            np.array([0, tokens]),
            rows,
            rows,
            rows,
            self.hidden,
            self.up,
            y,
            work.y.shape[1],
        )
        total = kernels.Sum(
            work.x.reshape(-1), work.x.shape[1], down.rows, y, work.ones, gates, tokens
        )
        alone = tokens * down.rows * down.cols < _ALONE
        ctx.team.run(kernels.feed_forward, self.weights, work.normed, job, total, alone=alone)


_FIRST = np.zeros(1, np.int64)


class MoEPart:
    """x += the routed experts' weighted outputs, in the router's order; then the shared expert."""

    def __init__(
        self,
        spec: MoE,
        source: WeightSource,
        work: Workspace,
        experts: ExpertSource,
        layout: RecordLayout,
    ) -> None:
        self.spec, self.experts = spec, experts
        code, arena = FORMATS[layout.format].code, experts.arena
        wide = layout.expert_size, layout.hidden_size
        self.weights = kernels.FeedForward(
            Matrix(code, arena, layout.gate, *wide),
            Matrix(code, arena, layout.up, *wide),
            Matrix(code, arena, layout.down, *wide[::-1]),
        )
        self.hidden, self.up = work.mlp(spec.experts, work.chunk * spec.router.top_k)
        self.shared = None
        if spec.shared is not None:
            self.shared = DensePart(spec.shared, source, work, spec.shared_gate)

    def __call__(self, ctx: Context, layer: int) -> None:
        work, tokens = ctx.work, ctx.tokens
        logits = work.router_logits[:tokens, : self.spec.num_experts]
        selected, weights = route(self.spec.router, logits)
        flat = selected.reshape(-1)
        if tokens == 1:
            wanted, runs = flat.tolist(), None
        else:
            order = np.argsort(flat, kind="stable").astype(np.int32)
            ends = np.cumsum(np.bincount(flat, minlength=self.spec.num_experts))
            wanted = np.unique(flat).tolist()
            runs = {e: order[ends[e - 1] if e else 0 : ends[e]] for e in wanted}
        left = len(wanted)
        for batch in self.experts.batches(layer, wanted):
            left -= len(batch)
            if runs is None:
                target = np.array([wanted.index(e) for e, _ in batch], np.int32)
                first = np.arange(len(batch) + 1)
            else:
                mine = [runs[e] for e, _ in batch]
                target, first = np.concatenate(mine), np.cumsum([0, *map(len, mine)])
            self._multiply(ctx, batch, (target, first), weights, 0 if left else tokens)
        if self.shared is not None:
            self.shared(ctx)

    def _multiply(
        self,
        ctx: Context,
        batch: list[tuple[int, int]],
        positions: tuple[np.ndarray, np.ndarray],
        weights: F32,
        tokens: int,
    ) -> None:
        """Computes a batch of experts; then, with tokens > 0, sums all parts into x."""
        work, (target, first) = ctx.work, positions
        parts, width = work.parts.reshape(-1), work.parts.shape[1]
        base = np.array([slot for _, slot in batch], np.int64) * self.experts.record_bytes
        source = target // np.int32(self.spec.router.top_k)
        job = kernels.FeedForwardJob(
            base, first, source, target, work.rows, self.hidden, self.up, parts, width
        )
        down = self.weights.down
        total = kernels.Sum(
            work.x.reshape(-1), work.x.shape[1], down.rows, parts, weights, ops.EMPTY, tokens
        )
        alone = target.size * down.rows * down.cols < _ALONE
        ctx.team.run(kernels.feed_forward, self.weights, work.normed, job, total, alone=alone)
