"""Tiny random checkpoints as Hugging Face writes them: safetensors and numpy, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moelite.quant.record import RecordLayout
from moelite.store import Store

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 100,
}
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 101,
}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a mixtral or qwen3_moe checkpoint."""
    h, v = config["hidden_size"], config["vocab_size"]
    n, nk = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim", h // n)
    qwen = config["model_type"] == "qwen3_moe"
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        found |= {
            p + "input_layernorm.weight": (h,),
            p + "post_attention_layernorm.weight": (h,),
            p + "self_attn.q_proj.weight": (n * d, h),
            p + "self_attn.k_proj.weight": (nk * d, h),
            p + "self_attn.v_proj.weight": (nk * d, h),
            p + "self_attn.o_proj.weight": (h, n * d),
        }
        if qwen:
            found |= {p + "self_attn.q_norm.weight": (d,), p + "self_attn.k_norm.weight": (d,)}
        if i in config.get("mlp_only_layers", ()):
            found |= _gated(p + "mlp.{}.weight", _QWEN, config["intermediate_size"], h)
            continue
        block = p + ("mlp." if qwen else "block_sparse_moe.")
        experts = config["num_experts" if qwen else "num_local_experts"]
        size = config["moe_intermediate_size" if qwen else "intermediate_size"]
        found[block + "gate.weight"] = (experts, h)
        for e in range(experts):
            name = block + f"experts.{e}." + "{}.weight"
            found |= _gated(name, _QWEN if qwen else _MIXTRAL, size, h)
    found["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (v, h)
    return found


_QWEN = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")


def _gated(name: str, parts: tuple[str, str, str], size: int, h: int) -> dict[str, Any]:
    gate, up, down = (name.format(part) for part in parts)
    return {gate: (size, h), up: (size, h), down: (h, size)}


def weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes(config).items()
    }


def write_raw(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file by hand, for dtypes that numpy lacks: {name: (dtype, shape, bytes)}."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        span = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def bf16(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """The upper half of each float32, for `write_raw`."""
    high = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
    return "BF16", array.shape, high.tobytes()


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    shards: int = 1,
    dtype: str = "F32",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write config.json, a tokenizer file and the weights; returns the tensors as written."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(weights(config, seed) if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    names = sorted(tensors)
    files = [names[i::shards] for i in range(shards)]
    where = {}
    for i, part in enumerate(files):
        name = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        where |= dict.fromkeys(part, name)
        if dtype == "BF16":
            write_raw(folder / name, {k: bf16(tensors[k]) for k in part})
        else:
            numpy_type = np.float16 if dtype == "F16" else np.float32
            # save_file writes a strided array's bytes in memory order, whatever its shape says
            save_file({k: np.array(tensors[k], numpy_type, order="C") for k in part}, folder / name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def layout_of(store: Store) -> RecordLayout:
    """The layout of the records of a store whose experts are all in one format."""
    return next(iter(store.layers.values())).tiers[0]
