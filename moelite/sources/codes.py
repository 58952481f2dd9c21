"""A matrix that came quantized, as its codes: what a lossless repack starts from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moelite.quant.base import F32


class Codes(NamedTuple):
    """Rows of an [O, I] matrix as codes and block scales, exactly as a checkpoint keeps them.

    kind    "int4", "mxfp4", "nf4": codes uint8 [n, I], 0..15, entries of a table of 16
            "int8": codes int8 [n, I], -128..127, themselves the entries
    table   int8 [16]; empty for "int8" and for "nf4", whose table is `nf4`'s own 16 floats
    scales  float32 [n, ceil(I / block)]: w = entry * scale. For "mxfp4" the table is twice E2M1,
            so that its entries are whole, and the scales are half the stored powers of two.
    block   columns that share a scale
    extra   what the checkpoint keeps to make the scales, where they are coded too. For "nf4" with
            nested scales: "codes" uint8 like scales, "absmax" float32 (one for each "block" codes
            of the whole matrix, rows after rows), "first" (index of the first code among all),
            "map" float32 [256], "offset" float: scale = map[code] * absmax + offset.
    """

    kind: str
    table: npt.NDArray[np.int8]
    codes: npt.NDArray[Any]
    scales: F32
    block: int
    extra: dict[str, Any] = {}  # noqa: RUF012 - never written to


def finer_scales(coded: Codes, block: int) -> F32:
    """The scales of blocks of `block` columns, a divisor of coded.block: each repeated."""
    blocks = -(-coded.codes.shape[1] // block)
    return np.repeat(coded.scales, coded.block // block, axis=1)[:, :blocks]
