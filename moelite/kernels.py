"""Matrix kernels over every format: dense linear layers and the routed experts of a layer.

A format is chosen by its code at run time, once for a strip of rows, so one compiled kernel serves
all formats and mixes of them. Work is handed out in strips through a shared counter (`take`): a
thread that loses its core costs one strip, not half the matrix.

Every result is computed by one thread in a fixed order of operations that depends on nothing but
the token's own activations and the weights: bits do not change with threads, chunk or cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moelite.jit import inlined, inner, kernel
from moelite.ops import silu_gate_8
from moelite.quant import FORMATS
from moelite.quant.base import F32, Act, Job, Matrix, QuantFormat
from moelite.simd import (
    abs_f32,
    add_f32,
    add_i32,
    f32_as_i32,
    largest_f32,
    load_f32,
    max_f32,
    mul_f32,
    round_f32,
    splat_f32,
    store_f32_as_i8,
    sum_f32,
    sum_i32,
    take,
    zero_f32,
    zero_i32,
)

STRIP = 32  # rows a thread takes at a time; a multiple of the 32-column blocks of the next matrix

I64 = npt.NDArray[np.int64]


# --- one entry for all formats ------------------------------------------------------------------


def _chain(formats: list[QuantFormat], last: Any, link: Any) -> Any:
    # an if-chain over the formats' codes, built so that a new format is one more file in quant/
    chain = last(formats[-1])
    for fmt in reversed(formats[:-1]):
        chain = link(fmt, chain)
    return chain


def _last_multiply(fmt: QuantFormat) -> Any:
    multiply = fmt.multiply

    @inner
    def last(matrix, act, job, start, stop):
        multiply(matrix, act, job, start, stop)

    return last


def _link_multiply(fmt: QuantFormat, others: Any) -> Any:
    code, multiply = fmt.code, fmt.multiply

    @inner
    def link(matrix, act, job, start, stop):
        if matrix.fmt == code:
            multiply(matrix, act, job, start, stop)
        else:
            others(matrix, act, job, start, stop)

    return link


def _last_row(fmt: QuantFormat) -> Any:
    row = fmt.row

    @inner
    def last(matrix, r, out):
        row(matrix, r, out)

    return last


def _link_row(fmt: QuantFormat, others: Any) -> Any:
    code, row = fmt.code, fmt.row

    @inner
    def link(matrix, r, out):
        if matrix.fmt == code:
            row(matrix, r, out)
        else:
            others(matrix, r, out)

    return link


_FORMATS = list(FORMATS.values())
_multiply = _chain(_FORMATS, _last_multiply, _link_multiply)
_row = _chain(_FORMATS, _last_row, _link_row)


# --- activations --------------------------------------------------------------------------------


@inlined
def _quantize_block(act, at, k):
    # x[at : at + 32] -> block k: q, scale, total. A NaN or infinity makes the scale NaN: it shows.
    x, q = act.x, act.q
    v0, v1 = load_f32(x, at), load_f32(x, at + 8)
    v2, v3 = load_f32(x, at + 16), load_f32(x, at + 24)
    largest = largest_f32(
        max_f32(max_f32(abs_f32(v0), abs_f32(v1)), max_f32(abs_f32(v2), abs_f32(v3)))
    )
    zero = zero_f32()
    seen = add_f32(
        add_f32(mul_f32(v0, zero), mul_f32(v1, zero)), add_f32(mul_f32(v2, zero), mul_f32(v3, zero))
    )
    finite = sum_f32(seen) == np.float32(0)
    inverse = np.float32(0)
    if finite and largest > np.float32(0):
        inverse = np.float32(127) / largest
    # below 127 / float32's largest the inverse overflows: such a block is zero to every purpose
    if inverse > np.float32(3e38):
        inverse = np.float32(0)
        largest = np.float32(0)
    if not finite:
        v0, v1, v2, v3 = zero, zero, zero, zero
    by = splat_f32(inverse)
    r0, r1 = round_f32(mul_f32(v0, by)), round_f32(mul_f32(v1, by))
    r2, r3 = round_f32(mul_f32(v2, by)), round_f32(mul_f32(v3, by))
    store_f32_as_i8(q, k * 32, r0)
    store_f32_as_i8(q, k * 32 + 8, r1)
    store_f32_as_i8(q, k * 32 + 16, r2)
    store_f32_as_i8(q, k * 32 + 24, r3)
    whole = add_f32(add_f32(r0, r1), add_f32(r2, r3))
    act.total[k] = sum_i32(add_i32(zero_i32(), f32_as_i32(whole)))
    act.scale[k] = largest / np.float32(127) if finite else np.float32(np.nan)


@kernel
def quantize_activations(act, tokens):
    """Fills q, scale and total of an Act from its x, for rows 0..tokens.

    act.width must be act.blocks * 32, zero filled beyond the true columns.
    """
    for k in range(tokens * act.blocks):
        _quantize_block(act, k * 32, k)


@kernel
def embed_rows(matrix, ids, out):
    """Row ids[t] of a Matrix -> out [T, >= cols] float32."""
    for t in range(ids.size):
        _row(matrix, ids[t], out[t])


# --- linear -------------------------------------------------------------------------------------


@kernel
def linear_job(tid, counter, matrix, act, job):
    """One thread's share of out[target] = x[source] @ W.T."""
    rows = matrix.rows
    start = take(counter, STRIP)
    while start < rows:
        _multiply(matrix, act, job, start, min(start + STRIP, rows))
        start = take(counter, STRIP)


