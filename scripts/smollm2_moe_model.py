"""smollm2-moe as it is trained: the frozen dense base, and per layer eight low-rank experts.

Two facts make it affordable on two CPU cores. The base matrices are frozen: no weight gradient is
computed for them. And all experts share them: gate and up of the base are multiplied once for both
selected experts, and down once for their weighted sum, so a token costs about a dense token.

    expert e: down_e(silu(gate_e x) * up_e x),  M_e = M + B_e A_e,  A_e [r, I], B_e [O, r]

Letters: N tokens, H hidden 576, F intermediate 1536, E experts 8, r rank.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from moelite.demo import NUM_LAYERS, BaseWeights

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 576, 1536, 9, 3, 64
EXPERTS, TOP_K, THETA, EPS = 8, 2, 1e5, 1e-5


class _Norm(torch.autograd.Function):
    """RMS norm with a frozen weight: one pass back instead of autograd's eight."""

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse * weight).bfloat16()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, inverse = ctx.saved_tensors
        scaled = grad.float() * weight
        normed = x * inverse
        return inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True)), None


def rope(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D] in bf16."""
    inverse = THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angles = torch.arange(length)[:, None] * inverse[None]
    angles = torch.cat((angles, angles), -1)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = torch.cat((-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]), -1)
    return x * cos + half * sin


class Layer(nn.Module):
    """One decoder layer; the base's tensors are bf16 buffers, the trained ones float32."""

    def __init__(self, base: BaseWeights, index: int, rank: int) -> None:
        super().__init__()
        stem = f"model.layers.{index}."

        def read(*names: str) -> torch.Tensor:
            return torch.cat([torch.tensor(base.get(f"{stem}{n}.weight")) for n in names])

        self.rank = rank
        self.norm1 = read("input_layernorm")
        self.norm2 = read("post_attention_layernorm")
        self.qkv = read(*(f"self_attn.{n}_proj" for n in "qkv")).bfloat16()
        self.o = read("self_attn.o_proj").bfloat16()
        self.gate_up = read("mlp.gate_proj", "mlp.up_proj").bfloat16()
        self.down = read("mlp.down_proj").bfloat16()
        width = EXPERTS * rank
        self.a_gate_up = nn.Parameter(torch.randn(2 * width, HIDDEN) * HIDDEN**-0.5)
        self.a_down = nn.Parameter(torch.randn(width, INNER) * INNER**-0.5)
        self.b_gate = nn.Parameter(torch.zeros(width, INNER))
        self.b_up = nn.Parameter(torch.zeros(width, INNER))
        self.b_down = nn.Parameter(torch.zeros(width, HIDDEN))
        self.router = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [S, T, H] f32 -> x plus attention."""
        rows, length, _ = x.shape
        qkv = F.linear(_Norm.apply(x, self.norm1), self.qkv)
        qkv = qkv.view(rows, length, -1, HEAD_DIM).transpose(1, 2)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
        group = HEADS // KV_HEADS
        k = _rotate(k, cos, sin).repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(_rotate(q, cos, sin), k, v, is_causal=True)
        return x + F.linear(out.transpose(1, 2).reshape(rows, length, HIDDEN), self.o).float()

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, T, H] f32 -> x plus the base's own feed-forward."""
        gate, up = F.linear(_Norm.apply(x, self.norm2), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down).float()

    def sparse(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [S, T, H] f32 -> x plus two experts, router_logits [N, E] f32, selected [N, K]."""
        h = _Norm.apply(x, self.norm2).view(-1, HIDDEN)
        logits = F.linear(h.float(), self.router)
        top, selected = logits.topk(TOP_K, -1)
        weights = top.softmax(-1).bfloat16()  # softmax over E, top-2, renormalised: the same
        gate0, up0 = F.linear(h, self.gate_up).chunk(2, -1)
        small = F.linear(h, self.a_gate_up.bfloat16()).chunk(2, -1)
        b_gate, b_up = self.b_gate.bfloat16(), self.b_up.bfloat16()
        a_down, b_down = self.a_down.bfloat16(), self.b_down.bfloat16()
        total, extra = None, None
        for slot in range(TOP_K):
            mask = F.one_hot(selected[:, slot], EXPERTS).bfloat16()
            mask = mask.repeat_interleave(self.rank, -1)
            gate = torch.addmm(gate0, small[0] * mask, b_gate)
            up = torch.addmm(up0, small[1] * mask, b_up)
            inner = F.silu(gate) * up * weights[:, slot, None]
            update = F.linear(inner, a_down) * mask
            total = inner if total is None else total + inner
            extra = update if extra is None else extra + update
        out = F.linear(total, self.down) + extra @ b_down
        return x + out.float().view_as(x), logits, selected


class SmolMoE(nn.Module):
    """The whole model; forward gives final hidden states, `head` the logits."""

    def __init__(self, base: BaseWeights, rank: int) -> None:
        super().__init__()
        self.embed = torch.tensor(base.get("model.embed_tokens.weight")).bfloat16()
        self.norm = torch.tensor(base.get("model.norm.weight"))
        self.layers = nn.ModuleList(Layer(base, i, rank) for i in range(NUM_LAYERS))

    def forward(self, ids: torch.Tensor, *, dense: bool = False) -> tuple[torch.Tensor, list]:
        """ids [S, T] -> hidden [S, T, H] bf16, and (router_logits, selected) of each layer."""
        cos, sin = rope(ids.shape[1])
        x = self.embed[ids].float()
        routing = []
        for layer in self.layers:
            x = layer.attend(x, cos, sin)
            if dense:
                routing.append(x)
                x = layer.dense(x)
            else:
                x, logits, selected = layer.sparse(x)
                routing.append((logits, selected))
        return _Norm.apply(x, self.norm), routing

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.embed)
