"""Attention over the kv cache: softmax(q k^T * scale) v, block by block of 32 positions.

A piece of work is one kv head and a few tokens: the queries of all heads that share it (GQA). A
block of keys and values is made float32 once for all of them, and each query keeps a running
maximum, sum and weighted sum of values (online softmax: Milakov & Gimelshein 2018; in blocks: Dao
et al. 2022). Blocks begin at absolute positions, so a token's bits depend on its position alone,
not on the chunk it came in or on the tokens beside it.

The kv of a layer is bytes, [kv heads, context, row_bytes], in one of KV_FORMATS; D8 is head_dim
rounded up to a multiple of 8, with zeros, D32 to one of 32:
    f32    D8 float32
    f16    D8 IEEE halves
    int8   D32 signed bytes, then D32 / 32 float32 scales: v ~= code * scale, scale = max |v| / 127
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from moelite.jit import inlined, inner
from moelite.quant.base import pad
from moelite.simd import (
    abs_f32,
    add_f32,
    div_f32,
    exp_f32,
    fma_f32,
    largest_f32,
    load_f16,
    load_f32,
    load_i8_as_f32,
    max_f32,
    mul_f32,
    round_f32,
    splat_f32,
    splat_f32_at,
    store_f16,
    store_f32,
    store_f32_as_i8,
    store_one,
    sub_f32,
    sum_f32,
    sums_f32,
    zero_f32,
)

KVFormat = Literal["f32", "f16", "int8"]
KV_FORMATS: tuple[KVFormat, ...] = get_args(KVFormat)  # the code of a format is its place here

_BLOCK = 32  # positions; 32 keys and values of 128 floats are 32 KiB
_ROWS = 32  # queries of a piece, at most, unless a single token has more


class AttentionShape(NamedTuple):
    """Sizes of one layer's attention. window: how far a token sees, itself included; 0: all.

    kv: place in KV_FORMATS. row_bytes: one head's key, or value, of one position.
    """

    heads: int
    kv_heads: int
    head_dim: int
    padded_dim: int
    context: int
    window: int
    scale: np.float32
    kv: int
    row_bytes: int


def kv_row_bytes(head_dim: int, kv: KVFormat) -> int:
    """Bytes of one head's key, or value, of one position."""
    if kv == "int8":
        return pad(head_dim, 32) // 32 * (32 + 4)
    return pad(head_dim, 8) * (4 if kv == "f32" else 2)


