"""Choosing vq codes and row scales for a matrix, with and without calibration.

Without calibration each group of weights gets the sum of entries that is nearest, at the row scale
that fits a first, quick choice of codes.

With it a row's outputs p = w R count, R the curvature's root: tr(E H E^T) is the sum of |p - q|^2
over the rows, q = what codes stand for times R. R is upper triangular, so groups of columns are
coded from left to right, each for what its own outputs still lack beside the groups before it. That
is GPTQ's error feedback without the inverse. As there, a group's entries reach the outputs of the
same 128 columns at once, the others once for all 128. Of a few scales the one that leaves the least
error stays, for each row. No row's result depends on which others are packed with it.

The row scale is then fitted to the codes by least squares, in the same metric.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moelite.jit import inner, kernel
from moelite.quant.base import BLOCK, F32, TILE_ROWS, U8, TileLayout, pad
from moelite.quant.curvature import Curvature
from moelite.quant.vq_search import make_slots, new_room, prepare, search
from moelite.quant.vq_tables import ENTRIES, STEPS

HEAD = 2 * TILE_ROWS  # row scales bf16 [8]
LAZY = 128  # columns whose errors reach the rest of the matrix together
TILE = 256  # columns that they reach at a time: 128 KiB of the root, which stays in the cache
# Entries of the first plane that are tried with the best of the second. Errors on normal weights at
# 3 bits: 1 .0349, 4 .0281, 8 .0264, 16 .0254, all .0248; the time is in proportion.
TRIES = 8
FACTORS = (0.85, 1.0, 1.15)  # of the scale by the row's spread: rows with long tails want less
LEAST = 1e-34  # root mean square of a row below which it counts as zero


@inner
def _feed(y, first, stop, amounts, root):
    # y[first:stop] -= amounts @ root[:, first:stop]; by fours: a quarter of the stores
    target = y[first:stop]
    for k in range(0, amounts.size, 4):
        a0, a1, a2, a3 = amounts[k], amounts[k + 1], amounts[k + 2], amounts[k + 3]
        r0, r1 = root[k, first:stop], root[k + 1, first:stop]
        r2, r3 = root[k + 2, first:stop], root[k + 3, first:stop]
        for c in range(stop - first):
            target[c] -= (a0 * r0[c] + a1 * r1[c]) + (a2 * r2[c] + a3 * r3[c])


@inner
def _decode(slots, codes, out):
    out[:] = np.float32(0)
    for j in range(codes.size):
        start, entry = slots.start[j], slots.entries[slots.plane[j], codes[j]]
        for k in range(start, slots.stop[j]):
            out[k] += entry[k - start]


@inner
def _code_lazy(slots, room, how, rows, state):
    # codes columns first .. stop of every row, whose errors reach only as far
    blocks, root, tries, first, stop = how
    y, wanted, amounts, codes, sums = state
    width = slots.width
    for at in range(first, stop, width):
        group, behind = at // width, at + width
        prepare(slots, blocks[group], room)
        for r in range(rows):
            found = codes[r, group]
            search(slots, room, y[r, at:behind], tries, found)
            for k in range(width):
                left, want = np.float64(room.rest[k]), np.float64(wanted[r, at + k])
                sums[r, 0] += want * want
                sums[r, 1] += want * (want - left)
                sums[r, 2] += (want - left) * (want - left)
            if root.size:
                amount = amounts[r, at - first : behind - first]
                _decode(slots, found, amount)
                _feed(y[r], behind, stop, amount, root[at:behind])


@kernel
def _code(wanted, slots, room, metric, tries, codes):
    """Codes [n, groups, slots] for outputs wanted [n, I], in steps of the tables, of n rows.

    metric: blocks [groups, width, width], the diagonal of root [I, I], which is empty if there is
    no more to it. Returns float64 [n, 3]: each row's sums of wanted^2, wanted * got and got^2.
    """
    (blocks, root), (rows, cols) = metric, wanted.shape
    sums, y = np.zeros((rows, 3)), wanted.copy()
    amounts = np.zeros((rows, LAZY), np.float32)
    state = y, wanted, amounts, codes, sums
    for first in range(0, cols, LAZY):
        stop = min(first + LAZY, cols)
        _code_lazy(slots, room, (blocks, root, tries, first, stop), rows, state)
        if root.size:
            for tile in range(stop, cols, TILE):
                for r in range(rows):
                    end = min(tile + TILE, cols)
                    _feed(y[r], tile, end, amounts[r, : stop - first], root[first:stop])
    return sums


@kernel
def _outputs(weight, root, out):
    # weight [n, I] @ root [I, I], upper triangular, whatever n is in the same order of additions
    rows, cols = weight.shape
    out[:] = np.float32(0)
    for first in range(0, cols, LAZY):
        stop = min(first + LAZY, cols)
        for tile in range(first, cols, TILE):
            for r in range(rows):
                end = min(tile + TILE, cols)
                _feed(out[r], tile, end, -weight[r, first:stop], root[first:stop])


def _metric(curve: Curvature | None, cols: int, size: int, width: int) -> tuple[F32, F32]:
    # (diagonal blocks, root): of a matrix of `cols` columns, zero beyond, up to `size`
    if curve is None:
        root = np.zeros((0, 0), np.float32)
        blocks = np.zeros((size // width, width, width), np.float32)
        diagonal = np.einsum("gii->gi", blocks)
        diagonal[...] = (np.arange(size) < cols).reshape(-1, width)
        return blocks, root
    root = np.zeros((size, size), np.float32)
    root[:cols, :cols] = curve.root
    squares = root.reshape(size // width, width, size // width, width)
    return np.ascontiguousarray(np.einsum("gigj->gij", squares)), root


def choose(tables: list[Any], weight: F32, cols: int, curve: Curvature | None) -> tuple[U8, Any]:
    """Codes [n, groups, slots] and row scales float64 [n] for weight [n, I], I whole blocks.

    weight: zero from column `cols` on. Rows of almost nothing get scale 0.
    """
    n, size = weight.shape
    slots = make_slots([t.astype(np.float32) for t in tables])
    blocks, root = _metric(curve, cols, size, slots.width)
    squares = np.array([np.square(row, dtype=np.float64).sum() for row in weight])
    spread = np.sqrt(squares / cols)
    start = np.where(spread > LEAST, spread / STEPS, 1.0)
    weight = weight * (spread > LEAST)[:, None].astype(np.float32)
    outputs = weight
    if curve is not None:
        outputs = np.empty_like(weight)
        _outputs(weight, root, outputs)

    def attempt(scale: Any, tries: int, codes: U8) -> tuple[Any, Any]:
        # (the scale that fits the codes found at `scale`, the error then left)
        wanted = outputs * (1 / scale)[:, None].astype(np.float32)
        sums = _code(wanted, slots, new_room(slots), (blocks, root), tries, codes)
        fit = np.divide(sums[:, 1], sums[:, 2], out=np.zeros(n), where=sums[:, 2] > 0)
        return fit * scale, (sums[:, 0] - fit * sums[:, 1]) * scale**2

    codes = np.zeros((n, size // slots.width, len(slots.plane)), np.uint8)
    if curve is None:
        quick, _ = attempt(start, 1, codes)
        return codes, attempt(np.where(quick > 0, quick, start), TRIES, codes)[0]
    scales, least, trial = np.zeros(n), np.full(n, np.inf), codes.copy()
    for factor in FACTORS:
        fitted, error = attempt(start * factor, TRIES, trial)
        better = error < least
        codes[better], scales[better], least[better] = trial[better], fitted[better], error[better]
    return codes, scales


def layout_of(tables: list[Any]) -> TileLayout:
    """The tiles of planes with these tables."""
    return TileLayout(HEAD, 0, sum(ENTRIES // t.shape[1] for t in tables))


def _bf16(values: Any) -> Any:
    # float32 -> uint16, to the nearest, ties to even
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def encode_rows(
    packed: U8, cols: int, start: int, weight: F32, tables: list[Any], curve: Curvature | None
) -> None:
    """Chooses codes and scales for weight [n, I] and writes them as rows start .. start + n."""
    n, blocks = pad(len(weight), TILE_ROWS), pad(cols, BLOCK) // BLOCK
    full = np.zeros((n, blocks * BLOCK), np.float32)
    full[: len(weight), :cols] = weight
    codes, scales = choose(tables, full, cols, curve)
    layout, width = layout_of(tables), tables[0].shape[1]
    size, first = layout.tile_bytes(cols), start // TILE_ROWS
    tiles = packed[first * size : (first + n // TILE_ROWS) * size]
    layout.heads(tiles, cols)[:] = _bf16(scales).reshape(-1, TILE_ROWS).view(np.uint8)
    # codes of a plane: [tile, row, block, group of the block, slot] -> [tile, block, code, row]
    slot, planes = 0, []
    for table in tables:
        n = width // table.shape[1]
        plane = codes[:, :, slot : slot + n].reshape(-1, TILE_ROWS, blocks, BLOCK // width * n)
        planes.append(plane.transpose(0, 2, 3, 1).reshape(len(plane), blocks, -1))
        slot += n
    both = np.concatenate(planes, axis=2)
    for at, _, codes_at in layout.groups(tiles, cols):
        codes_at[...] = both[:, at]
