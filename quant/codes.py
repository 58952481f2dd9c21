"""Matrices that arrive in 4-bit codes: what a checkpoint of another program holds, as it holds it.

Formats that can carry such numbers without changing them offer `from_codes` or `from_bitsandbytes`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moelite.errors import QuantizationError, UnsupportedError
from moelite.quant import nf4_pack
from moelite.quant.base import BLOCK, F32, U8, pad

# Tables of ggml and of OCP's MX formats. An MX entry is doubled: its scale is half of the block's.
Q4_0 = np.arange(-8, 8, dtype=np.int8)
IQ4_NL = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


class Coded(NamedTuple):
    """A matrix [O, I] of 16-entry codes: w[o, i] = table[codes[o, i]] * scales[o, i // 32].

    table int8 [16], entries from -127 on; codes uint8 [O, I], 0..15; scales float32
    [O, ceil(I / 32)].
    """

    table: npt.NDArray[np.int8]
    codes: U8
    scales: F32

    def check(self) -> None:
        """Raises QuantizationError if shapes, types or values are not as promised."""
        shapes = self.table.shape, self.codes.ndim, self.scales.shape
        want = (16,), 2, (len(self.codes), pad(self.codes.shape[-1], BLOCK) // BLOCK)
        types = [a.dtype.name for a in self]
        if shapes != want or types != ["int8", "uint8", "float32"]:
            raise QuantizationError(
                f"codes {self.codes.dtype} {self.codes.shape} do not go with a table "
                f"{self.table.dtype} {self.table.shape} and scales {self.scales.dtype} "
                f"{self.scales.shape}"
            )
        if self.codes.max(initial=0) > 15 or self.table.min() < -127:
            raise QuantizationError("a code is over 15 or a table entry is -128")
        if bad := int(np.count_nonzero(~np.isfinite(self.scales))):
            raise QuantizationError(
                f"{bad} of {self.scales.size} scales are NaN or infinite",
                fix="the checkpoint is damaged: download it again",
            )


class Nested(NamedTuple):
    """What double quantization adds: absmax ~= table[code] * absmax[i // 256] + offset.

    absmax float32 [ceil(n / 256)]; table float32 [256] (nested_quant_map).
    """

    absmax: F32
    table: F32
    offset: float


class Bitsandbytes(NamedTuple):
    """A 4-bit matrix [O, I] of a bitsandbytes checkpoint: tensors, and what its quant_state says.

    weight uint8, O * I / 2 bytes of any shape, the high half first. absmax float32 [O * I / 64], or
    uint8 codes of it with `nested`.
    """

    weight: U8
    absmax: Any
    shape: tuple[int, int]
    nested: Nested | None = None
    quant_type: str = "nf4"
    blocksize: int = nf4_pack.SPAN

    def check(self) -> None:
        """Raises UnsupportedError for other kinds, QuantizationError for sizes that do not fit."""
        if self.quant_type != "nf4" or self.blocksize != nf4_pack.SPAN:
            raise UnsupportedError(
                f"bitsandbytes weights of type {self.quant_type!r} in blocks of {self.blocksize}; "
                f"only 'nf4' in blocks of {nf4_pack.SPAN} can be taken over",
                fix="quantize the unquantized model instead",
            )
        rows, cols = self.shape
        check_cols("nf4", cols)
        n = rows * cols // nf4_pack.SPAN
        kind = "float32" if self.nested is None else "uint8"
        if self.weight.size * 2 != rows * cols or self.absmax.shape != (n,):
            raise QuantizationError(
                f"{self.weight.size} bytes and {self.absmax.size} absmax do not make a matrix "
                f"[{rows}, {cols}]: that takes {rows * cols // 2} and {n}"
            )
        if (self.weight.dtype.name, self.absmax.dtype.name) != ("uint8", kind):
            raise QuantizationError(
                f"bytes {self.weight.dtype} and absmax {self.absmax.dtype}: "
                f"expected uint8 and {kind}"
            )
        if self.nested is not None:
            nested, table, _ = self.nested
            want = (-(-n // nf4_pack.NESTED),), (256,)
            if (nested.shape, table.shape) != want:
                raise QuantizationError(f"nested absmax {nested.shape}, expected {want[0]}")

    def codes(self) -> U8:
        """uint8 [O, I], 0..15."""
        flat = self.weight.reshape(-1)
        return np.stack([flat >> 4, flat & 15], axis=1).reshape(self.shape)

    def scales(self) -> F32:
        """The absmax that bitsandbytes multiplies by, float32 [O, I / 64]."""
        absmax: F32 = self.absmax
        if self.nested is not None:
            nested, table, offset = self.nested
            absmax = nf4_pack.dequantize_absmax(self.absmax, nested, offset, table)
        return absmax.reshape(self.shape[0], -1)


def check_cols(name: str, cols: int) -> None:
    """Raises QuantizationError if rows of `cols` values do not begin and end with their blocks."""
    if cols % nf4_pack.SPAN:
        raise QuantizationError(
            f"{name} cannot hold rows of {cols} values: its blocks of {nf4_pack.SPAN} would run "
            "across rows",
            fix="choose another format, such as int4",
        )
