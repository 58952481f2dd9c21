"""Kernels by Triton: which kernel runs with what, for every operation of products.Kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moelite.errors import QuantizationError
from moelite.gpu import triton_attend, triton_rows, triton_steps, triton_tiles
from moelite.gpu.products import FEW, Kernels, Norm
from moelite.gpu.triton_decode import KINDS
from moelite.gpu.unpack import BLOCK_BYTES, constant, head_bytes
from moelite.quant import FORMATS
from moelite.quant.base import BLOCK, TILE_ROWS, pad
from moelite.quant.vq_tables import PLANES

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a format's product is cut: tiles of a program, units of columns at a time, warps.

    Fewer units than threads: the compiler then loads activations where they are used, and moves
    none between threads.
    """

    tiles: int = 1
    units: int = 64
    warps: int = 4


# What scripts/device-kernels --tune found; a format that is not named takes Shape().
SHAPES: dict[str, Shape] = {}
UNPACK_CHUNK = 8  # blocks that a program unpacks
ROWS, COLS = 4, 512  # of a float matrix at a time
CODES = 128  # of qmoe at a time, by one warp


def power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def tile_constants(fmt: str, cols: int, device: torch.device) -> tuple[list[Any], dict[str, int]]:
    """(tables, constants of compilation) of a format of tiles."""
    kind = "vq" if fmt.startswith("vq") else fmt
    tables: list[Any] = [None, None]
    sizes = PLANES.get(fmt, ())
    if kind == "vq":
        for plane in range(len(sizes)):
            tables[plane] = constant(f"{fmt}.{plane}", device).view(torch.int32)
    elif kind in ("mxfp4", "nf4", "nf4-dq"):
        tables[0] = constant("mxfp4" if kind == "mxfp4" else "nf4", device)
        tables[1] = constant("absmax", device) if kind == "nf4-dq" else None
    d0, d1 = (*sizes, 0, 0)[:2]
    constants = {"KIND": KINDS.index(kind), "HEAD": head_bytes(fmt, cols), "D0": d0, "D1": d1}
    constants["SCALES"] = BLOCK_BYTES[fmt][0]
    constants["UNIT"] = 4 if kind in ("vq", "int8") else 8
    return tables, constants


