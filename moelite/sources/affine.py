"""What the encodings of w = (code - zero) * scale share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moelite.quant.base import BLOCK
from moelite.sources.codes import Codes


def group_size(cols: int, groups: int) -> int | None:
    """Columns of a group, if all groups have the same whole blocks of 32."""
    size = cols // groups
    return size if size * groups == cols and size % BLOCK == 0 else None


def coded(
    codes: npt.NDArray[Any], zero: int, scales: npt.NDArray[Any], block: int, bits: int
) -> Codes | None:
    """The codes [n, I] as a table of 16 or as int8, if they fit there.

    scales: [n, I / block]. zero: the code that means 0.
    """
    scales = np.ascontiguousarray(scales, np.float32)
    if bits == 4:
        table = (np.arange(16) - zero).astype(np.int8)
        return Codes("int4", table, np.ascontiguousarray(codes), scales, block)
    if bits == 8 and zero == 128:
        signed = (codes ^ np.uint8(128)).view(np.int8)
        return Codes("int8", np.empty(0, np.int8), np.ascontiguousarray(signed), scales, block)
    return None