def scratch_floats(heads: int, kv_heads: int, head_dim: int) -> int:
    """float32 of scratch that each thread needs for `attend`."""
    d32, rows = pad(head_dim, 32), max(_ROWS, heads // kv_heads)
    return 2 * _BLOCK * d32 + rows * (2 * d32 + 16) + _BLOCK


# --- keys and values, stored and loaded ---------------------------------------------------------


@inner
def _store_int8(row, d8, cache, to):
    # row float32 [D8], zeros beyond, to D32 codes and their scales
    blocks = (d8 + 31) // 32
    for b in range(blocks):
        last = min(d8 - b * 32, 32)
        largest = np.float32(0)
        for i in range(0, last, 8):
            largest = max(largest, largest_f32(abs_f32(load_f32(row, b * 32 + i))))
        # below float32's reach of 127 / largest a block is zero to every purpose
        inverse = np.float32(127) / largest if largest > np.float32(1e-36) else np.float32(0)
        for i in range(0, 32, 8):
            v = zero_f32()
            if i < last:
                v = round_f32(mul_f32(load_f32(row, b * 32 + i), splat_f32(inverse)))
            store_f32_as_i8(cache, to + b * 32 + i, v)
        scale = largest / np.float32(127)
        store_one(cache, to + blocks * 32 + b * 4, scale)


@inlined
def _scaled(x, at, times, out, to, sizes):
    # out[to : to + D8] = x[at : at + D] * times, then zeros; sizes: (D, D8)
    d, d8 = sizes
    eights = d // 8 * 8
    for i in range(0, eights, 8):
        store_f32(out, to + i, mul_f32(load_f32(x, at + i), splat_f32(times)))
    for i in range(eights, d):
        out[to + i] = x[at + i] * times
    for i in range(d, d8):
        out[to + i] = np.float32(0)


@inner
def keep_heads(x, at, shape, position, row, cache):
    """The kv heads x[at : at + NK * D] -> the kv bytes of `position`. row [D8]: scratch."""
    d, d8 = shape.head_dim, shape.padded_dim
    for h in range(shape.kv_heads):
        _scaled(x, at + h * d, np.float32(1), row, 0, (d, d8))
        to = (h * shape.context + position) * shape.row_bytes
        if shape.kv == 2:
            _store_int8(row, d8, cache, to)
        elif shape.kv == 1:
            for i in range(0, d8, 8):
                store_f16(cache, to + i * 2, load_f32(row, i))
        else:
            for i in range(0, d8, 8):
                store_f32(cache, to + i * 4, load_f32(row, i))


@inner
def _load_block(cache, at, count, shape, out):
    # `count` positions from byte `at` -> out float32 [count, D8]
    d8, step = shape.padded_dim, shape.row_bytes
    if shape.kv == 2:
        blocks = (d8 + 31) // 32
        for j in range(count):
            for i in range(0, d8, 8):
                scale = splat_f32_at(cache, at + j * step + blocks * 32 + i // 32 * 4)
                value = load_i8_as_f32(cache, at + j * step + i)
                store_f32(out, j * d8 + i, mul_f32(value, scale))
    elif shape.kv == 1:
        for j in range(count):
            for i in range(0, d8, 8):
                store_f32(out, j * d8 + i, load_f16(cache, at + j * step + i * 2))
    else:
        for j in range(count):
            for i in range(0, d8, 8):
                store_f32(out, j * d8 + i, load_f32(cache, at + j * step + i * 4))


# --- one query and one block --------------------------------------------------------------------


@inlined
def _eight_scores(query, q, keys, k, d8):
    # query[q:] times 8 neighbouring keys
    a0, a1, a2, a3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    a4, a5, a6, a7 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    for i in range(0, d8, 8):
        v, at = load_f32(query, q + i), k + i
        a0 = fma_f32(load_f32(keys, at), v, a0)
        a1 = fma_f32(load_f32(keys, at + d8), v, a1)
        a2 = fma_f32(load_f32(keys, at + 2 * d8), v, a2)
        a3 = fma_f32(load_f32(keys, at + 3 * d8), v, a3)
        a4 = fma_f32(load_f32(keys, at + 4 * d8), v, a4)
        a5 = fma_f32(load_f32(keys, at + 5 * d8), v, a5)
        a6 = fma_f32(load_f32(keys, at + 6 * d8), v, a6)
        a7 = fma_f32(load_f32(keys, at + 7 * d8), v, a7)
    return sums_f32(a0, a1, a2, a3, a4, a5, a6, a7)


@inlined
def _add_values(weights, span, values, d8, total, at, times):
    # total[at:] = total * times + weights[first:last] @ values, 64 columns at once, then 8
    first, last = span
    i = 0
    while i + 64 <= d8:
        a0 = mul_f32(load_f32(total, at + i), times)
        a1 = mul_f32(load_f32(total, at + i + 8), times)
        a2 = mul_f32(load_f32(total, at + i + 16), times)
        a3 = mul_f32(load_f32(total, at + i + 24), times)
        a4 = mul_f32(load_f32(total, at + i + 32), times)
        a5 = mul_f32(load_f32(total, at + i + 40), times)
        a6 = mul_f32(load_f32(total, at + i + 48), times)
        a7 = mul_f32(load_f32(total, at + i + 56), times)
        for j in range(first, last):
            w, v = splat_f32_at(weights, j), j * d8 + i
            a0 = fma_f32(w, load_f32(values, v), a0)
            a1 = fma_f32(w, load_f32(values, v + 8), a1)
            a2 = fma_f32(w, load_f32(values, v + 16), a2)
            a3 = fma_f32(w, load_f32(values, v + 24), a3)
            a4 = fma_f32(w, load_f32(values, v + 32), a4)
            a5 = fma_f32(w, load_f32(values, v + 40), a5)
            a6 = fma_f32(w, load_f32(values, v + 48), a6)
            a7 = fma_f32(w, load_f32(values, v + 56), a7)
        store_f32(total, at + i, a0)
        store_f32(total, at + i + 8, a1)
        store_f32(total, at + i + 16, a2)
        store_f32(total, at + i + 24, a3)
        store_f32(total, at + i + 32, a4)
        store_f32(total, at + i + 40, a5)
        store_f32(total, at + i + 48, a6)
        store_f32(total, at + i + 56, a7)
        i += 64
    while i < d8:
        acc = mul_f32(load_f32(total, at + i), times)
        for j in range(first, last):
            acc = fma_f32(splat_f32_at(weights, j), load_f32(values, j * d8 + i), acc)
        store_f32(total, at + i, acc)
        i += 8


@inner
def _weigh(query, q, keys, d8, span, kept, scores):
    # scores[:32] = exp(q.k - the maximum so far), 0 outside span; returns what earlier sums are to
    # be multiplied by. kept: the array of maxima and sums, and where the query's are
    first, last = span
    state, at = kept
    low = np.float32(-np.inf)
    for j in range(0, _BLOCK, 8):
        s = splat_f32(low)
        if j < last and j + 8 > first:
            s = _eight_scores(query, q, keys, j * d8, d8)
        store_f32(scores, j, s)
    for j in range(first):
        scores[j] = low
    for j in range(last, _BLOCK):
        scores[j] = low
    m0, m1 = load_f32(scores, 0), load_f32(scores, 8)
    m2, m3 = load_f32(scores, 16), load_f32(scores, 24)
    before = state[at]
    largest = max(before, largest_f32(max_f32(max_f32(m0, m1), max_f32(m2, m3))))
    shift, total = splat_f32(largest), zero_f32()
    for j in range(0, _BLOCK, 8):
        store_f32(scores, j, exp_f32(sub_f32(load_f32(scores, j), shift)))
    for j in range(first):
        scores[j] = np.float32(0)
    for j in range(last, _BLOCK):
        scores[j] = np.float32(0)
    for j in range(0, _BLOCK, 8):
        total = add_f32(total, load_f32(scores, j))
    times = exp_f32(sub_f32(splat_f32(before), shift))
    sums = add_f32(mul_f32(load_f32(state, at + 8), times), splat_f32(sum_f32(total)))
    store_f32(state, at + 8, sums)
    state[at] = largest
    return times


# --- a piece ------------------------------------------------------------------------------------


@inlined
def _tokens_of_piece(shape):
    return max(1, _ROWS // (shape.heads // shape.kv_heads))


@inlined
def attend_pieces(shape, tokens):
    """How many pieces the attention of a chunk of `tokens` tokens has."""
    each = _tokens_of_piece(shape)
    return shape.kv_heads * ((tokens + each - 1) // each)


@inner
def _load_queries(queries, shape, where, rows, query, sums):
    # rows of a piece: its tokens' heads, scaled, with zeros in the padding; sums are cleared
    (q, width), (token, head), (total, state) = queries, where, sums
    group, d, d8 = shape.heads // shape.kv_heads, shape.head_dim, shape.padded_dim
    for r in range(rows):
        at = (token + r // group) * width + (head * group + r % group) * d
        _scaled(q, at, shape.scale, query, r * d8, (d, d8))
        for i in range(0, d8, 8):
            store_f32(total, r * d8 + i, zero_f32())
        state[r * 16] = np.float32(-np.inf)
        store_f32(state, r * 16 + 8, zero_f32())


@inner
def attend(piece, queries, cache, shape, place, scratch, out):
    """One piece: out[t * W + h * D : ...] = the attention of head h of token t.

    queries: (float32 [T * width], width). cache: (keys, values), bytes. place: (tokens, position
    of the first). scratch: float32 [scratch_floats]. out: (float32 [T * W], W).
    """
    tokens, start = place
    group, d, d8 = shape.heads // shape.kv_heads, shape.head_dim, shape.padded_dim
    each = _tokens_of_piece(shape)
    # kv heads first: neighbouring pieces, which one thread takes, read the same keys
    blocks = (tokens + each - 1) // each
    head, token = piece // blocks, piece % blocks * each
    count = min(each, tokens - token)
    rows, n = count * group, _BLOCK * d8
    keys, values = scratch[:n], scratch[n : 2 * n]
    query, total = scratch[2 * n : 2 * n + rows * d8], scratch[2 * n + rows * d8 :]
    state, scores = total[rows * d8 :], total[rows * (d8 + 16) :]
    _load_queries(queries, shape, (token, head), rows, query, (total, state))
    newest = start + token + count - 1
    oldest = max(0, start + token + 1 - shape.window) if shape.window > 0 else 0
    base = head * shape.context
    for block in range(oldest // _BLOCK * _BLOCK, newest + 1, _BLOCK):
        held = min(_BLOCK, newest + 1 - block)
        _load_block(cache[0], (base + block) * shape.row_bytes, held, shape, keys)
        _load_block(cache[1], (base + block) * shape.row_bytes, held, shape, values)
        for r in range(rows):
            position = start + token + r // group
            last = min(position + 1 - block, _BLOCK)
            first = max(0, position + 1 - shape.window - block) if shape.window > 0 else 0
            if first < last:
                span = first, last
                times = _weigh(query, r * d8, keys, d8, span, (state, r * 16), scores)
                _add_values(scores, span, values, d8, total, r * d8, times)
    for r in range(rows):
        to = (token + r // group) * out[1] + (head * group + r % group) * d
        norm = state[r * 16 + 8]
        eights = d // 8 * 8
        for i in range(0, eights, 8):
            store_f32(out[0], to + i, div_f32(load_f32(total, r * d8 + i), splat_f32(norm)))
        for i in range(eights, d):
            out[0][to + i] = total[r * d8 + i] / norm
