"""The buffers a forward pass writes to, allocated once for a chunk of tokens, and their size."""

from __future__ import annotations

import numpy as np

from moelite.arch import Arch, GatedMLP, MoE
from moelite.attention import scratch_floats
from moelite.dispatch import act_bytes, new_act
from moelite.kernels import PAIRED
from moelite.program import Ahead, LayerBuffers
from moelite.quant.base import Act, pad


def _mlp_shapes(arch: Arch, chunk: int) -> set[tuple[int, int]]:
    """(rows, inner width) of every feed-forward part: the hidden activations it needs."""
    shapes = set()
    for layer in arch.layers:
        mlp = layer.mlp
        if isinstance(mlp, MoE):
            shapes.add((chunk * mlp.router.top_k, mlp.experts.gate.rows))
            if mlp.shared is not None:
                shapes.add((chunk, mlp.shared.gate.rows))
        else:
            shapes.add((chunk, mlp.gate.rows))
    return shapes


def _widths(arch: Arch) -> tuple[int, int, int, int]:
    """Largest (query width, key width, experts, top_k) over the layers, widths padded to 8."""
    q = max(pad(layer.attention.q.rows, 8) for layer in arch.layers)
    k = max(pad(layer.attention.k.rows, 8) for layer in arch.layers)
    moes = [layer.mlp for layer in arch.layers if isinstance(layer.mlp, MoE)]
    experts = max((pad(m.num_experts, 8) for m in moes), default=8)
    return q, k, experts, max((m.router.top_k for m in moes), default=0)


def _scratch(arch: Arch, chunk: int) -> int:
    """float32 that each thread needs: for attention, or for a strip of gate and up of a chunk."""
    attentions = [layer.attention for layer in arch.layers]
    most = max(scratch_floats(a.num_heads, a.num_kv_heads, a.head_dim) for a in attentions)
    return max(most, chunk * PAIRED)


def workspace_bytes(arch: Arch, chunk: int, threads: int) -> int:
    """Exact bytes of `Workspace(arch, chunk, threads)`."""
    hidden = pad(arch.hidden_size, 8)
    q, k, experts, top_k = _widths(arch)
    rows = hidden * (2 + top_k) + q + 2 * k + experts + 9
    total = 4 * chunk * rows + act_bytes(chunk, arch.hidden_size, quantized=True)
    for cols in {layer.attention.o.cols for layer in arch.layers}:
        total += act_bytes(chunk, cols, quantized=True)
    for count, inner in _mlp_shapes(arch, chunk):
        total += act_bytes(count, inner, quantized=True)
    routes = 16 * len(arch.layers) * top_k + 8 * experts + 20 * top_k + 16 * max(top_k, 1) + 32
    routes += act_bytes(1, arch.hidden_size, quantized=False)
    return total + 4 * threads * _scratch(arch, chunk) + routes


class Workspace:
    """Buffers for up to `chunk` tokens. Widths are padded to 8 floats, activations to 32.

    x [T, H8] residual; normed: Act of H; q, k, v [T, ...]; attended[N * D]: Act; y [T, H8];
    router_logits [T, E8]; ones [T, 1]; parts [T * K, H8] expert outputs by token and rank;
    hidden[(rows, inner)]: Act of each feed-forward part. scratch [threads, ...].
    start [1] int64: 0. span [2] int64: 0 and the number of tokens in work. selected, weights
    [layers, K]: one token's experts; given [layers, K]: those it has to take, or -1; guessed
    [layers, K]: as the layer before expects them; ahead: what that takes; expert_base, expert_tier,
    expert_first, expert_target, zeros [K]: their job; router_scores [E].
    """

    def __init__(self, arch: Arch, chunk: int, threads: int) -> None:
        self.chunk = chunk
        hidden = pad(arch.hidden_size, 8)
        q, k, experts, top_k = _widths(arch)
        self.x = np.zeros((chunk, hidden), np.float32)
        self.y = np.zeros((chunk, hidden), np.float32)
        self.parts = np.zeros((chunk * top_k, hidden), np.float32)
        self.q = np.zeros((chunk, q), np.float32)
        self.k = np.zeros((chunk, k), np.float32)
        self.v = np.zeros((chunk, k), np.float32)
        self.router_logits = np.zeros((chunk, experts), np.float32)
        self.shared_gate = np.zeros((chunk, 8), np.float32)
        self.ones = np.ones((chunk, 1), np.float32)
        self.normed = new_act(chunk, arch.hidden_size, quantized=True)
        self.attended = {
            cols: new_act(chunk, cols, quantized=True)
            for cols in {layer.attention.o.cols for layer in arch.layers}
        }
        self.hidden: dict[tuple[int, int], Act] = {}
        for count, inner in _mlp_shapes(arch, chunk):
            self.hidden[count, inner] = new_act(count, inner, quantized=True)
        self.scratch = np.zeros((threads, _scratch(arch, chunk)), np.float32)
        self.start = np.zeros(1, np.int64)
        self.span = np.array([0, 1])
        self.given = np.full((len(arch.layers), top_k), -1, np.int32)
        self.selected = np.zeros((len(arch.layers), top_k), np.int32)
        self.weights = np.zeros((len(arch.layers), top_k), np.float32)
        self.guessed = np.zeros((len(arch.layers), top_k), np.int32)
        self.ahead = Ahead(
            new_act(1, arch.hidden_size, quantized=False),
            np.zeros(experts, np.float32),
            np.zeros(top_k, np.float32),
            np.full(top_k, -1, np.int32),
        )
        self.router_scores = np.zeros(experts, np.float32)
        self.expert_base = np.zeros(max(top_k, 1), np.int64)
        self.expert_tier = np.zeros(max(top_k, 1), np.int32)
        self.expert_first = np.zeros(top_k + 1, np.int64)
        self.expert_target = np.zeros(top_k, np.int32)
        self.zeros = np.zeros(max(top_k, 1), np.int32)
        # positions 0..n: the source, target and place of rows that stay where they are
        self.rows = np.arange(max(chunk * max(top_k, 1), 1), dtype=np.int32)

    def buffers(self, attended: int) -> LayerBuffers:
        """The buffers as a kernel takes them, for an attention output of `attended` columns."""
        return LayerBuffers(
            self.x.reshape(-1),
            self.x.shape[1],
            self.q.reshape(-1),
            self.q.shape[1],
            self.k.reshape(-1),
            self.v.reshape(-1),
            self.k.shape[1],
            self.y.reshape(-1),
            self.normed,
            self.attended[attended],
            self.router_logits.reshape(-1),
            self.router_logits.shape[1],
            self.scratch.reshape(-1),
            self.scratch.shape[1],
            self.rows,
        )

    def mlp(self, part: GatedMLP, rows: int) -> Act:
        """The hidden activations of a feed-forward part computed over `rows` rows."""
        return self.hidden[rows, part.gate.rows]
