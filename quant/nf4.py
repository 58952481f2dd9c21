"""nf4: bitsandbytes' normal floats, blocks of 64 columns under a float32 absmax. 4.5 bits a weight.

    w = TABLE[code] * absmax,  code in 0..15, TABLE float32

Numbers are bitsandbytes' own, bit for bit: packing chooses the codes and absmax of its
`quantize_4bit(quant_type="nf4", blocksize=64)`, unpacking gives the float32 of its
`dequantize_4bit`, and `from_bitsandbytes` takes over a checkpoint, double quantized or not. Its
blocks run over the flattened matrix, so rows have to be a multiple of 64 long.

Layout of a [O, I] matrix, O padded to 8 rows (tiles): tiles one after another, each, for every 8
blocks of 32 columns (fewer at the end),
    scales  absmax float32 [4, 8 rows]; of columns that are not there, zero
    codes   128 bytes a block, see nibbles_pack.py
"""

from __future__ import annotations

import numpy as np

from moelite.jit import inlined, inner
from moelite.quant.base import (
    F32,
    TILE_ROWS,
    U8,
    Tiled,
    TileLayout,
    check_packed,
    check_weight,
    empty_packed,
)
from moelite.quant.codes import Bitsandbytes, check_cols
from moelite.quant.curvature import Curvature
from moelite.quant.nf4_pack import SPAN, TABLE, pad_rows, quantize
from moelite.quant.nf4_tiles import make_products
from moelite.quant.nibbles_pack import (
    CODE_BYTES,
    read_blocks,
    read_scales,
    tiles_of,
    to_rows,
    write_blocks,
)
from moelite.simd import load_f32, store_f32

LAYOUT = TileLayout(head=0, scale_bytes=TILE_ROWS * 2, code_bytes=CODE_BYTES)
_SCALES_BYTES = 128


@inlined
def _no_head(blocks):
    return 0


@inner
def _put_scales(packed, tile, blocks, scales):
    at = tile
    for pair in range(blocks // 2):
        store_f32(scales, pair * 8, load_f32(packed, at + pair % 4 * 32))
        if pair % 4 == 3:
            at += _SCALES_BYTES + 8 * CODE_BYTES


multiply, row = make_products("nf4", _no_head, _SCALES_BYTES, _put_scales)


class NormalFloat(Tiled):
    name = "nf4"
    layout = LAYOUT
    planes = 1
    row_multiple = SPAN
    multiply = staticmethod(multiply)
    row = staticmethod(row)

    def nbytes(self, rows: int, cols: int) -> int:
        check_cols(self.name, cols)
        return super().nbytes(rows, cols)

    def pack_rows(
        self,
        packed: U8,
        rows: int,
        cols: int,
        start: int,
        weight: F32,
        curve: Curvature | None = None,
    ) -> None:
        check_cols(self.name, cols)
        self.code_rows(packed, cols, start, *quantize(check_weight(self.name, weight)))

    def code_rows(self, packed: U8, cols: int, start: int, codes: U8, absmax: F32) -> None:
        """Writes codes [n, cols] 0..15 and absmax [n, cols / 64] as rows start..start + n."""
        codes, absmax = pad_rows(codes, absmax)
        tiles = tiles_of(self, packed, cols, start, len(codes))
        write_blocks(tiles, LAYOUT, cols, codes, absmax)

    def from_bitsandbytes(self, state: Bitsandbytes) -> U8:
        """The packed matrix whose `unpack` is what bitsandbytes dequantizes to, bit for bit.

        Double quantized or not. Raises UnsupportedError for other kinds than nf4 in blocks of 64,
        QuantizationError for sizes that do not fit.
        """
        state.check()
        packed = empty_packed(self, *state.shape)
        self.code_rows(packed, state.shape[1], 0, state.codes(), state.scales())
        return packed

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        packed = check_packed(self, packed, rows, cols)
        stored = read_scales(packed, LAYOUT, cols)
        absmax = stored.reshape(len(stored), -1, TILE_ROWS * 4).view(np.float32)
        full = read_blocks(packed, LAYOUT, cols, TABLE, np.repeat(absmax, 2, axis=1))
        return to_rows(full, rows, cols)


FORMAT = NormalFloat()
