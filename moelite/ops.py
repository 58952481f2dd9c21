"""Format-free kernels: norms, rotary embedding, the key-value cache, attention.

All work row by row in a fixed order, so a token's bits do not depend on the chunk it came in.
Heads are padded to D8, head_dim rounded up to a multiple of 8, with zeros.
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
    take,
    zero_f32,
)

EMPTY = np.zeros(0, np.float32)  # stands for "no weight" or "no bias"


# --- norms --------------------------------------------------------------------------------------


@kernel
def rms_norm(x, size, groups, weight, eps, out):
    """RMSNorm (Zhang & Sennrich 2019) of `groups` runs of `size` values in each row.

    x float32 [T, >= groups * size], out float32 likewise (may be x itself), weight [size] or empty:
    out = x / sqrt(mean(x^2) + eps) * weight.
    """
    eights = size // 8
    for t in range(x.shape[0]):
        for g in range(groups):
            at = t * x.shape[1] + g * size
            acc = zero_f32()
            for i in range(eights):
                v = load_f32(x, at + i * 8)
                acc = fma_f32(v, v, acc)
            total = sum_f32(acc)
            for i in range(g * size + eights * 8, (g + 1) * size):
                total += x[t, i] * x[t, i]
            scale = np.float32(1) / math.sqrt(total / np.float32(size) + eps)
            for i in range(size):
                scaled = x[t, g * size + i] * scale
                out[t, g * size + i] = scaled * weight[i] if weight.size else scaled


@kernel
def layer_norm(x, size, weight, bias, eps, out):
    """LayerNorm (Ba et al. 2016), x [T, >= size]: (x - mean) / sqrt(var + eps) * weight + bias."""
    for t in range(x.shape[0]):
        mean = np.float32(0)
        for i in range(size):
            mean += x[t, i]
        mean /= np.float32(size)
        spread = np.float32(0)
        for i in range(size):
            spread += (x[t, i] - mean) * (x[t, i] - mean)
        scale = np.float32(1) / math.sqrt(spread / np.float32(size) + eps)
        for i in range(size):
            scaled = (x[t, i] - mean) * scale
            scaled = scaled * weight[i] if weight.size else scaled
            out[t, i] = scaled + bias[i] if bias.size else scaled


# --- element by element, on float32 [T, width] ---------------------------------------------------


@kernel
def add_rows(x, size, y):
    """x[:, :size] += y[:, :size]."""
    for t in range(x.shape[0]):
        for i in range(size):
            x[t, i] += y[t, i]


@kernel
def add_bias(x, bias):
    """x[:, :n] += bias [n]."""
    for t in range(x.shape[0]):
        for i in range(bias.size):
            x[t, i] += bias[i]


@kernel
def clamp(x, size, limit):
    """Clamps x[:, :size] to [-limit, limit]."""
    for t in range(x.shape[0]):
        for i in range(size):
            x[t, i] = min(max(x[t, i], -limit), limit)


@inlined
def silu_gate_8(gate, up, at):
    """gate[at : at + 8] = silu(gate) * up, with silu(g) = g / (1 + exp(-g))."""
    g = load_f32(gate, at)
    s = add_f32(splat_f32(np.float32(1)), exp_f32(sub_f32(zero_f32(), g)))
    store_f32(gate, at, mul_f32(div_f32(g, s), load_f32(up, at)))


@kernel
def silu_gate(gate, up, size):
    """gate[:, :size] = silu(gate) * up; zero from size to the width, a multiple of 8."""
    for t in range(gate.shape[0]):
        for c in range(0, (size + 7) // 8 * 8, 8):
            silu_gate_8(gate, up, t * gate.shape[1] + c)
        gate[t, size:] = np.float32(0)


@kernel
def scale_by_sigmoid(x, size, logits):
    """x[:, :size] *= sigmoid(logits[:, 0])."""
    for t in range(x.shape[0]):
        g = np.float32(1) / (np.float32(1) + np.float32(math.exp(-logits[t, 0])))
        for i in range(size):
            x[t, i] *= g


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


@kernel
def rope(x, heads, head_dim, cos, sin, interleaved):
    """Rotates `heads` heads of each row of x [T, >= heads * head_dim]; cos, sin [T, n] by row.

    Pairs (i, i + n) of a head's first 2n values, or (2i, 2i + 1) if interleaved.
    """
    n = cos.shape[1]
    for t in range(x.shape[0]):
        for h in range(heads):
            at = h * head_dim
            for i in range(n):
                a, b = (at + 2 * i, at + 2 * i + 1) if interleaved else (at + i, at + i + n)
                va, vb = x[t, a], x[t, b]
                x[t, a] = va * cos[t, i] - vb * sin[t, i]
                x[t, b] = vb * cos[t, i] + va * sin[t, i]


# --- key-value cache and attention --------------------------------------------------------------


def _load_kv(array: Any, at: int) -> Any:
    """8 values of a cache run as float32, by its dtype; exists in compiled code only."""
    raise TypeError("call it from a kernel")


@overload(_load_kv)
def _load_kv_for(array, at):
    if array.dtype == types.uint16:
        return lambda array, at: load_f16(array, at)
    return lambda array, at: load_f32(array, at)


class AttentionShape(NamedTuple):
    """Sizes of one layer's attention. window: how far a token sees, itself included; 0: all."""

    heads: int
    kv_heads: int
    head_dim: int
    padded_dim: int
    context: int
    window: int
    scale: np.float32


