"""Products straight from 4-bit codes, through a table of 16 int8 entries: for many formats.

A format says where the table, the scale of a block and that of a row come from (`Parts`); how codes
lie is in nibbles_pack.py. Codes are looked up and multiplied by int8 blocks of activations, exactly
in int32; acc += dot * (block scale * x scale) in float32, blocks in order; the row's scale comes
last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moelite.jit import VNNI, inlined, inner
from moelite.quant.base import GROUP, TileLayout
from moelite.quant.nibbles_pack import CODE_BYTES
from moelite.quant.tiles import MANY, ask, make_block, make_many
from moelite.simd import (
    Narrow,
    dot_i8,
    dot_u7,
    fma_f32,
    load_i8x32,
    lookup_high,
    lookup_low,
    mul_f32,
    splat_f32_at,
    store_f32,
    store_i8x32,
    zero_f32,
)

# (dot, how often a table is 64 too high) for tables of |entry| <= 63, and of any int8 but -128. The
# second costs nothing where bytes are multiplied unsigned up to 255 (vnni) or signed (neon).
SMALL = dot_u7, 1
FULL = (dot_u7, 2) if VNNI else (dot_i8, 0)


class Parts(NamedTuple):
    """What tells formats apart, as inlined functions of (packed, where in it) -> vector.

    table: of a tile: its 16 entries, twice, SMALL's or FULL's offset added. scale: of the bytes of
    a block's scales: float32 of 8 rows. last: of a tile: what a row's sum is multiplied by.
    """

    table: Any
    scale: Any
    last: Any


@inlined
def decode(packed, at, table):
    """128 bytes of codes -> 8 vectors: vector g holds columns 4g..4g+3 of 8 rows, looked up."""
    v0, v1 = load_i8x32(packed, at), load_i8x32(packed, at + 32)
    v2, v3 = load_i8x32(packed, at + 64), load_i8x32(packed, at + 96)
    return (
        lookup_low(table, v0),
        lookup_high(table, v0),
        lookup_low(table, v1),
        lookup_high(table, v1),
        lookup_low(table, v2),
        lookup_high(table, v2),
        lookup_low(table, v3),
        lookup_high(table, v3),
    )


@inlined
def store8(codes, at, step, w):
    """Stores the 8 vectors of a block `step` bytes apart."""
    store_i8x32(codes, at, w[0])
    store_i8x32(codes, at + step, w[1])
    store_i8x32(codes, at + step * 2, w[2])
    store_i8x32(codes, at + step * 3, w[3])
    store_i8x32(codes, at + step * 4, w[4])
    store_i8x32(codes, at + step * 5, w[5])
    store_i8x32(codes, at + step * 6, w[6])
    store_i8x32(codes, at + step * 7, w[7])


class _Places(NamedTuple):
    # of a tile: where the first group begins, bytes from group to group, of a group's scales, and
    # of a block's
    head: int
    group: int
    scales: int
    step: int


def make_products(
    name: str, layout: TileLayout, parts: Parts, words: tuple[Any, int]
) -> tuple[Any, Any]:
    """(multiply, row) of a format, see QuantFormat; words: SMALL or FULL."""
    scales = GROUP * layout.scale_bytes
    places = _Places(layout.head, scales + GROUP * CODE_BYTES, scales, layout.scale_bytes)
    table_of, one = parts.table, _make_one(name, places, parts, words)
    many = make_many(_make_unpack(name, places, parts), make_block, words, name)

    def multiply(matrix, act, job, start, stop, follow):
        first, last, packed = start // 8, (stop + 7) // 8, matrix.packed
        if job.last - job.first >= MANY:
            many(matrix, act, job, first, last)
            return
        for tile in range(first, last):
            at = matrix.base + tile * matrix.tile_bytes
            if tile == last - 1:
                ask(matrix, last, follow)
            table = table_of(packed, at)
            for p in range(job.first, job.last):
                acc = one(packed, at, table, act, job.source[p])
                store_f32(job.out, job.target[p] * job.width + tile * 8, acc)

    return inner(multiply, name), _make_row(name, places, parts, np.uint8(64 * words[1]))


def _make_one(name: str, places: _Places, parts: Parts, words: tuple[Any, int]) -> Any:
    (head, group_bytes, scales_bytes, step), (_, scale_of, last_of) = places, parts
    dot = make_block(Narrow, *words, f"{name}.one")

    def block(packed, scales, codes, table, act, k, acc):
        # acc + one block; scales, codes: where its bytes are; k: of the activations
        scale = mul_f32(scale_of(packed, scales), splat_f32_at(act.scale, k))
        return fma_f32(dot(decode(packed, codes, table), act, k), scale, acc)

    block = inlined(block, name)

    def one(packed, tile, table, act, token):
        # a tile, its bytes from packed[tile], times one token
        acc, k, at = zero_f32(), token * act.blocks, tile + head
        for _ in range(act.blocks // GROUP):
            for b in range(GROUP):
                codes = at + scales_bytes + b * CODE_BYTES
                acc = block(packed, at + b * step, codes, table, act, k + b, acc)
            at, k = at + group_bytes, k + GROUP
        for b in range(act.blocks % GROUP):
            codes = at + scales_bytes + b * CODE_BYTES
            acc = block(packed, at + b * step, codes, table, act, k + b, acc)
        return mul_f32(acc, last_of(packed, tile))

    return inlined(one, name)


def _make_unpack(name: str, places: _Places, parts: Parts) -> Any:
    (head, group_bytes, scales_bytes, step), (table_of, scale_of, last_of) = places, parts

    def unpack_tile(packed, tile, blocks, out, lanes):
        # see tiles.make_many
        table = table_of(packed, tile)
        codes, scales, last, lane = out
        for b in range(blocks):
            group = tile + head + b // GROUP * group_bytes
            w = decode(packed, group + scales_bytes + b % GROUP * CODE_BYTES, table)
            store8(codes, b * lanes * 32 + lane * 4, lanes * 4, w)
            store_f32(scales, b * lanes + lane, scale_of(packed, group + b % GROUP * step))
        store_f32(last, lane, last_of(packed, tile))

    return inner(unpack_tile, name)


def _make_row(name: str, places: _Places, parts: Parts, shift: np.uint8) -> Any:
    (head, group_bytes, scales_bytes, step), (table_of, scale_of, last_of) = places, parts

    def row(matrix, r, out):
        packed, lane = matrix.packed, r % 8
        tile = matrix.base + r // 8 * matrix.tile_bytes
        entries = np.empty(32, np.uint8)
        scales, last = np.empty(8, np.float32), np.empty(8, np.float32)
        store_i8x32(entries, 0, table_of(packed, tile))
        store_f32(last, 0, last_of(packed, tile))
        for c in range(matrix.cols):
            b, pair = c // 32, c % 32 // 8
            group = tile + head + b // GROUP * group_bytes
            if c % 32 == 0:
                store_f32(scales, 0, scale_of(packed, group + b % GROUP * step))
            at = group + scales_bytes + b % GROUP * CODE_BYTES + pair * 32 + lane * 4 + c % 4
            byte = np.int64(packed[at])
            entry = np.int8(entries[byte >> 4 if c % 8 >= 4 else byte & 15] - shift)
            out[c] = np.float32(entry) * scales[lane] * last[lane]

    return inner(row, name)
