"""nf4 through bitsandbytes: the same codes and absmax in its own order, and its products.

bitsandbytes keeps a matrix row after row: uint8 [rows * cols / 2], two codes a byte, the first in
the high half, and absmax float32 [rows * cols / 64]. Tiles of nf4 never take fewer bytes, so a
matrix in a slot can be laid anew within it (`in_place`). Weights are the same numbers bit for bit.

Only nf4. bitsandbytes' int8 has one scale a row, ours one for 32 columns, so it cannot hold ours
without changing its numbers. Of nf4-dq it makes absmax float32 anew for every product, and there is
no room to keep them in a slot. Products are in the dtype of the activations: float32.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from moelite.errors import QuantizationError
from moelite.gpu.plan import SCRATCH_BYTES
from moelite.gpu.unpack import constant, strip_rows
from moelite.quant import FORMATS
from moelite.quant.base import BLOCK, GROUP, TILE_ROWS, pad
from moelite.quant.codes import check_cols
from moelite.quant.nf4_pack import SPAN

Tensor = torch.Tensor
_SCALES = GROUP * 16  # bytes of a group's absmax, before its codes


class Blocks(NamedTuple):
    """A [rows, cols] matrix in bitsandbytes' order: codes uint8 [rows * cols / 2], absmax float32
    [rows * cols / 64]."""

    codes: Tensor
    absmax: Tensor
    rows: int
    cols: int


def packed_bytes(rows: int, cols: int) -> int:
    """Bytes of the codes, then the absmax, in bitsandbytes' order."""
    return rows * cols // 2 + rows * cols // SPAN * 4


def of_packed(packed: Tensor, rows: int, cols: int) -> Blocks:
    """`in_place` in memory of its own."""
    return in_place(packed.clone(), rows, cols)


