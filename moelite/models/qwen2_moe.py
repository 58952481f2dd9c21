"""Qwen1.5-MoE and Qwen2-MoE.

Biases on q, k and v; beside the routed experts a shared one, weighted by a sigmoid gate; dense
layers in between by `decoder_sparse_step` and `mlp_only_layers`; renormalization by flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moelite.arch import Arch, GatedMLP, Layer, MoE
from moelite.config import MAX_POSITIONS, HFConfig
from moelite.errors import CheckpointError, UnsupportedError
from moelite.models._blocks import (
    attention,
    decoder,
    gated_mlp,
    layer,
    linear,
    read_experts,
    read_sizes,
    routed,
    sparse_layers,
)


def build(raw: Mapping[str, Any]) -> Arch:
    hf = HFConfig(raw)
    sizes = read_sizes(hf)
    renormalize = hf.flag("norm_topk_prob")
    experts = read_experts(hf, size_key="moe_intermediate_size", renormalize=renormalize)
    shared_size = hf.integer("shared_expert_intermediate_size")
    dense_size = hf.integer("intermediate_size")
    qkv_bias = hf.flag("qkv_bias", default=True)  # files older than the key do have the biases
    sparse = sparse_layers(hf, sizes.num_layers)
    windows = _windows(hf, sizes.num_layers)
    hidden = sizes.hidden_size

    def one(i: int) -> Layer:
        prefix = f"model.layers.{i}"
        attn = attention(f"{prefix}.self_attn", sizes, qkv_bias=qkv_bias, window=windows[i])
        mlp: GatedMLP | MoE = gated_mlp(f"{prefix}.mlp", hidden, dense_size)
        if sparse[i]:
            mlp = replace(
                routed(f"{prefix}.mlp", sizes, experts),
                shared=gated_mlp(f"{prefix}.mlp.shared_expert", hidden, shared_size),
                shared_gate=linear(f"{prefix}.mlp.shared_expert_gate", 1, hidden),
            )
        return layer(prefix, sizes, attn, mlp)

    return decoder(hf, "qwen2_moe", sizes, [one(i) for i in range(sizes.num_layers)])


def _windows(hf: HFConfig, num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: None everywhere unless use_sliding_window."""
    sliding = hf.flag("use_sliding_window", default=False)
    hf.inert("max_window_layers")  # only the default of layer_types depends on it
    types = hf.items("layer_types", str)
    if types is None:
        types = ("full_attention",) * num_layers
        if sliding:
            raise UnsupportedError(
                "use_sliding_window is true but config.json does not say layer_types, and versions "
                "of transformers disagree about which layers then slide",
                fix='add layer_types, one "sliding_attention" or "full_attention" per layer',
            )
    if len(types) != num_layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"layer_types must hold {num_layers} times full_attention or sliding_attention",
            fix="download config.json again, or correct it",
        )
    if not sliding:
        hf.inert("sliding_window")
        if "sliding_attention" in types:
            raise CheckpointError(
                "layer_types has sliding_attention but use_sliding_window is false",
                fix="correct one of them in config.json",
            )
        return (None,) * num_layers
    window = hf.integer("sliding_window", high=MAX_POSITIONS)
    return tuple(window if t == "sliding_attention" else None for t in types)
