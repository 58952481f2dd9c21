"""f32: float32 as it is, row after row. 32 bits per weight, no error.

Layout of a [O, I] matrix: float32 [O, I], little endian.
"""

from __future__ import annotations

import numpy as np

from moelite.jit import inner
from moelite.quant.base import F32, TILE_ROWS, U8, Exact, check_packed, check_weight
from moelite.quant.curvature import Curvature
from moelite.quant.floats import make_multiply
from moelite.simd import (
    load_f32,
)

multiply = make_multiply(load_f32, 4, "f32")


@inner
def row(matrix, r, out):
    bytes_out, at = out.view(np.uint8), matrix.base + r * matrix.cols * 4
    for i in range(matrix.cols * 4):
        bytes_out[i] = matrix.packed[at + i]


class Float32(Exact):
    name = "f32"
    planes = 0
    multiply = staticmethod(multiply)
    row = staticmethod(row)

    def tile_bytes(self, cols: int) -> int:
        return TILE_ROWS * cols * 4

    def nbytes(self, rows: int, cols: int) -> int:
        return rows * cols * 4

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
        packed.view(np.float32).reshape(rows, cols)[start : start + len(weight)] = weight

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        return check_packed(self, packed, rows, cols).view(np.float32).reshape(rows, cols).copy()


FORMAT = Float32()
