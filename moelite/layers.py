"""Writes a model down for compiled code: every layer as one row of words (moelite.step).

The facts come from an Arch, the numbers from a WeightSource; nothing here knows a model or a
format. Routed experts come from an ExpertSource, which owns their memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from moelite import ops
from moelite.arch import Arch, Attention, GatedMLP, Layer, Linear, MoE, Norm, Rope, TensorRef
from moelite.attention import KV_FORMATS, AttentionShape, kv_row_bytes
from moelite.dispatch import NO_MATRIX, matrix_of, new_act
from moelite.errors import UnsupportedError
from moelite.kv import KVCache
from moelite.program import (
    AttentionWeights,
    Dense,
    FeedForward,
    FeedForwardJob,
    LayerWords,
    Routed,
    Shaping,
    Sum,
)
from moelite.quant import FORMATS
from moelite.quant.base import (
    F32,
    U8,
    Matrix,
    pad,
    pair_rows,
    put_half,
)
from moelite.quant.record import RecordLayout
from moelite.routing import Rule
from moelite.storefile import LayerEntry
from moelite.words import I32, I64, words_of
from moelite.workspace import Workspace

_NO_NORM = ops.NormWeights(ops.EMPTY, ops.EMPTY, 0, np.float32(0), False)
_NO_I32, _NO_I64 = np.zeros(0, np.int32), np.zeros(0, np.int64)
_NO_ACT = new_act(0, 0, quantized=False)
_NO_JOB = FeedForwardJob(
    *(_NO_I64, _NO_I32, _NO_I64, _NO_I32, _NO_I32, _NO_I32, _NO_ACT),
    *(ops.EMPTY, 0, ops.EMPTY, 0, 0),
)
_NO_SUM = Sum(ops.EMPTY, 0, 0, ops.EMPTY, ops.EMPTY, 0, ops.EMPTY)
_NOTHING_ROUTED = Routed(
    Rule(0, 0, False, np.float32(0)),
    *(_NO_I32, _NO_I32, -1, 0, _NO_I32, _NO_I32, ops.EMPTY, _NO_I32, ops.EMPTY),
    *(_NO_I64, _NO_JOB, _NO_SUM),
)
_NOTHING_DENSE = Dense(_NO_I64, _NO_JOB, _NO_SUM, NO_MATRIX, ops.EMPTY)


class WeightSource(Protocol):
    """Where dense weights come from: packed bytes and the format they are in."""

    def format_of(self, key: str) -> str: ...

    def read(self, key: str) -> U8:
        """A tensor's packed bytes, in memory that lasts as long as the model."""
        ...

    def borrow(self, key: str) -> U8:
        """The same in memory of its own, to be let go of."""
        ...

    def room(self, nbytes: int) -> U8:
        """Zeros for what is made of borrowed tensors."""
        ...


