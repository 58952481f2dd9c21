"""Triton: products with the formats that lie row after row: f32, bf16, and qmoe's runs of symbols.

Arguments are those of triton_tiles.gemv_tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["base", "rows", "x_step", "out_step"])
def gemv_rows(
    x,
    packed,
    base,
    bases,
    out,
    target,
    rows,
    cols,
    x_step,
    out_step,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # HALF: the words are bf16, else float32. `cols` is specialised: loads are wide where it is a
    # multiple of 16
    p = tl.program_id(1).to(tl.int64)
    begin, to = p * 0 + base, p
    if bases is not None:
        begin = tl.load(bases + p)
        if begin < 0:
            return
    if target is not None:
        to = tl.load(target + p).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    places, column = row.to(tl.int64) * cols, tl.arange(0, COLS)[None, :]
    acc = tl.zeros([ROWS, COLS], tl.float32)
    whole = packed + begin // 16 * 16
    for first in range(0, cols, COLS):
        at = first + column
        there = (row < rows) & (at < cols)
        if HALF:
            words = whole.to(tl.pointer_type(tl.uint16))
            bits = tl.load(words + places + at, mask=there, other=0).to(tl.int32) << 16
            weight = bits.to(tl.float32, bitcast=True)
        else:
            floats = whole.to(tl.pointer_type(tl.float32))
            weight = tl.load(floats + places + at, mask=there, other=0)
        acc += weight * tl.load(x + p * x_step + at, mask=at < cols, other=0.0)
    total = tl.sum(acc, axis=1)[:, None]
    tl.store(out + to * out_step + row, total, mask=row < rows)


@triton.jit
def level(words, at):
    """A bf16 level at uint16 word `at`, float32."""
    return (tl.load(words + at).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def run_of(words, masks, first, index, count):
    """(where symbols are 1, where they are 2, how many there are) of codes index < count."""
    there = index < count
    code = tl.load(words + first + index, mask=there, other=0).to(tl.int32)
    low = tl.load(masks + code * 2, mask=there, other=0)
    high = tl.load(masks + code * 2 + 1, mask=there, other=0)
    return low, high, ((low >> 28) & 15) * 2


@triton.jit
def row_codes(whole, rows, row):
    """(first code, how many) of a row of a qmoe matrix; offsets are uint32."""
    offsets = whole.to(tl.pointer_type(tl.uint32))
    first = tl.load(offsets + row).to(tl.int64)
    return first, (tl.load(offsets + row + 1).to(tl.int64) - first).to(tl.int32)


@triton.jit(do_not_specialize=["base", "rows", "cols", "x_step", "out_step"])
def gemv_qmoe(
    x,
    packed,
    base,
    bases,
    out,
    target,
    rows,
    cols,
    x_step,
    out_step,
    masks,
    CODES: tl.constexpr,
):
    # a program takes a row, CODES codes at a time; a running sum says where their symbols begin.
    # masks int32 [2^16 * 2], see quant/qmoe_dictionary.py
    p = tl.program_id(1).to(tl.int64)
    begin, to = p * 0 + base, p
    if bases is not None:
        begin = tl.load(bases + p)
        if begin < 0:
            return
    if target is not None:
        to = tl.load(target + p).to(tl.int64)
    row = tl.program_id(0)
    whole = packed + begin // 16 * 16
    words = whole.to(tl.pointer_type(tl.uint16))
    first, count = row_codes(whole, rows, row)
    codes = words + 4 * rows.to(tl.int64) + 2
    below, above = tl.zeros([CODES], tl.float32), tl.zeros([CODES], tl.float32)
    start, xs = row * 0, x + p * x_step
    for done in range(0, count, CODES):
        low, high, length = run_of(codes, masks, first, done + tl.arange(0, CODES), count)
        at = start + tl.cumsum(length, axis=0) - length
        for i in tl.static_range(28):
            one, two = (low >> i) & 1, (high >> i) & 1
            value = tl.load(xs + at + i, mask=((one | two) > 0) & (at + i < cols), other=0.0)
            below += tl.where(one > 0, value, 0.0)
            above += tl.where(two > 0, value, 0.0)
        start += tl.sum(length, axis=0)
    lower = tl.sum(below, axis=0) * level(words, 2 * rows + 2 + 2 * row)
    upper = tl.sum(above, axis=0) * level(words, 2 * rows + 3 + 2 * row)
    tl.store(out + to * out_step + row, lower + upper)


@triton.jit(do_not_specialize=["base", "rows", "cols"])
def unpack_qmoe(packed, base, out, rows, cols, masks, CODES: tl.constexpr):
    # the weights that are not 0, into out f32 [rows, cols] of zeros
    row = tl.program_id(0)
    whole = packed + (row.to(tl.int64) * 0 + base) // 16 * 16
    words = whole.to(tl.pointer_type(tl.uint16))
    first, count = row_codes(whole, rows, row)
    codes, start = words + 4 * rows.to(tl.int64) + 2, row * 0
    lower, upper = level(words, 2 * rows + 2 + 2 * row), level(words, 2 * rows + 3 + 2 * row)
    to = out + row.to(tl.int64) * cols
    for done in range(0, count, CODES):
        low, high, length = run_of(codes, masks, first, done + tl.arange(0, CODES), count)
        at = start + tl.cumsum(length, axis=0) - length
        for i in tl.static_range(28):
            one, two = (low >> i) & 1, (high >> i) & 1
            value = tl.where(one > 0, lower, upper)
            tl.store(to + at + i, value, mask=((one | two) > 0) & (at + i < cols))
        start += tl.sum(length, axis=0)
