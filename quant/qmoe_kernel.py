"""Multiplying from the codes of the qmoe formats, and expanding them.

8 rows, 16 where vectors are 512 bits wide, are expanded into bytes 0, 1, 2 and turned so that a
vector holds 4 neighbouring columns of all of them, as int4's and int8's tiles have it. There are
two products, with the places of the lower level and with those of the upper one, whose bytes are 2.
Sums of a block are exact; then, in float32, blocks in order,
    out = sum(low dots * x_scale) * low + sum(high dots * x_scale) * (high / 2)
"""

from __future__ import annotations

import numpy as np

from moelite import raw
from moelite.jit import WIDE, inlined, inner, kernel
from moelite.quant.base import Job
from moelite.quant.qmoe_dictionary import ENTRIES, masks_address
from moelite.quant.tiles import MANY, TILES, make_block, make_gemm
from moelite.simd import (
    Narrow,
    Wide,
    add_f32,
    and_i8,
    bits_i8,
    dot_u7,
    fma_f32,
    load_f32,
    load_i8x32,
    mul_f32,
    splat_f32_at,
    splat_i8,
    store_f32,
    store_i8x32,
    transpose_i8x4,
    zero_f32,
)

_LANES = TILES * 8
_dot = make_block(Narrow, dot_u7, 0, "qmoe")
_gemm = _gemm8 = make_gemm(Narrow, _dot, "qmoe")
if WIDE:
    _gemm = make_gemm(Wide, make_block(Wide, Wide.dot_u8, 0, "qmoe.wide"), "qmoe.wide")


@inlined
def _expand(head, rows, r, out, at):
    # the symbols of row r to out[at:]; up to 31 bytes behind them are changed, too
    offsets = raw.i32_at(head, rows + 1)
    first = np.int64(np.uint32(offsets[r]))
    count = np.int64(np.uint32(offsets[r + 1])) - first
    codes = raw.u16_at(head + 4 * (rows + 1) + 4 * rows + 2 * first, count)
    masks = raw.i32_at(masks_address(), 2 * ENTRIES)
    for i in range(count):
        entry = 2 * np.int64(codes[i])
        ones, twos = np.uint32(masks[entry]), np.uint32(masks[entry + 1])
        store_i8x32(out, at, bits_i8(ones, twos))
        at += 2 * np.int64(ones >> np.uint32(28))


@inlined
def _level(head, rows, r, which):
    levels = raw.u16_at(head + 4 * (rows + 1), 2 * rows)
    return raw.f32_of(np.int64(levels[2 * r + which]) << 16)


@inlined
def _turned(flat, stride, at):
    # 32 columns of 8 rows, `stride` apart: vector g has columns 4 g .. 4 g + 3 of them all
    return transpose_i8x4(
        load_i8x32(flat, at),
        load_i8x32(flat, at + stride),
        load_i8x32(flat, at + stride * 2),
        load_i8x32(flat, at + stride * 3),
        load_i8x32(flat, at + stride * 4),
        load_i8x32(flat, at + stride * 5),
        load_i8x32(flat, at + stride * 6),
        load_i8x32(flat, at + stride * 7),
    )


@inlined
def _places(w, which):
    # what of the symbols w is `which`
    m = splat_i8(which)
    return (
        and_i8(w[0], m),
        and_i8(w[1], m),
        and_i8(w[2], m),
        and_i8(w[3], m),
        and_i8(w[4], m),
        and_i8(w[5], m),
        and_i8(w[6], m),
        and_i8(w[7], m),
    )


@inlined
def _put(plane, at, step, w):
    store_i8x32(plane, at, w[0])
    store_i8x32(plane, at + step, w[1])
    store_i8x32(plane, at + step * 2, w[2])
    store_i8x32(plane, at + step * 3, w[3])
    store_i8x32(plane, at + step * 4, w[4])
    store_i8x32(plane, at + step * 5, w[5])
    store_i8x32(plane, at + step * 6, w[6])
    store_i8x32(plane, at + step * 7, w[7])


