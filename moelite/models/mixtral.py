"""Mixtral 8x7B, 8x22B and the many merges in this shape.

Grouped-query attention without biases, an optional sliding window over all layers, experts in every
layer, routing weights always renormalized. Experts are called w1 (gate), w3 (up), w2 (down).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelite.arch import Arch, Layer
from moelite.config import MAX_POSITIONS, HFConfig
from moelite.models._blocks import attention, decoder, layer, read_experts, read_sizes, routed


def build(raw: Mapping[str, Any]) -> Arch:
    hf = HFConfig(raw)
    sizes = read_sizes(hf)
    experts = read_experts(hf, size_key="intermediate_size", renormalize=True)
    window = hf.integer("sliding_window", high=MAX_POSITIONS, default=None)
    hf.must_be("attention_bias", False)  # some merges write it

    def one(i: int) -> Layer:
        prefix = f"model.layers.{i}"
        attn = attention(f"{prefix}.self_attn", sizes, window=window)
        moe = routed(f"{prefix}.block_sparse_moe", sizes, experts, names=("w1", "w3", "w2"))
        return layer(prefix, sizes, attn, moe)

    return decoder(hf, "mixtral", sizes, [one(i) for i in range(sizes.num_layers)])
