"""OLMoE (1B-7B).

q and k are normalized over all heads at once, then q, k and v optionally clipped, before rotation;
experts in every layer; renormalization by flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moelite.arch import Arch, Layer
from moelite.config import HFConfig
from moelite.errors import CheckpointError
from moelite.models._blocks import (
    attention,
    decoder,
    layer,
    read_experts,
    read_sizes,
    rms_norm,
    routed,
)


def build(raw: Mapping[str, Any]) -> Arch:
    hf = HFConfig(raw)
    sizes = read_sizes(hf, kv_heads_may_be_absent=True)  # absent: as many as num_attention_heads
    width, kv_width = (n * sizes.head_dim for n in (sizes.num_heads, sizes.num_kv_heads))
    if width != sizes.hidden_size:
        raise CheckpointError(
            f"olmoe needs num_attention_heads * head_dim = hidden_size, not {width} and "
            f"{sizes.hidden_size}",
            fix="download config.json again, or correct it",
        )
    renormalize = hf.flag("norm_topk_prob")
    experts = read_experts(hf, size_key="intermediate_size", renormalize=renormalize)
    bias = hf.flag("attention_bias", default=False)
    clip = hf.number("clip_qkv", low=1e-6, high=1e6, default=None)

    def one(i: int) -> Layer:
        prefix = f"model.layers.{i}"
        attn = f"{prefix}.self_attn"
        normed = replace(
            attention(attn, sizes, qkv_bias=bias, o_bias=bias),
            q_norm=rms_norm(f"{attn}.q_norm", width, sizes.eps),
            k_norm=rms_norm(f"{attn}.k_norm", kv_width, sizes.eps),
            qk_norm_over="full",
            clip=clip,
        )
        return layer(prefix, sizes, normed, routed(f"{prefix}.mlp", sizes, experts))

    return decoder(hf, "olmoe", sizes, [one(i) for i in range(sizes.num_layers)])