@inlined
def _unpack(matrix, first, stop, flat, levels, lane):
    # rows first .. stop, at most 8, one after another, and their levels; without a row: level 0
    head, stride = raw.address(matrix.packed) + matrix.base, flat.size // 8
    levels[:, lane : lane + 8] = 0
    for i in range(min(stop - first, 8)):
        _expand(head, matrix.rows, first + i, flat, i * stride)
        levels[0, lane + i] = _level(head, matrix.rows, first + i, 0)
        levels[1, lane + i] = _level(head, matrix.rows, first + i, 1) * np.float32(0.5)


@inner
def _few(matrix, act, job, start, stop):
    # tokens one by one: faster than `_many` for one or two
    flat = np.zeros(8 * (act.blocks * 32 + 32), np.uint8)
    levels, stride = np.empty((2, 8), np.float32), act.blocks * 32 + 32
    for row in range(start, stop, 8):
        _unpack(matrix, row, stop, flat, levels, 0)
        for p in range(job.first, job.last):
            k = job.source[p] * act.blocks
            low, high = zero_f32(), zero_f32()
            for b in range(act.blocks):
                w, s = _turned(flat, stride, b * 32), splat_f32_at(act.scale, k + b)
                low = fma_f32(_dot(_places(w, np.int8(1)), act, k + b), s, low)
                high = fma_f32(_dot(_places(w, np.int8(2)), act, k + b), s, high)
            low, high = mul_f32(low, load_f32(levels[0], 0)), mul_f32(high, load_f32(levels[1], 0))
            store_f32(job.out, job.target[p] * job.width + row, add_f32(low, high))


@inner
def _many(matrix, act, job, start, stop):
    tokens, stride = job.last - job.first, act.blocks * 32 + 32
    size = act.blocks * _LANES
    low, high = np.empty(size * 32, np.uint8), np.empty(size * 32, np.uint8)
    flat, levels = np.zeros(8 * stride, np.uint8), np.empty((2, _LANES), np.float32)
    ones, upper = np.ones(size, np.float32), np.empty(tokens * _LANES, np.float32)
    order = np.arange(-job.first, tokens).astype(np.int32)  # of position p, at p: p - first
    second = Job(job.source, order, job.first, job.last, upper, _LANES)
    for row in range(start, stop, _LANES):
        lanes = _LANES if row + 8 < stop else 8
        for lane in range(0, lanes, 8):
            _unpack(matrix, row + lane, stop, flat, levels, lane)
            for b in range(act.blocks):
                w, to = _turned(flat, stride, b * 32), b * lanes * 32 + lane * 4
                _put(low, to, lanes * 4, _places(w, np.int8(1)))
                _put(high, to, lanes * 4, _places(w, np.int8(2)))
        if lanes == _LANES:
            _gemm(low, ones, levels[0], act, job, row)
            _gemm(high, ones, levels[1], act, second, 0)
        else:
            _gemm8(low, ones, levels[0], act, job, row)
            _gemm8(high, ones, levels[1], act, second, 0)
        for p in range(tokens):
            at, to = p * _LANES, job.target[job.first + p] * job.width + row
            for lane in range(0, lanes, 8):
                sums = add_f32(load_f32(job.out, to + lane), load_f32(upper, at + lane))
                store_f32(job.out, to + lane, sums)


@inner
def multiply(matrix, act, job, start, stop, follow):
    # `follow` is left to the processor: expanding takes longer than reading
    if job.last - job.first < MANY:
        _few(matrix, act, job, start, min(stop, matrix.rows))
    else:
        _many(matrix, act, job, start, min(stop, matrix.rows))


@inner
def row(matrix, r, out):
    head = raw.address(matrix.packed) + matrix.base
    flat = np.empty(matrix.cols + 32, np.uint8)
    _expand(head, matrix.rows, r, flat, 0)
    for c in range(matrix.cols):
        symbol = flat[c]
        out[c] = np.float32(0) if symbol == 0 else _level(head, matrix.rows, r, symbol - 1)


@kernel
def check_codes(offsets, codes, masks, pairs):
    """The first row whose codes are not `pairs` pairs of symbols, or -1."""
    for r in range(offsets.size - 1):
        found = np.int64(0)
        for i in range(offsets[r], offsets[r + 1]):
            found += np.int64(masks[codes[i], 0] >> np.uint32(28))
        if found != pairs:
            return r
    return -1
