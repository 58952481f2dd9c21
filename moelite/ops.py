"""Format-free row operations: norms, rotary embedding, the key-value cache, attention scores.

All work on one row in a fixed order, so a token's bits do not depend on the chunk it came in. Heads
are padded to D8, head_dim rounded up to a multiple of 8, with zeros.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moelite.jit import inlined, inner, kernel
from moelite.quant.base import F32
from moelite.simd import (
    add_f32,
    div_f32,
    exp_f32,
    fma_f32,
    load_f32,
    mul_f32,
    splat_f32,
    store_f32,
    sub_f32,
    sum_f32,
    zero_f32,
)

EMPTY = np.zeros(0, np.float32)  # stands for "no weight" or "no bias"


# --- norms --------------------------------------------------------------------------------------


class NormWeights(NamedTuple):
    """RMSNorm, or LayerNorm if `centred`, of runs of `size` values; weight or bias may be empty."""

    weight: F32
    bias: F32
    size: int
    eps: np.float32
    centred: bool


@inner
def _spread(x, at, size):
    # mean of x^2 over x[at : at + size]
    acc = zero_f32()
    eights = size // 8
    for i in range(eights):
        v = load_f32(x, at + i * 8)
        acc = fma_f32(v, v, acc)
    total = sum_f32(acc)
    for i in range(at + eights * 8, at + size):
        total += x[i] * x[i]
    return total / np.float32(size)


@inner
def norm_run(x, at, norm, out, to):
    """out[to : to + size] = the norm of x[at : at + size]; both flat, and may be the same.

    RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight. LayerNorm (Ba et al. 2016):
    the same of x - mean, + bias.
    """
    size, mean = norm.size, np.float32(0)
    if norm.centred:
        for i in range(at, at + size):
            mean += x[i]
        mean /= np.float32(size)
        for i in range(size):
            out[to + i] = x[at + i] - mean
        scale = np.float32(1) / math.sqrt(_spread(out, to, size) + norm.eps)
    else:
        scale = np.float32(1) / math.sqrt(_spread(x, at, size) + norm.eps)
    eights = size // 8
    shift, times = splat_f32(mean), splat_f32(scale)
    for i in range(0, eights * 8, 8):
        v = mul_f32(sub_f32(load_f32(x, at + i), shift), times)
        v = mul_f32(v, load_f32(norm.weight, i)) if norm.weight.size else v
        v = add_f32(v, load_f32(norm.bias, i)) if norm.bias.size else v
        store_f32(out, to + i, v)
    for i in range(eights * 8, size):
        scaled = (x[at + i] - mean) * scale
        scaled = scaled * norm.weight[i] if norm.weight.size else scaled
        out[to + i] = scaled + norm.bias[i] if norm.bias.size else scaled


# --- element by element -------------------------------------------------------------------------


@inner
def add_run(x, at, y, to, size):
    """x[at : at + size] += y[to : to + size]."""
    eights = size // 8 * 8
    for i in range(0, eights, 8):
        store_f32(x, at + i, add_f32(load_f32(x, at + i), load_f32(y, to + i)))
    for i in range(eights, size):
        x[at + i] += y[to + i]


@inner
def clamp_run(x, at, size, limit):
    """Clamps x[at : at + size] to [-limit, limit]."""
    for i in range(at, at + size):
        x[i] = min(max(x[i], -limit), limit)


@inlined
def silu_gate_8(both, at, out, to):
    """out[to : to + 8] = silu(gate) * up, with silu(g) = g / (1 + exp(-g)); both[at:]: 8 of gate,
    then 8 of up."""
    g = load_f32(both, at)
    s = add_f32(splat_f32(np.float32(1)), exp_f32(sub_f32(zero_f32(), g)))
    store_f32(out, to, mul_f32(div_f32(g, s), load_f32(both, at + 8)))


# --- rotary embedding ---------------------------------------------------------------------------


@kernel
def rope_table(inv_freq, scale, start, cos, sin):
    """cos, sin float32 [P, n] of angle (start + p) * inv_freq[i], times scale.

    The angle is a float32 product, as checkpoints were trained with; libm evaluates it in float64.
    """
    for p in range(cos.shape[0]):
        for i in range(inv_freq.size):
            angle = np.float32(start + p) * inv_freq[i]
            cos[p, i] = math.cos(np.float64(angle)) * scale
            sin[p, i] = math.sin(np.float64(angle)) * scale


@inner
def rotate_run(x, at, cos, sin, interleaved):
    """Rotates the head x[at:] by cos, sin [n]: pairs (i, i + n), or (2i, 2i + 1) if interleaved."""
    n, eights = cos.size, 0 if interleaved else cos.size // 8 * 8
    for i in range(0, eights, 8):
        c, s = load_f32(cos, i), load_f32(sin, i)
        va, vb = load_f32(x, at + i), load_f32(x, at + i + n)
        store_f32(x, at + i, sub_f32(mul_f32(va, c), mul_f32(vb, s)))
        store_f32(x, at + i + n, add_f32(mul_f32(vb, c), mul_f32(va, s)))
    for i in range(eights, n):
        a, b = (at + 2 * i, at + 2 * i + 1) if interleaved else (at + i, at + i + n)
        va, vb = x[a], x[b]
        x[a] = va * cos[i] - vb * sin[i]
        x[b] = vb * cos[i] + va * sin[i]