class TritonKernels(Kernels):
    """Products straight from packed bytes. A matrix begins at a multiple of 16 bytes."""

    blind = True

    def unpack(self, fmt: str, packed: Tensor, base: int, rows: int, cols: int) -> Tensor:
        _check(packed, base)
        if fmt in ("f32", "bf16"):
            return super().unpack(fmt, packed, base, rows, cols)
        if fmt not in BLOCK_BYTES:
            out = torch.zeros((rows, cols), dtype=torch.float32, device=packed.device)
            masks = constant("masks", packed.device)
            triton_rows.unpack_qmoe[(rows,)](
                packed, base, out, rows, cols, masks, CODES=CODES, num_warps=1
            )
            return out
        out = torch.empty((rows, cols), dtype=torch.float32, device=packed.device)
        tables, constants = tile_constants(fmt, cols, packed.device)
        grid = (-(-rows // TILE_ROWS), -(-cols // (UNPACK_CHUNK * BLOCK)))
        size = FORMATS[fmt].tile_bytes(cols)
        # nf4-dq's product and sum are each rounded: no contraction
        triton_tiles.unpack_tiles[grid](
            *(packed, base, out, rows, cols, size, *tables),
            **constants,
            CHUNK=UNPACK_CHUNK,
            enable_fp_fusion=False,
        )
        return out

    def rounded(self, fmt: str, x: Tensor) -> Tensor:
        planes = FORMATS[fmt].planes
        if planes == 0:
            return x
        x, out = x.contiguous(), torch.empty(x.shape, dtype=torch.float32, device=x.device)
        grid = (len(x), -(-x.shape[1] // 1024))
        triton_steps.round_rows[grid](
            x, out, x.shape[1], PLANES=planes, BLOCKS=32, enable_fp_fusion=False
        )
        return out

    def linear(
        self, fmt: str, x: Tensor, packed: Tensor, base: int, rows: int, cols: int
    ) -> Tensor:
        if len(x) > FEW:
            return super().linear(fmt, x, packed, base, rows, cols)
        _check(packed, base)
        out = torch.empty((len(x), rows), dtype=torch.float32, device=x.device)
        self._multiply(fmt, x.contiguous(), packed, (base, None), (rows, cols), (out, None))
        return out

    def experts(
        self,
        fmt: str,
        x: Tensor,
        arena: Tensor,
        bases: Tensor,
        rows: int,
        cols: int,
        *,
        out: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        _check(arena, 0)
        if out is None:
            out = torch.zeros((len(bases), rows), dtype=torch.float32, device=x.device)
        self._multiply(fmt, x.contiguous(), arena, (0, bases), (rows, cols), (out, target))
        return out

    def _multiply(
        self,
        fmt: str,
        x: Tensor,
        packed: Tensor,
        places: tuple[int, Tensor | None],
        shape: tuple[int, int],
        to: tuple[Tensor, Tensor | None],
    ) -> None:
        (base, bases), (rows, cols), (out, target) = places, shape, to
        count = len(x) if bases is None else len(bases)
        x_step = 0 if len(x) == 1 else cols
        given = (x, packed, base, bases, out, target, rows, cols)
        steps = (x_step, out.stride(0))
        if fmt in ("f32", "bf16"):
            triton_rows.gemv_rows[(-(-rows // ROWS), count)](
                *given, *steps, HALF=fmt == "bf16", ROWS=ROWS, COLS=COLS
            )
        elif fmt not in BLOCK_BYTES:
            triton_rows.gemv_qmoe[(rows, count)](
                *given, *steps, constant("masks", x.device), CODES=CODES, num_warps=1
            )
        else:
            tables, constants = tile_constants(fmt, cols, x.device)
            cut = SHAPES.get(fmt, Shape())
            triton_tiles.gemv_tiles[(-(-rows // (TILE_ROWS * cut.tiles)), count)](
                *(*given, FORMATS[fmt].tile_bytes(cols), *steps, *tables),
                **constants,
                TILES=cut.tiles,
                CHUNK=cut.units * constants["UNIT"] // BLOCK,
                num_warps=cut.warps,
            )

    def gated(self, both: Tensor, size: int, fmt_down: str) -> Tensor:
        both = both.contiguous()
        out = torch.empty((len(both), size), dtype=torch.float32, device=both.device)
        triton_steps.gate_rows[(len(both), -(-size // 512))](
            *(both, out, size, both.shape[1]),
            PLANES=FORMATS[fmt_down].planes,
            BLOCKS=16,
            enable_fp_fusion=False,
        )
        return out

    def normed(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        kind: Norm,
        fmt: str | None = None,
    ) -> Tensor:
        x, size = x.contiguous(), x.shape[1]
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        triton_steps.norm_rows[(len(x),)](
            *(x, weight, bias, out, size, eps),
            CENTRED=kind == "layer",
            PLANES=0 if fmt is None else FORMATS[fmt].planes,
            BLOCKS=power(pad(size, BLOCK) // BLOCK),
            num_warps=4 if size <= 1024 else 8 if size <= 4096 else 16,
            enable_fp_fusion=False,
        )
        return out

    def add_experts(
        self, x: Tensor, parts: Tensor, weights: Tensor, gate: Tensor | None = None
    ) -> None:
        if not (x.is_contiguous() and parts.is_contiguous() and weights.is_contiguous()):
            return super().add_experts(x, parts, weights, gate)
        tokens, size = x.shape
        gate = None if gate is None else gate.reshape(-1).contiguous()
        triton_steps.add_rows[(-(-size // 256), tokens)](
            *(x, parts, weights, gate, size, weights.shape[1]),
            BLOCK=256,
            num_warps=2,
            enable_fp_fusion=False,
        )
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        length: Tensor | int,
        scale: float,
        window: int = 0,
    ) -> Tensor:
        _, heads, size = q.shape
        dense = (size, 1)
        if k.stride()[1:] != dense or v.stride()[1:] != dense:
            return super().attend(q, k, v, length, scale, window)
        q, group, wide = q.contiguous(), heads // len(k), power(size)
        together = 4 if group % 4 == 0 else 2 if group % 2 == 0 else 1
        block = 32 if together < 4 else 16
        splits = min(64, power(-(-256 * together // heads)), power(-(-k.shape[1] // block)))
        state = torch.empty((heads, splits, 2), dtype=torch.float32, device=q.device)
        mixed = torch.empty((heads, splits, size), dtype=torch.float32, device=q.device)
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        here = None if isinstance(length, int) else length
        count = length if isinstance(length, int) else 0
        triton_attend.attend_split[(heads // together, splits)](
            *(q, k, v, here, count, window, scale, k.stride(0), v.stride(0), state, mixed),
            SIZE=size,
            WIDE=wide,
            HEADS=together,
            GROUP=group,
            SPLITS=splits,
            BLOCK=block,
        )
        triton_attend.attend_join[(heads,)](state, mixed, out, SIZE=size, WIDE=wide, SPLITS=splits)
        return out


def _check(packed: Tensor, base: int) -> None:
    if (packed.data_ptr() + base) % 16:
        raise QuantizationError(
            f"a matrix begins at byte {base} of an array at {packed.data_ptr():#x}: "
            "Triton's kernels read 16 bytes at a time",
            fix="begin at a multiple of 16",
        )
