"""int4-f16: 16-entry codebook, blocks of 32 columns, fp16 block scale times a power of two.

    w = table[code] * block_scale * row_scale,  code in 0..15,  4.53 bits per weight at 2048 columns

A carrier for 4-bit numbers that were chosen elsewhere: Q4_0 and IQ4_NL of ggml, and int4 of groups
of 32 under fp16 or bf16 scales fit exactly, with their own table (`from_codes`). Packing a matrix
without calibration searches as int4 does, and stores its table: the error is int4's, less what
int8 block scales cost.

Layout as int4's, tiles of 8 rows, each
    head    row scales float32 [8], powers of two; table int8 [16], any but -128; 16 zero bytes
    then, for every 8 blocks (fewer at the end),
    scales  fp16 [8 blocks, 8 rows]; of blocks that are not there, zero
    codes   128 bytes a block, see nibbles_pack.py
"""

from __future__ import annotations

import numpy as np

from moelite.errors import QuantizationError
from moelite.jit import inlined
from moelite.quant.base import BLOCK, F32, TILE_ROWS, U8, TileLayout, check_packed
from moelite.quant.codes import Coded
from moelite.quant.int4_pack import TABLE
from moelite.quant.nibbles import FULL, Parts, make_products
from moelite.quant.nibbles_pack import (
    CODE_BYTES,
    Carrier,
    nearest,
    read_blocks,
    read_scales,
    search,
    to_rows,
    write_blocks,
)
from moelite.simd import add_i8, load_f16, load_f32, load_table16, splat_i8

LAYOUT = TileLayout(head=64, scale_bytes=TILE_ROWS * 2, code_bytes=CODE_BYTES)
_SHIFT = np.int8(-128) if FULL[1] else np.int8(0)  # 128 more, to be unsigned


@inlined
def _table(packed, tile):
    return add_i8(load_table16(packed, tile + 32), splat_i8(_SHIFT))


_PARTS = Parts(table=_table, scale=load_f16, last=load_f32)
multiply, row = make_products("int4_f16", LAYOUT, _PARTS, FULL)


def _row_scales(scales: F32) -> F32:
    """Powers of two [n, 1] by which rows of scales [n, blocks] are divided to become fp16.

    1 where that is exact; otherwise what brings the largest to 2^14, an octave below fp16's last:
    there, rounding can end at infinity.
    """
    largest = np.abs(scales).max(axis=1, keepdims=True, initial=0)
    halves = np.clip(scales, -65504, 65504).astype(np.float16)
    exact = (halves.astype(np.float32) == scales).all(axis=1, keepdims=True)
    power = np.exp2(np.maximum(np.frexp(largest)[1] - 15, -126).astype(np.float32))
    return np.where(exact, np.float32(1), power)


class Int4F16(Carrier):
    name = "int4-f16"
    layout = LAYOUT
    planes = 1
    multiply = staticmethod(multiply)
    row = staticmethod(row)

    @staticmethod
    def choose(weight: F32) -> Coded:
        blocks = weight.reshape(len(weight), -1, BLOCK)
        scales = search(blocks, TABLE)
        by = _row_scales(scales)
        scales = (scales / by).astype(np.float16).astype(np.float32) * by
        step = scales[..., None]
        unit = np.divide(blocks, step, out=np.zeros_like(blocks), where=step != 0)
        return Coded(TABLE, nearest(unit, TABLE).reshape(weight.shape), scales)

    @staticmethod
    def put(tiles: U8, cols: int, coded: Coded) -> None:
        by = _row_scales(coded.scales)
        halves = (coded.scales / by).astype(np.float16)
        if bad := int(np.count_nonzero(halves.astype(np.float32) * by != coded.scales)):
            raise QuantizationError(
                f"{bad} of {coded.scales.size} scales are not fp16 numbers times a power of two "
                "of their row",
                fix="choose another format, such as int8",
            )
        head = LAYOUT.heads(tiles, cols)
        head[:, :32] = by.reshape(-1, TILE_ROWS).view(np.uint8)
        head[:, 32:48] = coded.table.view(np.uint8)
        write_blocks(tiles, LAYOUT, cols, coded.codes, halves)

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        packed = check_packed(self, packed, rows, cols)
        head = LAYOUT.heads(packed, cols)
        scales = read_scales(packed, LAYOUT, cols).view(np.float16).astype(np.float32)
        full = read_blocks(packed, LAYOUT, cols, head[:, 32:48].view(np.int8), scales)
        full *= head[:, :32].copy().view(np.float32)[:, None, :, None]
        return to_rows(full, rows, cols)


FORMAT = Int4F16()
