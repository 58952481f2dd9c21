"""GGUF files of tiny checkpoints, as llama.cpp's convert_hf_to_gguf.py writes them.

Names come from the gguf package's own table; what the converter does to tensors and which keys it
sets is transcribed from its classes (LlamaModel, OlmoeModel, Qwen2MoeModel, Qwen3MoeModel).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHS = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
_MERGED = {  # what the converter calls the stack of one layer's experts
    "w1": "layers.{}.feed_forward.experts.w1.weight",
    "w2": "layers.{}.feed_forward.experts.w2.weight",
    "w3": "layers.{}.feed_forward.experts.w3.weight",
    "gate_proj": "model.layers.{}.mlp.experts.gate_proj.weight",
    "up_proj": "model.layers.{}.mlp.experts.up_proj.weight",
    "down_proj": "model.layers.{}.mlp.experts.down_proj.weight",
}
_EXPERT = re.compile(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight")


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def stacked(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name in the GGUF: tensor} of a checkpoint's tensors."""
    arch = ARCHS[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, value in tensors.items():
        tensor = value
        if (match := _EXPERT.fullmatch(name)) is not None:
            merged = _MERGED[match[3]].format(match[1])
            experts.setdefault(merged, {})[int(match[2])] = tensor
            continue
        if arch == gguf.MODEL_ARCH.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight")):
            kind = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            tensor = permute(tensor, config[kind])
        found[mapped(names, name)] = tensor
    for merged, parts in experts.items():
        whole = np.stack([parts[i] for i in range(len(parts))])
        found[mapped(names, merged)] = whole
    return found


def mapped(names: gguf.TensorNameMap, name: str) -> str:
    new = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert new is not None, name
    return str(new)


def facts(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    """The keys that the converter sets."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    experts = config.get("num_local_experts") or config.get("num_experts")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config["model_type"] == "mixtral":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config.get("head_dim") or hidden // heads)
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if config.get("clip_qkv"):
        writer.add_clamp_kqv(config["clip_qkv"])
    if rope.get("rope_type", "default") != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def words(writer: gguf.GGUFWriter, count: int) -> None:
    """A byte-level vocabulary of `count` tokens, three of them control tokens."""
    plain = sorted(chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)])
    tokens = ["<pad>", "<s>", "</s>", "\u0120", *plain, *(f"x{i}" for i in range(count))][:count]
    if "a" in tokens and "b" in tokens:
        tokens[-1] = "ab"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (count - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")


def write_gguf(
    folder: Path,
    path: Path,
    *,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    split: int = 1,
    extra: Mapping[str, np.ndarray] | None = None,
    keys: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """The checkpoint in `folder` as `path`; its tensors by their GGUF names.

    kinds: {end of a GGUF name: type} instead of F32. split: into how many files, by the converter's
    names. keys: metadata beyond what the converter sets.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = stacked(config, load_file(folder / "model.safetensors")) | dict(extra or {})
    size = -(-len(tensors) // split)
    for i in range(split):
        name = path.stem + (f"-{i + 1:05}-of-{split:05}" if split > 1 else "") + ".gguf"
        writer = gguf.GGUFWriter(
            path.with_name(name), gguf.MODEL_ARCH_NAMES[ARCHS[config["model_type"]]]
        )
        if i == 0:
            facts(writer, config)
            words(writer, config["vocab_size"])
            for key, value in (keys or {}).items():
                writer.add_key_value(key, value, _type(value))
        if split > 1:
            writer.add_uint16("split.no", i)
            writer.add_uint16("split.count", split)
            writer.add_int32("split.tensors.count", len(tensors))
        for tensor_name in sorted(tensors)[i * size : (i + 1) * size]:
            _add(writer, tensor_name, tensors[tensor_name], kinds or {})
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return tensors


def _add(
    writer: gguf.GGUFWriter,
    name: str,
    tensor: np.ndarray,
    kinds: Mapping[str, gguf.GGMLQuantizationType],
) -> None:
    kind = next((k for end, k in kinds.items() if name.endswith(end)), None)
    if kind is None or tensor.ndim < 2:
        writer.add_tensor(name, tensor)
    else:
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)


def _type(value: Any) -> gguf.GGUFValueType:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    return gguf.GGUFValueType[kinds[type(value)]]
