"""How a record holds one expert: gate and up as one interleaved matrix, then down.

Tile t of gate and tile t of up are neighbours, so that the kernel reads both as one stream and has
the two halves of an activation at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moelite.quant import FORMATS
from moelite.quant.base import (
    ALIGN,
    F32,
    PAGE,
    TILE_ROWS,
    U8,
    QuantFormat,
    pad,
    pair_rows,
    put_half,
)
from moelite.quant.curvature import Curvature


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """Where the matrices of one expert lie in its record.

    gate_up_format: of gate and up, both [expert_size, hidden_size], interleaved from the record's
    first byte on; down_format: of down [hidden_size, expert_size], from byte `down` on.
    payload_bytes: up to the last byte of down; record_bytes: a multiple of PAGE.
    """

    gate_up_format: str
    down_format: str
    hidden_size: int
    expert_size: int
    down: int
    payload_bytes: int
    record_bytes: int

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        """Of the interleaved matrix: rows of both, padded to whole tiles; columns."""
        return pair_rows(self.expert_size), self.hidden_size

    @property
    def down_shape(self) -> tuple[int, int]:
        return self.hidden_size, self.expert_size

    @property
    def formats(self) -> tuple[str, str]:
        return self.gate_up_format, self.down_format


def record_layout(
    formats: tuple[str, str],
    hidden_size: int,
    expert_size: int,
    sizes: tuple[int, int] | None = None,
) -> RecordLayout:
    """The layout of an expert whose gate and up, and down, are in `formats`.

    sizes: bytes to hold for gate_up and for down, where a format's sizes depend on the weights; by
    default what their formats plan with.
    """
    wide, down = FORMATS[formats[0]], FORMATS[formats[1]]
    if sizes is None:
        sizes = (
            wide.nbytes(pair_rows(expert_size), hidden_size),
            down.nbytes(hidden_size, expert_size),
        )
    begin = pad(sizes[0], ALIGN)
    return RecordLayout(
        gate_up_format=formats[0],
        down_format=formats[1],
        hidden_size=hidden_size,
        expert_size=expert_size,
        down=begin,
        payload_bytes=begin + sizes[1],
        record_bytes=pad(begin + sizes[1], PAGE),
    )


def join(fmt: QuantFormat, shape: tuple[int, int], gate: U8, up: U8) -> U8:
    """gate and up, matrices of a `shape` packed alone, as one: tile by tile in turn."""
    rows, cols = shape
    both = np.zeros(fmt.nbytes(pair_rows(rows), cols), np.uint8)
    tile = fmt.tile_bytes(cols)
    put_half(both, 0, gate, tile)
    put_half(both, 1, up, tile)
    return both


def pack_gate_up(fmt: QuantFormat, gate: F32, up: F32, curve: Curvature | None = None) -> U8:
    """gate and up [expert_size, hidden_size] as one packed matrix."""
    if fmt.exact:
        return join(fmt, gate.shape, fmt.pack(gate, curve), fmt.pack(up, curve))
    rows, cols = gate.shape
    both = np.zeros((pair_rows(rows) // (2 * TILE_ROWS), 2, TILE_ROWS, cols), np.float32)
    for half, part in enumerate((gate, up)):
        whole = np.zeros((pad(rows, TILE_ROWS), cols), np.float32)
        whole[:rows] = part
        both[:, half] = whole.reshape(-1, TILE_ROWS, cols)
    return fmt.pack(both.reshape(-1, cols), curve)


def unpack_gate_up(fmt: QuantFormat, packed: U8, rows: int, cols: int) -> tuple[F32, F32]:
    """(gate, up) [rows, cols] of `pack_gate_up`."""
    return separate(fmt.unpack(packed, pair_rows(rows), cols), rows)


def separate(both: F32, rows: int) -> tuple[F32, F32]:
    """(gate, up) [rows, I] of a gate_up matrix as its format unpacks it."""
    tiles = both.reshape(-1, 2, TILE_ROWS, both.shape[1])
    gate, up = (tiles[:, half].reshape(-1, both.shape[1])[:rows] for half in (0, 1))
    return np.ascontiguousarray(gate), np.ascontiguousarray(up)


def fill_record(layout: RecordLayout, gate_up: U8, down: U8) -> U8:
    """The record uint8 [record_bytes] of one expert, from its packed matrices."""
    record = np.zeros(layout.record_bytes, np.uint8)
    record[: gate_up.size] = gate_up
    record[layout.down : layout.down + down.size] = down
    return record


def packed_parts(layout: RecordLayout, record: U8) -> tuple[U8, U8]:
    """(gate_up, down), packed, of a record: views; with what lies behind them, if their format's
    sizes depend on the weights."""
    parts = record[: layout.down], record[layout.down : layout.payload_bytes]
    shapes, found = (layout.gate_up_shape, layout.down_shape), []
    for part, name, shape in zip(parts, layout.formats, shapes, strict=True):
        fmt = FORMATS[name]
        found.append(part[: fmt.nbytes(*shape)] if fmt.exact else part)
    return found[0], found[1]


def check_record(layout: RecordLayout, record: U8) -> None:
    """Raises QuantizationError for a record that would lead a kernel out of it."""
    shapes = layout.gate_up_shape, layout.down_shape
    parts = packed_parts(layout, record)
    for part, name, shape in zip(parts, layout.formats, shapes, strict=True):
        FORMATS[name].check(part, *shape)


def unpack_record(layout: RecordLayout, record: U8) -> tuple[F32, F32, F32]:
    """(gate, up, down) as the kernels multiply by them, float32."""
    wide, down = packed_parts(layout, record)
    shape = layout.expert_size, layout.hidden_size
    gate, up = unpack_gate_up(FORMATS[layout.gate_up_format], wide, *shape)
    return gate, up, FORMATS[layout.down_format].unpack(down, *layout.down_shape)
