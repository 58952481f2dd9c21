"""The parts of a layer: attention, feed-forward parts, and the head.

A part is a row of phases whose pieces the threads of a team share (moelite.sync): a thread that
loses its core costs one piece, not half a matrix. Every result is computed by one thread in a fixed
order of operations that depends on nothing but the token's own activations and the weights: bits do
not change with threads, chunk or cache.

Each part takes the number of its first phase and returns the next free one. A layer is given as
(table, at): its words begin at table[at] (moelite.program). A thread that multiplies the last rows
of its run asks memory for the first rows of its next: of the next matrix, phase or layer.
"""

from __future__ import annotations

import math

import numpy as np

from moelite import ops
from moelite.attention import attend, attend_pieces, keep_heads
from moelite.dispatch import multiply, place, quantize_block, quantize_row, strip_of, strips
from moelite.jit import inlined, inner
from moelite.program import FeedForward, LayerWords
from moelite.quant.base import Job, Matrix
from moelite.raw import address, f32_at
from moelite.simd import add_f32, load_f32, mul_f32, splat_f32, store_f32, zero_f32
from moelite.sync import finish, own, take
from moelite.words import field, size_of

_q, _k = field(LayerWords, "attention.q"), field(LayerWords, "attention.k")
_v, _o = field(LayerWords, "attention.v"), field(LayerWords, "attention.o")
_shaping = field(LayerWords, "attention.shaping")
_input_norm = field(LayerWords, "attention.input_norm")
_post_norm = field(LayerWords, "attention.post_norm")
_o_bias = field(LayerWords, "attention.o_bias")
_shape = field(LayerWords, "shape")
_cache_k, _cache_v = field(LayerWords, "k"), field(LayerWords, "v")
_buffers = field(LayerWords, "buffers")
query_matrix = _q

# --- products -----------------------------------------------------------------------------------


@inner
def _strip(matrix, act, rows, to, part, follow):
    # some rows of a matrix for all tokens; to: (tokens, out, width), part: (first row, how many)
    job = Job(rows, rows, 0, to[0], to[1], to[2])
    start, count = part
    multiply(matrix, act, job, start, min(start + count, matrix.rows), follow)


@inlined
def first_row(crew, matrix):
    """The address of the first row that a thread multiplies of a matrix."""
    strip = strip_of(matrix.rows, crew.team)
    return place(matrix, own(crew, strips(matrix.rows, strip), crew.tid)[0] * strip)


@inner
def product(crew, phase, matrix, act, rows, to, after):
    """out[t] = act[t] @ matrix.T for every token; to: (tokens, out, its width). 1 phase.

    rows: 0, 1, 2, ... after: the address that this thread reads next.
    """
    strip = strip_of(matrix.rows, crew.team)
    pieces, mine = strips(matrix.rows, strip), 0
    last = own(crew, pieces, crew.tid)[1]
    piece = take(crew, phase, pieces)
    while piece < pieces:
        follow = place(matrix, (piece + 1) * strip) if piece + 1 < last else after
        _strip(matrix, act, rows, to, (piece * strip, strip), follow)
        mine += 1
        piece = take(crew, phase, pieces)
    finish(crew, phase, mine, pieces)
    return phase + 1


# --- attention ----------------------------------------------------------------------------------


@inlined
def _queries(crew, phase, table, at, tokens):
    # q, k, v = the normed rows times the three matrices
    q, k, v, io = _q(table, at), _k(table, at), _v(table, at), _buffers(table, at)
    size = strip_of(q.rows + k.rows + v.rows, crew.team)
    nq, nk = strips(q.rows, size), strips(k.rows, size)
    pieces = nq + nk + strips(v.rows, size)
    mine, last, after = 0, own(crew, pieces, crew.tid)[1], first_row(crew, _o(table, at))
    piece = take(crew, phase, pieces)
    while piece < pieces:
        matrix, out, width, strip = q, io.q, io.q_width, piece
        if piece >= nq + nk:
            matrix, out, width, strip = v, io.v, io.k_width, piece - nq - nk
        elif piece >= nq:
            matrix, out, width, strip = k, io.k, io.k_width, piece - nq
        follow = after
        if piece + 1 < last:
            if piece + 1 == nq:
                follow = place(k, 0)
            elif piece + 1 == nq + nk:
                follow = place(v, 0)
            else:
                follow = place(matrix, (strip + 1) * size)
        _strip(matrix, io.normed, io.rows, (tokens, out, width), (strip * size, size), follow)
        mine += 1
        piece = take(crew, phase, pieces)
    finish(crew, phase, mine, pieces)


