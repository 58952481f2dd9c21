"""Triton: what comes between products: norms, silu and gate, the experts' sum, and rounding.

Compiled without contraction of a product and a sum into one rounding: activations are to be rounded
as the CPU rounds them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(v):
    """The whole number nearest to v, ties to even; |v| < 2^22."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def round_blocks(v, PLANES: tl.constexpr):
    """v [blocks, 32] as moelite.dispatch.quantize_block makes it, PLANES 0, 1 or 2."""
    if PLANES > 0:
        largest = tl.max(tl.abs(v), axis=1)[:, None]
        finite = tl.sum(v * 0.0, axis=1)[:, None] == 0.0
        some = finite & (largest > 0.0)
        inverse = tl.where(some, tl.math.div_rn(127.0 + largest * 0.0, largest), 0.0)
        tiny = inverse > 3e38
        inverse, largest = tl.where(tiny, 0.0, inverse), tl.where(tiny, 0.0, largest)
        unit = tl.where(finite, v, 0.0) * inverse
        code = nearest(unit)
        if PLANES == 2:
            code += nearest((unit - code) * 254.0) * (1.0 / 254)
        scale = tl.math.div_rn(largest, 127.0 + largest * 0.0)
        v = code * tl.where(finite, scale, float("nan"))
    return v


@triton.jit(do_not_specialize=["cols"])
def round_rows(x, out, cols, PLANES: tl.constexpr, BLOCKS: tl.constexpr):
    # x [T, cols] f32 -> out
    start = tl.program_id(0).to(tl.int64) * cols
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    at = block * 32 + tl.arange(0, 32)[None, :]
    v = tl.load(x + start + at, mask=at < cols, other=0.0)
    tl.store(out + start + at, round_blocks(v, PLANES), mask=at < cols)


@triton.jit(do_not_specialize=["size", "both_step"])
def gate_rows(both, out, size, both_step, PLANES: tl.constexpr, BLOCKS: tl.constexpr):
    # both [K, both_step] f32: 8 of gate, 8 of up, in turn -> out [K, size]
    k = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    at = block * 32 + tl.arange(0, 32)[None, :]
    pair = both + k * both_step + at // 8 * 16 + at % 8
    gate = tl.load(pair, mask=at < size, other=0.0)
    up = tl.load(pair + 8, mask=at < size, other=0.0)
    v = tl.math.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    tl.store(out + k * size + at, round_blocks(v, PLANES), mask=at < size)


@triton.jit(do_not_specialize=["size", "eps"])
def norm_rows(
    x,
    weight,
    bias,
    out,
    size,
    eps,
    CENTRED: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # x [T, size] f32 -> out; a program has a whole row in its registers
    start = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCKS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    there = at < size
    v = tl.load(x + start + at, mask=there, other=0.0)
    count = size.to(tl.float32)
    if CENTRED:
        v = tl.where(there, v - tl.math.div_rn(tl.sum(tl.sum(v, axis=1), axis=0), count), 0.0)
    spread = tl.math.div_rn(tl.sum(tl.sum(v * v, axis=1), axis=0), count)
    root = tl.math.sqrt_rn(spread + eps)
    v *= tl.math.div_rn(root * 0.0 + 1.0, root)
    if weight is not None:
        v *= tl.load(weight + at, mask=there, other=0.0)
    if bias is not None:
        v += tl.load(bias + at, mask=there, other=0.0)
    tl.store(out + start + at, round_blocks(v, PLANES), mask=there)


@triton.jit(do_not_specialize=["size", "top_k"])
def add_rows(x, parts, weights, gate, size, top_k, BLOCK: tl.constexpr):
    # x [T, size] += sum over k of weights [T, K] * parts [T * K, size], times sigmoid(gate [T])
    t = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(top_k):
        part = tl.load(parts + (t * top_k + k) * size + at, mask=there, other=0.0)
        total += part * tl.load(weights + t * top_k + k)
    if gate is not None:
        logit = tl.load(gate + t)
        total *= tl.math.div_rn(logit * 0.0 + 1.0, 1.0 + tl.exp(-logit))
    before = tl.load(x + t * size + at, mask=there, other=0.0)
    tl.store(x + t * size + at, before + total, mask=there)
