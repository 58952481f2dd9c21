"""Many tokens times tiles of 8 rows: what `int4` and `int8` share once a tile is unpacked.

Unpacked, one tile, or two side by side where vectors are 512 bits wide, is bytes [blocks, 8 groups,
rows, 4 columns] and float32 scales [blocks, rows]: small enough to stay in the second-level cache
(36 KiB at 2048 columns) while every token passes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moelite import raw
from moelite.jit import WIDE, inlined, inner
from moelite.simd import Narrow, Wide

# Positions from which tiles are unpacked. 4 one by one reach 69 GMAC/s, 16 over unpacked tiles 119;
# where between them it begins to pay was not measured.
MANY = 8
TILES = 2 if WIDE else 1  # tiles unpacked together
# Within a run of tiles the processor's own prefetch is best: asking 2 to 8 KiB ahead took 5 to 50 %
# of the speed. It cannot know where the run goes on, nor start before it has seen a few lines.
JUMP_LINES = 16


@inlined
def ask(matrix, stop, follow):
    """Asks memory for the lines at the address `follow`, if a run that ends before tile `stop` of
    the matrix does not go on there by itself."""
    if follow != raw.address(matrix.packed) + matrix.base + stop * matrix.tile_bytes:
        for i in range(JUMP_LINES):
            raw.prefetch_at(follow + i * 64)


def make_gemm(words: Any, block: Any, name: str, load: Any) -> Any:
    """The product of unpacked tiles with many positions, by the `block` product of the same words.

    gemm(codes, scales, row_scales, act, job, row): rows row .. row + lanes of the result, for all
    positions of the job, in the arithmetic of a format's product of one token. load: see make_many.
    """
    w = words
    zero, load_scales, store, mul, fma = w.zero, w.load_scales, w.store, w.mul, w.fma
    scale_at, lanes = w.splat_f32_at, w.lanes

    def four(codes, scales, act, tokens):
        a0, a1, a2, a3 = zero(), zero(), zero(), zero()
        k0, k1, k2, k3 = tokens
        for b in range(act.blocks):
            w = load(codes, b * lanes * 32)
            s = load_scales(scales, b * lanes)
            a0 = fma(block(w, act, k0 + b), mul(s, scale_at(act.scale, k0 + b)), a0)
            a1 = fma(block(w, act, k1 + b), mul(s, scale_at(act.scale, k1 + b)), a1)
            a2 = fma(block(w, act, k2 + b), mul(s, scale_at(act.scale, k2 + b)), a2)
            a3 = fma(block(w, act, k3 + b), mul(s, scale_at(act.scale, k3 + b)), a3)
        return a0, a1, a2, a3

    def one(codes, scales, act, token):
        acc = zero()
        for b in range(act.blocks):
            s = mul(load_scales(scales, b * lanes), scale_at(act.scale, token + b))
            acc = fma(block(load(codes, b * lanes * 32), act, token + b), s, acc)
        return acc

    four, one = inlined(four, name), inlined(one, name)

    def gemm(codes, scales, row_scales, act, job, row):
        src, dst, out, width, nb = job.source, job.target, job.out, job.width, act.blocks
        last = load_scales(row_scales, 0)
        p = job.first
        while p + 4 <= job.last:
            at = (src[p] * nb, src[p + 1] * nb, src[p + 2] * nb, src[p + 3] * nb)
            a0, a1, a2, a3 = four(codes, scales, act, at)
            store(out, dst[p] * width + row, mul(a0, last))
            store(out, dst[p + 1] * width + row, mul(a1, last))
            store(out, dst[p + 2] * width + row, mul(a2, last))
            store(out, dst[p + 3] * width + row, mul(a3, last))
            p += 4
        while p < job.last:
            acc = one(codes, scales, act, src[p] * nb)
            store(out, dst[p] * width + row, mul(acc, last))
            p += 1

    return inner(gemm, name)


def make_load(words: Any, name: str) -> Any:
    """load8(codes, at): the 8 groups of a block."""
    load, size = words.load_codes, words.lanes * 4

    def load8(codes, at):
        return (
            load(codes, at),
            load(codes, at + size),
            load(codes, at + size * 2),
            load(codes, at + size * 3),
            load(codes, at + size * 4),
            load(codes, at + size * 5),
            load(codes, at + size * 6),
            load(codes, at + size * 7),
        )

    return inlined(load8, name)


def make_block(words: Any, dot: Any, offset: int, name: str) -> Any:
    """block(w, act, k): 8 vectors of codes + 64 * offset times block k of the activations' first
    plane, as float32 lanes of the rows' exact sums."""
    sums, to_f32 = _make_sums(words, dot, name), words.to_f32
    bias_at, times = words.splat_i32_at, _make_times(words, offset, name)

    def block(w, act, k):
        return to_f32(sums(times(bias_at(act.bias, k)), w, act.q, k * 32))

    return inlined(block, name)


