"""vq-0.5 .. vq-3: vector quantization, a byte of code for every 4, 8 or 16 columns of each plane.

    w ~= (first table[code] + second table[code]) * row_scale,  |sum of entries| <= 63
    bits per weight: what the name says, and 16 for each row (.03 at 576 columns)

The tables hold whole numbers and are the same for every matrix (quant/vq_tables.py): a row scale
brings them to its weights. A format with one plane has no second table.

Layout of a [O, I] matrix, O padded to 8 rows (tiles) and I to 32 columns (blocks): tiles one after
another, each
    head    row scales bf16 [8]
    then, for each block and each of its planes,
    codes   [32 / d, 8 rows] bytes, d the plane's entry length

Multiplication takes activations as int8 blocks, as int4 does: dot = sum (entries + 64) q - 64 sum
q, exact in int32; acc += dot * x_scale in float32, blocks in order; the row scale multiplies the
sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moelite.quant.base import BLOCK, F32, TILE_ROWS, U8, Tiled, check_packed, check_weight, pad
from moelite.quant.curvature import Curvature
from moelite.quant.vq_kernels import make_multiply, make_row
from moelite.quant.vq_pack import encode_rows, layout_of
from moelite.quant.vq_tables import ENTRIES, read_tables


class VQ(Tiled):
    planes = 1
    curved = True

    def __init__(self, name: str, tables: list[Any]) -> None:
        self.name, self.tables, self.layout = name, tables, layout_of(tables)
        self.multiply = make_multiply(tables, self.layout.code_bytes, name)
        self.row = make_row(tables, self.layout.code_bytes, name)

    def pack_rows(
        self,
        packed: U8,
        rows: int,
        cols: int,
        start: int,
        weight: F32,
        curve: Curvature | None = None,
    ) -> None:
        encode_rows(packed, cols, start, check_weight(self.name, weight), self.tables, curve)

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        packed = check_packed(self, packed, rows, cols)
        tiles, blocks = pad(rows, TILE_ROWS) // TILE_ROWS, pad(cols, BLOCK) // BLOCK
        full = np.zeros((tiles, TILE_ROWS, blocks, BLOCK), np.float32)
        for at, _, codes in self.layout.groups(packed, cols):
            first = 0
            for table in self.tables:
                size = ENTRIES // table.shape[1]
                found = codes[:, :, first : first + size].reshape(tiles, -1, size // 8, TILE_ROWS)
                entries = table[found.transpose(0, 3, 1, 2)]  # [tile, row, block, group, d]
                full[:, :, at] += entries.reshape(tiles, TILE_ROWS, -1, BLOCK)
                first += size
        bits = self.layout.heads(packed, cols).copy().view(np.uint16).astype(np.uint32)
        full *= (bits << 16).view(np.float32)[:, :, None, None]
        return full.reshape(tiles * TILE_ROWS, -1)[:rows, :cols].copy()


FORMATS = tuple(VQ(name, tables) for name, tables in read_tables().items())
