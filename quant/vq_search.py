"""The best codes for a group of weights, in the metric of a triangular root.

A group is as many neighbouring columns of a row as the longest entry has. A slot is one code of a
group: an entry of one plane's table at some of its columns. With R the root's diagonal block, the
error of the chosen entries is |(w - s * sum of entries) R|^2 = |y - sum of t|^2 with y = w R / s
and t = entry R: the same search as without a metric, over other tables.

R is upper triangular: an entry reaches the outputs of its own columns and of those behind. So a
group's slots are chosen from left to right, each by the outputs of its own columns, which are then
settled: the sum of the slots' errors is the error. Where two planes add up, the first has one slot
that spans the group, and its best few entries are tried.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moelite.jit import inlined, inner
from moelite.quant.base import F32
from moelite.quant.vq_tables import ENTRIES
from moelite.simd import (
    fma_f32,
    largest_f32,
    load_f32,
    max_f32,
    splat_f32_at,
    store_f32,
)


class Slots(NamedTuple):
    """The codes of a group of `width` columns, plane after plane; the longest plane is the first.

    entries float32 [planes, 256, width]: tables, zero beyond a plane's entry length. plane, start,
    stop int64 [slots]: whose entry, at which columns of the group.
    """

    entries: F32
    plane: Any
    start: Any
    stop: Any
    width: int


def make_slots(tables: list[F32]) -> Slots:
    """The slots of planes with these tables, [256, d] each, the longest first."""
    width = tables[0].shape[1]
    entries = np.zeros((len(tables), ENTRIES, width), np.float32)
    places = []
    for p, table in enumerate(tables):
        d = table.shape[1]
        entries[p, :, :d] = table
        places += [(p, start, start + d) for start in range(0, width, d)]
    plane, start, stop = np.array(places, np.int64).T.copy()
    return Slots(entries, plane, start, stop, width)


class Room(NamedTuple):
    """What a search needs. tables [slots * width * 256]: outputs of every entry. less [slots *
    256]: minus half the squared length of each, over the outputs that its slot is chosen by."""

    tables: F32
    less: F32
    rest: F32
    scores: F32
    ranks: F32
    trial: Any


def new_room(slots: Slots) -> Room:
    """Room for searches in these slots."""
    n = len(slots.plane)
    return Room(
        np.empty(n * slots.width * ENTRIES, np.float32),
        np.empty(n * ENTRIES, np.float32),
        np.empty(slots.width, np.float32),
        np.empty(ENTRIES, np.float32),
        np.empty(ENTRIES, np.float32),
        np.empty(n, np.uint8),
    )


@inner
def prepare(slots, root, room):
    """Fills the tables of searches in the metric of root [width, width], upper triangular."""
    tables, width = room.tables, slots.width
    tables[:] = np.float32(0)
    room.less[:] = np.float32(0)
    for j in range(slots.plane.size):
        entries, start, stop = slots.entries[slots.plane[j]], slots.start[j], slots.stop[j]
        less = room.less[j * 256 : j * 256 + 256]
        for k in range(start, width):
            table = tables[(j * width + k) * 256 : (j * width + k + 1) * 256]
            for i in range(start, min(stop, k + 1)):
                for c in range(256):
                    table[c] += entries[c, i - start] * root[i, k]
            if k < stop:
                for c in range(256):
                    less[c] -= np.float32(0.5) * table[c] * table[c]


@inner
def _score(slots, room, j, scores):
    # rest . t - |t|^2 / 2 of every entry t, over the slot's own outputs; returns the greatest
    tables, rest = room.tables, room.rest
    start, before, at = slots.start[j], room.less, j * 256
    for k in range(start, slots.stop[j], 4):
        t = (j * slots.width + k) * 256
        r0, r1 = splat_f32_at(rest, k), splat_f32_at(rest, k + 1)
        r2, r3 = splat_f32_at(rest, k + 2), splat_f32_at(rest, k + 3)
        for c in range(0, 256, 8):
            a = fma_f32(r0, load_f32(tables, t + c), load_f32(before, at + c))
            a = fma_f32(r1, load_f32(tables, t + 256 + c), a)
            a = fma_f32(r2, load_f32(tables, t + 512 + c), a)
            store_f32(scores, c, fma_f32(r3, load_f32(tables, t + 768 + c), a))
        before, at = scores, 0
    return _largest(scores)


@inlined
def _largest(scores):
    a, b = load_f32(scores, 0), load_f32(scores, 8)
    for c in range(16, 256, 16):
        a, b = max_f32(load_f32(scores, c), a), max_f32(load_f32(scores, c + 8), b)
    return largest_f32(max_f32(a, b))


@inner
def _find(scores, value):
    # the first place of a value; integers, so that the processor can look at many at once
    found = np.int32(255)
    for c in range(256):
        found = min(found, np.int32(c) if scores[c] == value else np.int32(255))
    return found


@inner
def _subtract(slots, room, j, code):
    width, tables, rest = slots.width, room.tables, room.rest
    for k in range(slots.start[j], width):
        rest[k] -= tables[(j * width + k) * 256 + code]


@inner
def _choose(slots, room, j, codes):
    codes[j] = _find(room.scores, _score(slots, room, j, room.scores))
    _subtract(slots, room, j, codes[j])


@inner
def _rate(slots, room, codes):
    # the sum of the scores of slots 1 .. beside the first as it is; codes: room for theirs
    last = codes.size - 1
    total = np.float32(0)
    for j in range(1, last):
        best = _score(slots, room, j, room.scores)
        total += best
        codes[j] = _find(room.scores, best)
        _subtract(slots, room, j, codes[j])
    return total + _score(slots, room, last, room.scores)


@inner
def search(slots, room, y, tries, codes):
    """Codes [slots] for a group y [width]: the outputs that are wanted, in steps of the tables.

    tries: how many entries of the first plane are tried, best first, if there are two planes.
    """
    rest, first = room.rest, 0
    if slots.plane[-1] == 1:
        rest[:] = y
        rank, most = _score(slots, room, 0, room.ranks), np.float32(-np.inf)
        for _ in range(tries):
            c = _find(room.ranks, rank)
            rest[:] = y
            _subtract(slots, room, 0, c)
            total = rank + _rate(slots, room, room.trial)
            if total > most:
                most = total
                codes[0] = c
            room.ranks[c] = -np.inf
            rank = _largest(room.ranks)
        first = 1
    rest[:] = y
    if first == 1:
        _subtract(slots, room, 0, codes[0])
    for j in range(first, codes.size):
        _choose(slots, room, j, codes)
