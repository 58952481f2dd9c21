"""int8: signed bytes, blocks of 32 columns, one fp16 scale a block. 8.5 bits per weight.

    w ~= code * scale,  code in [-127, 127],  scale = fp16(max |w| of the block / 127)
    |error| <= scale / 2 (+ 2^-11 of |w| where rounding the scale to fp16 clips the largest code)

Layout of a [O, I] matrix, O padded to 8 rows (tiles) and I to 32 columns (blocks), zero filled:
tiles one after another, each, for every 8 blocks (fewer at the end),
    scales  fp16 [8 blocks, 8 rows]; of blocks that are not there, zero
    codes   int8 [blocks, 8 groups, 8 rows, 4 columns]: 256 bytes a block; a 32-byte vector holds 4
            neighbouring columns of 8 rows, one 32-bit lane each

Multiplication takes activations as two int8 planes, 16 bits in all: one plane would be most of the
error (KL divergence on smollm2-moe .0034, with two .0009). Two exact int32 dot products a
block, dot = whole + rest / 254, then acc += dot * (w_scale * x_scale) in float32, blocks in order.
"""

from __future__ import annotations

import numpy as np

from moelite.errors import QuantizationError
from moelite.jit import VNNI, inlined, inner
from moelite.quant.base import (
    BLOCK,
    F32,
    GROUP,
    TILE_ROWS,
    U8,
    Tiled,
    TileLayout,
    check_packed,
    check_weight,
    pad,
)
from moelite.quant.curvature import Curvature
from moelite.quant.tiles import MANY, ask, make_fine_block, make_many
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

LAYOUT = TileLayout(head=0, scale_bytes=TILE_ROWS * 2, code_bytes=TILE_ROWS * BLOCK)
_GROUP_BYTES = GROUP * (16 + 256)

# vnni multiplies unsigned bytes: codes are taken 128 too high, which turns their sign bit. Others
# take them as they are.
_SHIFT = np.int8(-128) if VNNI else np.int8(0)
_WORDS = (dot_u7, 2) if VNNI else (dot_i8, 0)
_dot = make_fine_block(Narrow, *_WORDS, "int8.one")


@inlined
def _load(packed, at):
    shift = splat_i8(_SHIFT)
    return (
        add_i8(load_i8x32(packed, at), shift),
        add_i8(load_i8x32(packed, at + 32), shift),
        add_i8(load_i8x32(packed, at + 64), shift),
        add_i8(load_i8x32(packed, at + 96), shift),
        add_i8(load_i8x32(packed, at + 128), shift),
        add_i8(load_i8x32(packed, at + 160), shift),
        add_i8(load_i8x32(packed, at + 192), shift),
        add_i8(load_i8x32(packed, at + 224), shift),
    )


@inlined
def _block(packed, scales, codes, act, k, acc):
    # acc + one block; scales, codes: where its bytes are; k: of the activations
    scale = mul_f32(load_f16(packed, scales), splat_f32_at(act.scale, k))
    return fma_f32(_dot(_load(packed, codes), act, k), scale, acc)


@inlined
def _one(packed, tile, act, token):
    # a tile, its bytes from packed[tile], times one token
    acc, k, at = zero_f32(), token * act.blocks, tile
    for _ in range(act.blocks // GROUP):
        for b in range(GROUP):
            acc = _block(packed, at + b * 16, at + 128 + b * 256, act, k + b, acc)
        at, k = at + _GROUP_BYTES, k + GROUP
    for b in range(act.blocks % GROUP):
        acc = _block(packed, at + b * 16, at + 128 + b * 256, act, k + b, acc)
    return acc


@inner
def _unpack_tile(packed, tile, blocks, out, lanes):
    # a tile as lanes out.lane .. + 8 of groups of `lanes` rows: codes + _SHIFT, and scales
    codes, scales, last, lane = out
    shift = splat_i8(_SHIFT)
    for b in range(blocks):
        group = tile + b // GROUP * _GROUP_BYTES
        at = group + 128 + b % GROUP * 256
        for g in range(8):
            w = add_i8(load_i8x32(packed, at + g * 32), shift)
            store_i8x32(codes, (b * 8 + g) * lanes * 4 + lane * 4, w)
        store_f32(scales, b * lanes + lane, load_f16(packed, group + b % GROUP * 16))
    store_f32(last, lane, splat_f32(np.float32(1)))


_many = make_many(_unpack_tile, make_fine_block, _WORDS, "int8")


@inner
def multiply(matrix, act, job, start, stop, follow):
    first, last = start // 8, (stop + 7) // 8
    if job.last - job.first >= MANY:
        _many(matrix, act, job, first, last)
        return
    for tile in range(first, last):
        at = matrix.base + tile * matrix.tile_bytes
        if tile == last - 1:
            ask(matrix, last, follow)
        for p in range(job.first, job.last):
            acc = _one(matrix.packed, at, act, job.source[p])
            store_f32(job.out, job.target[p] * job.width + tile * 8, acc)


@inner
def row(matrix, r, out):
    packed, lane = matrix.packed, r % 8
    tile = matrix.base + r // 8 * matrix.tile_bytes
    scales = np.empty(8, np.float32)
    for c in range(matrix.cols):
        b = c // 32
        group = tile + b // GROUP * _GROUP_BYTES
        if c % 32 == 0:
            store_f32(scales, 0, load_f16(packed, group + b % GROUP * 16))
        at = group + 128 + b % GROUP * 256 + (c % 32) // 4 * 32 + lane * 4 + c % 4
        out[c] = np.float32(np.int8(packed[at])) * scales[lane]


class Int8(Tiled):
    name = "int8"
    layout = LAYOUT
    planes = 2
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
        size, first = self.tile_bytes(cols), start // TILE_ROWS
        tiles = packed[first * size : (first + n // TILE_ROWS) * size]
        # [tile, row, block, group, column] -> [tile, block, group, row, column]
        split = codes.reshape(-1, TILE_ROWS, blocks, 8, 4).transpose(0, 2, 3, 1, 4)
        by_tile = scale.reshape(-1, TILE_ROWS, blocks).transpose(0, 2, 1)
        for at, scales_at, codes_at in LAYOUT.groups(tiles, cols):
            scales_at.view(np.float16)[...] = by_tile[:, at]
            codes_at.view(np.int8)[...] = split[:, at].reshape(codes_at.shape)

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        packed = check_packed(self, packed, rows, cols)
        tiles, blocks = pad(rows, TILE_ROWS) // TILE_ROWS, pad(cols, BLOCK) // BLOCK
        full = np.empty((tiles, blocks, TILE_ROWS, BLOCK), np.float32)
        for at, scales, codes in LAYOUT.groups(packed, cols):
            found = codes.view(np.int8).reshape(tiles, -1, 8, TILE_ROWS, 4)
            weight = found.transpose(0, 1, 3, 2, 4).reshape(tiles, -1, TILE_ROWS, BLOCK)
            full[:, at] = weight * scales.view(np.float16).astype(np.float32)[..., None]
        return full.transpose(0, 2, 1, 3).reshape(tiles * TILE_ROWS, -1)[:rows, :cols].copy()


FORMAT = Int8()
