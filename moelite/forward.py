"""What lies between the routed experts of a decoder, for many tokens at once: float32 numpy.

Calibration runs a model layer by layer over a whole text, where the decoder of `model` runs all
layers over a few tokens. Weights are those of a store's dense file, as they will be multiplied.
T tokens, of one sequence; H hidden size; other letters as in `arch`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moelite.arch import Attention, GatedMLP, Linear, MoE, Norm, Rope, TensorRef
from moelite.errors import StoreError
from moelite.quant import FORMATS
from moelite.quant.base import F32, TILE_ROWS, U8, QuantFormat
from moelite.storefile import DenseSpec
from moelite.tensorfile import pread_into, read_header

Rows = npt.NDArray[np.int64]
EMBED_ROWS = 4096  # rows of an embedding unpacked at once, a multiple of TILE_ROWS


class Weights(Protocol):
    """Where dense weights come from, as float32: see DenseWeights."""

    def matrix(self, part: Linear) -> F32: ...
    def vector(self, ref: TensorRef) -> F32: ...
    def embed(self, ref: TensorRef, ids: Sequence[int]) -> Iterator[tuple[Rows, F32]]: ...


class DenseWeights:
    """The tensors of a finished dense file as float32. specs: {TensorRef.key: what it is}."""

    def __init__(self, path: Path, specs: Mapping[str, DenseSpec]) -> None:
        self._path, self._specs = path, specs
        self._tensors = read_header(path, StoreError).tensors

    def matrix(self, part: Linear) -> F32:
        """[rows, cols]: the matrix that the kernel multiplies by."""
        spec, fmt = self._spec(part.weight), FORMATS[self._spec(part.weight).format]
        packed = self._bytes(part.weight.key, 0, fmt.nbytes(*spec.shape))
        return fmt.unpack(packed, part.rows, part.cols)

    def vector(self, ref: TensorRef) -> F32:
        """A norm's weight or a bias."""
        return self._bytes(ref.key, 0, 4 * self._spec(ref).shape[0]).view(np.float32)

    def embed(self, ref: TensorRef, ids: Sequence[int]) -> Iterator[tuple[Rows, F32]]:
        """(places in `ids`, ascending, and their embeddings [n, H]), until all places were given.

        Of the matrix, EMBED_ROWS rows at a time are held.
        """
        spec = self._spec(ref)
        fmt, (rows, cols), wanted = FORMATS[spec.format], spec.shape, np.asarray(ids)
        for start in range(0, rows, EMBED_ROWS):
            size = min(EMBED_ROWS, rows - start)
            here = np.flatnonzero((wanted >= start) & (wanted < start + size))
            if here.size:
                part = self._rows(fmt, ref.key, start, (size, cols))
                yield here, part[wanted[here] - start]

    def _rows(self, fmt: QuantFormat, key: str, start: int, shape: tuple[int, int]) -> F32:
        at = start // TILE_ROWS * fmt.tile_bytes(shape[1])
        return fmt.unpack(self._bytes(key, at, fmt.nbytes(*shape)), *shape)

    def _spec(self, ref: TensorRef) -> DenseSpec:
        return self._specs[ref.key]

    def _bytes(self, key: str, at: int, size: int) -> U8:
        out = np.empty(size, np.uint8)
        fd = os.open(self._path, os.O_RDONLY)
        try:
            if pread_into(fd, out.data, self._tensors[key].offset + at) != size:
                raise StoreError(f"{self._path} ends inside tensor {key!r}")
        finally:
            os.close(fd)
        return out


class Projection:
    """y [T, rows] = x [T, cols] @ W.T (+ bias), its weights read."""

    def __init__(self, weights: Weights, part: Linear) -> None:
        self._weight = weights.matrix(part)
        self._bias = None if part.bias is None else weights.vector(part.bias)

    def __call__(self, x: F32) -> F32:
        y = x @ self._weight.T
        return y if self._bias is None else y + self._bias


class Normed:
    """A Norm of the last axis, its weights read."""

    def __init__(self, weights: Weights, norm: Norm) -> None:
        self._norm = norm
        self._bias = None if norm.bias is None else weights.vector(norm.bias)
        self._weight = None
        if norm.weight is not None:
            self._weight = weights.vector(norm.weight) + np.float32(norm.offset)

    def __call__(self, x: F32) -> F32:
        if self._norm.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        square = np.mean(x * x, -1, keepdims=True) + np.float32(self._norm.eps)
        y: F32 = x / np.sqrt(square)
        y = y if self._weight is None else y * self._weight
        return y if self._bias is None else y + self._bias


