"""Format-free row operations: norms, rotary embedding, the key-value cache, attention scores.

All work on one row in a fixed order, so a token's bits do not depend on the chunk it came in. Heads
are padded to D8, head_dim rounded up to a multiple of 8, with zeros.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from moelite.jit import inlined, inner, kernel
from moelite.quant.base import F32
from moelite.simd import (
    add_f32,
    div_f32,
    exp_f32,
    fma_f32,
    load_f16,
    load_f32,
    mul_f32,
    splat_f32,
    store_f16,
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
    for i in range(size):
        scaled = (x[at + i] - mean) * scale
        scaled = scaled * norm.weight[i] if norm.weight.size else scaled
        out[to + i] = scaled + norm.bias[i] if norm.bias.size else scaled


# --- element by element -------------------------------------------------------------------------


@inner
def add_run(x, at, y, to, size):
    """x[at : at + size] += y[to : to + size]."""
    for i in range(size):
        x[at + i] += y[to + i]


@inner
def clamp_run(x, at, size, limit):
    """Clamps x[at : at + size] to [-limit, limit]."""
    for i in range(at, at + size):
        x[i] = min(max(x[i], -limit), limit)


@inlined
def silu_gate_8(gate, up, at):
    """gate[at : at + 8] = silu(gate) * up, with silu(g) = g / (1 + exp(-g))."""
    g = load_f32(gate, at)
    s = add_f32(splat_f32(np.float32(1)), exp_f32(sub_f32(zero_f32(), g)))
    store_f32(gate, at, mul_f32(div_f32(g, s), load_f32(up, at)))


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
    n = cos.size
    for i in range(n):
        a, b = (at + 2 * i, at + 2 * i + 1) if interleaved else (at + i, at + i + n)
        va, vb = x[a], x[b]
        x[a] = va * cos[i] - vb * sin[i]
        x[b] = vb * cos[i] + va * sin[i]


# --- key-value cache and attention --------------------------------------------------------------


class AttentionShape(NamedTuple):
    """Sizes of one layer's attention. window: how far a token sees, itself included; 0: all."""

    heads: int
    kv_heads: int
    head_dim: int
    padded_dim: int
    context: int
    window: int
    scale: np.float32


def _load_kv(array: Any, at: int) -> Any:
    """8 values of a cache run as float32, by its dtype; exists in compiled code only."""
    raise TypeError("call it from a kernel")


@overload(_load_kv)
def _load_kv_for(array, at):
    if array.dtype == types.uint16:
        return lambda array, at: load_f16(array, at)
    return lambda array, at: load_f32(array, at)


def _store_kv(array: Any, at: int, buffer: F32, i: int) -> None:
    """8 float32 values into a cache run, by its dtype; exists in compiled code only."""
    raise TypeError("call it from a kernel")


@overload(_store_kv)
def _store_kv_for(array, at, buffer, i):
    if array.dtype == types.uint16:
        return lambda array, at, buffer, i: store_f16(array, at, load_f32(buffer, i))
    return lambda array, at, buffer, i: store_f32(array, at, load_f32(buffer, i))


@inner
def keep_heads(x, at, shape, position, buffer, cache):
    """The kv heads x[at : at + NK * D] -> cache run [NK, context, D8] at `position`.

    buffer float32 [D8]: scratch.
    """
    d, d8 = shape.head_dim, shape.padded_dim
    buffer[:d8] = np.float32(0)
    for h in range(shape.kv_heads):
        for i in range(d):
            buffer[i] = x[at + h * d + i]
        to = (h * shape.context + position) * d8
        for i in range(0, d8, 8):
            _store_kv(cache, to + i, buffer, i)


@inner
def _scores(query, k, at, count, shape, scores):
    # scores[j] = exp(q.k_j * scale - largest) for `count` keys from element `at`; returns their sum
    d8 = shape.padded_dim
    largest = np.float32(-np.inf)
    for j in range(count):
        acc = zero_f32()
        for i in range(0, d8, 8):
            acc = fma_f32(load_f32(query, i), _load_kv(k, at + j * d8 + i), acc)
        scores[j] = sum_f32(acc) * shape.scale
        largest = max(largest, scores[j])
    for j in range(count, count + 7):
        scores[j] = largest
    total, shift = zero_f32(), splat_f32(largest)
    for j in range(0, count, 8):
        e = exp_f32(sub_f32(load_f32(scores, j), shift))
        store_f32(scores, j, e)
        if j + 8 <= count:
            total = add_f32(total, e)
    norm = sum_f32(total)
    for j in range(count // 8 * 8, count):
        norm += scores[j]
    return norm


@inner
def attend_head(q, at, cache, shape, place, scratch, out):
    """out [D] = softmax(q.k * scale) v for the query head q[at : at + D].

    cache: (k, v); place: (kv head, position of the query); scratch float32 [D8 + context + 8]. Two
    passes over the head's positions, oldest first.
    """
    d, d8 = shape.head_dim, shape.padded_dim
    query, scores = scratch[:d8], scratch[d8:]
    query[:] = np.float32(0)
    for i in range(d):
        query[i] = q[at + i]
    k, v = cache
    last = place[1] + 1
    first = max(0, last - shape.window) if shape.window > 0 else 0
    begin = (place[0] * shape.context + first) * d8
    norm = _scores(query, k, begin, last - first, shape, scores)
    query[:] = np.float32(0)  # now the sum of values
    for j in range(last - first):
        weight = splat_f32(scores[j])
        for i in range(0, d8, 8):
            value = _load_kv(v, begin + j * d8 + i)
            store_f32(query, i, fma_f32(weight, value, load_f32(query, i)))
    for i in range(d):
        out[i] = query[i] / norm
