"""int8: signed bytes, blocks of 32 columns, one fp16 scale a block. 8.5 bits per weight.

    w ~= code * scale,  code in [-127, 127],  scale = fp16(max |w| of the block / 127)
    |error| <= scale / 2 (+ 2^-11 of |w| where rounding the scale to fp16 clips the largest code)

Layout of a [O, I] matrix, O padded to 8 rows (tiles) and I to 32 columns (blocks), zero filled:
    codes   int8 [tiles, blocks, 8 groups, 8 rows, 4 columns]: 256 bytes a tile and block; a 32-byte
            vector holds 4 neighbouring columns of 8 rows, one 32-bit lane each
    scales  fp16 [tiles, blocks, 8 rows]

Multiplication takes activations as two int8 planes, 16 bits in all: one plane would be most of the
error (KL divergence on smollm2-moe .0034, with two .0009). Two exact int32 dot products a
block, dot = whole + rest / 254, then acc += dot * (w_scale * x_scale) in float32, blocks in order.
"""

from __future__ import annotations

import numpy as np

from moelite.errors import QuantizationError
from moelite.jit import TARGET, inlined, inner
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
from moelite.quant.tiles import MANY, make_fine_block, make_many
from moelite.raw import address, prefetch_at
from moelite.simd import (
    Narrow,
    add_i8,
    dot_i8,
    dot_u7,
    fma_f32,
    load_f16,
    load_i8x32,
    mul_f32,
    splat_f32,
    splat_f32_at,
    splat_i8,
    store_f32,
    store_i8x32,
    zero_f32,
)

AHEAD = 8192  # bytes; 2 to 8 KiB measured alike, 8 KiB best where memory is quiet
_CODES, _SCALES = TILE_ROWS * BLOCK, TILE_ROWS * 2  # bytes of a tile and block


_block = make_fine_block(Narrow, dot_i8, 0, "int8.one")


@inlined
def _load(packed, at):
    return (
        load_i8x32(packed, at),
        load_i8x32(packed, at + 32),
        load_i8x32(packed, at + 64),
        load_i8x32(packed, at + 96),
        load_i8x32(packed, at + 128),
        load_i8x32(packed, at + 160),
        load_i8x32(packed, at + 192),
        load_i8x32(packed, at + 224),
    )


@inlined
def _one(packed, codes, scales, act, token, ahead):
    # ahead: addresses to prefetch from, before and from block `turn` on
    acc = zero_f32()
    near, far, turn = ahead
    for b in range(act.blocks):
        where = (near if b < turn else far) + b * 256
        prefetch_at(where)
        prefetch_at(where + 64)
        prefetch_at(where + 128)
        prefetch_at(where + 192)
        k = token * act.blocks + b
        scale = mul_f32(load_f16(packed, scales + b * 16), splat_f32_at(act.scale, k))
        acc = fma_f32(_block(_load(packed, codes + b * 256), act, k), scale, acc)
    return acc


# vnni multiplies bytes up to 255: a code is then stored 128 too high. Elsewhere it stays signed.
_SHIFT = np.int8(-128) if TARGET == "vnni" else np.int8(0)


@inner
def _unpack_tile(matrix, tile, blocks, out, lanes):
    # one tile as lanes out.lane .. + 8 of groups of `lanes` rows: codes + _SHIFT, and scales
    packed = matrix.packed
    tiles = (matrix.rows + 7) // 8
    codes, scales, last, lane = out
    shift = splat_i8(_SHIFT)
    for b in range(blocks):
        at = matrix.base + (tile * blocks + b) * 256
        for g in range(8):
            w = add_i8(load_i8x32(packed, at + g * 32), shift)
            store_i8x32(codes, (b * 8 + g) * lanes * 4 + lane * 4, w)
        scale = load_f16(packed, matrix.base + tiles * blocks * 256 + (tile * blocks + b) * 16)
        store_f32(scales, b * lanes + lane, scale)
    store_f32(last, lane, splat_f32(np.float32(1)))


_WORDS = (dot_u7, 2) if TARGET == "vnni" else (dot_i8, 0)
_many = make_many(_unpack_tile, make_fine_block, _WORDS, "int8")


