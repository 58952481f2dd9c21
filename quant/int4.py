"""int4: 16-entry codebook, blocks of 32 columns, int8 block scale times float32 row scale.

    w ~= table[code] * block_scale * row_scale,  code in 0..15,  |block_scale| <= 127
    4.25 bits per weight, plus 4 bytes a row and 16 a matrix (4.27 at 2048 columns)

The table's 16 int8 entries, |entry| <= 63, are stored with the matrix; this file's own is fitted to
blocks of 32 normal deviates under a least-squares scale. It is not symmetric, so a block scale may
be negative: the table then reads mirrored.

Layout of a [O, I] matrix, O padded to 8 rows (tiles) and I to 32 columns (blocks):
    codes         [tiles, blocks, 4 pairs, 8 rows, 4 columns] bytes: 128 a tile and block; low
                  nibble: column group 2 * pair, high: group 2 * pair + 1, a group being 4 columns
    block scales  int8 [tiles, blocks, 8 rows]
    row scales    float32 [tiles * 8]
    table         int8 [16]

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
    TILE_ROWS,
    U8,
    check_packed,
    check_weight,
    pack_whole,
    pad,
)
from moelite.quant.int4_pack import encode_rows, views
from moelite.quant.tiles import MANY, make_block, make_many
from moelite.raw import address, prefetch_at
from moelite.simd import (
    Narrow,
    add_i8,
    dot_u7,
    fma_f32,
    high_nibbles,
    load_f32,
    load_i8_as_f32,
    load_i8x32,
    load_table16,
    lookup16,
    low_nibbles,
    mul_f32,
    splat_f32_at,
    splat_i8,
    store_f32,
    store_i8x32,
    zero_f32,
)

AHEAD = 8192  # bytes; 2 to 8 KiB measured alike, 8 KiB best where memory is quiet
OFFSET = 64  # makes table entries unsigned: 1..127
_CODES = TILE_ROWS * BLOCK // 2  # bytes of a tile and block


@inlined
def _decode(packed, at, table):
    # 128 bytes -> 8 vectors: vector g holds columns 4g..4g+3 of 8 rows, as table + 64
    v0, v1 = load_i8x32(packed, at), load_i8x32(packed, at + 32)
    v2, v3 = load_i8x32(packed, at + 64), load_i8x32(packed, at + 96)
    return (
        lookup16(table, low_nibbles(v0)),
        lookup16(table, high_nibbles(v0)),
        lookup16(table, low_nibbles(v1)),
        lookup16(table, high_nibbles(v1)),
        lookup16(table, low_nibbles(v2)),
        lookup16(table, high_nibbles(v2)),
        lookup16(table, low_nibbles(v3)),
        lookup16(table, high_nibbles(v3)),
    )


_dot = make_block(Narrow, dot_u7, 1, "int4.one")


@inlined
def _one(packed, codes, scales, table, act, token, ahead):
    # ahead: addresses to prefetch from, before and from block `turn` on
    acc = zero_f32()
    near, far, turn = ahead
    for b in range(act.blocks):
        where = (near if b < turn else far) + b * 128
        prefetch_at(where)
        prefetch_at(where + 64)
        k = token * act.blocks + b
        scale = mul_f32(load_i8_as_f32(packed, scales + b * 8), splat_f32_at(act.scale, k))
        acc = fma_f32(_dot(_decode(packed, codes + b * 128, table), act, k), scale, acc)
    return acc


@inlined
def _places(matrix, blocks):
    # byte offsets of codes, block scales, row scales and table
    tiles = (matrix.rows + 7) // 8
    scales = matrix.base + tiles * blocks * 128
    rows = scales + tiles * blocks * 8
    return matrix.base, scales, rows, rows + tiles * 32


@inlined
def _table(packed, at):
    return add_i8(load_table16(packed, at), splat_i8(np.int8(OFFSET)))


@inner
def _unpack_tile(matrix, tile, blocks, out, lanes):
    # one tile as lanes out.lane .. + 8 of groups of `lanes` rows: table entries + 64, and scales
    packed = matrix.packed
    codes_at, scales_at, rows_at, table_at = _places(matrix, blocks)
    table = _table(packed, table_at)
    codes, scales, last, lane = out
    for b in range(blocks):
        w = _decode(packed, codes_at + (tile * blocks + b) * 128, table)
        at, step = b * lanes * 32 + lane * 4, lanes * 4
        store_i8x32(codes, at, w[0])
        store_i8x32(codes, at + step, w[1])
        store_i8x32(codes, at + step * 2, w[2])
        store_i8x32(codes, at + step * 3, w[3])
        store_i8x32(codes, at + step * 4, w[4])
        store_i8x32(codes, at + step * 5, w[5])
        store_i8x32(codes, at + step * 6, w[6])
        store_i8x32(codes, at + step * 7, w[7])
        scale = load_i8_as_f32(packed, scales_at + (tile * blocks + b) * 8)
        store_f32(scales, b * lanes + lane, scale)
    store_f32(last, lane, load_f32(packed, rows_at + tile * 32))


_many = make_many(_unpack_tile, make_block, (dot_u7, 1), "int4")


@inner
def multiply(matrix, act, job, start, stop, follow):
    first, last, nb = start // 8, (stop + 7) // 8, act.blocks
    if job.last - job.first >= MANY:
        _many(matrix, act, job, first, last)
        return
    packed = matrix.packed
    codes_at, scales_at, rows_at, table_at = _places(matrix, nb)
    table = _table(packed, table_at)
    start_at = address(packed)
    for tile in range(first, last):
        codes, scales = codes_at + tile * nb * 128, scales_at + tile * nb * 8
        row_scale = load_f32(packed, rows_at + tile * 32)
        turn = max((last - first) * nb - AHEAD // 128, 0) - (tile - first) * nb
        ahead = start_at + codes + AHEAD, follow - turn * 128, turn
        for p in range(job.first, job.last):
            acc = _one(packed, codes, scales, table, act, job.source[p], ahead)
            store_f32(job.out, job.target[p] * job.width + tile * 8, mul_f32(acc, row_scale))


@inner
def row(matrix, r, out):
    packed, blocks = matrix.packed, (matrix.cols + 31) // 32
    first, lane = r // 8 * blocks, r % 8
    codes_at, scales_at, rows_at, table_at = _places(matrix, blocks)
    row_scales = np.empty(8, np.float32)
    store_f32(row_scales, 0, load_f32(packed, rows_at + r // 8 * 32))
    for c in range(matrix.cols):
        block, group = first + c // 32, c % 32 // 4
        pair = np.int64(packed[codes_at + block * 128 + group // 2 * 32 + lane * 4 + c % 4])
        entry = np.int8(packed[table_at + (pair >> 4 if group % 2 else pair & 15)])
        scale = np.int8(packed[scales_at + block * 8 + lane])
        out[c] = np.float32(entry) * np.float32(scale) * row_scales[lane]


class Int4:
    name = "int4"
    planes = 1
    multiply = staticmethod(multiply)
    row = staticmethod(row)

    def tile_bytes(self, cols: int) -> int:
        return pad(cols, BLOCK) // BLOCK * _CODES

    def nbytes(self, rows: int, cols: int) -> int:
        tiles, blocks = pad(rows, TILE_ROWS) // TILE_ROWS, pad(cols, BLOCK) // BLOCK
        return tiles * blocks * (_CODES + TILE_ROWS) + tiles * TILE_ROWS * 4 + 16

    def pack(self, weight: F32) -> U8:
        return pack_whole(self, check_weight(self.name, weight))

    def pack_rows(self, packed: U8, rows: int, cols: int, start: int, weight: F32) -> None:
        encode_rows(packed, rows, cols, start, check_weight(self.name, weight))

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        packed = check_packed(self, packed, rows, cols)
        codes_at, scales_at, row_scales, table = views(packed, rows, cols)
        tiles, blocks = codes_at.shape[:2]
        codes = np.stack(
            [codes_at & 15, codes_at >> 4], axis=-1
        )  # [tile, block, pair, row, col, 2]
        codes = codes.transpose(0, 3, 1, 2, 5, 4).reshape(tiles * TILE_ROWS, blocks, BLOCK)
        scale = scales_at.transpose(0, 2, 1).reshape(tiles * TILE_ROWS, blocks, 1)
        full = table[codes].astype(np.float32) * scale.astype(np.float32)
        full = full.reshape(tiles * TILE_ROWS, -1) * row_scales[:, None]
        return full[:rows, :cols].copy()


FORMAT = Int4()
