"""Packed bytes -> float32 by torch operations alone, on any torch device.

Bit for bit what `FORMATS[name].unpack` gives: the same numbers, multiplied in the same order. How
a format lies is said at the top of its file in quant/.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from moelite.errors import QuantizationError
from moelite.gpu.plan import SCRATCH_BYTES
from moelite.quant import FORMATS
from moelite.quant.base import BLOCK, GROUP, TILE_ROWS, pad
from moelite.quant.codes import E2M1
from moelite.quant.nf4_pack import MAP, NESTED, TABLE
from moelite.quant.qmoe_dictionary import BITS, dictionary
from moelite.quant.vq_tables import ENTRIES, read_tables

Tensor = torch.Tensor

# Weights of tiles that are unpacked at a time: indices and halves of codes take 20 bytes a weight.
CHUNK = 1 << 23
_CODES = 1 << 18  # of qmoe at a time: 28 places each

# bytes of a block's scales, and of its codes, for 8 rows; what else a tile has is its head
BLOCK_BYTES = {
    "int8": (16, 256),
    "int4": (8, 128),
    "int4-f16": (16, 128),
    "mxfp4": (8, 128),
    "nf4": (16, 128),
    "nf4-dq": (4, 128),
    **{name: (0, sum(ENTRIES // t.shape[1] for t in t)) for name, t in read_tables().items()},
}


def head_bytes(name: str, cols: int) -> int:
    """The head of a tile of a format of BLOCK_BYTES, with rows of `cols`."""
    blocks, (scales, codes) = pad(cols, BLOCK) // BLOCK, BLOCK_BYTES[name]
    size = pad(blocks, GROUP) * scales + blocks * codes
    return int(FORMATS[name].tile_bytes(cols) - size)


@functools.cache
def constant(name: str, device: torch.device) -> Tensor:
    """A table on a device, made once: "nf4" and "absmax" float32, "mxfp4" float32 of E2M1,
    "power" float32 [256] of mxfp4's scales, "masks" int32 [2^16, 2], or a plane "vq-3.1" int8.
    """
    made: dict[str, Callable[[], Any]] = {
        "nf4": lambda: TABLE,
        "absmax": lambda: MAP,
        "mxfp4": lambda: E2M1.astype(np.float32),
        "power": lambda: np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32),
        "masks": lambda: dictionary().masks.view(np.int32),
    }
    if name in made:
        table = made[name]()
    else:
        vq, plane = name.rsplit(".", 1)
        table = read_tables()[vq][int(plane)]
    return torch.from_numpy(np.array(table)).to(device)


def strip_rows(cols: int) -> int:
    """Rows of a matrix that are unpacked at once: whole tiles, SCRATCH_BYTES as float32."""
    return max(SCRATCH_BYTES // (4 * cols) // TILE_ROWS * TILE_ROWS, TILE_ROWS)


def unpack(name: str, packed: Tensor, base: int, rows: int, cols: int) -> Tensor:
    """The [rows, cols] matrix whose bytes begin at packed[base], float32.

    packed: uint8 [n], of any device, with anything around the matrix.
    """
    if name not in FORMATS:
        raise QuantizationError(f"no format is called {name!r}", fix=f"one of {', '.join(FORMATS)}")
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise QuantizationError(f"a matrix is uint8 [n], not {packed.dtype} {list(packed.shape)}")
    if name not in BLOCK_BYTES:
        return _unpack_rows(name, packed, base, rows, cols)
    size, tiles = FORMATS[name].tile_bytes(cols), pad(rows, TILE_ROWS) // TILE_ROWS
    flat = packed[base : base + tiles * size].reshape(tiles, size)
    out = torch.empty((tiles * TILE_ROWS, cols), dtype=torch.float32, device=packed.device)
    step = max(1, CHUNK // (TILE_ROWS * pad(cols, BLOCK)))
    for first in range(0, tiles, step):
        part = flat[first : first + step]
        full = _unpack_tiles(name, part, cols).reshape(len(part) * TILE_ROWS, -1)
        out[first * TILE_ROWS : first * TILE_ROWS + len(full)] = full[:, :cols]
    return out[:rows]


# --- tiles --------------------------------------------------------------------------------------


def _pieces(name: str, tiles: Tensor, cols: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    # (its blocks, scales [tiles, n, bytes], codes [tiles, n, bytes]): whole groups, then the rest
    blocks, (scales, codes) = pad(cols, BLOCK) // BLOCK, BLOCK_BYTES[name]
    n, whole, skip = len(tiles), blocks // GROUP, GROUP * scales
    size, at = skip + GROUP * codes, head_bytes(name, cols)
    if whole:
        run = tiles[:, at : at + whole * size].reshape(n, whole, size)
        yield (
            slice(0, whole * GROUP),
            run[:, :, :skip].reshape(n, whole * GROUP, scales),
            run[:, :, skip:].reshape(n, whole * GROUP, codes),
        )
    if rest := blocks % GROUP:
        at += whole * size
        yield (
            slice(whole * GROUP, blocks),
            tiles[:, at : at + rest * scales].reshape(n, rest, scales),
            tiles[:, at + skip : at + skip + rest * codes].reshape(n, rest, codes),
        )


def _unpack_tiles(name: str, tiles: Tensor, cols: int) -> Tensor:
    # uint8 [tiles, tile_bytes] -> float32 [tiles, 8 rows, blocks * 32]
    n, blocks = len(tiles), pad(cols, BLOCK) // BLOCK
    full = torch.empty((n, TILE_ROWS, blocks, BLOCK), dtype=torch.float32, device=tiles.device)
    head = _view(tiles[:, : head_bytes(name, cols)], torch.uint8)
    first_span = 0
    for at, scales, codes in _pieces(name, tiles, cols):
        if name in _TABLES:
            entries = _TABLES[name](head, tiles.device, _nibbles(codes))
        elif name == "int8":
            entries = _lanes(codes.view(torch.int8)).to(torch.float32)
        else:
            entries = _vq(name, codes)
        if name == "nf4-dq":
            by = _nested(head, scales, first_span, cols // 64)
        elif name in _SCALES:
            by = _SCALES[name](scales)
        if name in BLOCK_BYTES and BLOCK_BYTES[name][0]:
            entries = entries * by[..., None]  # [tiles, blocks, 8 rows, 32]
        full[:, :, at] = entries.transpose(1, 2)
        first_span += codes.shape[1] // 2
    if name in ("int4", "int4-f16"):
        full *= _view(head[:, :32], torch.float32)[:, :, None, None]
    elif name.startswith("vq"):
        full *= _bf16(head)[:, :, None, None]
    return full


def _view(values: Tensor, dtype: torch.dtype) -> Tensor:
    # bytes as another type, wherever they lie: a copy is aligned
    return values.clone(memory_format=torch.contiguous_format).view(dtype)


def _bf16(values: Tensor) -> Tensor:
    # bytes of bf16 -> float32
    return (_view(values, torch.int16).to(torch.int32) << 16).view(torch.float32)


def _lanes(codes: Tensor) -> Tensor:
    # [tiles, n, 256] of groups of 4 columns -> [tiles, n, 8 rows, 32]
    found = codes.reshape(len(codes), -1, 8, TILE_ROWS, 4)
    return found.transpose(2, 3).reshape(len(codes), -1, TILE_ROWS, BLOCK)


def _nibbles(codes: Tensor) -> Tensor:
    # uint8 [tiles, n, 128], see quant/nibbles_pack.py -> int64 [tiles, n, 8 rows, 32] 0..15
    found = codes.reshape(len(codes), -1, 4, TILE_ROWS, 4)
    both = torch.stack([found & 15, found >> 4], dim=3)  # [tile, block, pair, half, row, column]
    return both.permute(0, 1, 4, 2, 3, 5).reshape(len(codes), -1, TILE_ROWS, BLOCK).long()


def _own_table(head: Tensor, device: torch.device, index: Tensor) -> Tensor:
    # entries of the table that each tile's head holds
    table = _view(head[:, 32:48], torch.int8).to(torch.float32)
    return torch.gather(table, 1, index.reshape(len(index), -1)).reshape(index.shape)


def _fixed_table(name: str) -> Any:
    return lambda head, device, index: constant(name, device)[index]


_TABLES: dict[str, Any] = {
    "int4": _own_table,
    "int4-f16": _own_table,
    "mxfp4": _fixed_table("mxfp4"),
    "nf4": _fixed_table("nf4"),
    "nf4-dq": _fixed_table("nf4"),
}


def _f16(scales: Tensor) -> Tensor:
    return _view(scales, torch.float16).to(torch.float32)


def _absmax(scales: Tensor) -> Tensor:
    # 16 bytes a block are float32 [8 rows] of two
    by = _view(scales.reshape(len(scales), -1, 32), torch.float32)
    return by.repeat_interleave(2, dim=1)


# bytes [tiles, n, bytes] -> float32 [tiles, n, 8 rows]
_SCALES: dict[str, Any] = {
    "int8": _f16,
    "int4": lambda scales: _view(scales, torch.int8).to(torch.float32),
    "int4-f16": _f16,
    "mxfp4": lambda scales: constant("power", scales.device)[scales.long()],
    "nf4": _absmax,
}


def _nested(head: Tensor, scales: Tensor, first: int, spans: int) -> Tensor:
    # nf4-dq's absmax of spans first .. of `spans` in a row, once for each block of 32
    values = _view(head, torch.float32)
    codes = scales.reshape(len(scales), -1, TILE_ROWS).long()  # [tile, span, row]
    span = torch.arange(first, first + codes.shape[1], device=scales.device)[:, None]
    row = torch.arange(TILE_ROWS, device=scales.device)
    at = values[:, 1].long()[:, None, None] + span + row * spans
    nested = torch.gather(values[:, 2:], 1, (at // NESTED).reshape(len(head), -1))
    absmax = constant("absmax", scales.device)[codes] * nested.reshape(codes.shape)
    return (absmax + values[:, :1, None]).repeat_interleave(2, dim=1)


def _vq(name: str, codes: Tensor) -> Tensor:
    # [tiles, n, bytes] of all planes -> float32 [tiles, n, 8 rows, 32] sums of entries
    total, first, plane = None, 0, 0
    while first < codes.shape[2]:
        table = constant(f"{name}.{plane}", codes.device)
        size = ENTRIES // table.shape[1]
        found = codes[:, :, first : first + size].reshape(len(codes), -1, size // 8, TILE_ROWS)
        entries = table[found.transpose(2, 3).long()].to(torch.float32)
        entries = entries.reshape(len(codes), -1, TILE_ROWS, BLOCK)
        total = entries if total is None else total + entries
        first, plane = first + size, plane + 1
    assert total is not None
    return total


# --- row after row ------------------------------------------------------------------------------


def _unpack_rows(name: str, packed: Tensor, base: int, rows: int, cols: int) -> Tensor:
    if name == "f32":
        return _view(packed[base : base + rows * cols * 4], torch.float32).reshape(rows, cols)
    if name == "bf16":
        return _bf16(packed[base : base + rows * cols * 2]).reshape(rows, cols)
    return _qmoe(packed[base:], rows, cols)


def _qmoe(packed: Tensor, rows: int, cols: int) -> Tensor:
    # a matrix of qmoe whose `check` has passed: its rows' codes follow one another without a gap
    head = 8 * rows + 4
    count = int(_view(packed[4 * rows : 4 * rows + 4], torch.int32)) & 0xFFFFFFFF
    levels = _bf16(packed[head - 4 * rows : head]).reshape(rows, 2)
    masks, even = constant("masks", packed.device), pad(cols, 2)
    places = torch.arange(BITS, dtype=torch.int32, device=packed.device)
    parts = []
    for first in range(0, count, _CODES):
        stop = min(first + _CODES, count)
        codes = _view(packed[head + 2 * first : head + 2 * stop], torch.int16).long() & 0xFFFF
        low, high = masks[codes].unbind(1)
        runs = (low[:, None] >> places & 1) + 2 * (high[:, None] >> places & 1)
        there = places < 2 * (low[:, None] >> BITS & 15)
        parts.append(runs[there].to(torch.uint8))
    symbols = torch.cat(parts).reshape(rows, even)[:, :cols].long()
    table = torch.cat([torch.zeros_like(levels[:, :1]), levels], 1)
    return torch.gather(table, 1, symbols)