def in_place(packed: Tensor, rows: int, cols: int) -> Blocks:
    """Lays a packed nf4 matrix anew within its bytes: codes, then absmax; returns views of it.

    The rows of an interleaved gate_up matrix stay interleaved. packed: uint8, the matrix's bytes,
    contiguous, beginning at a multiple of 4 bytes. No format reads it afterwards.

    A strip of tiles at a time: its codes never reach into the next, since tiles hold absmax, too.
    Beside the matrix it takes SCRATCH_BYTES at most, as long as its absmax alone do not.
    """
    check_cols("nf4", cols)
    tiles, size = pad(rows, TILE_ROWS) // TILE_ROWS, FORMATS["nf4"].tile_bytes(cols)
    if packed.numel() != tiles * size:
        raise QuantizationError(
            f"an nf4 matrix [{rows}, {cols}] takes {tiles * size} bytes, not {packed.numel()}"
        )
    there, flat = views(packed, rows, cols), packed.view(tiles, size)
    absmax = torch.empty((tiles, TILE_ROWS, cols // SPAN), device=packed.device)
    strip = max(1, (SCRATCH_BYTES - absmax.numel() * 4) // (TILE_ROWS * cols))
    for first in range(0, tiles, strip):
        part = flat[first : first + strip]
        _absmax_of(part, absmax[first : first + strip])
        codes = _codes_of(part, cols)[: rows - first * TILE_ROWS]  # from here on not of `part`
        start = first * TILE_ROWS * cols // 2
        to = there.codes[start : start + codes.numel()].view(codes.shape)
        one, other = codes[..., 0::2], codes[..., 1::2]
        torch.bitwise_or(one << 4, other & 15, out=to[..., :2])
        torch.bitwise_or(one & 0xF0, other >> 4, out=to[..., 2:])
    there.absmax.copy_(absmax.view(-1)[: there.absmax.numel()])
    return there


def _groups(tiles: Tensor) -> Iterator[Tensor]:
    # uint8 [n, tile_bytes] -> [n, groups, bytes]: the whole ones, then the shorter one, if any
    size = _SCALES + GROUP * BLOCK * TILE_ROWS // 2
    whole = tiles.shape[1] // size
    if whole:
        yield tiles[:, : whole * size].view(-1, whole, size)
    if tiles.shape[1] % size:
        yield tiles[:, None, whole * size :]


def _absmax_of(tiles: Tensor, to: Tensor) -> None:
    # [n, tile_bytes] -> float32 [n, 8 rows, spans]
    first = 0
    for group in _groups(tiles):
        # [tile, group, span, row] -> [tile, row, group, span]; the shorter group has some unused
        found = group[:, :, :_SCALES].view(torch.float32).view(*group.shape[:2], -1, TILE_ROWS)
        found = found.permute(0, 3, 1, 2)[..., : to.shape[2] - first]
        room = to[:, :, first : first + found.shape[2] * found.shape[3]]
        room.view(found.shape).copy_(found)
        first += room.shape[2]


def _codes_of(tiles: Tensor, cols: int) -> Tensor:
    # [n, tile_bytes] -> uint8 [n * 8 rows, cols / 8, 4]: low halves are the first four columns of
    # eight
    out = tiles.new_empty((len(tiles), TILE_ROWS, cols // 8, 4))
    first = 0
    for group in _groups(tiles):
        # [tile, group, block, pair, row, column] -> [tile, row, group, block, pair, column]
        found = group[:, :, _SCALES:].view(*group.shape[:2], -1, 4, TILE_ROWS, 4)
        found = found.permute(0, 4, 1, 2, 3, 5)
        room = out[:, :, first : first + found.shape[2] * found.shape[3] * 4]
        room.view(found.shape).copy_(found)
        first += room.shape[2]
    return out.flatten(0, 1)


def views(packed: Tensor, rows: int, cols: int) -> Blocks:
    """What `in_place` left in the bytes of a matrix, with which `packed` begins."""
    half = rows * cols // 2
    absmax = packed[half : packed_bytes(rows, cols)].view(torch.float32)
    return Blocks(packed[:half], absmax, rows, cols)


def taken(blocks: Blocks, ids: Tensor) -> Blocks:
    """The rows `ids`, int64 [n], of a matrix as one of their own."""
    codes = blocks.codes.view(blocks.rows, -1)[ids]
    absmax = blocks.absmax.view(blocks.rows, -1)[ids]
    return Blocks(codes.view(-1), absmax.view(-1), ids.numel(), blocks.cols)


@functools.cache
def _functional() -> Any:
    # importing it on a machine whose CPU could do more says so on standard error
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as found
    finally:
        log.setLevel(level)
    return found


def _state(blocks: Blocks) -> Any:
    return _functional().QuantState(
        absmax=blocks.absmax,
        shape=torch.Size((blocks.rows, blocks.cols)),
        code=constant("nf4", blocks.codes.device),
        blocksize=SPAN,
        quant_type="nf4",
        dtype=torch.float32,
    )


def dequantized(blocks: Blocks) -> Tensor:
    """The [rows, cols] matrix, float32, by bitsandbytes."""
    found: Tensor = _functional().dequantize_4bit(blocks.codes.reshape(-1, 1), _state(blocks))
    return found.reshape(blocks.rows, blocks.cols)


def product(x: Tensor, blocks: Blocks) -> Tensor:
    """x [T, cols] float32 -> [T, rows] by bitsandbytes: its gemv for one token, else its float32
    weights, of a large matrix a strip of rows at a time, and a matrix product.

    On a CPU always the latter: its gemv there rounds to bf16, and aborts on CPUs without that.
    """
    codes, absmax, rows, cols = blocks
    if len(x) == 1 and x.device.type != "cpu":
        found: Tensor = _functional().gemv_4bit(x, codes.reshape(-1, 1), state=_state(blocks))
        return found.reshape(1, rows)
    strip = strip_rows(cols)
    if rows <= strip:
        return torch.matmul(x, dequantized(blocks).T)
    out = x.new_empty((len(x), rows))
    for at in range(0, rows, strip):
        n = min(strip, rows - at)
        part = codes[at * cols // 2 :][: n * cols // 2], absmax[at * cols // SPAN :]
        some = Blocks(part[0], part[1][: n * cols // SPAN], n, cols)
        torch.matmul(x, dequantized(some).T, out=out[:, at : at + n])
    return out
