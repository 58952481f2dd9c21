"""Attention over the kv cache against float64 numpy, in every format of the kv."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite import attention
from moelite.attention import KV_FORMATS, AttentionShape, kv_row_bytes, scratch_floats
from moelite.jit import kernel
from moelite.kv import KVCache, kv_bytes
from moelite.quant.base import pad

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@kernel
def _keep(x, shape, cache):
    row = np.full(shape.padded_dim, np.float32(np.nan), np.float32)
    for t in range(x.shape[0]):
        attention.keep_heads(x.reshape(-1), t * x.shape[1], shape, t, row, cache)


@kernel
def _attend(q, cache, shape, place, scratch, out, backwards):
    pieces = attention.attend_pieces(shape, place[0])
    for i in range(pieces):
        piece = pieces - 1 - i if backwards else i
        queries, to = (q.reshape(-1), q.shape[1]), (out.reshape(-1), out.shape[1])
        attention.attend(piece, queries, cache, shape, place, scratch, to)


def shape_of(heads: tuple[int, int], dim: int, kv: str, *, window: int = 0) -> AttentionShape:
    n, nk = heads
    scale, code = np.float32(dim**-0.5), KV_FORMATS.index(kv)
    return AttentionShape(n, nk, dim, pad(dim, 8), 700, window, scale, code, kv_row_bytes(dim, kv))


def kept(x: np.ndarray, shape: AttentionShape) -> np.ndarray:
    """The kv bytes of keys or values; what no position holds is NaN or extreme."""
    cache = np.full(shape.kv_heads * shape.context * shape.row_bytes, 0xFF, np.uint8)
    _keep(x, shape, cache)
    return cache


def attend(q, cache, shape: AttentionShape, start: int, pieces=(), *, backwards=False):
    """The attention of the tokens q at positions start.., cut into chunks at `pieces`."""
    out = np.zeros((len(q), shape.heads * shape.head_dim), np.float32)
    size = scratch_floats(shape.heads, shape.kv_heads, shape.head_dim)
    scratch = np.full(size, np.nan, np.float32)
    cuts = [0, *pieces, len(q)]
    for first, last in itertools.pairwise(cuts):
        place = last - first, start + first
        _attend(q[first:last], cache, shape, place, scratch, out[first:last], backwards)
    return out


def exact(q, k, v, shape: AttentionShape, start: int) -> np.ndarray:
    d, group = shape.head_dim, shape.heads // shape.kv_heads
    out = np.zeros((len(q), shape.heads * d))
    for t in range(len(q)):
        last = start + t + 1
        first = max(0, last - shape.window) if shape.window else 0
        for h in range(shape.heads):
            keys = k[first:last].reshape(last - first, -1, d)[:, h // group].astype(np.float64)
            values = v[first:last].reshape(last - first, -1, d)[:, h // group]
            s = keys @ q[t].reshape(-1, d)[h].astype(np.float64) * np.float64(shape.scale)
            w = np.exp(s - s.max())
            out[t, h * d : h * d + d] = w @ values / w.sum()
    return out


def rounded(x: np.ndarray, dim: int, kv: str) -> np.ndarray:
    """What the kv keeps of x, by numpy."""
    if kv == "f32":
        return x
    if kv == "f16":
        return x.astype(np.float16).astype(np.float32)
    blocks = np.zeros((len(x), x.shape[1] // dim, pad(dim, 32)), np.float32)
    blocks[..., :dim] = x.reshape(len(x), -1, dim)
    blocks = blocks.reshape(len(x), -1, pad(dim, 32) // 32, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (codes * scale).reshape(len(x), -1, pad(dim, 32))[..., :dim].reshape(len(x), -1)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (8, 1)]),
    dim=st.sampled_from([8, 20, 64, 72, 128]),
    start=st.sampled_from([0, 1, 31, 32, 40, 600]),
    tokens=st.integers(1, 50),
    window=st.sampled_from([0, 1, 5, 32, 100]),
    kv=st.sampled_from(KV_FORMATS),
)
def test_attention(heads, dim, start, tokens, window, kv) -> None:
    """Every token over its own positions, in the values that the kv has kept."""
    shape = shape_of(heads, dim, kv, window=window)
    q = normal(tokens, heads[0] * dim)
    k, v = (normal(start + tokens, heads[1] * dim) for _ in range(2))
    cache = kept(k, shape), kept(v, shape)
    got = attend(q, cache, shape, start)
    want = exact(q, rounded(k, dim, kv), rounded(v, dim, kv), shape, start)
    # a code of int8 may be the next one where numpy's division rounds the other way
    tolerance = 2e-2 if kv == "int8" else 4e-6
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=tolerance)
    cut = tokens // 3
    again = attend(q, cache, shape, start, [cut, cut + 1] if cut else [], backwards=True)
    np.testing.assert_array_equal(again, got, "bits depend on the chunk or the order of pieces")


@pytest.mark.parametrize("outlier", [1, 30])
def test_int8_is_near_full_precision(outlier: int) -> None:
    """The error of the result beside its size; keys with a channel many times the others too."""
    shape, full = shape_of((8, 2), 128, "int8"), shape_of((8, 2), 128, "f32")
    q, k, v = normal(40, 1024), normal(500, 256), normal(500, 256)
    k[:, 5] *= outlier
    got = attend(q, (kept(k, shape), kept(v, shape)), shape, 460)
    want = attend(q, (kept(k, full), kept(v, full)), full, 460)
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 0 < error < (0.02 if outlier == 1 else 0.15)


def test_one_key_that_wins_by_far() -> None:
    """By more than exp can show: the result is its value, not NaN."""
    shape = shape_of((1, 1), 8, "f32")._replace(scale=np.float32(1))
    k = np.zeros((61, 8), np.float32)
    k[4] = 100
    v, q = normal(61, 8), np.full((1, 8), 3, np.float32)
    got = attend(q, (kept(k, shape), kept(v, shape)), shape, 60)
    np.testing.assert_allclose(got, v[4:5], rtol=1e-6)


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_the_kv_is_allocated_for_the_whole_context(kv) -> None:
    layer = SimpleNamespace(attention=SimpleNamespace(num_kv_heads=2, head_dim=20))
    arch: Any = SimpleNamespace(layers=[layer, layer])
    cache = KVCache(arch, 32, kv)
    assert sum(a.nbytes for a in (*cache.k, *cache.v)) == kv_bytes(arch, 32, kv)
    assert cache.k[0].size == 2 * 32 * kv_row_bytes(20, kv)


def test_bytes_of_a_position() -> None:
    assert [kv_row_bytes(128, kv) for kv in ("f32", "f16", "int8")] == [512, 256, 144]
    assert [kv_row_bytes(20, kv) for kv in ("f32", "f16", "int8")] == [96, 48, 36]
