"""config.json and the small files beside it, rebuilt from a GGUF's metadata.

What llama.cpp holds fixed for an architecture (whether routing weights are renormalized, which rows
of q and k it keeps in another order) is written down here; every metadata key of the architecture
is used, declared inert, or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moelite.config import MAX_LAYERS, MAX_POSITIONS, HFConfig, short
from moelite.errors import CheckpointError, UnsupportedError
from moelite.sources import gguf_tokenizer
from moelite.sources.gguf_file import GGUF

_KEY = "tokenizer.ggml."
_SPECIAL = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
_SOFTMAX = 1  # expert_gating_func


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One architecture. block: what holds router and experts in a layer; experts: gate, up, down.

    halves_in_turn: llama.cpp keeps q's and k's rows for a rope of neighbours (its converter's
    `permute`). renormalize: of routing weights, None where the config has no such key.
    """

    model_type: str
    class_name: str
    block: str
    experts: tuple[str, str, str]
    halves_in_turn: bool = False
    renormalize: bool | None = None


_PROJ = ("gate_proj", "up_proj", "down_proj")
KINDS = {
    "llama": Kind(
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        block="block_sparse_moe",
        experts=("w1", "w3", "w2"),
        halves_in_turn=True,
    ),
    "olmoe": Kind(
        model_type="olmoe",
        class_name="OlmoeForCausalLM",
        block="mlp",
        experts=_PROJ,
        renormalize=False,
    ),
    "qwen2moe": Kind(
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        block="mlp",
        experts=_PROJ,
        renormalize=False,
    ),
    "qwen3moe": Kind(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        block="mlp",
        experts=_PROJ,
        renormalize=True,
    ),
}


def kind_of(file: GGUF) -> Kind:
    """The architecture of a GGUF. Raises UnsupportedError for one that moelite does not run."""
    name = file.metadata.get("general.architecture")
    if name not in KINDS or not file.metadata.get(f"{name}.expert_count"):
        experts = "" if name not in KINDS else " without experts"
        raise UnsupportedError(
            f"{file.path} is a {short(name)} model{experts};"
            f" moelite reads GGUFs of {', '.join(KINDS)} with experts",
            fix="use a mixture-of-experts model of one of these architectures",
        )
    return KINDS[name]


