"""The naive forward pass of an Arch: float64 numpy, one full causal pass, no cache, no kernels.

It shares nothing with the decoder but the Arch, so where the two agree, both are right or the Arch
is wrong; and where this agrees with transformers, the Arch is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moelite.arch import Arch, Attention, GatedMLP, Linear, MoE, Norm, Rope, Router, TensorRef

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


class Reference:
    """logits of `arch` over `weights` (checkpoint name -> array of any float dtype).

    margins: after `forward`, per MoE layer, [T]: the gap between the k-th and (k+1)-th router
    score of each token, relative to the k-th; 1 where every expert is chosen.
    states: after `forward`, the residual stream [T, H] before each layer and after the last.
    """

    def __init__(self, arch: Arch, weights: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self.arch = arch
        self._weights = weights
        self.margins: list[F64] = []
        self.states: list[F64] = []

    def forward(self, ids: Sequence[int]) -> F64:
        """ids [T] -> logits [T, V]."""
        self.margins, self.states = [], []
        x = self._read(self.arch.embed)[list(ids)]
        for layer in self.arch.layers:
            self.states.append(x)
            x = x + self._attention(layer.attention, self._norm(layer.input_norm, x))
            n = self._norm(layer.post_norm, x)
            mlp = layer.mlp
            x = x + (self._moe(mlp, n) if isinstance(mlp, MoE) else self._gated(mlp, n))
        self.states.append(x)
        return self._linear(self.arch.head, self._norm(self.arch.norm, x))

    def _read(self, ref: TensorRef) -> F64:
        tensor = np.asarray(self._weights[ref.name], np.float64)
        if ref.stacked:
            tensor = tensor[ref.expert]
        if ref.transpose:
            tensor = tensor.swapaxes(-1, -2)
        return tensor if ref.rows is None else tensor[slice(*ref.rows)]

    def _linear(self, linear: Linear, x: F64) -> F64:
        weight = self._read(linear.weight)
        assert weight.shape == (linear.rows, linear.cols)
        y = x @ weight.T
        return y if linear.bias is None else y + self._read(linear.bias)

    def _norm(self, norm: Norm, x: F64) -> F64:
        assert x.shape[-1] == norm.size
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + norm.eps)
        if norm.weight is not None:
            x = x * (self._read(norm.weight) + norm.offset)
        return x if norm.bias is None else x + self._read(norm.bias)

    def _attention(self, a: Attention, x: F64) -> F64:
        tokens = len(x)
        q, k, v = self._linear(a.q, x), self._linear(a.k, x), self._linear(a.v, x)
        if a.qk_norm_over == "full":
            q, k = self._qk_norm(a, q, k)
        if a.clip is not None:
            q, k, v = (np.clip(y, -a.clip, a.clip) for y in (q, k, v))
        q, k, v = (y.reshape(tokens, -1, a.head_dim) for y in (q, k, v))
        if a.qk_norm_over == "head":
            q, k = self._qk_norm(a, q, k)
        if a.rope is not None:
            q, k = _rotate(a.rope, q), _rotate(a.rope, k)
        ago = np.arange(tokens)[:, None] - np.arange(tokens)
        hidden = (ago < 0) | (ago >= (a.window or tokens))
        heads = []
        for n in range(a.num_heads):
            m = n // (a.num_heads // a.num_kv_heads)
            scores = np.where(hidden, -np.inf, q[:, n] @ k[:, m].T * a.scale)
            heads.append(_softmax(scores) @ v[:, m])
        return self._linear(a.o, np.concatenate(heads, -1))

    def _qk_norm(self, a: Attention, q: F64, k: F64) -> tuple[F64, F64]:
        return (
            q if a.q_norm is None else self._norm(a.q_norm, q),
            k if a.k_norm is None else self._norm(a.k_norm, k),
        )

    def _gated(self, mlp: GatedMLP, x: F64, expert: int | None = None) -> F64:
        gate, up, down = (
            p if expert is None else Linear(weight=p.weight.at(expert), rows=p.rows, cols=p.cols)
            for p in (mlp.gate, mlp.up, mlp.down)
        )
        g = self._linear(gate, x)
        return self._linear(down, g / (1 + np.exp(-g)) * self._linear(up, x))

    def _moe(self, moe: MoE, x: F64) -> F64:
        scores = _softmax(self._linear(moe.router.linear, x))
        order = np.argsort(-scores, axis=-1, kind="stable")
        self.margins.append(_margin(moe.router, scores, order))
        y = np.zeros_like(x)
        for t, row in enumerate(order[:, : moe.router.top_k]):
            weights = scores[t, row]
            if moe.router.renormalize:
                weights = weights / weights.sum()
            for expert, weight in zip(row, weights * moe.router.scale, strict=True):
                y[t] += weight * self._gated(moe.experts, x[t : t + 1], int(expert))[0]
        if moe.shared is not None:
            shared = self._gated(moe.shared, x)
            if moe.shared_gate is not None:
                shared = shared / (1 + np.exp(-self._linear(moe.shared_gate, x)))
            y = y + shared
        return y


def _margin(router: Router, scores: F64, order: I64) -> F64:
    ranked = np.take_along_axis(scores, order, -1)
    if router.top_k == scores.shape[1]:
        return np.ones(len(scores))
    return 1 - ranked[:, router.top_k] / ranked[:, router.top_k - 1]


def _softmax(x: F64) -> F64:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _rotate(rope: Rope, x: F64) -> F64:
    # x [T, N, D]: pairs (a, b) of dimensions turn by position * inv_freq
    n = len(rope.inv_freq)
    angle = np.arange(len(x))[:, None, None] * np.array(rope.inv_freq)
    cos, sin = np.cos(angle) * rope.scale, np.sin(angle) * rope.scale
    y = x.copy()
    first = slice(0, n) if rope.style == "half" else slice(0, 2 * n, 2)
    second = slice(n, 2 * n) if rope.style == "half" else slice(1, 2 * n, 2)
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y
