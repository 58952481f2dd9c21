"""How 4-bit codes lie in tiles, and the search for a block's scale, for formats of 4-bit codes.

Codes of a block of 8 rows and 32 columns are 128 bytes [4 pairs, 8 rows, 4 columns]: low nibble:
column group 2 * pair, high: group 2 * pair + 1, a group being 4 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moelite.quant.base import (
    BLOCK,
    F32,
    TILE_ROWS,
    U8,
    Tiled,
    TileLayout,
    check_weight,
    empty_packed,
    pad,
    rank,
)
from moelite.quant.codes import Coded
from moelite.quant.curvature import Curvature

CODE_BYTES = TILE_ROWS * BLOCK // 2
# The tried quotients of a table's end and a block's largest weight, as int4 tries them (int4_pack).
_STEPS = (52, 56, 60, 64, 68, 73)


def whole(values: Any, multiple: int) -> Any:
    """[n, m] -> the same with zeros added: n a multiple of 8, m of `multiple`."""
    n, m = values.shape
    full = np.zeros((pad(n, TILE_ROWS), pad(m, multiple)), values.dtype)
    full[:n, :m] = values
    return full


class Carrier(Tiled):
    """A format that takes codes as they are, and chooses its own for weights without calibration.

    `choose` makes a Coded of weights [n, I], I a multiple of 32; `put` fills whole tiles with one,
    or raises QuantizationError where it cannot hold a scale or the table exactly.
    """

    choose: Callable[[F32], Coded]
    put: Callable[[U8, int, Coded], None]

    def pack_rows(
        self: Any,
        packed: U8,
        rows: int,
        cols: int,
        start: int,
        weight: F32,
        curve: Curvature | None = None,
    ) -> None:
        coded = self.choose(whole(check_weight(self.name, weight), BLOCK))
        self.put(tiles_of(self, packed, cols, start, len(coded.codes)), cols, coded)

    def code_rows(self: Any, packed: U8, rows: int, cols: int, start: int, coded: Coded) -> None:
        """Writes codes [n, I] as rows start..start+n of the [rows, cols] matrix in `packed`.

        start as in `pack_rows`. Raises QuantizationError where a scale or the table does not fit.
        """
        coded.check()
        full = coded._replace(codes=whole(coded.codes, BLOCK), scales=whole(coded.scales, 1))
        self.put(tiles_of(self, packed, cols, start, len(full.codes)), cols, full)

    def from_codes(self: Any, coded: Coded) -> U8:
        """The packed matrix whose `unpack` is coded.table[codes] * scales, bit for bit.

        Raises QuantizationError where a scale or the table does not fit the format exactly.
        """
        rows, cols = coded.codes.shape
        packed = empty_packed(self, rows, cols)
        self.code_rows(packed, rows, cols, 0, coded)
        return packed


def tiles_of(fmt: Any, packed: U8, cols: int, start: int, n: int) -> U8:
    """The tiles of rows start..start+n of a packed matrix, a view."""
    size, first = fmt.tile_bytes(cols), start // TILE_ROWS
    return packed[first * size : (first + n // TILE_ROWS) * size]


def nearest(values: F32, table: npt.NDArray[np.int8]) -> U8:
    """Codes of the entries nearest to float32 values; `table` ascends."""
    middles = (table[:-1].astype(np.float32) + table[1:].astype(np.float32)) / np.float32(2)
    return rank(values, middles)


def search(blocks: F32, table: npt.NDArray[np.int8]) -> F32:
    """blocks [..., 32] -> the scale of each, with either sign, that explains most of its energy.

    As int4_pack: entries t nearest to w * +-c / max|w| explain (w.t)^2 / (t.t), by scale w.t / t.t.
    """
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    unit = np.divide(blocks, largest, out=np.zeros_like(blocks), where=largest > 0)
    best, scale = np.zeros_like(largest), np.zeros_like(largest)
    for step in (*_STEPS, *(-s for s in _STEPS)):
        entries = table[nearest(unit * np.float32(step), table)].astype(np.float32)
        wt = (unit * entries).sum(axis=-1, keepdims=True)
        tt = np.maximum((entries * entries).sum(axis=-1, keepdims=True), np.float32(1))
        better = wt * wt > best * tt
        best = np.where(better, wt * wt / tt, best)
        scale = np.where(better, wt / tt, scale)
    return (scale * largest)[..., 0]


def write_blocks(tiles: U8, layout: TileLayout, cols: int, codes: U8, scales: Any) -> None:
    """Fills whole packed tiles, all but their heads.

    codes uint8 [n, I] 0..15, n a multiple of 8 and I of 32; scales of the dtype stored, [n, I / 32]
    or, where blocks share them, fewer.
    """
    blocks = codes.shape[1] // BLOCK
    span = blocks // max(scales.shape[1], 1)  # blocks that share a scale
    # [tile, row, block, pair, half, column] -> [tile, block, pair, row, column, half]
    split = codes.reshape(-1, TILE_ROWS, blocks, 4, 2, 4).transpose(0, 2, 3, 1, 5, 4)
    nibbles = (split[..., 0] | split[..., 1] << 4).reshape(len(split), blocks, -1)
    by_tile = scales.reshape(len(split), TILE_ROWS, -1).transpose(0, 2, 1)
    for at, scales_at, codes_at in layout.groups(tiles, cols):
        some = by_tile[:, at.start // span : at.stop // span]
        scales_at.reshape(*some.shape[:2], -1).view(scales.dtype)[...] = some
        codes_at[...] = nibbles[:, at]


def indices(codes: U8) -> npt.NDArray[np.int64]:
    """codes uint8 [tiles, n, 128] of a group -> [tiles, n, 8 rows, 32] 0..15."""
    found = codes.reshape(len(codes), -1, 4, TILE_ROWS, 4)
    both = np.stack([found & 15, found >> 4], axis=-1)  # [tile, block, pair, row, col, 2]
    split = both.transpose(0, 1, 3, 2, 5, 4)
    return split.reshape(len(codes), -1, TILE_ROWS, BLOCK).astype(np.int64)


def read_scales(packed: U8, layout: TileLayout, cols: int) -> U8:
    """The bytes of the blocks' scales, uint8 [tiles, blocks, scale_bytes], a copy."""
    return np.concatenate([scales for _, scales, _ in layout.groups(packed, cols)], axis=1)


def read_blocks(packed: U8, layout: TileLayout, cols: int, table: Any, scales: F32) -> F32:
    """Table entries times scales, float32 [tiles, blocks, 8 rows, 32 columns].

    table: [tiles, 16] or [1, 16]; scales float32 [tiles, blocks, 8]. `to_rows` gives the result the
    shape of a matrix.
    """
    full = np.empty((*scales.shape, BLOCK), np.float32)
    table = np.broadcast_to(table, (len(full), 16))
    for at, _, codes in layout.groups(packed, cols):
        index = indices(codes)
        entries = np.take_along_axis(table, index.reshape(len(full), -1), 1).astype(np.float32)
        full[:, at] = entries.reshape(index.shape) * scales[:, at, :, None]
    return full


def to_rows(full: F32, rows: int, cols: int) -> F32:
    """[tiles, blocks, 8 rows, 32 columns] -> [rows, cols], a copy."""
    return full.transpose(0, 2, 1, 3).reshape(len(full) * TILE_ROWS, -1)[:rows, :cols].copy()
