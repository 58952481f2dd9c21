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

Multiplication looks codes up as table + 63 (0..126, unsigned) and takes activations as int8
blocks: dot = sum (table + 63) q - 63 sum q, exact in int32; acc += dot * (block_scale * x_scale) in
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
from moelite.simd import (
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
    splat4,
    splat_f32,
    splat_i8,
    splat_i32,
    store_f32,
    sub_i32,
    to_f32,
    zero_f32,
    zero_i32,
)

OFFSET = 63  # makes table entries unsigned
_CODES = TILE_ROWS * BLOCK // 2  # bytes of a tile and block


@inlined
def _decode(packed, at, table):
    # 128 bytes -> 8 vectors: vector g holds columns 4g..4g+3 of 8 rows, as table + 63
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


@inlined
def _dot(w, act, k):
    # 8 rows x 32 columns times block k of the activations
    q, x = act.q, k * 32
    s = sub_i32(zero_i32(), splat_i32(np.int32(OFFSET) * act.total[k]))
    s = dot_u7(s, w[0], splat4(q, x))
    s = dot_u7(s, w[1], splat4(q, x + 4))
    s = dot_u7(s, w[2], splat4(q, x + 8))
    s = dot_u7(s, w[3], splat4(q, x + 12))
    s = dot_u7(s, w[4], splat4(q, x + 16))
    s = dot_u7(s, w[5], splat4(q, x + 20))
    s = dot_u7(s, w[6], splat4(q, x + 24))
    return to_f32(dot_u7(s, w[7], splat4(q, x + 28)))


@inlined
def _one(packed, codes, scales, table, act, token):
    acc = zero_f32()
    for b in range(act.blocks):
        k = token * act.blocks + b
        scale = mul_f32(load_i8_as_f32(packed, scales + b * 8), splat_f32(act.scale[k]))
        acc = fma_f32(_dot(_decode(packed, codes + b * 128, table), act, k), scale, acc)
    return acc


@inlined
def _four(packed, codes, scales, table, act, tokens):
    a0, a1, a2, a3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    k0, k1, k2, k3 = tokens
    for b in range(act.blocks):
        w = _decode(packed, codes + b * 128, table)
        s = load_i8_as_f32(packed, scales + b * 8)
        a0 = fma_f32(_dot(w, act, k0 + b), mul_f32(s, splat_f32(act.scale[k0 + b])), a0)
        a1 = fma_f32(_dot(w, act, k1 + b), mul_f32(s, splat_f32(act.scale[k1 + b])), a1)
        a2 = fma_f32(_dot(w, act, k2 + b), mul_f32(s, splat_f32(act.scale[k2 + b])), a2)
        a3 = fma_f32(_dot(w, act, k3 + b), mul_f32(s, splat_f32(act.scale[k3 + b])), a3)
    return a0, a1, a2, a3


@inner
def multiply(matrix, act, job, start, stop):
    packed, base = matrix.packed, matrix.base
    tiles = (matrix.rows + 7) // 8
    nb = act.blocks
    scales_at = base + tiles * nb * 128
    rows_at = scales_at + tiles * nb * 8
    src, dst, out, width = job.source, job.target, job.out, job.width
    table = add_i8(load_table16(packed, rows_at + tiles * 32), splat_i8(np.int8(OFFSET)))
    for tile in range(start // 8, (stop + 7) // 8):
        codes = base + tile * nb * 128
        scales = scales_at + tile * nb * 8
        row_scale = load_f32(packed, rows_at + tile * 32)
        p = job.first
        while p + 4 <= job.last:
            at = (src[p] * nb, src[p + 1] * nb, src[p + 2] * nb, src[p + 3] * nb)
            a0, a1, a2, a3 = _four(packed, codes, scales, table, act, at)
            store_f32(out, dst[p] * width + tile * 8, mul_f32(a0, row_scale))
            store_f32(out, dst[p + 1] * width + tile * 8, mul_f32(a1, row_scale))
            store_f32(out, dst[p + 2] * width + tile * 8, mul_f32(a2, row_scale))
            store_f32(out, dst[p + 3] * width + tile * 8, mul_f32(a3, row_scale))
            p += 4
        while p < job.last:
            acc = _one(packed, codes, scales, table, act, src[p])
            store_f32(out, dst[p] * width + tile * 8, mul_f32(acc, row_scale))
            p += 1


@inner
def row(matrix, r, out):
    _, packed, base, rows, cols = matrix
    tiles, blocks = (rows + 7) // 8, (cols + 31) // 32
    tile, lane = r // 8, r % 8
    scales = base + tiles * blocks * 128
    row_scales = packed[scales + tiles * blocks * 8 :][: tiles * 32].view(np.float32)
    table = scales + tiles * blocks * 8 + tiles * 32
    for c in range(cols):
        block, group = tile * blocks + c // 32, c % 32 // 4
        pair = np.int64(packed[base + block * 128 + group // 2 * 32 + lane * 4 + c % 4])
        entry = np.int8(packed[table + (pair >> 4 if group % 2 else pair & 15)])
        scale = np.int8(packed[scales + block * 8 + lane])
        out[c] = np.float32(entry) * np.float32(scale) * row_scales[r]


class Int4:
    name = "int4"
    code = 3
    quantized_input = True
    multiply = staticmethod(multiply)
    row = staticmethod(row)

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