@inner
def _norm_heads(x, at, norm, width):
    if norm.size:
        for h in range(width // norm.size):
            ops.norm_run(x, at + h * norm.size, norm, x, at + h * norm.size)


@inner
def _rotate_heads(x, at, heads, head_dim, w, position):
    begin = position * w.rotary
    cos, sin = w.cos[begin : begin + w.rotary], w.sin[begin : begin + w.rotary]
    for h in range(heads):
        ops.rotate_run(x, at + h * head_dim, cos, sin, w.interleaved)


@inner
def _shape_token(table, at, t, position, buffer):
    # bias, norm, clip and rotate token t's query and key, and keep key and value
    w, shape, io = _shaping(table, at), _shape(table, at), _buffers(table, at)
    q, k = t * io.q_width, t * io.k_width
    ops.add_run(io.q, q, w.q_bias, 0, w.q_bias.size)
    ops.add_run(io.k, k, w.k_bias, 0, w.k_bias.size)
    ops.add_run(io.v, k, w.v_bias, 0, w.v_bias.size)
    nq, nk = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    _norm_heads(io.q, q, w.q_norm, nq)
    _norm_heads(io.k, k, w.k_norm, nk)
    if w.clip < np.float32(np.inf):
        ops.clamp_run(io.q, q, nq, w.clip)
        ops.clamp_run(io.k, k, nk, w.clip)
        ops.clamp_run(io.v, k, nk, w.clip)
    if w.rotary:
        _rotate_heads(io.q, q, shape.heads, shape.head_dim, w, position)
        _rotate_heads(io.k, k, shape.kv_heads, shape.head_dim, w, position)
    keep_heads(io.k, k, shape, position, buffer, _cache_k(table, at))
    keep_heads(io.v, k, shape, position, buffer, _cache_v(table, at))


@inlined
def _attend(crew, phase, table, at, tokens, start):
    # from q, k, v to attended: three phases
    io, shape = _buffers(table, at), _shape(table, at)
    scratch = io.scratch[crew.tid * io.scratch_width : (crew.tid + 1) * io.scratch_width]
    mine = 0
    piece = take(crew, phase, tokens)
    while piece < tokens:
        _shape_token(table, at, piece, start + piece, scratch)
        mine += 1
        piece = take(crew, phase, tokens)
    finish(crew, phase, mine, tokens)
    cache, out = (_cache_k(table, at), _cache_v(table, at)), io.attended
    pieces, mine = attend_pieces(shape, tokens), 0
    piece = take(crew, phase + 1, pieces)
    while piece < pieces:
        where = tokens, start
        attend(piece, (io.q, io.q_width), cache, shape, where, scratch, (out.x, out.width))
        mine += 1
        piece = take(crew, phase + 1, pieces)
    finish(crew, phase + 1, mine, pieces)
    mine = 0
    piece = take(crew, phase + 2, tokens)
    while piece < tokens:
        quantize_row(out, piece)
        mine += 1
        piece = take(crew, phase + 2, tokens)
    finish(crew, phase + 2, mine, tokens)


@inlined
def _enter(crew, phase, table, at, tokens):
    # normed = input norm(x)
    io, norm = _buffers(table, at), _input_norm(table, at)
    mine = 0
    piece = take(crew, phase, tokens)
    while piece < tokens:
        ops.norm_run(io.x, piece * io.x_width, norm, io.normed.x, piece * io.normed.width)
        quantize_row(io.normed, piece)
        mine += 1
        piece = take(crew, phase, tokens)
    finish(crew, phase, mine, tokens)


@inlined
def _leave(crew, phase, table, at, tokens):
    # x += y + bias; normed = post norm(x)
    io, norm, bias = _buffers(table, at), _post_norm(table, at), _o_bias(table, at)
    size, mine = _o(table, at).rows, 0
    piece = take(crew, phase, tokens)
    while piece < tokens:
        row = piece * io.x_width
        ops.add_run(io.y, row, bias, 0, bias.size)
        ops.add_run(io.x, row, io.y, row, size)
        ops.norm_run(io.x, row, norm, io.normed.x, piece * io.normed.width)
        quantize_row(io.normed, piece)
        mine += 1
        piece = take(crew, phase, tokens)
    finish(crew, phase, mine, tokens)


@inner
def attention(crew, phase, table, at, tokens, start):
    """x += attention(norm(x)); normed = norm(x), of tokens at positions start... 7 phases."""
    _enter(crew, phase, table, at, tokens)
    _queries(crew, phase + 1, table, at, tokens)
    _attend(crew, phase + 2, table, at, tokens, start)
    io, o = _buffers(table, at), _o(table, at)
    to = tokens, io.y, io.x_width
    product(crew, phase + 5, o, io.attended, io.rows, to, first_row(crew, o))
    _leave(crew, phase + 6, table, at, tokens)
    return phase + 7


@inlined
def head(crew, phase, norm, matrix, io, row, out):
    """out = norm(x[row]) @ matrix.T: the logits of one token. 2 phases."""
    mine = 0
    piece = take(crew, phase, 1)
    while piece < 1:
        ops.norm_run(io.x, row * io.x_width, norm, io.normed.x, 0)
        quantize_row(io.normed, 0)
        mine += 1
        piece = take(crew, phase, 1)
    finish(crew, phase, mine, 1)
    to, after = (np.int64(1), out, out.size), first_row(crew, matrix)
    return product(crew, phase + 1, matrix, io.normed, io.rows, to, after)


# --- feed-forward -------------------------------------------------------------------------------


@inlined
def _move(matrix, by):
    return Matrix(
        matrix.product,
        matrix.row,
        matrix.packed,
        matrix.base + by,
        matrix.rows,
        matrix.cols,
        matrix.tile_bytes,
    )


_gate_up_of, _down_of = field(FeedForward, "gate_up"), field(FeedForward, "down")
_PARTS_WORDS = size_of(FeedForward)


@inlined
def _wide(tiers, job, part):
    # the gate_up of a part
    return _move(_gate_up_of(tiers, job.tier[part] * _PARTS_WORDS), job.base[part])


@inlined
def _down(tiers, job, part):
    return _move(_down_of(tiers, job.tier[part] * _PARTS_WORDS), job.base[part])


@inner
def _wide_place(tiers, job, piece, each, rows):
    # where a piece of `rows` rows of gate_up begins, of `each` pieces a part
    return place(_wide(tiers, job, piece // each), piece % each * rows)


@inner
def _down_place(tiers, job, piece, each, rows):
    return place(_down(tiers, job, piece // each), piece % each * rows)


PAIRED = 64  # rows of gate_up that make a block of 32 hidden activations


@inner
def _gate_up(crew, tiers, act, job, part, rows, follow):
    # rows of gate_up of one part, silu(gate) * up of them, quantized as made; rows: (first, count)
    h, first, last, (begin, size) = job.hidden, job.first[part], job.first[part + 1], rows
    matrix = _wide(tiers, job, part)
    stop, count = min(begin + size, matrix.rows), last - first
    both = job.scratch[crew.tid * job.scratch_width : (crew.tid + 1) * job.scratch_width]
    # `multiply` writes row r of the matrix to column r, and here column 0 is `begin`
    out = f32_at(address(both) - begin * 4, both.size + begin)
    to = Job(job.source[first:last], job.places, 0, count, out, size)
    multiply(matrix, act, to, begin, stop, follow)
    for p in range(count):
        row = (first + p) * h.width
        for i in range(0, stop - begin, 16):
            ops.silu_gate_8(both, p * size + i, h.x, row + (begin + i) // 2)
        end = (stop + PAIRED - 1) // PAIRED * (PAIRED // 2)
        for c in range(stop // 2, end):
            h.x[row + c] = np.float32(0)
        if h.q.size:
            for c in range(begin // 2, end, 32):
                quantize_block(h, row + c, (first + p) * h.blocks + c // 32)


@inlined
def _paired(crew, rows, job, count):
    # rows of gate_up in a piece: what a strip is to other matrices, and the scratch has room for
    size = 2 * strip_of(job.parts * rows // 2, crew.team)
    return max(min(size, job.scratch_width // count // PAIRED * PAIRED), PAIRED)


@inlined
def _hidden(crew, phase, tiers, act, job, count):
    rows, down = _gate_up_of(tiers, 0).rows, _down_of(tiers, 0).rows
    size = _paired(crew, rows, job, count)
    each = strips(rows, size)
    pieces, mine = job.parts * each, 0
    last, strip = own(crew, pieces, crew.tid)[1], strip_of(job.parts * down, crew.team)
    downs = job.parts * strips(down, strip)
    first = min(own(crew, downs, crew.tid)[0], downs - 1)
    after = _down_place(tiers, job, first, strips(down, strip), strip)
    piece = take(crew, phase, pieces)
    while piece < pieces:
        follow = _wide_place(tiers, job, piece + 1, each, size) if piece + 1 < last else after
        _gate_up(crew, tiers, act, job, piece // each, (piece % each * size, size), follow)
        mine += 1
        piece = take(crew, phase, pieces)
    finish(crew, phase, mine, pieces)


SUM_RUN = 512  # columns of one piece of a Sum


@inner
def _add_parts(total, t, start):
    # columns start .. start + SUM_RUN of row t; widths are padded to 8
    factor = np.float32(1)
    if total.gates.size:
        factor = np.float32(1) / (np.float32(1) + np.float32(math.exp(-total.gates[t * 8])))
    times = splat_f32(factor)
    for c in range(start, min(start + SUM_RUN, total.size), 8):
        acc = zero_f32()
        for k in range(total.top_k):
            row = t * total.top_k + k
            part = load_f32(total.parts, row * total.width + c)
            acc = add_f32(acc, mul_f32(splat_f32(total.weights[row]), part))
        at = t * total.width + c
        store_f32(total.x, at, add_f32(load_f32(total.x, at), mul_f32(acc, times)))


@inner
def feed_forward(crew, phase, tiers, act, job, total, then):
    """out[target] = down(silu(gate(x)) * up(x)) for the job's positions; then the Sum. 3 phases.

    tiers: words of FeedForwards, which job.tier chooses from. Most often all parts are of one.
    then: (the most positions of a part, rows of the Sum, 0 if it has to wait; the address that this
    thread reads next). The first is not looked up in the job: a thread that comes late would find
    another job's number there, and count other pieces.
    """
    count, tokens, after = then
    _hidden(crew, phase, tiers, act, job, count)
    rows = _down_of(tiers, 0).rows
    strip = strip_of(job.parts * rows, crew.team)
    each = strips(rows, strip)
    pieces, mine = job.parts * each, 0
    end = own(crew, pieces, crew.tid)[1]
    piece = take(crew, phase + 1, pieces)
    while piece < pieces:
        part, start = piece // each, piece % each * strip
        first, last = job.first[part], job.first[part + 1]
        to = Job(job.places, job.target, first, last, job.out, job.width)
        follow = _down_place(tiers, job, piece + 1, each, strip) if piece + 1 < end else after
        stop = min(start + strip, rows)
        multiply(_down(tiers, job, part), job.hidden, to, start, stop, follow)
        mine += 1
        piece = take(crew, phase + 1, pieces)
    finish(crew, phase + 1, mine, pieces)
    runs = (total.size + SUM_RUN - 1) // SUM_RUN
    pieces, mine = tokens * runs, 0
    piece = take(crew, phase + 2, pieces)
    while piece < pieces:
        _add_parts(total, piece // runs, piece % runs * SUM_RUN)
        mine += 1
        piece = take(crew, phase + 2, pieces)
    finish(crew, phase + 2, mine, pieces)
    return phase + 3