@kernel
def store_kv(x, shape, start, cache):
    """Rows of x [T, NK * D] -> cache [NK * context * D8] (uint16 as fp16, or float32) at positions
    start.. onwards. The padding beyond head_dim stays zero."""
    d, d8 = shape.head_dim, shape.padded_dim
    buffer = np.zeros(d8, np.float32)
    for t in range(x.shape[0]):
        for h in range(shape.kv_heads):
            buffer[:d] = x[t, h * d : h * d + d]
            to = (h * shape.context + start + t) * d8
            for i in range(0, d8, 8):
                _store_kv(cache, to + i, buffer, i)


def _store_kv(array: Any, at: int, buffer: F32, i: int) -> None:
    """8 float32 values into a cache run, by its dtype; exists in compiled code only."""
    raise TypeError("call it from a kernel")


@overload(_store_kv)
def _store_kv_for(array, at, buffer, i):
    if array.dtype == types.uint16:
        return lambda array, at, buffer, i: store_f16(array, at, load_f32(buffer, i))
    return lambda array, at, buffer, i: store_f32(array, at, load_f32(buffer, i))


class AttentionJob(NamedTuple):
    """T queries at positions start.. against a layer's cache, which already holds their keys.

    q, out float32 [T, >= N * D]; k, v the cache; scratch float32 [threads, D8 + context + 8].
    """

    q: F32
    k: Any
    v: Any
    start: int
    scratch: F32
    out: F32


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


@kernel
def attention_job(tid, counter, job, shape):
    """One thread's share of causal grouped-query attention: softmax(q.k * scale) v, per head.

    Two passes over a head's positions, oldest first, so a token's bits depend on its own past only.
    """
    group, d, d8 = shape.heads // shape.kv_heads, shape.head_dim, shape.padded_dim
    query, scores = job.scratch[tid, :d8], job.scratch[tid, d8:]
    piece = take(counter, 1)
    while piece < job.q.shape[0] * shape.heads:
        t, h = piece // shape.heads, piece % shape.heads
        query[:] = np.float32(0)
        query[:d] = job.q[t, h * d : h * d + d]
        last = job.start + t + 1
        first = max(0, last - shape.window) if shape.window > 0 else 0
        at = (h // group * shape.context + first) * d8
        norm = _scores(query, job.k, at, last - first, shape, scores)
        query[:] = np.float32(0)  # now the sum of values
        for j in range(last - first):
            weight = splat_f32(scores[j])
            for i in range(0, d8, 8):
                value = _load_kv(job.v, at + j * d8 + i)
                store_f32(query, i, fma_f32(weight, value, load_f32(query, i)))
        for i in range(d):
            job.out[t, h * d + i] = query[i] / norm
        piece = take(counter, 1)