class ExpertSource(Protocol):
    """Where routed experts are: slots in one arena, each on a page.

    asked: reads, needed or ahead of need, for which threads were asked, since it was made.
    """

    arena: U8
    asked: int

    def slots_of(self, layer: int, experts: int) -> I32:
        """The page where each of a layer's experts begins, or -1. Kept up to date."""
        ...

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """Experts that all are in memory were used."""
        ...

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Experts were used, those that are not in memory in few bits."""
        ...

    def admit(self) -> None:
        """Takes in what has been read since."""
        ...

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Experts that `layer` will perhaps need next, likeliest first."""
        ...

    def batches(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """(expert, slot) pairs, in groups, as they can be multiplied; each expert once."""
        ...


def load_vector(source: WeightSource, ref: TensorRef | None) -> F32:
    """A float32 vector, empty if there is none."""
    return ops.EMPTY if ref is None else source.read(ref.key).view(np.float32)


def load_matrix(source: WeightSource, part: Linear | None) -> Matrix:
    """A packed matrix of [rows, cols], without rows if there is none; its bias is loaded apart."""
    if part is None:
        return NO_MATRIX
    key = part.weight.key
    return matrix_of(source.format_of(key), source.read(key), 0, part.rows, part.cols)


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
    """cos and sin of every position of the context, flat, once for each distinct Rope."""

    def __init__(self, arch: Arch, context: int) -> None:
        self.tables: dict[Rope | None, tuple[F32, F32]] = {None: (ops.EMPTY, ops.EMPTY)}
        for layer in arch.layers:
            rope = layer.attention.rope
            if rope is None or rope in self.tables:
                continue
            freq = np.array(rope.inv_freq, np.float32)
            cos = np.empty((context, freq.size), np.float32)
            sin = np.empty((context, freq.size), np.float32)
            ops.rope_table(freq, rope.scale, 0, cos, sin)
            self.tables[rope] = cos.reshape(-1), sin.reshape(-1)


def rope_bytes(arch: Arch, context: int) -> int:
    """Bytes of RopeTables."""
    ropes = {layer.attention.rope for layer in arch.layers} - {None}
    return sum(8 * context * len(rope.inv_freq) for rope in ropes if rope is not None)


def load_attention(source: WeightSource, layer: Layer, ropes: RopeTables) -> AttentionWeights:
    """One layer's norms, attention and router matrix."""
    spec, mlp = layer.attention, layer.mlp
    cos, sin = ropes.tables[spec.rope]
    shaping = Shaping(
        load_vector(source, spec.q.bias),
        load_vector(source, spec.k.bias),
        load_vector(source, spec.v.bias),
        load_norm(source, spec.q_norm),
        load_norm(source, spec.k_norm),
        np.float32(np.inf if spec.clip is None else spec.clip),
        cos,
        sin,
        0 if spec.rope is None else len(spec.rope.inv_freq),
        spec.rope is not None and spec.rope.style == "interleaved",
    )
    return AttentionWeights(
        load_norm(source, layer.input_norm),
        load_matrix(source, spec.q),
        load_matrix(source, spec.k),
        load_matrix(source, spec.v),
        shaping,
        load_matrix(source, spec.o),
        load_vector(source, spec.o.bias),
        load_norm(source, layer.post_norm),
        load_matrix(source, mlp.router.linear if isinstance(mlp, MoE) else None),
    )


def attention_shape(spec: Attention, kv: KVCache) -> AttentionShape:
    """The sizes that a layer's attention runs with."""
    d8, row_bytes = pad(spec.head_dim, 8), kv_row_bytes(spec.head_dim, kv.format)
    return AttentionShape(
        *(spec.num_heads, spec.num_kv_heads, spec.head_dim, d8, kv.context, spec.window or 0),
        *(np.float32(spec.scale), KV_FORMATS.index(kv.format), row_bytes),
    )


def expert_parts(layout: RecordLayout, arena: U8) -> FeedForward:
    """The matrices of the expert whose record begins at the arena's first byte."""
    return FeedForward(
        matrix_of(layout.gate_up_format, arena, 0, *layout.gate_up_shape),
        matrix_of(layout.down_format, arena, layout.down, *layout.down_shape),
    )


class ExpertTiers(NamedTuple):
    """How a layer's experts lie in memory: words of the tiers, which one each expert is of, and
    what stands in for one that is not there (low_tier -1: nothing). low: the memory of the latter,
    which words name by its address."""

    words: I64
    tier_of: I32
    low_tier: int
    low_bytes: int
    low: U8 | None


def tiers_of(entry: LayerEntry, arena: U8, low: U8 | None) -> ExpertTiers:
    """Of a layer whose low plane, if it is to be used, is in `low`."""
    parts, low_tier, low_bytes = [expert_parts(tier, arena) for tier in entry.tiers], -1, 0
    if low is not None and entry.low is not None:
        low_tier, low_bytes = len(parts), entry.low.record_bytes
        parts.append(expert_parts(entry.low, low))
    words = np.array(words_of(tuple(parts)), np.int64)
    return ExpertTiers(words, np.array(entry.tier_of, np.int32), low_tier, low_bytes, low)


def load_gated(source: WeightSource, spec: GatedMLP) -> FeedForward:
    """A dense part's matrices, gate and up interleaved, one of them at a time held twice."""
    fmt, (rows, cols) = source.format_of(spec.gate.weight.key), (spec.gate.rows, spec.gate.cols)
    if source.format_of(spec.up.weight.key) != fmt:
        raise UnsupportedError(f"{spec.gate.weight.key} and {spec.up.weight.key} differ in format")
    tile = FORMATS[fmt].tile_bytes(cols)
    both = source.room(FORMATS[fmt].nbytes(pair_rows(rows), cols))
    for half, part in enumerate((spec.gate, spec.up)):
        put_half(both, half, source.borrow(part.weight.key), tile)
    return FeedForward(
        matrix_of(fmt, both, 0, pair_rows(rows), cols), load_matrix(source, spec.down)
    )


def _dense(source: WeightSource, spec: GatedMLP, gate: Linear | None, work: Workspace) -> Dense:
    parts, hidden = load_gated(source, spec), work.mlp(spec, work.chunk)
    scratch, each = work.scratch.reshape(-1), work.scratch.shape[1]
    rows, y, width = work.rows, work.y.reshape(-1), work.y.shape[1]
    base, tier, gates = work.start, work.zeros, work.shared_gate.reshape(-1)
    job = FeedForwardJob(
        *(base, tier, work.span, rows, rows, rows, hidden, scratch, each, y, width, 1)
    )
    x, ones = work.x.reshape(-1), work.ones.reshape(-1)
    factor = ops.EMPTY if gate is None else gates
    total = Sum(x, work.x.shape[1], spec.down.rows, y, ones, 1, factor)
    words = np.array(words_of(parts), np.int64)
    return Dense(words, job, total, load_matrix(source, gate), gates)


def _routed(
    spec: MoE, number: int, work: Workspace, experts: ExpertSource, tiers: ExpertTiers
) -> Routed:
    router, k = spec.router, spec.router.top_k
    hidden = work.mlp(spec.experts, work.chunk * k)
    scratch, each = work.scratch.reshape(-1), work.scratch.shape[1]
    out, width = work.parts.reshape(-1), work.parts.shape[1]
    first, target = work.expert_first, work.expert_target
    base, tier, rows = work.expert_base[:k], work.expert_tier[:k], work.rows
    job = FeedForwardJob(
        *(base, tier, first, work.zeros, target, rows, hidden, scratch, each, out, width, k)
    )
    weights = work.weights[number, :k]
    size = spec.experts.down.rows
    total = Sum(work.x.reshape(-1), work.x.shape[1], size, out, weights, k, ops.EMPTY)
    return Routed(
        Rule(spec.num_experts, k, router.renormalize, np.float32(router.scale)),
        experts.slots_of(number, spec.num_experts),
        tiers.tier_of,
        tiers.low_tier,
        tiers.low_bytes,
        work.given[number, :k],
        work.selected[number, :k],
        weights,
        work.guessed[number, :k],
        work.router_scores,
        tiers.words,
        job,
        total,
    )


class Builder:
    """Makes the LayerWords of an Arch's layers, one after another."""

    def __init__(
        self,
        arch: Arch,
        source: WeightSource,
        experts: ExpertSource,
        tiers: Mapping[int, ExpertTiers],
    ) -> None:
        self._arch, self._source, self._experts = arch, source, experts
        self._tiers = tiers

    def layer(self, number: int, ropes: RopeTables, work: Workspace, kv: KVCache) -> LayerWords:
        """Layer `number`, its weights read."""
        layer, source = self._arch.layers[number], self._source
        spec, mlp = layer.attention, layer.mlp
        routed, dense = _NOTHING_ROUTED, _NOTHING_DENSE
        if isinstance(mlp, MoE):
            routed = _routed(mlp, number, work, self._experts, self._tiers[number])
            if mlp.shared is not None:
                dense = _dense(source, mlp.shared, mlp.shared_gate, work)
        else:
            dense = _dense(source, mlp, None, work)
        return LayerWords(
            load_attention(source, layer, ropes),
            attention_shape(spec, kv),
            work.buffers(spec.o.cols),
            kv.k[number],
            kv.v[number],
            routed,
            dense,
        )