@inner
def multiply(matrix, act, job, start, stop, follow):
    first, last, nb = start // 8, (stop + 7) // 8, act.blocks
    if job.last - job.first >= MANY:
        _many(matrix, act, job, first, last)
        return
    tiles = (matrix.rows + 7) // 8
    for tile in range(first, last):
        codes = matrix.base + tile * nb * 256
        scales = matrix.base + tiles * nb * 256 + tile * nb * 16
        turn = max((last - first) * nb - AHEAD // 256, 0) - (tile - first) * nb
        ahead = address(matrix.packed) + codes + AHEAD, follow - turn * 256, turn
        for p in range(job.first, job.last):
            acc = _one(matrix.packed, codes, scales, act, job.source[p], ahead)
            store_f32(job.out, job.target[p] * job.width + tile * 8, acc)


@inner
def row(matrix, r, out):
    packed, blocks = matrix.packed, (matrix.cols + 31) // 32
    first, lane = r // 8 * blocks, r % 8
    scales_at = matrix.base + (matrix.rows + 7) // 8 * blocks * 256
    scales = np.empty(8, np.float32)
    for c in range(matrix.cols):
        block = first + c // 32
        if c % 32 == 0:
            store_f32(scales, 0, load_f16(packed, scales_at + block * 16))
        code = np.int8(packed[matrix.base + block * 256 + (c % 32) // 4 * 32 + lane * 4 + c % 4])
        out[c] = np.float32(code) * scales[lane]


class Int8:
    name = "int8"
    planes = 2
    multiply = staticmethod(multiply)
    row = staticmethod(row)

    def tile_bytes(self, cols: int) -> int:
        return pad(cols, BLOCK) // BLOCK * _CODES

    def nbytes(self, rows: int, cols: int) -> int:
        return pad(rows, TILE_ROWS) // TILE_ROWS * (pad(cols, BLOCK) // BLOCK) * (_CODES + _SCALES)

    def pack(self, weight: F32) -> U8:
        return pack_whole(self, check_weight(self.name, weight))

    def pack_rows(self, packed: U8, rows: int, cols: int, start: int, weight: F32) -> None:
        weight = check_weight(self.name, weight)
        n, blocks = pad(len(weight), TILE_ROWS), pad(cols, BLOCK) // BLOCK
        flat = np.zeros((n, blocks * BLOCK), np.float32)
        flat[: len(weight), :cols] = weight
        full = flat.reshape(n, blocks, BLOCK)
        largest = np.abs(full).max(axis=2)
        if largest.max(initial=0) > 127 * 65504:
            raise QuantizationError(f"a weight of size {largest.max():g} is beyond fp16's scales")
        scale = (largest / np.float32(127)).astype(np.float16)
        step = scale.astype(np.float32)[:, :, None]
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
        codes = np.clip(np.rint(full * inverse), -127, 127).astype(np.int8)
        codes_at, scales_at = self._views(packed, rows, cols)
        first, last = start // TILE_ROWS, (start + n) // TILE_ROWS
        split = codes.reshape(-1, TILE_ROWS, blocks, 8, 4)
        codes_at[first:last] = split.transpose(0, 2, 3, 1, 4)
        scales_at[first:last] = scale.reshape(-1, TILE_ROWS, blocks).transpose(0, 2, 1)

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        codes, scales = self._views(check_packed(self, packed, rows, cols), rows, cols)
        tiles, blocks = codes.shape[:2]
        weight = codes.transpose(0, 3, 1, 2, 4).reshape(tiles * TILE_ROWS, blocks, BLOCK)
        scale = scales.transpose(0, 2, 1).reshape(tiles * TILE_ROWS, blocks, 1)
        full = weight.astype(np.float32) * scale.astype(np.float32)
        return full.reshape(tiles * TILE_ROWS, -1)[:rows, :cols].copy()

    def _views(self, packed, rows, cols):
        tiles, blocks = pad(rows, TILE_ROWS) // TILE_ROWS, pad(cols, BLOCK) // BLOCK
        split = tiles * blocks * _CODES
        codes = packed[:split].view(np.int8).reshape(tiles, blocks, 8, TILE_ROWS, 4)
        return codes, packed[split:].view(np.float16).reshape(tiles, blocks, TILE_ROWS)


FORMAT = Int8()
