"""Matrix products over every format, and the int8 blocks of activations that most formats read.

A format is called by address, once for a strip of rows, so one compiled kernel serves all formats
and mixes of them.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
from numba import types

from moelite import raw
from moelite.jit import entry, inlined, inner, kernel
from moelite.quant import FORMATS
from moelite.quant.base import U8, Act, Job, Matrix
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
from moelite.words import flat_text, size_of, value_text

LEAST, MOST = 32, 256  # rows a thread takes at a time

# --- a format's code, by address ----------------------------------------------------------------
#
# Formats are compiled one by one, each when a model first uses it, and called by the addresses that
# a Matrix carries: kernels are compiled once whatever formats there are, and do not contain them.

_PARTS: dict[str, tuple[Any, ...]] = {"product": (Matrix, Act, Job), "row": (Matrix,)}


@functools.cache
def _entry(part: str, fmt: str) -> int:
    # the address of compiled void (int64, int64, ...): Matrix, then Act and Job, then the rest
    name = re.sub(r"\W", "_", f"{part}_{fmt}")  # a format may be called vq-0.5
    scope = {"f32_at": raw.f32_at, "__name__": __name__}
    scope["function"] = getattr(FORMATS[fmt], "multiply" if part == "product" else "row")
    values, count = [], 0
    for kind in _PARTS[part]:
        values.append(value_text(kind, count, "a{}".format, scope))
        count += size_of(kind)
    if part == "row":
        values += [f"a{count}", f"f32_at(a{count + 1}, a{count + 2})"]
    else:
        values += [f"a{count}", f"a{count + 1}", f"a{count + 2}"]
    count += 3
    arguments = ", ".join(f"a{i}" for i in range(count))
    text = f"def {name}({arguments}):\n    function({', '.join(values)})\n"
    exec(compile(text, __file__, "exec"), scope)  # numba keeps code by the file it is from
    return int(entry(scope[name], types.void(*[types.int64] * count)).address)


def matrix_of(fmt: str, packed: U8, base: int, rows: int, cols: int) -> Matrix:
    """A Matrix of a format, whose code is compiled if this process has not done so yet."""
    tile = FORMATS[fmt].tile_bytes(cols)
    return Matrix(_entry("product", fmt), _entry("row", fmt), packed, base, rows, cols, tile)


NO_MATRIX = Matrix(0, 0, np.zeros(0, np.uint8), 0, 0, 0, 0)


def _caller(part: str, names: str, rest: list[str]) -> Any:
    # the compiled function that flattens its arguments and calls the address in matrix.<part>
    words = [f"matrix.{part}"]
    for kind, value in zip(_PARTS[part], names.split(", "), strict=False):
        words += flat_text(kind, value)
    words += rest
    scope: dict[str, Any] = {
        "__name__": __name__,
        "call": raw.call(len(words) - 1),
        "address": raw.address,
    }
    exec(f"def caller({names}):\n    call({', '.join(words)})", scope)
    return inner(scope["caller"], part)


# multiply(matrix, act, job, start, stop, follow), as QuantFormat.multiply
multiply = _caller("product", "matrix, act, job, start, stop, follow", ["start", "stop", "follow"])
# unpack_row(matrix, r, out), as QuantFormat.row
unpack_row = _caller("row", "matrix, r, out", ["r", "address(out)", "out.size"])


@inlined
def place(matrix, r):
    """The address at which the codes of the tile of row r begin."""
    return raw.address(matrix.packed) + matrix.base + r // 8 * matrix.tile_bytes


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
def round_row(act):
    """Fills the int8 planes of the first row of an Act."""
    quantize_row(act, 0)


@inlined
def strip_of(rows, team):
    """How many rows a thread takes at a time of `rows` that a team shares: some pieces for each.

    A multiple of LEAST. Large where there is enough to share: between two strips a stream from
    memory pauses, and 128 rows instead of 32 made decode 12 % faster on one thread (docs/LOG.md).
    """
    return min(max(rows // (4 * team) // LEAST * LEAST, LEAST), MOST)


@inlined
def strips(rows, strip):
    """How many strips a matrix of `rows` rows has."""
    return (rows + strip - 1) // strip


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
