"""int4: 16-entry codebook, blocks of 32 columns, int8 block scale times float32 row scale.

    w ~= table[code] * block_scale * row_scale,  code in 0..15,  |block_scale| <= 127
    4.28 bits per weight at 2048 columns: 4 of codes, .25 of block scales, the rest the tile's head

The table's 16 int8 entries, |entry| <= 63, are stored with every tile; this file's own is fitted to
blocks of 32 normal deviates under a least-squares scale. It is not symmetric, so a block scale may
be negative: the table then reads mirrored.

Layout of a [O, I] matrix, O padded to 8 rows (tiles) and I to 32 columns (blocks): tiles one after
another, each
    head    row scales float32 [8], table int8 [16], 16 zero bytes
    then, for every 8 blocks (fewer at the end),
    scales  int8 [8 blocks, 8 rows]; of blocks that are not there, zero
    codes   [blocks, 4 pairs, 8 rows, 4 columns] bytes: 128 a block; low nibble: column group
            2 * pair, high: group 2 * pair + 1, a group being 4 columns

Multiplication looks codes up as table + 64 (1..127, unsigned) and takes activations as int8
blocks: dot = sum (table + 64) q - 64 sum q, exact in int32; acc += dot * (block_scale * x_scale) in
float32, blocks in order; the row scale multiplies the sum.
"""

from __future__ import annotations

import numpy as np

from moelite.jit import inlined, inner
from moelite.quant.base import (
    BLOCK,
    F32,
    GROUP,
    TILE_ROWS,
    U8,
    Tiled,
    check_packed,
    check_weight,
    pad,
)
from moelite.quant.curvature import Curvature
from moelite.quant.int4_gptq import encode_rows
from moelite.quant.int4_pack import HEAD, LAYOUT
from moelite.quant.tiles import MANY, ask, make_block, make_many
from moelite.simd import (
    Narrow,
    add_i8,
    dot_u7,
    fma_f32,
    load_f32,
    load_i8_as_f32,
    load_i8x32,
    load_table16,
    lookup_high,
    lookup_low,
    mul_f32,
    splat_f32_at,
    splat_i8,
    store_f32,
    store_i8x32,
    zero_f32,
)

_GROUP_BYTES = GROUP * (8 + 128)
OFFSET = 64  # makes table entries unsigned: 1..127


@inlined
def _decode(packed, at, table):
    # 128 bytes -> 8 vectors: vector g holds columns 4g..4g+3 of 8 rows, as table + 64
    v0, v1 = load_i8x32(packed, at), load_i8x32(packed, at + 32)
    v2, v3 = load_i8x32(packed, at + 64), load_i8x32(packed, at + 96)
    return (
        lookup_low(table, v0),
        lookup_high(table, v0),
        lookup_low(table, v1),
        lookup_high(table, v1),
        lookup_low(table, v2),
        lookup_high(table, v2),
        lookup_low(table, v3),
        lookup_high(table, v3),
    )


_dot = make_block(Narrow, dot_u7, 1, "int4.one")


@inlined
def _block(packed, scales, codes, table, act, k, acc):
    # acc + one block; scales, codes: where its bytes are; k: of the activations
    scale = mul_f32(load_i8_as_f32(packed, scales), splat_f32_at(act.scale, k))
    return fma_f32(_dot(_decode(packed, codes, table), act, k), scale, acc)


