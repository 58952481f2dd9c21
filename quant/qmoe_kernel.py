"""Multiplying from the codes of the qmoe formats, and expanding them.

8 rows, 16 where vectors are 512 bits wide, are expanded into bytes 0, 1, 2 and turned so that a
vector holds 4 neighbouring columns of all of them: as the product of int4 and int8 over many tokens
has it. It runs twice, over the places of the lower level and those of the upper one, whose bytes
are 2. Sums of a block are exact; then, in float32,
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
    load_f32,
    load_i8x32,
    splat_i8,
    store_f32,
    store_i8x32,
    transpose_i8x4,
)

_LANES = TILES * 8
_narrow = make_gemm(Narrow, make_block(Narrow, dot_u7, 0, "qmoe"), "qmoe")
_wide = _narrow
if WIDE:
    _wide = make_gemm(Wide, make_block(Wide, Wide.dot_u8, 0, "qmoe.wide"), "qmoe.wide")


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
def _put(plane, at, step, w, which):
    m = splat_i8(which)
    store_i8x32(plane, at, and_i8(w[0], m))
    store_i8x32(plane, at + step, and_i8(w[1], m))
    store_i8x32(plane, at + step * 2, and_i8(w[2], m))
    store_i8x32(plane, at + step * 3, and_i8(w[3], m))
    store_i8x32(plane, at + step * 4, and_i8(w[4], m))
    store_i8x32(plane, at + step * 5, and_i8(w[5], m))
    store_i8x32(plane, at + step * 6, and_i8(w[6], m))
    store_i8x32(plane, at + step * 7, and_i8(w[7], m))


@inner
def _turn(flat, stride, planes, lane, lanes):
    # 8 rows of symbols, `stride` apart, as lanes lane .. lane + 8 of both planes
    low, high, _ = planes
    for b in range(stride // 32 - 1):
        at = b * 32
        w = transpose_i8x4(
            load_i8x32(flat, at),
            load_i8x32(flat, at + stride),
            load_i8x32(flat, at + stride * 2),
            load_i8x32(flat, at + stride * 3),
            load_i8x32(flat, at + stride * 4),
            load_i8x32(flat, at + stride * 5),
            load_i8x32(flat, at + stride * 6),
            load_i8x32(flat, at + stride * 7),
        )
        to, step = b * lanes * 32 + lane * 4, lanes * 4
        _put(low, to, step, w, np.int8(1))
        _put(high, to, step, w, np.int8(2))


@inner
def _unpack(matrix, rows, lanes, planes, levels):
    # rows rows[0] .. rows[1] as both planes, and their levels; lanes without a row: level 0
    head, flat = raw.address(matrix.packed) + matrix.base, planes[2]
    stride = flat.size // 8
    levels[:] = 0
    for first in range(rows[0], rows[1], 8):
        lane = first - rows[0]
        for r in range(first, min(first + 8, rows[1])):
            _expand(head, matrix.rows, r, flat, (r - first) * stride)
            levels[0, r - rows[0]] = _level(head, matrix.rows, r, 0)
            levels[1, r - rows[0]] = _level(head, matrix.rows, r, 1) * np.float32(0.5)
        _turn(flat, stride, planes, lane, lanes)


@inner
def multiply(matrix, act, job, start, stop, follow):
    # `follow` is left to the processor: expanding takes longer than reading
    tokens, end = job.last - job.first, min(stop, matrix.rows)
    lanes = _LANES if tokens >= MANY else 8
    size = act.blocks * lanes
    planes = (
        np.empty(size * 32, np.uint8),
        np.empty(size * 32, np.uint8),
        np.zeros(8 * (act.blocks * 32 + 32), np.uint8),
    )
    ones, levels = np.ones(size, np.float32), np.empty((2, lanes), np.float32)
    upper = np.empty(tokens * lanes, np.float32)
    order = np.arange(-job.first, tokens).astype(np.int32)  # of position p, at p: p - first
    second = Job(job.source, order, job.first, job.last, upper, lanes)
    for row in range(start, end, lanes):
        if row + 8 >= end:
            lanes = 8
        _unpack(matrix, (row, min(row + lanes, end)), lanes, planes, levels)
        if lanes == 8:
            _narrow(planes[0], ones, levels[0], act, job, row)
            _narrow(planes[1], ones, levels[1], act, second, 0)
        else:
            _wide(planes[0], ones, levels[0], act, job, row)
            _wide(planes[1], ones, levels[1], act, second, 0)
        for p in range(tokens):
            to = job.target[job.first + p] * job.width + row
            for lane in range(0, lanes, 8):
                at = p * second.width + lane
                store_f32(
                    job.out, to + lane, add_f32(load_f32(job.out, to + lane), load_f32(upper, at))
                )


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
