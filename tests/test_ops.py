"""Format-free kernels against plain float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite import ops
from moelite.kernels import combine
from moelite.kv import KVCache
from moelite.threads import Team, default_threads

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("size", "groups"), [(64, 1), (20, 3), (7, 2), (8, 4)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(size: int, groups: int, weighted: bool) -> None:
    x = normal(5, size * groups + 4)
    weight = normal(size) if weighted else ops.EMPTY
    out = np.full_like(x, 7)
    ops.rms_norm(x, size, groups, weight, np.float32(1e-5), out)
    runs = x[:, : size * groups].reshape(5, groups, size).astype(np.float64)
    want = runs / np.sqrt((runs**2).mean(-1, keepdims=True) + 1e-5)
    if weighted:
        want = want * weight
    np.testing.assert_allclose(out[:, : size * groups], want.reshape(5, -1), rtol=2e-6, atol=1e-7)
    assert (out[:, size * groups :] == 7).all()  # the padding is not touched


@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm(biased: bool) -> None:
    x, weight = normal(4, 24), normal(20)
    bias = normal(20) if biased else ops.EMPTY
    out = np.zeros_like(x)
    ops.layer_norm(x, 20, weight, bias, np.float32(1e-5), out)
    runs = x[:, :20].astype(np.float64)
    want = (runs - runs.mean(1, keepdims=True)) / np.sqrt(runs.var(1, keepdims=True) + 1e-5)
    want = want * weight + (bias if biased else 0)
    np.testing.assert_allclose(out[:, :20], want, rtol=1e-5, atol=1e-6)


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
    ops.rope(got, 2, 10, cos, sin, interleaved)
    heads, turned = x.reshape(4, 2, 10), got.reshape(4, 2, 10)
    first, second = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(3), slice(3, 6))
    z = (heads[..., first] + 1j * heads[..., second]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(turned[..., first], z.real, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(turned[..., second], z.imag, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(turned[..., 6:], heads[..., 6:])


def attend(q, k, v, shape: ops.AttentionShape, kv: str, start: int, threads: int) -> np.ndarray:
    """Stores all keys and values, then attends from positions start.. on."""
    dtype = np.uint16 if kv == "f16" else np.float32
    count = shape.kv_heads * shape.context * shape.padded_dim
    cache_k, cache_v = np.zeros(count, dtype), np.zeros(count, dtype)
    ops.store_kv(k, shape, 0, cache_k)
    ops.store_kv(v, shape, 0, cache_v)
    out = np.zeros((len(q), shape.heads * shape.head_dim), np.float32)
    scratch = np.full((threads, shape.padded_dim + shape.context + 8), np.nan, np.float32)
    team = Team(threads)
    job = ops.AttentionJob(q, cache_k, cache_v, start, scratch, out)
    team.run(ops.attention_job, job, shape)
    team.close()
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
    threads=st.integers(1, 2),
)
def test_attention(heads, dim, start, tokens, window, kv, threads) -> None:
    n, nk = heads
    padded = -(-dim // 8) * 8
    shape = ops.AttentionShape(n, nk, dim, padded, 64, window, np.float32(dim**-0.5))
    q, k, v = (
        normal(tokens, n * dim),
        normal(start + tokens, nk * dim),
        normal(start + tokens, nk * dim),
    )
    got = attend(q, k, v, shape, kv, start, threads)
    if kv == "f16":
        k, v = k.astype(np.float16), v.astype(np.float16)
    np.testing.assert_allclose(got, exact(q, k, v, shape, start), rtol=2e-5, atol=3e-6)


def test_attention_with_far_apart_scores() -> None:
    """One key wins by more than exp can show: the result is its value, not NaN."""
    shape = ops.AttentionShape(1, 1, 8, 8, 64, 0, np.float32(1))
    k = np.zeros((11, 8), np.float32)
    k[4] = 100
    v, q = normal(11, 8), np.full((1, 8), 3, np.float32)
    np.testing.assert_allclose(attend(q, k, v, shape, "f32", 10, 1), v[4:5], rtol=1e-6)


def test_silu_gate_and_sigmoid() -> None:
    gate, up = normal(3, 24), normal(3, 24)
    g, u = gate[:, :17].astype(np.float64), up[:, :17]
    got = gate.copy()
    ops.silu_gate(got, up, 17)
    np.testing.assert_allclose(got[:, :17], g / (1 + np.exp(-g)) * u, rtol=2e-6, atol=1e-7)
    assert not got[:, 17:].any()
    x, logits = normal(3, 9), normal(3, 8)
    want = x[:, :5] / (1 + np.exp(-logits[:, :1].astype(np.float64)))
    ops.scale_by_sigmoid(x, 5, logits)
    np.testing.assert_allclose(x[:, :5], want, rtol=1e-6)


def test_clamp_and_sums() -> None:
    x = normal(3, 8)
    y = x.copy()
    ops.clamp(y, 6, np.float32(0.5))
    np.testing.assert_array_equal(y[:, :6], np.clip(x[:, :6], -0.5, 0.5))
    np.testing.assert_array_equal(y[:, 6:], x[:, 6:])
    z, bias = x.copy(), normal(5)
    ops.add_bias(z, bias)
    np.testing.assert_array_equal(z[:, :5], x[:, :5] + bias)
    ops.add_rows(z, 8, y)
    np.testing.assert_array_equal(z[:, 5:], x[:, 5:] + y[:, 5:])


def test_combine_sums_in_the_routers_order() -> None:
    """Large terms of both signs: float32 addition in any other order gives other bits."""
    parts = np.array([[1e8], [1.0], [-1e8], [3.0]], np.float32)
    x = np.zeros((1, 1), np.float32)
    combine(parts, np.ones((1, 4), np.float32), x)
    assert x[0, 0] == ((np.float32(1e8) + np.float32(1)) - np.float32(1e8)) + np.float32(3)
    x[:] = 0
    combine(parts[[0, 2, 1, 3]], np.ones((1, 4), np.float32), x)
    assert x[0, 0] == 4


def test_team_shares_work_and_reports_errors() -> None:
    team = Team(3)
    seen: list[int] = []

    def job(tid, counter, what):
        seen.append(tid)
        if what == "fail" and tid == 2:
            raise ValueError("thread 2 failed")

    team.run(job, "go")
    assert sorted(seen) == [0, 1, 2]
    with pytest.raises(ValueError, match="thread 2 failed"):
        team.run(job, "fail")
    seen.clear()
    team.run(job, "go", alone=True)
    assert seen == [0]
    team.close()
    assert default_threads() >= 1


def test_kv_is_allocated_for_the_whole_context() -> None:
    from moelite.models import build
    from moelite.warm import _CONFIG

    kv = KVCache(build(_CONFIG), 32, "f16")
    assert kv.k[0].dtype == np.uint16
    assert kv.k[0].size == 2 * 32 * 16
