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

from moelite.jit import inlined
from moelite.quant.base import F32, U8, Tiled, check_packed, check_weight
from moelite.quant.curvature import Curvature
from moelite.quant.int4_gptq import encode_rows
from moelite.quant.int4_pack import LAYOUT
from moelite.quant.nibbles import SMALL, Parts, make_products
from moelite.quant.nibbles_pack import read_blocks, read_scales, to_rows
from moelite.simd import add_i8, load_f32, load_i8_as_f32, load_table16, splat_i8


@inlined
def _table(packed, tile):
    return add_i8(load_table16(packed, tile + 32), splat_i8(np.int8(64)))


_PARTS = Parts(table=_table, scale=load_i8_as_f32, last=load_f32)
multiply, row = make_products("int4", LAYOUT, _PARTS, SMALL)


class Int4(Tiled):
    name = "int4"
    layout = LAYOUT
    planes = 1
    curved = True
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
        head = LAYOUT.heads(packed, cols)
        scales = read_scales(packed, LAYOUT, cols).view(np.int8).astype(np.float32)
        full = read_blocks(packed, LAYOUT, cols, head[:, 32:48].view(np.int8), scales)
        full *= head[:, :32].copy().view(np.float32)[:, None, :, None]
        return to_rows(full, rows, cols)


FORMAT = Int4()
