"""int8: signed bytes, blocks of 32 columns, one fp16 scale a block. 8.5 bits per weight.

    w ~= code * scale,  code in [-127, 127],  scale = fp16(max |w| of the block / 127)
    |error| <= scale / 2 (+ 2^-11 of |w| where rounding the scale to fp16 clips the largest code)

Layout of a [O, I] matrix, O padded to 8 rows (tiles) and I to 32 columns (blocks), zero filled:
    codes   int8 [tiles, blocks, 8 groups, 8 rows, 4 columns]: 256 bytes a tile and block; a 32-byte
            vector holds 4 neighbouring columns of 8 rows, one 32-bit lane each
    scales  fp16 [tiles, blocks, 8 rows]

Multiplication takes activations as int8 blocks: an exact int32 dot product a block, then
acc += dot * (w_scale * x_scale) in float32, blocks in order.
"""

from __future__ import annotations

import numpy as np

from moelite.errors import QuantizationError
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
from moelite.simd import (
    dot_i8,
    fma_f32,
    load_f16,
    load_i8x32,
    mul_f32,
    splat4,
    splat_f32,
    store_f32,
    to_f32,
    zero_f32,
    zero_i32,
)

_CODES, _SCALES = TILE_ROWS * BLOCK, TILE_ROWS * 2  # bytes of a tile and block


@inlined
def _dot(packed, at, q, x):
    # 8 rows x 32 columns at byte `at` times 32 activations at q[x:]
    s = dot_i8(zero_i32(), load_i8x32(packed, at), splat4(q, x))
    s = dot_i8(s, load_i8x32(packed, at + 32), splat4(q, x + 4))
    s = dot_i8(s, load_i8x32(packed, at + 64), splat4(q, x + 8))
    s = dot_i8(s, load_i8x32(packed, at + 96), splat4(q, x + 12))
    s = dot_i8(s, load_i8x32(packed, at + 128), splat4(q, x + 16))
    s = dot_i8(s, load_i8x32(packed, at + 160), splat4(q, x + 20))
    s = dot_i8(s, load_i8x32(packed, at + 192), splat4(q, x + 24))
    s = dot_i8(s, load_i8x32(packed, at + 224), splat4(q, x + 28))
    return to_f32(s)


@inlined
def _one(packed, codes, scales, act, token):
    acc = zero_f32()
    for b in range(act.blocks):
        k = token * act.blocks + b
        scale = mul_f32(load_f16(packed, scales + b * 16), splat_f32(act.scale[k]))
        acc = fma_f32(_dot(packed, codes + b * 256, act.q, k * 32), scale, acc)
    return acc


@inlined
def _four(packed, codes, scales, act, tokens):
    a0, a1, a2, a3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
    k0, k1, k2, k3 = tokens
    for b in range(act.blocks):
        at = codes + b * 256
        w = load_f16(packed, scales + b * 16)
        s0 = mul_f32(w, splat_f32(act.scale[k0 + b]))
        a0 = fma_f32(_dot(packed, at, act.q, (k0 + b) * 32), s0, a0)
        s1 = mul_f32(w, splat_f32(act.scale[k1 + b]))
        a1 = fma_f32(_dot(packed, at, act.q, (k1 + b) * 32), s1, a1)
        s2 = mul_f32(w, splat_f32(act.scale[k2 + b]))
        a2 = fma_f32(_dot(packed, at, act.q, (k2 + b) * 32), s2, a2)
        s3 = mul_f32(w, splat_f32(act.scale[k3 + b]))
        a3 = fma_f32(_dot(packed, at, act.q, (k3 + b) * 32), s3, a3)
    return a0, a1, a2, a3


@inner
def multiply(matrix, act, job, start, stop):
    packed, base = matrix.packed, matrix.base
    tiles = (matrix.rows + 7) // 8
    nb = act.blocks
    src, dst, out, width = job.source, job.target, job.out, job.width
    for tile in range(start // 8, (stop + 7) // 8):
        codes = base + tile * nb * 256
        scales = base + tiles * nb * 256 + tile * nb * 16
        p = job.first
        while p + 4 <= job.last:
            at = (src[p] * nb, src[p + 1] * nb, src[p + 2] * nb, src[p + 3] * nb)
            a0, a1, a2, a3 = _four(packed, codes, scales, act, at)
            store_f32(out, dst[p] * width + tile * 8, a0)
            store_f32(out, dst[p + 1] * width + tile * 8, a1)
            store_f32(out, dst[p + 2] * width + tile * 8, a2)
            store_f32(out, dst[p + 3] * width + tile * 8, a3)
            p += 4
        while p < job.last:
            store_f32(out, dst[p] * width + tile * 8, _one(packed, codes, scales, act, src[p]))
            p += 1


@inner
def row(matrix, r, out):
    _, packed, base, rows, cols = matrix
    blocks = (cols + 31) // 32
    tile, lane = r // 8, r % 8
    scales = packed[base + (rows + 7) // 8 * blocks * 256 :].view(np.uint16)
    for c in range(cols):
        block = tile * blocks + c // 32
        code = np.int8(packed[base + block * 256 + (c % 32) // 4 * 32 + lane * 4 + c % 4])
        out[c] = np.float32(code) * half(scales[block * 8 + lane])


@inner
def half(bits):
    """The float32 value of an fp16's bits."""
    size = np.float32(bits & 0x3FF)
    exponent = (bits >> 10) & 31
    if exponent:
        size = (size + np.float32(1024)) * np.float32(2.0) ** np.float32(exponent - 25)
    else:
        size = size * np.float32(2.0**-24)
    return -size if bits & 0x8000 else size


class Int8:
    name = "int8"
    code = 2
    quantized_input = True
    multiply = staticmethod(multiply)
    row = staticmethod(row)

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
