"""What a text's activations say of the matrices of a layer that every token passes.

They are packed in the order in which they are multiplied, and what comes behind one reads what the
packed one makes: q, k and v; o; gate and up, then down, of a shared expert or a dense layer.

For o and an MLP a token counts by 1 / mean(residual^2), as it does for routed experts: their output
goes into the residual, and whoever reads that norms it first. For q, k and v all tokens count
alike, since what comes out of them goes to other tokens: a first token, whose residual is large
and to which all others attend, would hardly count (docs/log/calibration.md has the difference).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from moelite.arch import Attention, GatedMLP, Layer, Linear, MoE
from moelite.belief import believed
from moelite.forward import (
    Heads,
    Normed,
    Projection,
    SelfAttention,
    Weights,
    silu_gate,
    unrouted,
)
from moelite.quant.base import F32
from moelite.quant.curvature import Curvature, curvature

Inputs = Iterator[tuple[F32, F32]]  # x [T, I], and what each of its tokens counts [T]


class DensePacker(Protocol):
    """Packs the matrices of a layer that every token passes."""

    def wanted(self, part: Linear) -> bool:
        """Whether it is to be packed, with what calibration knows."""
        ...

    def original(self, part: Linear) -> F32:
        """[rows, cols], as the checkpoint has it."""
        ...

    def pack(self, part: Linear, curve: Curvature) -> None:
        """From then on the weights have it as it is packed."""
        ...


def pack_layer(
    layer: Layer, weights: Weights, residual: Callable[[], Iterator[F32]], packer: DensePacker
) -> None:
    """Packs what is wanted of a layer. residual: x [T, H] of each sequence, as the layer reads
    it; may be changed."""
    mlp = unrouted(layer.mlp)
    parts = [*layer.attention.linears, *(() if mlp is None else mlp.matrices)]
    if not any(packer.wanted(part) for part in parts):
        return
    before = Normed(weights, layer.input_norm)
    _pack_attention(layer.attention, weights, lambda: ((x, before(x)) for x in residual()), packer)
    if mlp is None or not any(packer.wanted(part) for part in mlp.matrices):
        return
    after, attention = Normed(weights, layer.post_norm), SelfAttention(weights, layer.attention)
    gate = layer.mlp.shared_gate if isinstance(layer.mlp, MoE) else None
    opened = None if gate is None else Projection(weights, gate)

    def inputs() -> Inputs:
        for x in residual():
            x += attention(before(x))
            count = 1 / np.mean(x * x, -1)
            normed = after(x)
            if opened is not None:
                count /= np.square(1 + np.exp(-opened(normed)[:, 0]))
            yield normed, count

    _pack_mlp(mlp, weights, inputs, packer)


def _pack_attention(
    spec: Attention,
    weights: Weights,
    read: Callable[[], Iterator[tuple[F32, F32]]],
    packer: DensePacker,
) -> None:
    # read: the residual, and what q, k and v read
    first = [part for part in (spec.q, spec.k, spec.v) if packer.wanted(part)]
    _pack(first, ((normed, np.ones(len(x), np.float32)) for x, normed in read()), packer)
    if not packer.wanted(spec.o):
        return
    heads, o = Heads(weights, spec), packer.original(spec.o).T
    bias = np.float32(0) if spec.o.bias is None else weights.vector(spec.o.bias)

    def inputs() -> Inputs:
        for x, normed in read():
            y = heads(normed)
            x += y @ o + bias
            yield y, 1 / np.mean(x * x, -1)

    _pack([spec.o], inputs(), packer)


def _pack_mlp(
    mlp: GatedMLP, weights: Weights, inputs: Callable[[], Inputs], packer: DensePacker
) -> None:
    _pack([part for part in (mlp.gate, mlp.up) if packer.wanted(part)], inputs(), packer)
    if packer.wanted(mlp.down):
        gate, up = Projection(weights, mlp.gate), Projection(weights, mlp.up)
        hidden = ((silu_gate(gate(x), up(x)), count) for x, count in inputs())
        _pack([mlp.down], hidden, packer)


def _pack(parts: Sequence[Linear], inputs: Iterable[tuple[F32, F32]], packer: DensePacker) -> None:
    # matrices that read the same inputs
    if not parts:
        return
    curve = _curve(parts[0].cols, inputs)
    for part in parts:
        packer.pack(part, curve)


def _curve(size: int, inputs: Iterable[tuple[F32, F32]]) -> Curvature:
    hessian, total, squares = np.zeros((size, size), np.float32), 0.0, 0.0
    for x, count in inputs:
        x *= np.sqrt(count)[:, None]
        hessian += x.T @ x
        total += float(count.sum(dtype=np.float64))
        squares += float(np.square(count, dtype=np.float64).sum())
    hessian *= np.float32(1 / total)
    return curvature(believed(hessian, total * total / squares, None))


def packing_bytes(part: Linear) -> int:
    """Memory that packing one matrix takes at most, its curve included."""
    # as read, checked, and the packer's copies; the square 5 times as float64, 3 times as float32
    return 4 * 8 * part.rows * part.cols + 52 * part.cols**2