def config_of(file: GGUF, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json. shapes: of every tensor, by its name in the GGUF."""
    kind = kind_of(file)
    name = file.metadata["general.architecture"]
    prefix = f"{name}."
    own = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    read = HFConfig(own, where=f"the metadata of {file.path.name} ({prefix}...)")
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{file.path} has no tensor 'token_embd.weight'")
    config = _sizes(read, shapes) | _rope(read) | _experts(read, kind, shapes) | _ids(file.metadata)
    config |= {"architectures": [kind.class_name], "model_type": kind.model_type}
    _other(read, kind, config)
    read.inert("vocab_size", "rope.dimension_count", "leading_dense_block_count")
    read.inert("feed_forward_length", "expert_feed_forward_length")
    read.inert(
        "expert_shared_feed_forward_length", "tensor_data_layout", "interleave_moe_layer_step"
    )
    read.finish()
    return config


def _float(value: float) -> float:
    """The shortest number that rounds to this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _sizes(read: HFConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    hidden = read.integer("embedding_length")
    heads = read.integer("attention.head_count", high=4096)
    head_dim = read.integer("attention.key_length", high=4096, default=hidden // heads)
    read.must_be("attention.value_length", head_dim)
    read.must_be("rope.dimension_count", head_dim)
    eps = read.number("attention.layer_norm_rms_epsilon", low=0.0, high=1.0)
    return {
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "num_hidden_layers": read.integer("block_count", high=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": read.integer("attention.head_count_kv", high=4096, default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": read.integer("context_length", high=MAX_POSITIONS),
        "rms_norm_eps": _float(eps),
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _rope(read: HFConfig) -> dict[str, Any]:
    """The rotary settings; llama.cpp's default base is 10000."""
    theta = read.number("rope.freq_base", low=1.0001, high=1e15, default=10000.0)
    found: dict[str, Any] = {"rope_theta": _float(theta), "rope_type": "default"}
    kind = read.text("rope.scaling.type", default="none")
    read.must_be("rope.scaling.attn_factor", 1.0)
    read.must_be("rope.scaling.yarn_attn_factor", 1.0)
    read.must_be("rope.scaling.yarn_log_multiplier", 0.0)
    read.must_be("rope.scaling.yarn_ext_factor", 1.0)
    read.must_be("rope.scale_linear", 1.0)
    read.inert("rope.scaling.finetuned")
    if kind not in {"none", "linear", "yarn"}:
        raise UnsupportedError(
            f"rope.scaling.type is {short(kind)}; moelite reads none, linear and yarn",
            fix="use the model's checkpoint",
        )
    if kind == "none":
        read.inert("rope.scaling.factor", "rope.scaling.original_context_length")
        return {"rope_parameters": found}
    found |= {"rope_type": kind, "factor": _float(_factor(read))}
    original = read.integer("rope.scaling.original_context_length", high=MAX_POSITIONS, default=0)
    if kind == "yarn":
        fast = read.number("rope.scaling.yarn_beta_fast", low=1e-3, high=1e6, default=32.0)
        slow = read.number("rope.scaling.yarn_beta_slow", low=1e-3, high=1e6, default=1.0)
        found |= {"beta_fast": _float(fast), "beta_slow": _float(slow)}
        if original:
            found["original_max_position_embeddings"] = original
    return {"rope_parameters": found}


def _factor(read: HFConfig) -> float:
    return read.number("rope.scaling.factor", low=1e-3, high=1e6)


def _experts(read: HFConfig, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """How many experts of which size; sizes of feed-forward parts are read off their tensors."""
    count = read.integer("expert_count", high=1 << 16)
    used = read.integer("expert_used_count", high=count)
    down = shapes.get("blk.0.ffn_down_exps.weight") or shapes.get("blk.0.ffn_down.0.weight")
    if down is None:
        raise CheckpointError(
            "the GGUF has no tensor 'blk.0.ffn_down_exps.weight'", fix="fetch it again, complete"
        )
    size = down[-1]
    found: dict[str, Any] = {"num_experts_per_tok": used}
    found["num_local_experts" if kind.model_type == "mixtral" else "num_experts"] = count
    if kind.renormalize is not None:
        found["norm_topk_prob"] = kind.renormalize
    if kind.model_type != "mixtral":
        bias = "blk.0.attn_q.bias" in shapes
        found["qkv_bias" if kind.model_type == "qwen2_moe" else "attention_bias"] = bias
    if not kind.model_type.startswith("qwen"):
        return found | {"intermediate_size": size}
    # llama.cpp's have experts in every layer; intermediate_size is that of the layers without
    found |= {"moe_intermediate_size": size, "intermediate_size": size}
    found |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if (shared := shapes.get("blk.0.ffn_down_shexp.weight")) is not None:
        found["shared_expert_intermediate_size"] = shared[-1]
    return found


def _other(read: HFConfig, kind: Kind, config: dict[str, Any]) -> None:
    """Settings that change what is computed, and that these architectures leave alone."""
    renormalize = True if kind.renormalize is None else kind.renormalize
    read.must_be("expert_weights_norm", renormalize)
    read.must_be("expert_weights_scale", 0.0, 1.0)
    read.must_be("expert_gating_func", _SOFTMAX)
    read.must_be("expert_group_count", 0, 1)
    read.must_be("expert_group_used_count", 0, 1)
    read.must_be("attention.causal", True)
    clip = read.number("attention.clamp_kqv", low=0.0, high=1e6, default=0.0)
    if clip and kind.model_type == "olmoe":
        config["clip_qkv"] = _float(clip)
    elif clip:
        raise _not_here("attention.clamp_kqv", clip, kind)
    window = read.integer("attention.sliding_window", low=0, high=MAX_POSITIONS, default=0)
    if window and kind.model_type == "mixtral":
        config["sliding_window"] = window
    elif window:
        raise _not_here("attention.sliding_window", window, kind)


def _not_here(key: str, value: float, kind: Kind) -> UnsupportedError:
    return UnsupportedError(
        f"the GGUF sets {key} = {value:g}, which a {kind.model_type} has no place for",
        fix="use the model's checkpoint",
    )


def _ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos, eos and pad by id; several ids that end an answer make a list."""
    found: dict[str, Any] = {}
    for name in ("bos", "eos", "padding"):
        if type(index := metadata.get(f"{_KEY}{name}_token_id")) is int:
            found[f"{_SPECIAL[name]}_token_id"] = index
    named = [metadata.get(f"{_KEY}{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = sorted({index for index in named if type(index) is int})
    if len(ends) > 1:
        found["eos_token_id"] = ends
    return found


def files_of(file: GGUF, config: dict[str, Any]) -> dict[str, bytes]:
    """config.json, generation_config.json and, if the GGUF has a vocabulary, the tokenizer's."""
    found = {
        "config.json": as_json(config),
        "generation_config.json": as_json(_generation(file.metadata)),
    }
    if file.metadata.get(_KEY + "model") in {None, "none"}:
        return found
    found["tokenizer.json"] = gguf_tokenizer.build(file.metadata).to_str(pretty=False).encode()
    found["tokenizer_config.json"] = as_json(_tokenizer_config(file.metadata, config))
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        found["chat_template.jinja"] = template.encode()
    return found


def _generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Ids, and the sampling that the authors advise, where the file says it."""
    found = _ids(metadata)
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    for key, name in names.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            found |= {name: _float(value) if isinstance(value, float) else value}
            found["do_sample"] = True
    repeat = metadata.get("general.sampling.penalty_repeat")
    if isinstance(repeat, float):
        found["repetition_penalty"] = _float(repeat)
    return found


def _tokenizer_config(metadata: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    tokens = gguf_tokenizer.token_list(metadata)
    found: dict[str, Any] = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, short_name in _SPECIAL.items():
        index = metadata.get(f"{_KEY}{name}_token_id")
        if type(index) is int and 0 <= index < len(tokens):
            found[f"{short_name}_token"] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        found["chat_template"] = template
    return found


def as_json(value: Any) -> bytes:
    """`value` as the JSON files of a checkpoint are written: indented, sorted keys."""
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
