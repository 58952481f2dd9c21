"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder) and fine-tunes.

As Qwen2-MoE without the shared expert; q and k are normalized head by head before rotation; the
head size is its own number; a sliding window, where switched on, is on all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moelite.arch import Arch, GatedMLP, Layer, MoE
from moelite.config import MAX_POSITIONS, HFConfig
from moelite.models._blocks import (
    attention,
    decoder,
    gated_mlp,
    layer,
    read_experts,
    read_sizes,
    rms_norm,
    routed,
    sparse_layers,
)


def build(raw: Mapping[str, Any]) -> Arch:
    hf = HFConfig(raw)
    sizes = read_sizes(hf)
    renormalize = hf.flag("norm_topk_prob")  # true in releases, false where transformers guesses
    experts = read_experts(hf, size_key="moe_intermediate_size", renormalize=renormalize)
    dense_size = hf.integer("intermediate_size")
    bias = hf.flag("attention_bias", default=False)
    sparse = sparse_layers(hf, sizes.num_layers)
    window = _window(hf)

    def one(i: int) -> Layer:
        prefix = f"model.layers.{i}"
        attn = f"{prefix}.self_attn"
        mlp: GatedMLP | MoE = gated_mlp(f"{prefix}.mlp", sizes.hidden_size, dense_size)
        if sparse[i]:
            mlp = routed(f"{prefix}.mlp", sizes, experts)
        normed = replace(
            attention(attn, sizes, qkv_bias=bias, o_bias=bias, window=window),
            q_norm=rms_norm(f"{attn}.q_norm", sizes.head_dim, sizes.eps),
            k_norm=rms_norm(f"{attn}.k_norm", sizes.head_dim, sizes.eps),
        )
        return layer(prefix, sizes, normed, mlp)

    return decoder(hf, "qwen3_moe", sizes, [one(i) for i in range(sizes.num_layers)])


def _window(hf: HFConfig) -> int | None:
    if not hf.flag("use_sliding_window", default=False):
        hf.inert("sliding_window", "max_window_layers")
        return None
    # With max_window_layers set, readers disagree about which layers slide: left unread, refused.
    return hf.integer("sliding_window", high=MAX_POSITIONS)