# --- experts ------------------------------------------------------------------------------------


class ExpertMatrices(NamedTuple):
    """Where the matrices of an expert lie behind its record's first byte, and their sizes."""

    fmt: int
    gate: int
    up: int
    down: int
    hidden: int
    inner: int


class ExpertJob(NamedTuple):
    """The experts of one batch: expert j's record is at arena[base[j]:], its positions are
    first[j]..first[j + 1].

    source [P] int32: activation row of position p. target [P] int32: row of `out` it writes.
    gate, up float32 [P, act.width]: workspace; hidden: the Act over `gate` that feeds `down`.
    """

    base: I64
    first: I64
    source: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]  # 0..P-1: the workspace row of each position
    up: F32
    hidden: Act
    out: F32
    width: int


@kernel
def gate_up_job(tid, counter, arena, matrices, act, job):
    """One thread's share of hidden = silu(x @ gate.T) * (x @ up.T), quantized as it is made."""
    h, m = job.hidden, matrices
    strips = (m.inner + STRIP - 1) // STRIP
    experts = job.base.size
    piece = take(counter, 1)
    while piece < experts * strips:
        e, start = piece // strips, piece % strips * STRIP
        stop = min(start + STRIP, m.inner)
        first, last = job.first[e], job.first[e + 1]
        base = job.base[e]
        to_gate = Job(job.source, job.places, first, last, h.x, h.width)
        to_up = Job(job.source, job.places, first, last, job.up, h.width)
        gate = Matrix(m.fmt, arena, base + m.gate, m.inner, m.hidden)
        up = Matrix(m.fmt, arena, base + m.up, m.inner, m.hidden)
        _multiply(gate, act, to_gate, start, stop)
        _multiply(up, act, to_up, start, stop)
        for p in range(first, last):
            row = p * h.width
            for c in range(start, (stop + 7) // 8 * 8, 8):
                silu_gate_8(h.x, job.up, row + c)
            for c in range(stop, start + STRIP):
                h.x[row + c] = np.float32(0)
            if h.q.size:
                _quantize_block(h, row + start, p * h.blocks + start // 32)
        piece = take(counter, 1)


@kernel
def down_job(tid, counter, arena, matrices, job):
    """One thread's share of out[target] = hidden @ down.T."""
    m = matrices
    strips = (m.hidden + STRIP - 1) // STRIP
    piece = take(counter, 1)
    while piece < job.base.size * strips:
        e, start = piece // strips, piece % strips * STRIP
        to = Job(job.places, job.target, job.first[e], job.first[e + 1], job.out, job.width)
        base = job.base[e] + m.down
        stop = min(start + STRIP, m.hidden)
        _multiply(Matrix(m.fmt, arena, base, m.hidden, m.inner), job.hidden, to, start, stop)
        piece = take(counter, 1)


@kernel
def combine(parts, weights, x):
    """x [T, width] += sum over k, in order, of weights [T, K] * parts [T * K, width]."""
    tokens, top_k = weights.shape
    width = x.shape[1]
    for t in range(tokens):
        for c in range(width):
            total = np.float32(0)
            for k in range(top_k):
                total += weights[t, k] * parts[t * top_k + k, c]
            x[t, c] += total


def new_act(tokens: int, cols: int, *, quantized: bool) -> Act:
    """A zeroed Act for `tokens` rows of `cols` columns; without int8 blocks if not `quantized`."""
    blocks = -(-cols // 32)
    n = tokens * blocks if quantized else 0
    return Act(
        np.zeros(tokens * blocks * 32, np.float32),
        blocks * 32,
        np.zeros(n * 32, np.int8),
        np.zeros(n, np.float32),
        np.zeros(n, np.int32),
        blocks,
    )


def act_bytes(tokens: int, cols: int, *, quantized: bool) -> int:
    """The size of `new_act(tokens, cols, quantized=quantized)`."""
    blocks = -(-cols // 32)
    return tokens * blocks * (128 + (40 if quantized else 0))
