"""nf4 through bitsandbytes: the same codes and absmax in its own order, and its products.

bitsandbytes keeps a matrix row after row: uint8 [rows * cols / 2], two codes a byte, the first in
the high half, and absmax float32 [rows * cols / 64]. Tiles of nf4 never take fewer bytes, so a
matrix in a slot can be laid anew within it (`in_place`). Weights are the same numbers bit for bit.

Only nf4: bitsandbytes' int8 has one scale a row, ours one for 32 columns, so it cannot hold
our int8 without changing its numbers. Products are in the dtype of the activations: float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moelite.errors import QuantizationError
from moelite.gpu.unpack import constant
from moelite.quant.base import BLOCK, GROUP, TILE_ROWS, pad
from moelite.quant.codes import check_cols
from moelite.quant.nf4_pack import SPAN

Tensor = torch.Tensor


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


def to_bitsandbytes(packed: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of a packed nf4 matrix, see Blocks. packed: uint8, the matrix's bytes."""
    check_cols("nf4", cols)
    tiles, blocks = pad(rows, TILE_ROWS) // TILE_ROWS, cols // BLOCK
    whole, rest = divmod(blocks, GROUP)
    flat = packed.reshape(tiles, -1)
    size = pad(blocks, GROUP) * 16 + blocks * 128
    if flat.shape[1] != size:
        raise QuantizationError(
            f"an nf4 matrix [{rows}, {cols}] takes {tiles * size} bytes, not {packed.numel()}"
        )
    group = GROUP * (16 + 128)
    runs = flat[:, : whole * group].reshape(tiles, whole, group)
    scales = [runs[:, :, : GROUP * 16].reshape(tiles, -1)]
    codes = [runs[:, :, GROUP * 16 :].reshape(tiles, -1)]
    if rest:
        scales.append(flat[:, whole * group : whole * group + rest * 16])
        codes.append(flat[:, whole * group + GROUP * 16 :])
    # absmax [tile, span, row] -> [row, span]
    absmax = torch.cat(scales, dim=1).contiguous().view(torch.float32)
    absmax = absmax.reshape(tiles, -1, TILE_ROWS).transpose(1, 2).reshape(tiles * TILE_ROWS, -1)
    # [tile, block, pair, row, column]: low halves are the first four columns of eight
    found = torch.cat(codes, dim=1).reshape(tiles, blocks, 4, TILE_ROWS, 4)
    both = torch.stack([found & 15, found >> 4], dim=3).permute(0, 4, 1, 2, 3, 5)
    pairs = both.reshape(tiles * TILE_ROWS, cols // 2, 2)[:rows]
    joined = (pairs[..., 0] << 4) | pairs[..., 1]
    return joined.reshape(-1), absmax[:rows].reshape(-1).contiguous()


def of_packed(packed: Tensor, rows: int, cols: int) -> Blocks:
    """`to_bitsandbytes` as Blocks, in memory of its own."""
    return Blocks(*to_bitsandbytes(packed, rows, cols), rows, cols)


def in_place(packed: Tensor, rows: int, cols: int) -> Blocks:
    """Lays a packed nf4 matrix anew within its bytes: codes, then absmax; returns views of it.

    The rows of an interleaved gate_up matrix stay interleaved. packed: uint8, contiguous, beginning
    at a multiple of 4 bytes. No format reads it afterwards.
    """
    found = of_packed(packed, rows, cols)
    there = views(packed, rows, cols)
    there.codes.copy_(found.codes)
    there.absmax.copy_(found.absmax)
    return there


def views(packed: Tensor, rows: int, cols: int) -> Blocks:
    """What `in_place` left in the bytes of a matrix."""
    half = rows * cols // 2
    absmax = packed[half : packed_bytes(rows, cols)].view(torch.float32)
    return Blocks(packed[:half], absmax, rows, cols)


def _state(blocks: Blocks) -> Any:
    from bitsandbytes.functional import QuantState

    state: Any = QuantState
    return state(
        absmax=blocks.absmax,
        shape=torch.Size((blocks.rows, blocks.cols)),
        code=constant("nf4", blocks.codes.device),
        blocksize=SPAN,
        quant_type="nf4",
        dtype=torch.float32,
    )


def dequantized(blocks: Blocks) -> Tensor:
    """The [rows, cols] matrix, float32, by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(blocks.codes.reshape(-1, 1), _state(blocks))
    return found.reshape(blocks.rows, blocks.cols)


def product(x: Tensor, blocks: Blocks) -> Tensor:
    """x [T, cols] float32 -> [T, rows] by bitsandbytes: its gemv for one token, else its float32
    weights and a matrix product.

    On a CPU always the latter: its gemv there rounds to bf16, and aborts on CPUs without that.
    """
    if len(x) == 1 and x.device.type != "cpu":
        from bitsandbytes.functional import gemv_4bit

        found: Tensor = gemv_4bit(x, blocks.codes.reshape(-1, 1), state=_state(blocks))
        return found.reshape(1, blocks.rows)
    return torch.matmul(x, dequantized(blocks).T)
