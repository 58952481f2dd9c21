"""Choosing int4 codes and scales for a matrix whose inputs calibration has seen.

GPTQ (Frantar et al. 2023, arXiv 2210.17323) over blocks of 32 columns, then descent:

1. A tile's table is fitted (int4_table); a row's scale comes from a search over its blocks as they
   are, with HEADROOM for what feedback will add to them.
2. Blocks from the first to the last. A block's scale is searched as without calibration, but each
   column counts by its share of the output error that no later column can make up for: R[j, j]^2.
   For the stored scales around it all 32 columns are rounded one by one, each making the others
   after it in the block make up for its error, and the scale with the least |E R|^2 wins. Then the
   columns after the block make up for its errors.
3. With scales as they are, columns are visited again: each takes the code that is best given all
   others, until none changes or SWEEPS are over. This takes 3 to 10 % off the error that is left.

H = R R^T and U = R^-1 are those of quant/curvature.py, for all 8 rows of a tile at once, so that
tiles do not depend on each other. Updates of columns more than LAZY away wait for LAZY columns:
they read all of U, and less often that way.
"""

from __future__ import annotations

import numpy as np

from moelite.jit import inner, kernel
from moelite.quant.base import BLOCK, F32, TILE_ROWS, U8
from moelite.quant.curvature import Curvature
from moelite.quant.int4_pack import (
    STEPS,
    code_of,
    encode_plain,
    search_weighed,
    whole_tiles,
    write_tiles,
)
from moelite.quant.int4_table import fit_table

HEADROOM = np.float32(1.25)
LAZY = 128  # columns, a multiple of BLOCK
SWEEPS = 8
_TRIED = 3  # stored scales: the one found and its two neighbours


@inner
def _spread(w, error, factor, span, to):
    # w[:, to] -= error @ factor[span, to], four columns of `error` at a time
    first, last = span
    for j in range(first, last, 4):
        u0, u1 = factor[j, to[0] : to[1]], factor[j + 1, to[0] : to[1]]
        u2, u3 = factor[j + 2, to[0] : to[1]], factor[j + 3, to[0] : to[1]]
        for r in range(w.shape[0]):
            e0, e1, e2, e3 = error[r, j], error[r, j + 1], error[r, j + 2], error[r, j + 3]
            v = w[r, to[0] : to[1]]
            for c in range(v.size):
                v[c] -= e0 * u0[c] + e1 * u1[c] + e2 * u2[c] + e3 * u3[c]


@inner
def _round_block(block, within, share, scales, tables, trial):
    # rounds block [32] with each of `scales`; trial: (weights, codes, errors) [_TRIED, 32] each.
    # Returns which scale leaves least. All scales go column by column side by side, since each
    # column has to wait for the one before.
    weights, codes, errors = trial
    table, nearest = tables
    loss = np.zeros(scales.size, np.float32)
    for i in range(scales.size):
        weights[i] = block
    for j in range(BLOCK):
        ahead = within[j]
        for i in range(scales.size):
            scale, w = scales[i], weights[i, j]
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            code = code_of(w, inverse, nearest)
            e = w - np.float32(table[code]) * scale
            codes[i, j], errors[i, j] = code, e
            loss[i] += e * e * share[j]
            row = weights[i]
            for k in range(BLOCK):
                row[k] -= e * ahead[k]
    return np.argmin(loss)


@inner
def _candidates(found, row_scale, tried, scales):
    # the stored scales next to `found`, and their values; how many
    middle = int(np.rint(found / row_scale)) if row_scale > 0 else 0
    middle = min(max(middle, -126), 126)
    for i in range(_TRIED):
        tried[i] = middle + i - _TRIED // 2
        scales[i] = np.float32(tried[i]) * row_scale