@inlined
def _one(packed, tile, table, act, token):
    # a tile, its bytes from packed[tile], times one token
    acc, k, at = zero_f32(), token * act.blocks, tile + HEAD
    for _ in range(act.blocks // GROUP):
        for b in range(GROUP):
            acc = _block(packed, at + b * 8, at + 64 + b * 128, table, act, k + b, acc)
        at, k = at + _GROUP_BYTES, k + GROUP
    for b in range(act.blocks % GROUP):
        acc = _block(packed, at + b * 8, at + 64 + b * 128, table, act, k + b, acc)
    return mul_f32(acc, load_f32(packed, tile))


@inlined
def _table(packed, tile):
    return add_i8(load_table16(packed, tile + 32), splat_i8(np.int8(OFFSET)))


@inner
def _unpack_tile(packed, tile, blocks, out, lanes):
    # a tile as lanes out.lane .. + 8 of groups of `lanes` rows: table entries + 64, and scales
    table = _table(packed, tile)
    codes, scales, last, lane = out
    for b in range(blocks):
        group = tile + HEAD + b // GROUP * _GROUP_BYTES
        w = _decode(packed, group + 64 + b % GROUP * 128, table)
        at, step = b * lanes * 32 + lane * 4, lanes * 4
        store_i8x32(codes, at, w[0])
        store_i8x32(codes, at + step, w[1])
        store_i8x32(codes, at + step * 2, w[2])
        store_i8x32(codes, at + step * 3, w[3])
        store_i8x32(codes, at + step * 4, w[4])
        store_i8x32(codes, at + step * 5, w[5])
        store_i8x32(codes, at + step * 6, w[6])
        store_i8x32(codes, at + step * 7, w[7])
        store_f32(scales, b * lanes + lane, load_i8_as_f32(packed, group + b % GROUP * 8))
    store_f32(last, lane, load_f32(packed, tile))


_many = make_many(_unpack_tile, make_block, (dot_u7, 1), "int4")


@inner
def multiply(matrix, act, job, start, stop, follow):
    first, last, packed = start // 8, (stop + 7) // 8, matrix.packed
    if job.last - job.first >= MANY:
        _many(matrix, act, job, first, last)
        return
    for tile in range(first, last):
        at = matrix.base + tile * matrix.tile_bytes
        if tile == last - 1:
            ask(matrix, last, follow)
        table = _table(packed, at)
        for p in range(job.first, job.last):
            acc = _one(packed, at, table, act, job.source[p])
            store_f32(job.out, job.target[p] * job.width + tile * 8, acc)


@inner
def row(matrix, r, out):
    packed, lane = matrix.packed, r % 8
    tile = matrix.base + r // 8 * matrix.tile_bytes
    row_scales = np.empty(8, np.float32)
    store_f32(row_scales, 0, load_f32(packed, tile))
    for c in range(matrix.cols):
        b, pair = c // 32, c % 32 // 8
        group = tile + HEAD + b // GROUP * _GROUP_BYTES
        byte = np.int64(packed[group + 64 + b % GROUP * 128 + pair * 32 + lane * 4 + c % 4])
        entry = np.int8(packed[tile + 32 + (byte >> 4 if c % 8 >= 4 else byte & 15)])
        scale = np.int8(packed[group + b % GROUP * 8 + lane])
        out[c] = np.float32(entry) * np.float32(scale) * row_scales[lane]


class Int4(Tiled):
    name = "int4"
    layout = LAYOUT
    planes = 1
    multiply = staticmethod(multiply)
    row = staticmethod(row)

    def pack_rows(
        self,
        packed: U8,
        rows: int,
        cols: int,
        start: int,
        weight: F32,
        curve: Curvature | None = None,
    ) -> None:
        encode_rows(packed, cols, start, check_weight(self.name, weight), curve)

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        packed = check_packed(self, packed, rows, cols)
        head, blocks = LAYOUT.heads(packed, cols), pad(cols, BLOCK) // BLOCK
        tiles, row_scales = len(head), head[:, :32].copy().view(np.float32)
        table = head[:, 32:48].view(np.int8)
        full = np.empty((tiles, blocks, TILE_ROWS, BLOCK), np.float32)
        for at, scales, codes in LAYOUT.groups(packed, cols):
            found = codes.reshape(tiles, -1, 4, TILE_ROWS, 4)
            both = np.stack([found & 15, found >> 4], axis=-1)  # [tile, block, pair, row, col, 2]
            index = both.transpose(0, 1, 3, 2, 5, 4).reshape(tiles, -1)
            entries = np.take_along_axis(table, index.astype(np.int64), 1).astype(np.float32)
            scale = scales.view(np.int8).astype(np.float32)[..., None]
            full[:, at] = entries.reshape(tiles, -1, TILE_ROWS, BLOCK) * scale
        full *= row_scales[:, None, :, None]
        return full.transpose(0, 2, 1, 3).reshape(tiles * TILE_ROWS, -1)[:rows, :cols].copy()


FORMAT = Int4()
