"""The kernels of the vq formats, made from their tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from moelite.jit import inlined, inner
from moelite.quant.tiles import ask, make_block, make_many
from moelite.quant.vq_pack import HEAD
from moelite.quant.vq_tables import ENTRIES
from moelite.simd import (
    Narrow,
    add_i8,
    dot_u7,
    entries4,
    entries8,
    entries16,
    fma_f32,
    load_bf16,
    mul_f32,
    splat_f32,
    splat_f32_at,
    store_f32,
    store_i8x32,
    zero_f32,
)

# Positions from which tiles are unpacked: looking codes up takes most of the time.
MANY = 2
OFFSET = 64  # makes sums of entries unsigned: 1..127


def _make_plane(table: Any, name: str) -> Any:
    # plane(packed, at): a block's codes of one plane -> 8 vectors, as int4's _decode
    flat = np.ascontiguousarray(table).view(np.uint8).reshape(-1)

    def plane4(packed, at):
        return (
            entries4(flat, packed, at),
            entries4(flat, packed, at + 8),
            entries4(flat, packed, at + 16),
            entries4(flat, packed, at + 24),
            entries4(flat, packed, at + 32),
            entries4(flat, packed, at + 40),
            entries4(flat, packed, at + 48),
            entries4(flat, packed, at + 56),
        )

    def plane8(packed, at):
        a, b = entries8(flat, packed, at), entries8(flat, packed, at + 8)
        c, d = entries8(flat, packed, at + 16), entries8(flat, packed, at + 24)
        return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]

    def plane16(packed, at):
        a, b = entries16(flat, packed, at), entries16(flat, packed, at + 8)
        return a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]

    return inlined({4: plane4, 8: plane8, 16: plane16}[table.shape[1]], name)


def _make_decode(tables: list[Any], name: str) -> Any:
    # decode(packed, at): a block -> 8 vectors: columns 4g .. 4g + 3 of 8 rows, as entries + 64
    first = _make_plane(tables[0] + np.int8(OFFSET), f"{name}.first")
    if len(tables) == 1:
        return first
    second, skip = _make_plane(tables[1], f"{name}.second"), ENTRIES // tables[0].shape[1]

    def decode(packed, at):
        v, w = first(packed, at), second(packed, at + skip)
        return (
            add_i8(v[0], w[0]),
            add_i8(v[1], w[1]),
            add_i8(v[2], w[2]),
            add_i8(v[3], w[3]),
            add_i8(v[4], w[4]),
            add_i8(v[5], w[5]),
            add_i8(v[6], w[6]),
            add_i8(v[7], w[7]),
        )

    return inlined(decode, name)


def _make_unpack(decode: Any, block_bytes: int, name: str) -> Any:
    def unpack_tile(packed, tile, blocks, out, lanes):
        # a tile as lanes out.lane .. + 8 of groups of `lanes` rows: entries + 64, and scales
        codes, scales, last, lane = out
        for b in range(blocks):
            w = decode(packed, tile + HEAD + b * block_bytes)
            at, step = b * lanes * 32 + lane * 4, lanes * 4
            store_i8x32(codes, at, w[0])
            store_i8x32(codes, at + step, w[1])
            store_i8x32(codes, at + step * 2, w[2])
            store_i8x32(codes, at + step * 3, w[3])
            store_i8x32(codes, at + step * 4, w[4])
            store_i8x32(codes, at + step * 5, w[5])
            store_i8x32(codes, at + step * 6, w[6])
            store_i8x32(codes, at + step * 7, w[7])
            store_f32(scales, b * lanes + lane, splat_f32(np.float32(1)))
        store_f32(last, lane, load_bf16(packed, tile))

    return inner(unpack_tile, name)


def make_multiply(tables: list[Any], block_bytes: int, name: str) -> Any:
    """A format's `multiply`."""
    decode = _make_decode(tables, name)
    dot = make_block(Narrow, dot_u7, 1, f"{name}.one")
    many = make_many(_make_unpack(decode, block_bytes, name), make_block, (dot_u7, 1), name)

    def one(packed, tile, act, token):
        # a tile, its bytes from packed[tile], times one token
        acc, at = zero_f32(), tile + HEAD
        for k in range(token * act.blocks, (token + 1) * act.blocks):
            sums = dot(decode(packed, at), act, k)
            acc, at = fma_f32(sums, splat_f32_at(act.scale, k), acc), at + block_bytes
        return mul_f32(acc, load_bf16(packed, tile))

    one = inlined(one, name)

    def multiply(matrix, act, job, start, stop, follow):
        first, last, packed = start // 8, (stop + 7) // 8, matrix.packed
        if job.last - job.first >= MANY:
            many(matrix, act, job, first, last)
            return
        for tile in range(first, last):
            at = matrix.base + tile * matrix.tile_bytes
            if tile == last - 1:
                ask(matrix, last, follow)
            for p in range(job.first, job.last):
                acc = one(packed, at, act, job.source[p])
                store_f32(job.out, job.target[p] * job.width + tile * 8, acc)

    return inner(multiply, name)


def make_row(tables: list[Any], block_bytes: int, name: str) -> Any:
    """A format's `row`."""
    first, second = tables[0], tables[-1]
    d, e, skip, two = first.shape[1], second.shape[1], ENTRIES // first.shape[1], len(tables) == 2

    def row(matrix, r, out):
        packed, lane = matrix.packed, r % 8
        tile = matrix.base + r // 8 * matrix.tile_bytes
        scales = np.empty(8, np.float32)
        store_f32(scales, 0, load_bf16(packed, tile))
        for c in range(matrix.cols):
            at = tile + HEAD + c // 32 * block_bytes + lane
            value = np.float32(first[packed[at + c % 32 // d * 8], c % d])
            if two:
                value += np.float32(second[packed[at + skip + c % 32 // e * 8], c % e])
            out[c] = value * scales[lane]

    return inner(row, name)