class Heads:
    """attention(q, k, v) of one sequence, from its first token on: what o reads."""

    def __init__(self, weights: Weights, spec: Attention) -> None:
        self._spec = spec
        self._q, self._k, self._v = (Projection(weights, part) for part in (spec.q, spec.k, spec.v))
        self._q_norm = None if spec.q_norm is None else Normed(weights, spec.q_norm)
        self._k_norm = None if spec.k_norm is None else Normed(weights, spec.k_norm)

    def __call__(self, x: F32) -> F32:
        """x [T, H], normed, is what q, k and v read -> [T, N * D]."""
        spec, tokens = self._spec, len(x)
        q, k, v = self._q(x), self._k(x), self._v(x)
        if spec.qk_norm_over == "full":
            q, k = self._normed(q, k)
        if spec.clip is not None:
            limit = np.float32(spec.clip)
            q, k, v = (np.clip(y, -limit, limit) for y in (q, k, v))
        q, k, v = (y.reshape(tokens, -1, spec.head_dim) for y in (q, k, v))
        if spec.qk_norm_over == "head":
            q, k = self._normed(q, k)
        if spec.rope is not None:
            q, k = rotate(spec.rope, q), rotate(spec.rope, k)
        return _attend(spec, q, k, v)

    def _normed(self, q: F32, k: F32) -> tuple[F32, F32]:
        return (
            q if self._q_norm is None else self._q_norm(q),
            k if self._k_norm is None else self._k_norm(k),
        )


class SelfAttention:
    """o(attention(q, k, v)) of one sequence, from its first token on."""

    def __init__(self, weights: Weights, spec: Attention) -> None:
        self._heads, self._o = Heads(weights, spec), Projection(weights, spec.o)

    def __call__(self, x: F32) -> F32:
        """x [T, H], normed, is what q, k and v read -> what is added to the residual, [T, H]."""
        return self._o(self._heads(x))


def _attend(spec: Attention, q: F32, k: F32, v: F32) -> F32:
    # q [T, N, D], k and v [T, NK, D] -> [T, N * D]; one kv head's scores are held at a time
    tokens, group = len(q), spec.num_heads // spec.num_kv_heads
    ago = np.arange(tokens)[:, None] - np.arange(tokens)
    unseen = (ago < 0) | (ago >= (spec.window or tokens))
    out = np.empty((tokens, spec.num_heads, spec.head_dim), np.float32)
    for n in range(spec.num_kv_heads):
        heads = slice(n * group, (n + 1) * group)
        each = np.ascontiguousarray(q[:, heads].swapaxes(0, 1)) * np.float32(spec.scale)
        scores = each @ np.ascontiguousarray(k[:, n]).T  # [group, T, T]
        scores[:, unseen] = -np.inf
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        out[:, heads] = (scores @ np.ascontiguousarray(v[:, n])).swapaxes(0, 1)
    return out.reshape(tokens, -1)


def rotate(rope: Rope, x: F32) -> F32:
    """The heads x [T, N, D] of positions 0..T-1, turned; angles as in `ops.rope_table`."""
    n = len(rope.inv_freq)
    angle = np.arange(len(x), dtype=np.float32)[:, None, None] * np.array(rope.inv_freq, np.float32)
    wide = angle.astype(np.float64)
    cos = (np.cos(wide) * rope.scale).astype(np.float32)
    sin = (np.sin(wide) * rope.scale).astype(np.float32)
    half = rope.style == "half"
    first = slice(0, n) if half else slice(0, 2 * n, 2)
    second = slice(n, 2 * n) if half else slice(1, 2 * n, 2)
    y = x.copy()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def silu_gate(gate: F32, up: F32) -> F32:
    """silu(gate) * up, in the memory of `gate`; silu(g) = g / (1 + exp(-g))."""
    with np.errstate(over="ignore"):  # exp of a large -g is inf, its silu 0, as it should be
        gate /= np.float32(1) + np.exp(-gate)
    gate *= up
    return gate


class DenseMLP:
    """A feed-forward part that every token passes, times its gate where it has one."""

    def __init__(self, weights: Weights, mlp: GatedMLP, gate: Linear | None = None) -> None:
        self._gate, self._up, self._down = (Projection(weights, part) for part in mlp.matrices)
        self._open = None if gate is None else Projection(weights, gate)

    def __call__(self, x: F32) -> F32:
        y = self._down(silu_gate(self._gate(x), self._up(x)))
        if self._open is not None:
            with np.errstate(over="ignore"):
                y /= np.float32(1) + np.exp(-self._open(x))
        return y


def dense_mlp(weights: Weights, mlp: GatedMLP | MoE) -> DenseMLP | None:
    """The part of a layer that is not routed: the shared expert, or all of a dense layer."""
    if not isinstance(mlp, MoE):
        return DenseMLP(weights, mlp)
    return None if mlp.shared is None else DenseMLP(weights, mlp.shared, mlp.shared_gate)


def unrouted(mlp: GatedMLP | MoE) -> GatedMLP | None:
    """The matrices of `dense_mlp`'s part."""
    return mlp.shared if isinstance(mlp, MoE) else mlp
