"""bf16: the upper half of a float32, row after row. 16 bits per weight.

    w ~= float32(bits << 16), rounded to nearest even: |error| <= 2^-9 |w|

Layout of a [O, I] matrix: uint16 [O, I], little endian. A bf16 checkpoint is kept bit for bit.
"""

from __future__ import annotations

import numpy as np

from moelite.jit import inner
from moelite.quant.base import F32, TILE_ROWS, U8, Exact, check_packed, check_weight
from moelite.quant.curvature import Curvature
from moelite.quant.floats import make_multiply
from moelite.simd import (
    load_bf16,
)

multiply = make_multiply(load_bf16, 2, "bf16")


@inner
def row(matrix, r, out):
    bits, at = out.view(np.uint32), matrix.base + r * matrix.cols * 2
    for c in range(matrix.cols):
        low, high = matrix.packed[at + c * 2], matrix.packed[at + c * 2 + 1]
        bits[c] = np.uint32(low) << np.uint32(16) | np.uint32(high) << np.uint32(24)


class BFloat16(Exact):
    name = "bf16"
    planes = 0
    multiply = staticmethod(multiply)
    row = staticmethod(row)

    def tile_bytes(self, cols: int) -> int:
        return TILE_ROWS * cols * 2

    def nbytes(self, rows: int, cols: int) -> int:
        return rows * cols * 2

    def pack_rows(
        self,
        packed: U8,
        rows: int,
        cols: int,
        start: int,
        weight: F32,
        curve: Curvature | None = None,
    ) -> None:
        bits = check_weight(self.name, weight).view(np.uint32)
        odd = (bits >> 16) & 1  # ties go to the even neighbour
        rounded = ((bits + (np.uint32(0x7FFF) + odd)) >> 16).astype(np.uint16)
        packed.view(np.uint16).reshape(rows, cols)[start : start + len(weight)] = rounded

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        bits = check_packed(self, packed, rows, cols).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(rows, cols)


FORMAT = BFloat16()