def make_fine_block(words: Any, dot: Any, offset: int, name: str) -> Any:
    """As `make_block`, over both planes: sum of code * (q + rest / 254)."""
    sums, to_f32, fma = _make_sums(words, dot, name), words.to_f32, words.fma
    bias_at, times = words.splat_i32_at, _make_times(words, offset, name)
    splat, part = words.splat_f32, np.float32(1 / 254)

    def block(w, act, k):
        whole = to_f32(sums(times(bias_at(act.bias, k)), w, act.q, k * 32))
        rest = to_f32(sums(times(bias_at(act.rest_bias, k)), w, act.rest, k * 32))
        return fma(rest, splat(part), whole)

    return inlined(block, f"{name}.fine")


def _make_sums(words: Any, dot: Any, name: str) -> Any:
    splat4, zero, add = words.splat4, words.zero_i32, words.add_i32

    def sums(s, w, q, x):
        # s + 8 vectors of codes times 32 activations at q[x:]; two chains, since one of 8 products
        # that wait for each other is as long as the processor sees ahead (7 % at one token)
        t = zero()
        s = dot(s, w[0], splat4(q, x))
        t = dot(t, w[1], splat4(q, x + 4))
        s = dot(s, w[2], splat4(q, x + 8))
        t = dot(t, w[3], splat4(q, x + 12))
        s = dot(s, w[4], splat4(q, x + 16))
        t = dot(t, w[5], splat4(q, x + 20))
        s = dot(s, w[6], splat4(q, x + 24))
        t = dot(t, w[7], splat4(q, x + 28))
        return add(s, t)

    return inlined(sums, name)


def _make_times(words: Any, offset: int, name: str) -> Any:
    # what a sum starts from: the bias as often as codes are 64 too high
    zero, add = words.zero_i32, words.add_i32

    def times0(bias):
        return zero()

    def times1(bias):
        return bias

    def times2(bias):
        return add(bias, bias)

    return inlined((times0, times1, times2)[offset], name)


def make_many(unpack: Any, block: Any, codes: tuple[Any, int], name: str, loads: Any = None) -> Any:
    """The product of tiles first .. stop of a matrix with many positions: `many(matrix, act, job,
    first, stop)`, from a format's `unpack` of one tile and its kind of `block` product.

    unpack(packed, at, blocks, (codes, scales, last, lane), lanes) writes the tile at packed[at]
    as lanes lane .. lane + 8 of an unpacked group of `lanes` rows; `last`: scales of whole rows.
    loads: how what `block` multiplies is loaded, and how many bytes a code becomes.
    """
    (dot, offset), (loader, planes) = codes, loads or (make_load, 1)
    narrow = wide = make_gemm(Narrow, block(Narrow, dot, offset, name), name, loader(Narrow, name))
    if WIDE:
        tag = f"{name}.wide"
        wide = make_gemm(Wide, block(Wide, Wide.dot_u8, offset, tag), tag, loader(Wide, tag))

    def many(matrix, act, job, first, stop):
        room = np.empty(act.blocks * TILES * 256 * planes + 64, np.uint8)
        codes = room[-raw.address(room) % 64 :]  # vectors of 64 bytes within their cache lines
        scales = np.empty(act.blocks * TILES * 8, np.float32)
        last = np.empty(TILES * 8, np.float32)
        packed, step, tile = matrix.packed, matrix.tile_bytes, first
        while tile < stop:
            at = matrix.base + tile * step
            if TILES == 2 and tile + 2 <= stop:
                unpack(packed, at, act.blocks, (codes, scales, last, 0), 16)
                unpack(packed, at + step, act.blocks, (codes, scales, last, 8), 16)
                wide(codes, scales, last, act, job, tile * 8)
                tile += 2
            else:
                unpack(packed, at, act.blocks, (codes, scales, last, 0), 8)
                narrow(codes, scales, last, act, job, tile * 8)
                tile += 1

    return inner(many, name)
