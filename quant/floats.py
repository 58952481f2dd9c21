"""The row-major float product that `f32` and `bf16` share: they differ in one load instruction.

A result is the sum over columns in 8 lanes, eights in order, then over the lanes. The columns past
the last eight are read from a zero-filled copy, so no load passes the matrix's end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moelite.jit import inlined, inner
from moelite.simd import fma_f32, load_f32, sum_f32, zero_f32


def make_multiply(load: Any, size: int, name: str) -> Any:
    """The `multiply` of a row-major format whose word `load` reads 8 weights of `size` bytes."""
    args = load, size, name
    four_rows, four_tokens, last = _four_rows(*args), _four_tokens(*args), _last(*args)

    def tokens4(matrix, act, job, p, rows, tail):
        # positions p .. p + 3 times every row of `rows`, a weight being loaded once for all four
        packed, base, cols = matrix.packed, matrix.base, matrix.cols
        src, dst, out, width, x = job.source, job.target, job.out, job.width, act.x
        o0, o1 = src[p] * act.width, src[p + 1] * act.width
        o2, o3 = src[p + 2] * act.width, src[p + 3] * act.width
        for r in range(rows[0], rows[1]):
            at = base + r * cols * size
            a0, a1, a2, a3 = four_tokens(packed, at, cols // 8, x, (o0, o1, o2, o3))
            out[dst[p] * width + r] = last(a0, packed, at, cols, x, o0, tail)
            out[dst[p + 1] * width + r] = last(a1, packed, at, cols, x, o1, tail)
            out[dst[p + 2] * width + r] = last(a2, packed, at, cols, x, o2, tail)
            out[dst[p + 3] * width + r] = last(a3, packed, at, cols, x, o3, tail)

    def token1(matrix, act, job, p, rows, tail):
        # position p times every row of `rows`, four rows at once to keep four sums in flight
        packed, base, cols = matrix.packed, matrix.base, matrix.cols
        step, r, stop, x = cols * size, rows[0], rows[1], act.x
        off, to, out = job.source[p] * act.width, job.target[p] * job.width, job.out
        while r < stop:
            at = base + r * step
            # near the end one row is read four times, never what lies behind the matrix
            gap = step if r + 4 <= stop else 0
            a0, a1, a2, a3 = four_rows(packed, at, gap, cols // 8, x, off)
            out[to + r] = last(a0, packed, at, cols, x, off, tail)
            if gap:
                out[to + r + 1] = last(a1, packed, at + step, cols, x, off, tail)
                out[to + r + 2] = last(a2, packed, at + 2 * step, cols, x, off, tail)
                out[to + r + 3] = last(a3, packed, at + 3 * step, cols, x, off, tail)
            r += 4 if gap else 1

    tokens4, token1 = inner(tokens4, name), inner(token1, name)

    def multiply(matrix, act, job, start, stop, follow):
        # `follow` is left to the processor: rows are long runs, and compute is not what bounds them
        tail = np.zeros(32, np.uint8)
        p = job.first
        while p < job.last:
            if p + 4 <= job.last:
                tokens4(matrix, act, job, p, (start, stop), tail)
                p += 4
            else:
                token1(matrix, act, job, p, (start, stop), tail)
                p += 1

    return inner(multiply, name)


def _four_rows(load: Any, size: int, name: str) -> Any:
    def four_rows(packed, at, step, eights, x, off):
        # 4 rows at byte at, at + step, ... times the same activations
        a0, a1, a2, a3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
        for i in range(eights):
            v = load_f32(x, off + i * 8)
            w = at + i * 8 * size
            a0 = fma_f32(load(packed, w), v, a0)
            a1 = fma_f32(load(packed, w + step), v, a1)
            a2 = fma_f32(load(packed, w + 2 * step), v, a2)
            a3 = fma_f32(load(packed, w + 3 * step), v, a3)
        return a0, a1, a2, a3

    return inlined(four_rows, name)


def _four_tokens(load: Any, size: int, name: str) -> Any:
    def four_tokens(packed, at, eights, x, offs):
        # one row times 4 activation rows
        a0, a1, a2, a3 = zero_f32(), zero_f32(), zero_f32(), zero_f32()
        for i in range(eights):
            w = load(packed, at + i * 8 * size)
            a0 = fma_f32(w, load_f32(x, offs[0] + i * 8), a0)
            a1 = fma_f32(w, load_f32(x, offs[1] + i * 8), a1)
            a2 = fma_f32(w, load_f32(x, offs[2] + i * 8), a2)
            a3 = fma_f32(w, load_f32(x, offs[3] + i * 8), a3)
        return a0, a1, a2, a3

    return inlined(four_tokens, name)


def _last(load: Any, size: int, name: str) -> Any:
    def last(acc, packed, at, cols, x, off, tail):
        # adds the columns after the last whole eight, then the lanes
        done = cols // 8 * 8
        if done == cols:
            return sum_f32(acc)
        for i in range((cols - done) * size):
            tail[i] = packed[at + done * size + i]
        return sum_f32(fma_f32(load(tail, 0), load_f32(x, off + done), acc))

    return inlined(last, name)
