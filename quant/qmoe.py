"""qmoe: rows of ternary symbols as 16-bit codes, each of which stands for up to 28 of them.

    w ~= 0, or its row's lower level (<= 0), or its upper one (>= 0)
    bits per weight at 2048 columns: .77 where .885 of the weights are 0, as the dictionary wants,
    never below .6; 8 where no weight is 0. Every size depends on the weights.

The format of QMoE (Frantar and Alistarh 2023, arXiv 2310.16795). `qmoe` takes levels as published,
the least and the largest weight of a row; `qmoe-ls` levels that fit best. Both are read alike.

Layout of a [O, I] matrix, little endian, padded with zeros to 64 bytes:
    offsets  uint32 [O + 1]: where each row's codes begin, and where the last one's end, in codes
    levels   bf16 [O, 2]: lower, upper
    codes    uint16, row after row: what they mean, see moelite.quant.qmoe_dictionary. If I is odd,
             a row has a 0 more
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from moelite.errors import QuantizationError
from moelite.quant import qmoe_kernel
from moelite.quant.base import ALIGN, F32, U8, check_weight, pad, zeros
from moelite.quant.curvature import Curvature
from moelite.quant.qmoe_dictionary import BITS, dictionary, encode, usual_codes
from moelite.quant.qmoe_kernel import check_codes
from moelite.quant.qmoe_pack import Choice, choose_fitted, choose_published


class Statistics(NamedTuple):
    """Of one packed matrix. zeros: the share of weights that are 0. bits: per weight, everything
    included. entropy: bits per weight that its symbols would take at best, were they independent.
    """

    zeros: float
    bits: float
    entropy: float


def _head_bytes(rows: int) -> int:
    return 4 * (rows + 1) + 4 * rows


def _parts(packed: U8, rows: int) -> tuple[Any, F32, Any]:
    # (offsets int64 [rows + 1], levels float32 [rows, 2], codes uint16)
    offsets = packed[: 4 * (rows + 1)].view(np.uint32).astype(np.int64)
    levels = packed[4 * (rows + 1) : _head_bytes(rows)].view(np.uint16).astype(np.uint32) << 16
    end = _head_bytes(rows) + 2 * int(offsets[-1])
    codes = packed[_head_bytes(rows) : end].view(np.uint16)
    return offsets, levels.view(np.float32).reshape(rows, 2), codes


def check(packed: U8, rows: int, cols: int) -> None:
    """Raises QuantizationError unless `packed` begins with a [rows, cols] matrix: then the kernel
    reads nothing beyond it, whatever its codes are.
    """
    if packed.dtype != np.uint8 or packed.ndim != 1 or packed.size < _head_bytes(rows):
        raise QuantizationError(
            f"a qmoe matrix [{rows}, {cols}] takes at least {_head_bytes(rows)} bytes (uint8), "
            f"not {packed.dtype} {packed.shape}"
        )
    offsets = packed[: 4 * (rows + 1)].view(np.uint32).astype(np.int64)
    if offsets[0] or (np.diff(offsets) < 0).any():
        raise QuantizationError("a qmoe matrix is damaged: its rows are not in order")
    room = (packed.size - _head_bytes(rows)) // 2
    if offsets[-1] > room:
        raise QuantizationError(
            f"a qmoe matrix is damaged: it names {offsets[-1]} codes and has {room}"
        )
    _, _, codes = _parts(packed, rows)
    bad = check_codes(offsets, codes, dictionary().masks, pad(cols, 2) // 2)
    if bad >= 0:
        raise QuantizationError(
            f"a qmoe matrix is damaged: the codes of row {bad} are not {cols} weights"
        )


def symbols_of(packed: U8, rows: int, cols: int) -> U8:
    """uint8 [rows, cols]: 0, 1 for the lower level, 2 for the upper one. Checks `packed` first."""
    check(packed, rows, cols)
    _, _, codes = _parts(packed, rows)
    low, high = dictionary().masks[codes].T
    places = np.arange(BITS, dtype=np.uint32)
    runs = (low[:, None] >> places & 1) + 2 * (high[:, None] >> places & 1)
    there = places < 2 * (low[:, None] >> BITS)
    return runs[there].astype(np.uint8).reshape(rows, -1)[:, :cols]


def statistics(packed: U8, rows: int, cols: int) -> Statistics:
    """Statistics of a packed matrix. Raises QuantizationError as `check`."""
    check(packed, rows, cols)
    offsets, _, codes = _parts(packed, rows)
    places = dictionary().masks[codes] & np.uint32((1 << BITS) - 1)
    low, high = np.bitwise_count(places).sum(0, dtype=np.int64).tolist()
    size = rows * cols
    shares = [count / size for count in (size - low - high, low, high)]
    entropy = sum(share * math.log2(1 / share) for share in shares if share)
    whole = pad(_head_bytes(rows) + 2 * int(offsets[-1]), ALIGN)
    return Statistics(shares[0], 8 * whole / size, entropy)


class QMoE:
    """`qmoe` and `qmoe-ls`: one layout, two ways to choose symbols and levels."""

    planes = 1
    exact = False
    row_multiple = 1
    whole = True
    curved = True
    check = staticmethod(check)
    statistics = staticmethod(statistics)

    def __init__(self, name: str, choose: Choice) -> None:
        self.name, self._choose = name, choose

    @property
    def multiply(self) -> Any:
        dictionary()  # compiled code reads it without asking
        return qmoe_kernel.multiply

    @property
    def row(self) -> Any:
        dictionary()
        return qmoe_kernel.row

    def tile_bytes(self, cols: int) -> int:
        """0: rows have no common size."""
        return 0

    def nbytes(self, rows: int, cols: int) -> int:
        """About what a matrix takes of symbols as probable as the dictionary has them."""
        return pad(_head_bytes(rows) + 2 * round(rows * usual_codes(cols)), ALIGN)

    def pack(self, weight: F32, curve: Curvature | None = None) -> U8:
        weight = check_weight(self.name, weight)
        symbols, levels = self._choose(weight, curve)
        offsets, codes = encode(symbols)
        parts = offsets, (levels.view(np.uint32) >> 16).astype(np.uint16), codes
        whole = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
        packed = zeros(pad(whole.size, ALIGN))
        packed[: whole.size] = whole
        return packed

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        symbols = symbols_of(packed, rows, cols)
        _, levels, _ = _parts(packed, rows)
        table = np.concatenate([np.zeros((rows, 1), np.float32), levels], 1)
        return np.take_along_axis(table, symbols.astype(np.int64), 1)


# Any: they have no pack_rows, see QuantFormat.exact
FORMATS: tuple[Any, ...] = (QMoE("qmoe", choose_published), QMoE("qmoe-ls", choose_fitted))