@inner
def _feedback(w, errors, curve, tables, out):
    # steps 1 and 2 for a tile: w [8, I] is used up; errors [8, I] becomes E R. curve: (factor,
    # within [blocks, 32, 32], root's diagonal [I], its square). out: (codes [8, I], scales
    # [8, blocks], row_scales [8])
    (factor, within, diagonal, share), (codes, scales, row_scales) = curve, out
    table, nearest, steps = tables
    cols = w.shape[1]
    shape = (_TRIED, BLOCK)
    trial = np.empty(shape, np.float32), np.empty(shape, np.uint8), np.empty(shape, np.float32)
    tried, values = np.empty(_TRIED, np.int64), np.empty(_TRIED, np.float32)
    for r in range(w.shape[0]):
        largest = np.float32(0)
        for at in range(0, cols, BLOCK):
            block, part = w[r, at : at + BLOCK], share[at : at + BLOCK]
            largest = max(largest, abs(search_weighed(block, part, table, nearest, steps)))
        row_scales[r] = largest * HEADROOM / np.float32(127)
    for at in range(0, cols, BLOCK):
        stop, part = at + BLOCK, share[at : at + BLOCK]
        for r in range(w.shape[0]):
            block = w[r, at:stop]
            found = search_weighed(block, part, table, nearest, steps)
            _candidates(found, row_scales[r], tried, values)
            best = _round_block(block, within[at // BLOCK], part, values, (table, nearest), trial)
            scales[r, at // BLOCK] = tried[best]
            codes[r, at:stop] = trial[1][best]
            for j in range(BLOCK):
                errors[r, at + j] = trial[2][best, j] * diagonal[at + j]
        lazy = at // LAZY * LAZY
        near = min(lazy + LAZY, cols)
        if stop < near:
            _spread(w, errors, factor, (at, stop), (stop, near))
        elif stop < cols:
            _spread(w, errors, factor, (lazy, stop), (stop, cols))


@inner
def _descend(errors, columns, hessian, tables, out):
    # step 3 for a tile. errors [8, I] is E R, so slope = -E H = -errors R^T, half the derivative
    # of the output error by the stored weights; columns [I, I]: R^T
    (codes, scales, row_scales), (table, nearest, _) = out, tables
    rows, cols = errors.shape
    slope = np.zeros(errors.shape, np.float32)
    for j in range(0, cols, 4):
        _spread(slope, errors, columns, (j, j + 4), (0, j + 4))
    for r in range(rows):
        for _ in range(SWEEPS):
            moved = False
            for c in range(cols):
                scale = np.float32(scales[r, c // BLOCK]) * row_scales[r]
                if scale == 0:
                    continue
                value = np.float32(table[codes[r, c]]) * scale
                wish = value - slope[r, c] / hessian[c, c]
                code = code_of(wish, np.float32(1) / scale, nearest)
                if code != codes[r, c]:
                    step, moved = np.float32(table[code]) * scale - value, True
                    codes[r, c] = code
                    row, h = slope[r], hessian[c]
                    for k in range(cols):
                        row[k] += step * h[k]
            if not moved:
                break


@kernel
def _pack(weight, curve, squares, steps, found):
    # weight [n, I] is used up. squares: (R^T, H) [I, I]. found: Encoded
    errors = np.empty((TILE_ROWS, weight.shape[1]), np.float32)
    nearest = np.empty(512, np.uint8)
    for at in range(0, weight.shape[0], TILE_ROWS):
        stop = at + TILE_ROWS
        out = found.codes[at:stop], found.scales[at:stop], found.row_scales[at:stop]
        tables = found.tables[at // TILE_ROWS], nearest, steps
        fit_table(weight[at:stop], curve[3], steps, tables[0], nearest)
        _feedback(weight[at:stop], errors, curve, tables, out)
        _descend(errors, squares[0], squares[1], tables, out)


def encode_rows(
    packed: U8, cols: int, start: int, weight: F32, curve: Curvature | None = None
) -> None:
    """Writes weight [n, I] as rows start..start + n; the rows of a tile depend on no other tile."""
    if curve is None:
        encode_plain(packed, cols, start, weight)
        return
    full, found = whole_tiles(weight)
    root, factor = _padded(curve.root, full.shape[1]), _padded(curve.factor, full.shape[1])
    diagonal = np.ascontiguousarray(np.diagonal(root))
    blocks = [slice(at, at + BLOCK) for at in range(0, full.shape[1], BLOCK)]
    within = np.stack([np.triu(factor[b, b], 1) * diagonal[b, None] for b in blocks])
    _pack(
        full,
        (factor, within, diagonal, diagonal * diagonal),
        (np.ascontiguousarray(root.T), root @ root.T),
        STEPS,
        found,
    )
    write_tiles(packed, cols, start, found)


def _padded(square: F32, size: int) -> F32:
    # columns that are padding have no part in any other's error
    if len(square) == size:
        return square
    out = np.eye(size, dtype=np.float32)
    out[: len(square), : len(square)] = square
    return out
