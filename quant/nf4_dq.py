"""nf4-dq: nf4 whose absmax are 8-bit codes: bitsandbytes with `compress_statistics`. 4.14 bits.

    w = nf4's TABLE[code] * absmax,  absmax = MAP[absmax code] * nested + offset, all in float32

256 absmax, counted through the whole matrix, share a `nested`; the offset is the mean of all. So a
matrix is packed whole, and rows have to be a multiple of 64 long. As in nf4, all numbers are
bitsandbytes' own; where 32,768 absmax or more are summed for the mean, as its one thread sums them.

Layout of a [O, I] matrix, O padded to 8 rows (tiles): tiles one after another, each
    head    float32 [n], a multiple of 32 bytes: offset; how many absmax of the first nested block
            are before this tile; the nested absmax from there on, as many as 8 rows can reach
    then, for every 8 blocks of 32 columns (fewer at the end),
    scales  absmax codes uint8 [4, 8 rows]; of columns that are not there, zero
    codes   128 bytes a block, see nibbles_pack.py
"""

from __future__ import annotations

import numpy as np

from moelite import raw
from moelite.errors import QuantizationError
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
from moelite.quant.codes import Bitsandbytes, Nested, check_cols
from moelite.quant.curvature import Curvature
from moelite.quant.nf4_pack import MAP, NESTED, SPAN, TABLE, pad_rows, quantize, quantize_absmax
from moelite.quant.nf4_tiles import make_products
from moelite.quant.nibbles_pack import CODE_BYTES, read_blocks, read_scales, to_rows, write_blocks
from moelite.simd import add_f32, load_f32, mul_f32, splat_f32, store_f32

_SCALES_BYTES = 32


def _reach(spans: int) -> int:
    """Nested blocks that 8 rows of `spans` absmax can touch."""
    return (8 * spans + NESTED - 2) // NESTED + 1


def _layout(cols: int) -> TileLayout:
    head = (2 + _reach(cols // SPAN)) * 4
    return TileLayout((head + 31) // 32 * 32, scale_bytes=TILE_ROWS // 2, code_bytes=CODE_BYTES)


@inlined
def _head(blocks):
    # _layout(cols).head
    return ((4 * blocks + 254) // 256 * 4 + 12 + 31) // 32 * 32


@inner
def _put_scales(packed, tile, blocks, scales):
    size, spans = _head(blocks), blocks // 2
    head = raw.f32_at(raw.address(packed) + tile, size // 4)
    offset, before, at = head[0], np.int64(head[1]), tile + size
    for span in range(spans):
        for r in range(8):
            scales[span * 8 + r] = MAP[packed[at + span % 4 * 8 + r]]
        if span % 4 == 3:
            at += _SCALES_BYTES + 8 * CODE_BYTES
    if before + 8 * spans <= NESTED:  # all share one: half the work (scalar: a third of a product)
        by, more = splat_f32(head[2]), splat_f32(offset)
        for at in range(0, 8 * spans, 8):
            store_f32(scales, at, add_f32(mul_f32(load_f32(scales, at), by), more))
        return
    for span in range(spans):
        for r in range(8):
            nested = head[2 + ((before + r * spans + span) >> 8)]
            scales[span * 8 + r] = scales[span * 8 + r] * nested + offset


multiply, row = make_products("nf4_dq", _head, _SCALES_BYTES, _put_scales)


class NestedNormalFloat(Tiled):
    name = "nf4-dq"
    planes = 1
    row_multiple = SPAN
    whole = True
    multiply = staticmethod(multiply)
    row = staticmethod(row)

    def tile_bytes(self, cols: int) -> int:
        return _layout(cols).tile_bytes(cols)

    def nbytes(self, rows: int, cols: int) -> int:
        check_cols(self.name, cols)
        return _layout(cols).nbytes(rows, cols)

    def pack_rows(
        self,
        packed: U8,
        rows: int,
        cols: int,
        start: int,
        weight: F32,
        curve: Curvature | None = None,
    ) -> None:
        if (start, len(weight)) != (0, rows):
            raise QuantizationError(
                f"{self.name} packs matrices whole, not {len(weight)} of {rows} rows"
            )
        check_cols(self.name, cols)
        codes, absmax = quantize(check_weight(self.name, weight))
        eighths, nested, offset = quantize_absmax(absmax.reshape(-1))
        if not np.isfinite(offset):
            raise QuantizationError("the mean of absmax is beyond float32")
        self._put(packed, codes, eighths.reshape(absmax.shape), Nested(nested, MAP, float(offset)))

    def from_bitsandbytes(self, state: Bitsandbytes) -> U8:
        """The packed matrix whose `unpack` is what bitsandbytes dequantizes to, bit for bit.

        Raises UnsupportedError for other kinds than nf4 in blocks of 64, QuantizationError for
        sizes that do not fit and for absmax not double quantized by today's map: `nf4` takes those.
        """
        state.check()
        if state.nested is None or not np.array_equal(state.nested.table, MAP):
            raise QuantizationError(
                "absmax is not double quantized, or by another map than MAP", fix="take nf4"
            )
        packed = empty_packed(self, *state.shape)
        self._put(packed, state.codes(), state.absmax.reshape(len(state.codes()), -1), state.nested)
        return packed

    def _put(self, packed: U8, codes: U8, eighths: U8, nested: Nested) -> None:
        cols, layout = codes.shape[1], _layout(codes.shape[1])
        codes, eighths = pad_rows(codes, eighths)
        spans = eighths.shape[1]
        first = np.arange(0, len(codes), TILE_ROWS) * spans
        head = np.zeros((len(first), layout.head // 4), np.float32)
        head[:, 0], head[:, 1] = nested.offset, first % NESTED
        reached = first[:, None] // NESTED + np.arange(_reach(spans))
        # beyond the last there is nothing that would use it
        head[:, 2 : 2 + _reach(spans)] = nested.absmax[np.minimum(reached, len(nested.absmax) - 1)]
        layout.heads(packed, cols)[...] = head.view(np.uint8)
        write_blocks(packed, layout, cols, codes, eighths)

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        packed, layout = check_packed(self, packed, rows, cols), _layout(cols)
        head = layout.heads(packed, cols).copy().view(np.float32)
        stored = read_scales(packed, layout, cols)
        eighths = stored.reshape(len(stored), -1, TILE_ROWS)  # [tile, span, row]
        spans = np.arange(eighths.shape[1])[:, None]
        at = head[:, 1].astype(np.int64)[:, None, None] + spans + np.arange(TILE_ROWS) * len(spans)
        nested = np.take_along_axis(head[:, 2:], (at // NESTED).reshape(len(head), -1), 1)
        absmax = MAP[eighths] * nested.reshape(eighths.shape) + head[:, :1, None]
        full = read_blocks(packed, layout, cols, TABLE, np.repeat(absmax, 2, axis=1))
        return to_rows(full, rows, cols)


FORMAT = NestedNormalFloat()
