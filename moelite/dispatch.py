"""Matrix products over every format, and the int8 blocks of activations that most formats read.

A format is chosen by its code at run time, once for a strip of rows, so one compiled kernel serves
all formats and mixes of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moelite.jit import inlined, inner, kernel
from moelite.quant import FORMATS
from moelite.quant.base import Act
from moelite.simd import (
    abs_f32,
    add_f32,
    f32_as_i32,
    largest_f32,
    load_f32,
    max_f32,
    mul_f32,
    round_f32,
    splat_f32,
    store_f32_as_i8,
    sub_f32,
    sum_f32,
    sum_i32,
    zero_f32,
)
from moelite.sync import done, take, wait

STRIP = 32  # rows a thread takes at a time; a multiple of the 32-column blocks of the next matrix

I64 = npt.NDArray[np.int64]


# --- one entry for all formats ------------------------------------------------------------------


def _chosen(part: str, arguments: str) -> Any:
    """A function of a Matrix that calls the `part` of its format: one branch per file in quant/.

    It is written as text, so that a new format needs no line here and all branches are compiled at
    one level: a chain of functions would have the compiler optimize the last format once per link.
    """
    lines = [f"def chosen(matrix, {arguments}):"]
    scope: dict[str, Any] = {}
    for fmt in FORMATS.values():
        scope[fmt.name] = getattr(fmt, part)
        lines += [f"    if matrix.fmt == {fmt.code}:", f"        {fmt.name}(matrix, {arguments})"]
    exec("\n".join(lines), scope)
    return inner(scope["chosen"], part)


multiply = _chosen("multiply", "act, job, start, stop")
unpack_row = _chosen("row", "r, out")


# --- activations --------------------------------------------------------------------------------


@inlined
def quantize_block(act, at, k):
    # x[at : at + 32] -> block k of the int8 planes. A NaN or infinity shows: the scale is NaN.
    x, q = act.x, act.q
    v0, v1 = load_f32(x, at), load_f32(x, at + 8)
    v2, v3 = load_f32(x, at + 16), load_f32(x, at + 24)
    largest = largest_f32(
        max_f32(max_f32(abs_f32(v0), abs_f32(v1)), max_f32(abs_f32(v2), abs_f32(v3)))
    )
    zero = zero_f32()
    seen = add_f32(
        add_f32(mul_f32(v0, zero), mul_f32(v1, zero)), add_f32(mul_f32(v2, zero), mul_f32(v3, zero))
    )
    finite = sum_f32(seen) == np.float32(0)
    inverse = np.float32(0)
    if finite and largest > np.float32(0):
        inverse = np.float32(127) / largest
    # below 127 / float32's largest the inverse overflows: such a block is zero to every purpose
    if inverse > np.float32(3e38):
        inverse = np.float32(0)
        largest = np.float32(0)
    if not finite:
        v0, v1, v2, v3 = zero, zero, zero, zero
    by = splat_f32(inverse)
    r0, r1 = round_f32(mul_f32(v0, by)), round_f32(mul_f32(v1, by))
    r2, r3 = round_f32(mul_f32(v2, by)), round_f32(mul_f32(v3, by))
    store_f32_as_i8(q, k * 32, r0)
    store_f32_as_i8(q, k * 32 + 8, r1)
    store_f32_as_i8(q, k * 32 + 16, r2)
    store_f32_as_i8(q, k * 32 + 24, r3)
    whole = add_f32(add_f32(r0, r1), add_f32(r2, r3))
    act.bias[k] = np.int32(-64) * sum_i32(f32_as_i32(whole))
    # what rounding left, in 254ths of a step: at most half of one
    parts = splat_f32(np.float32(254))
    e0 = round_f32(mul_f32(sub_f32(mul_f32(v0, by), r0), parts))
    e1 = round_f32(mul_f32(sub_f32(mul_f32(v1, by), r1), parts))
    e2 = round_f32(mul_f32(sub_f32(mul_f32(v2, by), r2), parts))
    e3 = round_f32(mul_f32(sub_f32(mul_f32(v3, by), r3), parts))
    store_f32_as_i8(act.rest, k * 32, e0)
    store_f32_as_i8(act.rest, k * 32 + 8, e1)
    store_f32_as_i8(act.rest, k * 32 + 16, e2)
    store_f32_as_i8(act.rest, k * 32 + 24, e3)
    whole = add_f32(add_f32(e0, e1), add_f32(e2, e3))
    act.rest_bias[k] = np.int32(-64) * sum_i32(f32_as_i32(whole))
    act.scale[k] = largest / np.float32(127) if finite else np.float32(np.nan)


@inner
def quantize_row(act, row):
    """Fills the int8 planes of one row of an Act from its x, if it has any.

    act.width must be act.blocks * 32, zero filled beyond the true columns.
    """
    if act.q.size:
        for k in range(row * act.blocks, (row + 1) * act.blocks):
            quantize_block(act, k * 32, k)


@kernel
def embed_rows(matrix, ids, out):
    """Row ids[t] of a Matrix -> out [T, >= cols] float32."""
    for t in range(ids.size):
        unpack_row(matrix, ids[t], out[t])


@inlined
def strips(rows):
    """How many strips a matrix of `rows` rows has."""
    return (rows + STRIP - 1) // STRIP


@kernel
def linear_job(tid, sync, matrix, act, job):
    """One thread's share of out[target] = x[source] @ W.T."""
    pieces = strips(matrix.rows)
    piece = take(sync, 0)
    while piece < pieces:
        start = piece * STRIP
        multiply(matrix, act, job, start, min(start + STRIP, matrix.rows))
        done(sync, 0)
        piece = take(sync, 0)
    wait(sync, 0, pieces)


def new_act(tokens: int, cols: int, *, quantized: bool) -> Act:
    """A zeroed Act for `tokens` rows of `cols` columns; without int8 blocks if not `quantized`."""
    blocks = -(-cols // 32)
    n = tokens * blocks if quantized else 0
    return Act(
        np.zeros(tokens * blocks * 32, np.float32),
        blocks * 32,
        np.zeros(n * 32, np.int8),
        np.zeros(n, np.float32),
        np.zeros(n, np.int32),
        np.zeros(n * 32, np.int8),
        np.zeros(n, np.int32),
        blocks,
    )


def act_bytes(tokens: int, cols: int, *, quantized: bool) -> int:
    """The size of `new_act(tokens, cols, quantized=quantized)`."""
    blocks = -(-cols // 32)
    return tokens * blocks * (128 + (76 if quantized else 0))
