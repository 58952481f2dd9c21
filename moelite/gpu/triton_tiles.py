"""Triton: products with, and unpacking of, the formats whose matrices are tiles of 8 rows.

A program takes TILES tiles and goes through their columns, CHUNK blocks of 32 at a time; every
lane has a sum of its own and they are added at the end, so loads are whole runs of bytes and no
program waits for another. Sizes are ordinary arguments: a kernel is compiled once for a format.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moelite.gpu.triton_decode import (
    INT4,
    INT4_F16,
    VQ,
    block_scale,
    row_scale,
    values,
)

SIZES = ["base", "rows", "cols", "tile_bytes", "x_step", "out_step"]


@triton.jit(do_not_specialize=SIZES)
def gemv_tiles(
    x,
    packed,
    base,
    bases,
    out,
    target,
    rows,
    cols,
    tile_bytes,
    x_step,
    out_step,
    table,
    second,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    SCALES: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # x [P, cols] f32 (x_step 0: one row for all), the matrix of position p at packed[bases[p]], or
    # at packed[base] -> out[target[p]]; second: vq's second table, nf4-dq's map of absmax
    p = tl.program_id(1).to(tl.int64)
    begin, to = p * 0 + base, p
    if bases is not None:
        begin = tl.load(bases + p)
        if begin < 0:
            return
    if target is not None:
        to = tl.load(target + p).to(tl.int64)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)[None, None, :]
    row, unit = tl.arange(0, 8)[:, None, None], tl.arange(0, CHUNK * 32 // UNIT)[None, :, None]
    held = tile * 8 < rows
    # spelt so that the compiler sees what loads of 16 bytes need
    at = packed + begin // 16 * 16 + tile.to(tl.int64) * (tile_bytes // 16) * 16
    acc = tl.zeros([8, CHUNK * 32 // UNIT, TILES], tl.float32)
    # x is loaded in one dimension: in three, each thread would load it once for each of its rows
    xs, along = x + p * x_step, tl.arange(0, CHUNK * 32 // UNIT) * UNIT
    for first in range(0, tl.cdiv(cols, 32), CHUNK):
        block = first + unit // (32 // UNIT)
        there = held & (block * 32 < cols)
        lanes = first, unit, row
        found = values(at, lanes, there, table, second, KIND, HEAD, SCALES, D0, D1)
        part = tl.zeros([8, CHUNK * 32 // UNIT, TILES], tl.float32)
        for j in tl.static_range(UNIT):
            column = first * 32 + along + j
            value = tl.load(xs + column, mask=column < cols, other=0.0)
            part += found[j] * value[None, :, None]
        if KIND != VQ:
            part *= block_scale(at, block, row, there, held, cols // 64, second, KIND, HEAD, SCALES)
        acc += part
    total = tl.sum(acc, axis=1)[:, None, :]
    if KIND == INT4 or KIND == INT4_F16 or KIND == VQ:
        total *= row_scale(at, row, held, KIND)
    index = tile * 8 + row
    tl.store(out + to * out_step + index, total, mask=index < rows)


@triton.jit
def join4(a, b, c, d):
    """Four tensors -> one with a last dimension of 4."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit(do_not_specialize=["base", "rows", "cols", "tile_bytes"])
def unpack_tiles(
    packed,
    base,
    out,
    rows,
    cols,
    tile_bytes,
    table,
    second,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    SCALES: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # the matrix at packed[base] -> out f32 [rows, cols]: entry * scale, then * row scale
    tile, first = tl.program_id(0) + tl.arange(0, 1)[None, None, :], tl.program_id(1) * CHUNK
    row, unit = tl.arange(0, 8)[:, None, None], tl.arange(0, CHUNK * 32 // UNIT)[None, :, None]
    begin = (tl.program_id(0).to(tl.int64) * 0 + base) // 16 * 16
    at = packed + begin + tile.to(tl.int64) * (tile_bytes // 16) * 16
    column, block = first * 32 + unit * UNIT, first + unit // (32 // UNIT)
    held = tile * 8 < rows
    there = held & (block * 32 < cols)
    found = values(at, (first, unit, row), there, table, second, KIND, HEAD, SCALES, D0, D1)
    both = join4(found[0], found[1], found[2], found[3])
    full = tl.reshape(both, [8, CHUNK * 32 // UNIT, 1, 4])
    if UNIT == 8:
        rest = tl.reshape(join4(found[4], found[5], found[6], found[7]), full.shape)
        # [.., 4, low or high] -> [.., low or high, 4]
        full = tl.permute(tl.join(full, rest), (0, 1, 2, 4, 3))
        full = tl.reshape(full, [8, CHUNK * 32 // UNIT, 1, 8])
    if KIND != VQ:
        scale = block_scale(at, block, row, there, held, cols // 64, second, KIND, HEAD, SCALES)
        full *= scale[:, :, :, None]
    if KIND == INT4 or KIND == INT4_F16 or KIND == VQ:
        full *= row_scale(at, row, held, KIND)[:, :, :, None]
    index = (tile * 8 + row).to(tl.int64)
    col = column[:, :, :, None] + tl.arange(0, UNIT)[None, None, None, :]
    mask = (index < rows)[:, :, :, None] & (col < cols)
    tl.store(out + index[:, :, :, None] * cols + col, full, mask=mask)
