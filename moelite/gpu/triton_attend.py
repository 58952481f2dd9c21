"""Triton: attention of one token over the kept keys and values.

The context is split among programs, each with a running maximum and sum (online softmax), and a
second kernel joins them: flash decoding (Dao et al. 2023). Everything is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "window", "k_head", "v_head"])
def attend_split(
    q,
    k,
    v,
    length,
    count,
    window,
    scale,
    k_head,
    v_head,
    state,
    mixed,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # q [N, SIZE] f32; k, v: heads k_head, v_head elements apart, positions SIZE. length int32 [1],
    # or None: `count`. -> state f32 [N, SPLITS, 2]: maximum, sum; mixed f32 [N, SPLITS, SIZE]
    head, split = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.program_id(1)
    n = count
    if length is not None:
        n = tl.load(length).to(tl.int32)
    oldest = tl.where(window > 0, tl.maximum(n - window, 0), 0)
    each = tl.cdiv(tl.cdiv(n - oldest, SPLITS), BLOCK) * BLOCK
    start = oldest + split * each
    stop = tl.minimum(start + each, n)
    d = tl.arange(0, WIDE)
    held = d < SIZE
    query = tl.load(q + head[:, None] * SIZE + d[None, :], mask=held[None, :], other=0.0) * scale
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total, acc = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS, WIDE], tl.float32)
    kv = (tl.program_id(0) * HEADS // GROUP).to(tl.int64)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        there = (at < stop)[:, None] & held[None, :]
        places = at.to(tl.int64)[:, None] * SIZE + d[None, :]
        key = tl.load(k + kv * k_head + places, mask=there, other=0.0).to(tl.float32)
        value = tl.load(v + kv * v_head + places, mask=there, other=0.0).to(tl.float32)
        score = tl.sum(query[:, None, :] * key[None, :, :], axis=2)
        score = tl.where((at < stop)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight, times = tl.exp(score - higher[:, None]), tl.exp(top - higher)
        total = total * times + tl.sum(weight, axis=1)
        acc = acc * times[:, None] + tl.sum(weight[:, :, None] * value[None, :, :], axis=1)
        top = higher
    to = head * SPLITS + split
    tl.store(state + to * 2, top)
    tl.store(state + to * 2 + 1, total)
    tl.store(mixed + to[:, None] * SIZE + d[None, :], acc, mask=held[None, :])


@triton.jit
def attend_join(state, mixed, out, SIZE: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    # the splits of a head -> out [N, SIZE]; an empty split has maximum -inf and counts for nothing
    head, split, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, WIDE)
    at = head * SPLITS + split
    top, total = tl.load(state + at * 2), tl.load(state + at * 2 + 1)
    weight = tl.exp(top - tl.max(top, axis=0))
    held = d < SIZE
    part = tl.load(mixed + at[:, None] * SIZE + d[None, :], mask=held[None, :], other=0.0)
    acc = tl.sum(weight[:, None] * part, axis=0)
    whole = tl.sum(weight * total, axis=0)
    tl.store(out + head * SIZE + d, acc / whole, mask=held)
