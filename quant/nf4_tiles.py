"""Products of nf4 tiles: codes through a table of 24 bits, under float32 scales of 64 columns.

One int8 table would be off by .4 % of the largest entry, two (16 bits) by 1.6e-5; three hold every
entry to 8e-8 of itself, half a float32's last bit. Three lookups and three exact int32 dot products
a block: dot = high + (middle + low / 254) / 254; acc += dot * (absmax * x_scale) in float32, blocks
in order; the sum is multiplied by STEP.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moelite.jit import inlined, inner
from moelite.quant.base import GROUP
from moelite.quant.nf4_pack import TABLE
from moelite.quant.nibbles import FULL, decode, store8
from moelite.quant.nibbles_pack import CODE_BYTES
from moelite.quant.tiles import MANY, ask, make_block, make_load, make_many
from moelite.simd import (
    Narrow,
    add_i8,
    fma_f32,
    load_f32,
    load_table16,
    mul_f32,
    splat_f32,
    splat_f32_at,
    splat_i8,
    store_f32,
    zero_f32,
)

RADIX = 254
# Entries are whole multiples of 1 / 8,089,892 to 8e-8 of themselves, the best number up to
# 127 * (254^2 + 254 + 1), the most that three signed bytes hold.
_UNITS = 8_089_892
STEP = np.float32(RADIX**2 / _UNITS)


def _planes() -> Any:
    # int8 [3 * 16]: high, middle, low, so that TABLE = (high + (middle + low / 254) / 254) * STEP
    whole = np.rint(TABLE.astype(np.float64) * _UNITS)
    high = np.rint(whole / RADIX**2)
    middle = np.rint((whole - high * RADIX**2) / RADIX)
    low = whole - high * RADIX**2 - middle * RADIX
    return np.concatenate([high, middle, low]).astype(np.int8)


PLANES = _planes()
_SHIFT = np.int8(-128) if FULL[1] else np.int8(0)
_PART = np.float32(1 / RADIX)


@inlined
def _tables():
    shift = splat_i8(_SHIFT)
    return (
        add_i8(load_table16(PLANES, 0), shift),
        add_i8(load_table16(PLANES, 16), shift),
        add_i8(load_table16(PLANES, 32), shift),
    )


def _make_block(words: Any, dot: Any, offset: int, name: str) -> Any:
    # w: the 8 vectors of each plane
    plane = make_block(words, dot, offset, name)
    fma, splat = words.fma, words.splat_f32

    def block(w, act, k):
        part = splat(_PART)
        rest = fma(plane(w[2], act, k), part, plane(w[1], act, k))
        return fma(rest, part, plane(w[0], act, k))

    return inlined(block, f"{name}.planes")


def _make_load3(words: Any, name: str) -> Any:
    load8, size = make_load(words, f"{name}.planes"), words.lanes * 32

    def load3(codes, at):
        at *= 3  # a block's planes lie one after another
        return load8(codes, at), load8(codes, at + size), load8(codes, at + size * 2)

    return inlined(load3, name)


def make_products(name: str, head_of: Any, scales_bytes: int, put_scales: Any) -> tuple[Any, Any]:
    """(multiply, row) of a format, see QuantFormat, whose groups keep `scales_bytes` of scales.

    head_of(blocks): bytes of a tile's head, inlined. put_scales(packed, tile, blocks, scales):
    njit, writes the absmax of a tile as float32 [blocks / 2, 8 rows].
    """
    one, unpack = (
        _make_one(name, scales_bytes),
        _make_unpack(name, head_of, scales_bytes, put_scales),
    )
    many = make_many(unpack, _make_block, FULL, name, (_make_load3, 3))

    def multiply(matrix, act, job, start, stop, follow):
        first, last, packed = start // 8, (stop + 7) // 8, matrix.packed
        if job.last - job.first >= MANY:
            many(matrix, act, job, first, last)
            return
        scales = np.empty(act.blocks * 4, np.float32)
        tables, head = _tables(), head_of(act.blocks)
        for tile in range(first, last):
            at = matrix.base + tile * matrix.tile_bytes
            if tile == last - 1:
                ask(matrix, last, follow)
            put_scales(packed, at, act.blocks, scales)
            for p in range(job.first, job.last):
                acc = one(packed, at + head, tables, scales, act, job.source[p])
                store_f32(job.out, job.target[p] * job.width + tile * 8, acc)

    return inner(multiply, name), _make_row(name, head_of, scales_bytes, put_scales)


def _make_one(name: str, scales_bytes: int) -> Any:
    plane = make_block(Narrow, *FULL, f"{name}.one")

    def dot(packed, at, tables, act, k):
        # as _make_block, one plane after another: there may be no more than 16 registers
        part = splat_f32(_PART)
        low = plane(decode(packed, at, tables[2]), act, k)
        rest = fma_f32(low, part, plane(decode(packed, at, tables[1]), act, k))
        return fma_f32(rest, part, plane(decode(packed, at, tables[0]), act, k))

    dot = inlined(dot, name)

    def pair(packed, at, tables, absmax, act, k, acc):
        # acc + two blocks that share an absmax
        scale = mul_f32(absmax, splat_f32_at(act.scale, k))
        acc = fma_f32(dot(packed, at, tables, act, k), scale, acc)
        scale = mul_f32(absmax, splat_f32_at(act.scale, k + 1))
        return fma_f32(dot(packed, at + CODE_BYTES, tables, act, k + 1), scale, acc)

    pair = inlined(pair, name)

    def one(packed, at, tables, scales, act, token):
        # a tile, its first group at packed[at], times one token
        acc, k = zero_f32(), token * act.blocks
        for b in range(0, act.blocks, 2):
            if b % GROUP == 0:
                at += scales_bytes
            acc = pair(packed, at, tables, load_f32(scales, b * 4), act, k + b, acc)
            at += 2 * CODE_BYTES
        return mul_f32(acc, splat_f32(STEP))

    return inlined(one, name)


def _make_unpack(name: str, head_of: Any, scales_bytes: int, put_scales: Any) -> Any:
    def unpack_tile(packed, tile, blocks, out, lanes):
        # see tiles.make_many; the planes of a block lie one after another
        codes, scales, last, lane = out
        tables, absmax = _tables(), np.empty(blocks * 4, np.float32)
        put_scales(packed, tile, blocks, absmax)
        at = tile + head_of(blocks)
        for b in range(blocks):
            if b % GROUP == 0:
                at += scales_bytes
            to, step = b * lanes * 96 + lane * 4, lanes * 4
            store8(codes, to, step, decode(packed, at, tables[0]))
            store8(codes, to + lanes * 32, step, decode(packed, at, tables[1]))
            store8(codes, to + lanes * 64, step, decode(packed, at, tables[2]))
            store_f32(scales, b * lanes + lane, load_f32(absmax, b // 2 * 8))
            at += CODE_BYTES
        store_f32(last, lane, splat_f32(STEP))

    return inner(unpack_tile, name)


def _make_row(name: str, head_of: Any, scales_bytes: int, put_scales: Any) -> Any:
    def row(matrix, r, out):
        packed, lane, blocks = matrix.packed, r % 8, matrix.cols // 32
        tile = matrix.base + r // 8 * matrix.tile_bytes
        absmax = np.empty(blocks * 4, np.float32)
        put_scales(packed, tile, blocks, absmax)
        for c in range(matrix.cols):
            b, pair = c // 32, c % 32 // 8
            at = tile + head_of(blocks) + (b // GROUP + 1) * scales_bytes + b * CODE_BYTES
            byte = np.int64(packed[at + pair * 32 + lane * 4 + c % 4])
            out[c] = TABLE[byte >> 4 if c % 8 >= 4 else byte & 15] * absmax[b // 2 * 8 + lane]

    return inner(row, name)
