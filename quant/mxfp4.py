"""mxfp4: 4-bit floats, blocks of 32 columns under a power of two. 4.25 bits per weight.

    w = E2M1[code] * 2^(e - 128),  code in 0..15: 0 1 2 3 4 6 8 12, from 8 on negative;  e in 0..252

As in OCP's Microscaling Formats 1.0, whose elements are half of these entries and whose scale,
E8M0, is 2^(e - 127): what gpt-oss and others are published in fits exactly (`from_codes`). Packing
a matrix takes e so that the largest weight falls into the last octave, as OCP says, or one more
where that lowers the block's squared error; elements are rounded to the nearest, ties to even, and
end at 6.

Layout of a [O, I] matrix, O padded to 8 rows (tiles) and I to 32 columns (blocks): tiles one after
another, each, for every 8 blocks (fewer at the end),
    scales  e, uint8 [8 blocks, 8 rows]; of blocks that are not there, zero
    codes   128 bytes a block, see nibbles_pack.py
"""

from __future__ import annotations

import numpy as np

from moelite.errors import QuantizationError
from moelite.jit import inlined
from moelite.quant.base import BLOCK, F32, TILE_ROWS, U8, TileLayout, check_packed, rank
from moelite.quant.codes import E2M1, Coded
from moelite.quant.nibbles import SMALL, Parts, make_products
from moelite.quant.nibbles_pack import (
    CODE_BYTES,
    Carrier,
    read_blocks,
    read_scales,
    to_rows,
    write_blocks,
)
from moelite.simd import add_i8, load_e8m0_half, load_table16, splat_f32, splat_i8

LAYOUT = TileLayout(head=0, scale_bytes=TILE_ROWS, code_bytes=CODE_BYTES)
_LAST = 252  # beyond, 12 times the scale is no float32; 255 is NaN
_TABLE = E2M1
_EVEN = np.array([0.5, 2.5, 5, 10], np.float32)  # middles whose lower entry has an even code
_ODD = np.array([1.5, 3.5, 7], np.float32)


@inlined
def _table(packed, tile):
    return add_i8(load_table16(_TABLE, 0), splat_i8(np.int8(64)))


@inlined
def _one(packed, tile):
    return splat_f32(np.float32(1))


multiply, row = make_products(
    "mxfp4", LAYOUT, Parts(table=_table, scale=load_e8m0_half, last=_one), SMALL
)


def _round(values: F32) -> U8:
    """Codes of values in units of half a scale."""
    size = np.abs(values)
    code = rank(size, _EVEN)
    for middle in _ODD:
        code += size >= middle
    code[values < 0] += 8
    return code


class Mxfp4(Carrier):
    name = "mxfp4"
    layout = LAYOUT
    planes = 1
    multiply = staticmethod(multiply)
    row = staticmethod(row)

    @staticmethod
    def choose(weight: F32) -> Coded:
        blocks = weight.reshape(len(weight), -1, BLOCK)
        largest = np.abs(blocks).max(axis=2, keepdims=True)
        # largest = m 2^x, m in [1/2, 1): its octave is x - 1, the last octave of elements 2
        lower = np.clip(np.frexp(largest)[1] - 3 + 127, 0, _LAST - 1)
        codes, errors = [], []
        for more in (0, 1):
            unit = blocks / np.ldexp(np.float32(1), lower + more - 128)
            found = _round(unit)
            misses = (unit - E2M1[found]) * np.float32(2**more)
            codes.append(found)
            errors.append((misses * misses).sum(axis=2, keepdims=True))
        more = errors[1] < errors[0]
        scales = np.ldexp(np.float32(1), lower + more - 128)[..., 0]
        return Coded(E2M1, np.where(more, codes[1], codes[0]).reshape(weight.shape), scales)

    @staticmethod
    def put(tiles: U8, cols: int, coded: Coded) -> None:
        if not np.array_equal(coded.table, E2M1):
            raise QuantizationError("mxfp4 holds codes of E2M1's table only")
        size, power = np.frexp(coded.scales)  # 1/2 * 2^power
        power += 127
        none = coded.scales == 0  # as are all weights of the block
        bad = (size != 0.5) | (power < 0) | (power > _LAST)
        if wrong := int(np.count_nonzero(bad & ~none)):
            raise QuantizationError(
                f"{wrong} of {coded.scales.size} scales are not powers of two from 2^-128 to 2^124",
                fix="choose another format, such as int4-f16",
            )
        codes = coded.codes * ~np.repeat(none, BLOCK, axis=1)
        write_blocks(tiles, LAYOUT, cols, codes, np.where(none, 0, power).astype(np.uint8))

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        packed = check_packed(self, packed, rows, cols)
        power = read_scales(packed, LAYOUT, cols).astype(np.int32) - 128
        full = read_blocks(packed, LAYOUT, cols, E2M1, np.ldexp(np.float32(1), power))
        return to_rows(full, rows, cols)


FORMAT = Mxfp4()
