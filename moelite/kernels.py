"""The kernels of a layer: attention, feed-forward parts, and the head.

A kernel is a row of phases whose pieces the threads of a team share (moelite.sync): a thread that
loses its core costs one piece, not half a matrix. Every result is computed by one thread in a fixed
order of operations that depends on nothing but the token's own activations and the weights: bits do
not change with threads, chunk or cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moelite import ops
from moelite.dispatch import STRIP, multiply, quantize_block, quantize_row, strips
from moelite.jit import inner, kernel
from moelite.quant.base import F32, Act, Job, Matrix
from moelite.sync import done, take, wait

I64 = npt.NDArray[np.int64]

# --- attention ----------------------------------------------------------------------------------


class AttentionWeights(NamedTuple):
    """What one layer's attention multiplies by. Empty arrays stand for parts it has not.

    q_norm and k_norm run over one head, or over all heads at once; a size of 0 means none.
    router: the MoE router's matrix, 0 rows where the layer has none.
    """

    input_norm: ops.NormWeights
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    q_bias: F32
    k_bias: F32
    v_bias: F32
    o_bias: F32
    q_norm: ops.NormWeights
    k_norm: ops.NormWeights
    clip: np.float32  # infinity: none
    cos: F32  # [context, n]; n = 0: no rotary embedding
    sin: F32
    interleaved: bool
    post_norm: ops.NormWeights
    router: Matrix


class LayerBuffers(NamedTuple):
    """The workspace of a chunk of T tokens, flat float32, rows `width`s apart; see Workspace."""

    x: F32
    x_width: int
    q: F32
    q_width: int
    k: F32
    v: F32
    k_width: int
    y: F32
    normed: Act
    attended: Act
    router_logits: F32
    router_width: int
    scratch: F32  # [threads, D8 + context + 8]
    rows: npt.NDArray[np.int32]  # 0, 1, 2, ...


@inner
def _strip(matrix, act, io, tokens, out, width, strip):
    # rows 32 * strip .. + 32 of a matrix for all tokens
    job = Job(io.rows, io.rows, 0, tokens, out, width)
    start = strip * STRIP
    multiply(matrix, act, job, start, min(start + STRIP, matrix.rows))


@inner
def _norm_heads(x, at, norm, width):
    if norm.size:
        for h in range(width // norm.size):
            ops.norm_run(x, at + h * norm.size, norm, x, at + h * norm.size)


@inner
def _shape_token(w, shape, io, t, position, buffer, cache):
    # bias, norm, clip and rotate token t's query and key, and keep key and value
    q, k, v = t * io.q_width, t * io.k_width, t * io.k_width
    ops.add_run(io.q, q, w.q_bias, 0, w.q_bias.size)
    ops.add_run(io.k, k, w.k_bias, 0, w.k_bias.size)
    ops.add_run(io.v, v, w.v_bias, 0, w.v_bias.size)
    _norm_heads(io.q, q, w.q_norm, w.q.rows)
    _norm_heads(io.k, k, w.k_norm, w.k.rows)
    if w.clip < np.float32(np.inf):
        ops.clamp_run(io.q, q, w.q.rows, w.clip)
        ops.clamp_run(io.k, k, w.k.rows, w.clip)
        ops.clamp_run(io.v, v, w.v.rows, w.clip)
    if w.cos.shape[1]:
        cos, sin = w.cos[position], w.sin[position]
        for h in range(shape.heads):
            ops.rotate_run(io.q, q + h * shape.head_dim, cos, sin, w.interleaved)
        for h in range(shape.kv_heads):
            ops.rotate_run(io.k, k + h * shape.head_dim, cos, sin, w.interleaved)
    ops.keep_heads(io.k, k, shape, position, buffer, cache[0])
    ops.keep_heads(io.v, v, shape, position, buffer, cache[1])


@kernel
def attention_block(tid, sync, w, shape, io, cache, place):
    """x += attention(norm(x)); normed = norm(x); router logits = normed @ router.T.

    place: (tokens, position of the first). cache: (k, v) of the layer.
    """
    tokens = place[0]
    piece = take(sync, 0)
    while piece < tokens:
        ops.norm_run(io.x, piece * io.x_width, w.input_norm, io.normed.x, piece * io.normed.width)
        quantize_row(io.normed, piece)
        done(sync, 0)
        piece = take(sync, 0)
    wait(sync, 0, tokens)
    nq, nk, nv = strips(w.q.rows), strips(w.k.rows), strips(w.v.rows)
    piece = take(sync, 1)
    while piece < nq + nk + nv:
        if piece < nq:
            _strip(w.q, io.normed, io, tokens, io.q, io.q_width, piece)
        elif piece < nq + nk:
            _strip(w.k, io.normed, io, tokens, io.k, io.k_width, piece - nq)
        else:
            _strip(w.v, io.normed, io, tokens, io.v, io.k_width, piece - nq - nk)
        done(sync, 1)
        piece = take(sync, 1)
    wait(sync, 1, nq + nk + nv)
    _attend(tid, sync, w, shape, io, cache, place)
    _finish(sync, w, io, tokens)


@inner
def _attend(tid, sync, w, shape, io, cache, place):
    # phases 2 to 4: from q, k, v to attended
    tokens, start = place
    piece = take(sync, 2)
    while piece < tokens:
        _shape_token(w, shape, io, piece, start + piece, io.scratch[tid], cache)
        done(sync, 2)
        piece = take(sync, 2)
    wait(sync, 2, tokens)
    heads, d, out = shape.heads, shape.head_dim, io.attended
    group = heads // shape.kv_heads
    piece = take(sync, 3)
    while piece < tokens * heads:
        t, h = piece // heads, piece % heads
        at, to = t * io.q_width + h * d, t * out.width + h * d
        where = (h // group, start + t)
        ops.attend_head(io.q, at, cache, shape, where, io.scratch[tid], out.x[to : to + d])
        done(sync, 3)
        piece = take(sync, 3)
    wait(sync, 3, tokens * heads)
    piece = take(sync, 4)
    while piece < tokens:
        quantize_row(out, piece)
        done(sync, 4)
        piece = take(sync, 4)
    wait(sync, 4, tokens)


@inner
def _finish(sync, w, io, tokens):
    # phases 5 to 7: output projection, residual, norm, router
    pieces = strips(w.o.rows)
    piece = take(sync, 5)
    while piece < pieces:
        _strip(w.o, io.attended, io, tokens, io.y, io.x_width, piece)
        done(sync, 5)
        piece = take(sync, 5)
    wait(sync, 5, pieces)
    piece = take(sync, 6)
    while piece < tokens:
        at = piece * io.x_width
        ops.add_run(io.x, at, io.y, at, w.o.rows)
        ops.add_run(io.x, at, w.o_bias, 0, w.o_bias.size)
        ops.norm_run(io.x, at, w.post_norm, io.normed.x, piece * io.normed.width)
        quantize_row(io.normed, piece)
        done(sync, 6)
        piece = take(sync, 6)
    wait(sync, 6, tokens)
    pieces = strips(w.router.rows)
    piece = take(sync, 7)
    while piece < pieces:
        _strip(w.router, io.normed, io, tokens, io.router_logits, io.router_width, piece)
        done(sync, 7)
        piece = take(sync, 7)
    wait(sync, 7, pieces)


@kernel
def norm_row(norm, io, row):
    """normed[0] = norm(x[row]): what the head multiplies."""
    ops.norm_run(io.x, row * io.x_width, norm, io.normed.x, 0)
    quantize_row(io.normed, 0)


# --- feed-forward -------------------------------------------------------------------------------


class FeedForward(NamedTuple):
    """The matrices of gated feed-forward parts: a dense one, or experts that share an arena.

    Expert j's gate begins at gate.packed[gate.base + base[j]], and so on, with `base` of the job.
    """

    gate: Matrix
    up: Matrix
    down: Matrix


class FeedForwardJob(NamedTuple):
    """Which parts compute which rows: part j computes positions first[j] .. first[j + 1].

    source [P] int32: activation row of position p. target [P] int32: row of `out` it writes.
    hidden: the Act that feeds `down`, its x [P, width] the gate's output; up float32 [P * width].
    """

    base: I64
    first: I64
    source: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]  # 0 .. P - 1: the workspace row of each position
    hidden: Act
    up: F32
    out: F32
    width: int


class Sum(NamedTuple):
    """x [T * width] += sum over k, in order, of weights [T, K] * parts [T * K * width].

    tokens 0: not yet. gates: a logit a token whose sigmoid multiplies the weight, or empty.
    """

    x: F32
    width: int
    size: int
    parts: F32
    weights: F32
    gates: F32
    tokens: int


@inner
def _move(matrix, by):
    return Matrix(matrix.fmt, matrix.packed, matrix.base + by, matrix.rows, matrix.cols)


@inner
def _gate_up(ff, act, job, part, start):
    # rows start .. start + 32 of silu(x @ gate.T) * (x @ up.T) of one part, quantized as made
    h, rows = job.hidden, ff.gate.rows
    stop = min(start + STRIP, rows)
    first, last, base = job.first[part], job.first[part + 1], job.base[part]
    to_gate = Job(job.source, job.places, first, last, h.x, h.width)
    to_up = Job(job.source, job.places, first, last, job.up, h.width)
    multiply(_move(ff.gate, base), act, to_gate, start, stop)
    multiply(_move(ff.up, base), act, to_up, start, stop)
    for p in range(first, last):
        row = p * h.width
        for c in range(start, (stop + 7) // 8 * 8, 8):
            ops.silu_gate_8(h.x, job.up, row + c)
        for c in range(stop, start + STRIP):
            h.x[row + c] = np.float32(0)
        if h.q.size:
            quantize_block(h, row + start, p * h.blocks + start // 32)


@inner
def _add_parts(total, t):
    top_k = total.weights.shape[1]
    factor = np.float32(1)
    if total.gates.size:
        factor = np.float32(1) / (np.float32(1) + np.float32(math.exp(-total.gates[t * 8])))
    for c in range(total.size):
        acc = np.float32(0)
        for k in range(top_k):
            acc += total.weights[t, k] * total.parts[(t * top_k + k) * total.width + c]
        total.x[t * total.width + c] += acc * factor


@kernel
def feed_forward(tid, sync, ff, act, job, total):
    """out[target] = down(silu(gate(x)) * up(x)) for the job's positions; then the Sum."""
    parts = job.base.size
    each = strips(ff.gate.rows)
    piece = take(sync, 0)
    while piece < parts * each:
        _gate_up(ff, act, job, piece // each, piece % each * STRIP)
        done(sync, 0)
        piece = take(sync, 0)
    wait(sync, 0, parts * each)
    each = strips(ff.down.rows)
    piece = take(sync, 1)
    while piece < parts * each:
        part, start = piece // each, piece % each * STRIP
        first, last = job.first[part], job.first[part + 1]
        to = Job(job.places, job.target, first, last, job.out, job.width)
        down = _move(ff.down, job.base[part])
        multiply(down, job.hidden, to, start, min(start + STRIP, ff.down.rows))
        done(sync, 1)
        piece = take(sync, 1)
    wait(sync, 1, parts * each)
    piece = take(sync, 2)
    while piece < total.tokens:
        _add_parts(total, piece)
        done(sync, 2)
        piece = take(sync, 2)
    wait(sync, 2, total.tokens)
