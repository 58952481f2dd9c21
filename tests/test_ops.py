"""Format-free kernels against plain float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite import ops, sync
from moelite.jit import kernel
from moelite.kernels import Sum, _add_parts
from moelite.kv import KVCache
from moelite.threads import Team, default_threads

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@kernel
def _norm(x, norm, out):
    for t in range(x.shape[0]):
        ops.norm_run(x.reshape(-1), t * x.shape[1], norm, out.reshape(-1), t * out.shape[1])


@pytest.mark.parametrize("size", [64, 20, 7, 8])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_norms(size: int, centred: bool, weighted: bool, biased: bool) -> None:
    """RMSNorm and LayerNorm, with and without weight and bias; the padding is not touched."""
    x = normal(5, size + 4)
    weight = normal(size) if weighted else ops.EMPTY
    bias = normal(size) if biased else ops.EMPTY
    out = np.full_like(x, 7)
    _norm(x, ops.NormWeights(weight, bias, size, np.float32(1e-5), centred), out)
    runs = x[:, :size].astype(np.float64)
    if centred:
        runs = runs - runs.mean(-1, keepdims=True)
    want = runs / np.sqrt((runs**2).mean(-1, keepdims=True) + 1e-5)
    want = want * (weight if weighted else 1) + (bias if biased else 0)
    np.testing.assert_allclose(out[:, :size], want, rtol=1e-5, atol=1e-6)
    assert (out[:, size:] == 7).all()


@kernel
def _rope(x, heads, head_dim, tables, interleaved):
    for t in range(x.shape[0]):
        for h in range(heads):
            at = t * x.shape[1] + h * head_dim
            ops.rotate_run(x.reshape(-1), at, tables[0][t], tables[1][t], interleaved)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_rotates_pairs(interleaved: bool) -> None:
    """Partial rotary: the first 6 of 10 dimensions; a rotation keeps each pair's length."""
    freq = np.array([1.0, 0.1, 0.01], np.float32)
    cos, sin = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)
    ops.rope_table(freq, 1.0, 5, cos, sin)
    angle = np.arange(5, 9)[:, None] * freq.astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angle), rtol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angle), rtol=1e-6, atol=1e-7)
    x = normal(4, 20)
    got = x.copy()
    _rope(got, 2, 10, (cos, sin), interleaved)
    heads, turned = x.reshape(4, 2, 10), got.reshape(4, 2, 10)
    first, second = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(3), slice(3, 6))
    z = (heads[..., first] + 1j * heads[..., second]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(turned[..., first], z.real, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(turned[..., second], z.imag, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(turned[..., 6:], heads[..., 6:])


@kernel
def _keep(x, shape, cache):
    for t in range(x.shape[0]):
        buffer = np.zeros(shape.padded_dim, np.float32)
        ops.keep_heads(x.reshape(-1), t * x.shape[1], shape, t, buffer, cache)


@kernel
def _attend(q, cache, shape, start, scratch, out):
    d, group = shape.head_dim, shape.heads // shape.kv_heads
    for t in range(q.shape[0]):
        for h in range(shape.heads):
            at, where = t * q.shape[1] + h * d, (h // group, start + t)
            target = out[t, h * d : h * d + d]
            ops.attend_head(q.reshape(-1), at, cache, shape, where, scratch, target)


def attend(q, k, v, shape: ops.AttentionShape, kv: str, start: int) -> np.ndarray:
    """Keeps all keys and values, then attends from positions start.. on."""
    dtype = np.uint16 if kv == "f16" else np.float32
    count = shape.kv_heads * shape.context * shape.padded_dim
    cache = np.zeros(count, dtype), np.zeros(count, dtype)
    _keep(k, shape, cache[0])
    _keep(v, shape, cache[1])
    out = np.zeros((len(q), shape.heads * shape.head_dim), np.float32)
    scratch = np.full(shape.padded_dim + shape.context + 8, np.nan, np.float32)
    _attend(q, cache, shape, start, scratch, out)
    return out


def exact(q, k, v, shape: ops.AttentionShape, start: int) -> np.ndarray:
    d, group = shape.head_dim, shape.heads // shape.kv_heads
    out = np.zeros((len(q), shape.heads * d))
    for t in range(len(q)):
        last = start + t + 1
        first = max(0, last - shape.window) if shape.window else 0
        for h in range(shape.heads):
            keys = k[first:last].reshape(last - first, -1, d)[:, h // group].astype(np.float64)
            values = v[first:last].reshape(last - first, -1, d)[:, h // group]
            s = keys @ q[t].reshape(-1, d)[h] * np.float64(shape.scale)
            w = np.exp(s - s.max())
            out[t, h * d : h * d + d] = w @ values / w.sum()
    return out


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (4, 1)]),
    dim=st.sampled_from([8, 20, 64]),
    start=st.integers(0, 40),
    tokens=st.integers(1, 9),
    window=st.sampled_from([0, 1, 5]),
    kv=st.sampled_from(["f16", "f32"]),
)
def test_attention(heads, dim, start, tokens, window, kv) -> None:
    n, nk = heads
    padded = -(-dim // 8) * 8
    shape = ops.AttentionShape(n, nk, dim, padded, 64, window, np.float32(dim**-0.5))
    q, k, v = (
        normal(tokens, n * dim),
        normal(start + tokens, nk * dim),
        normal(start + tokens, nk * dim),
    )
    got = attend(q, k, v, shape, kv, start)
    if kv == "f16":
        k, v = k.astype(np.float16), v.astype(np.float16)
    np.testing.assert_allclose(got, exact(q, k, v, shape, start), rtol=2e-5, atol=3e-6)


def test_attention_with_far_apart_scores() -> None:
    """One key wins by more than exp can show: the result is its value, not NaN."""
    shape = ops.AttentionShape(1, 1, 8, 8, 64, 0, np.float32(1))
    k = np.zeros((11, 8), np.float32)
    k[4] = 100
    v, q = normal(11, 8), np.full((1, 8), 3, np.float32)
    np.testing.assert_allclose(attend(q, k, v, shape, "f32", 10), v[4:5], rtol=1e-6)


@kernel
def _silu(gate, up):
    for i in range(0, gate.size, 8):
        ops.silu_gate_8(gate, up, i)


def test_silu_gate() -> None:
    gate, up = normal(64) * 8, normal(64)
    g = gate.astype(np.float64)
    want = g / (1 + np.exp(-g)) * up
    _silu(gate, up)
    np.testing.assert_allclose(gate, want, rtol=2e-6, atol=1e-7)


@kernel
def _sum(total):
    for t in range(total.tokens):
        _add_parts(total, t)


def test_parts_are_summed_in_the_routers_order() -> None:
    """Large terms of both signs: float32 addition in any other order gives other bits."""
    parts = np.array([1e8, 1.0, -1e8, 3.0], np.float32)
    ones = np.ones((1, 4), np.float32)

    def total(parts: np.ndarray) -> float:
        x = np.zeros(1, np.float32)
        _sum(Sum(x, 1, 1, parts, ones, ops.EMPTY, 1))
        return float(x[0])

    assert total(parts) == ((np.float32(1e8) + np.float32(1)) - np.float32(1e8)) + np.float32(3)
    assert total(parts[[0, 2, 1, 3]]) == 4


def test_a_gate_scales_the_sum_by_its_sigmoid() -> None:
    x, parts = np.zeros((2, 8), np.float32), normal(2, 8)
    gates = normal(2, 8)
    _sum(
        Sum(
            x.reshape(-1),
            8,
            5,
            parts.reshape(-1),
            np.ones((2, 1), np.float32),
            gates.reshape(-1),
            2,
        )
    )
    want = parts / (1 + np.exp(-gates[:, :1].astype(np.float64)))
    np.testing.assert_allclose(x[:, :5], want[:, :5], rtol=1e-6)
    assert not x[:, 5:].any()


@kernel
def _count(tid, state, seen, pieces, slow):
    # two phases: the second may only start when all of the first is there
    piece = sync.take(state, 0)
    while piece < pieces:
        for _ in range(slow * 1000):
            seen[1, piece] += 1
        seen[0, piece] += 1
        sync.done(state, 0)
        piece = sync.take(state, 0)
    sync.wait(state, 0, pieces)
    piece = sync.take(state, 1)
    while piece < pieces:
        seen[2, piece] = seen[0].sum()
        sync.done(state, 1)
        piece = sync.take(state, 1)
    sync.wait(state, 1, pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_team_does_every_piece_once_and_phases_in_order(size: int) -> None:
    """More threads than cores, pieces of uneven length, hundreds of jobs one after the other."""
    team = Team(size)
    for round in range(400):
        pieces = 1 + round % 17
        seen = np.zeros((3, pieces), np.int64)
        team.run(_count, seen, pieces, round % 3, alone=round % 7 == 0)
        assert (seen[0] == 1).all()
        assert (seen[2] == pieces).all(), "a second phase began before the first was over"
    team.close()


def test_a_team_reports_what_a_helper_raised() -> None:
    import threading

    team = Team(3)
    entered = threading.Barrier(3, timeout=30)

    def job(tid, state, fail):
        entered.wait()
        if fail and tid == 2:
            raise ValueError("thread 2 failed")

    with pytest.raises(ValueError, match="thread 2 failed"):
        team.run(job, True)
    team.run(job, False)
    team.close()
    assert default_threads() >= 1


def test_kv_is_allocated_for_the_whole_context() -> None:
    from moelite.models import build
    from moelite.warm import _CONFIG

    kv = KVCache(build(_CONFIG), 32, "f16")
    assert kv.k[0].dtype == np.uint16
    assert kv.k[0].size == 2 * 32 * 16
