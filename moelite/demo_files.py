"""The text files beside smollm2-moe's weights, built from the base GGUF's own metadata."""

from __future__ import annotations

from typing import Any, Protocol

from tokenizers import Tokenizer

from moelite.sources import gguf_tokenizer
from moelite.sources.gguf_config import as_json


class Metadata(Protocol):
    def field(self, name: str) -> Any: ...


def config_json(base: Metadata, num_experts: int, top_k: int) -> dict[str, Any]:
    """config.json: Mixtral's, with the base's numbers."""
    eps = float(f"{base.field('llama.attention.layer_norm_rms_epsilon'):.6g}")  # f32 of 1e-5
    theta = float(base.field("llama.rope.freq_base"))
    heads = int(base.field("llama.attention.head_count"))
    hidden = int(base.field("llama.embedding_length"))
    return {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": int(base.field("tokenizer.ggml.bos_token_id")),
        "dtype": "bfloat16",
        "eos_token_id": int(base.field("tokenizer.ggml.eos_token_id")),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": int(base.field("llama.feed_forward_length")),
        "max_position_embeddings": int(base.field("llama.context_length")),
        "model_type": "mixtral",
        "num_attention_heads": heads,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": int(base.field("llama.block_count")),
        "num_key_value_heads": int(base.field("llama.attention.head_count_kv")),
        "num_local_experts": num_experts,
        "output_router_logits": False,
        "pad_token_id": int(base.field("tokenizer.ggml.padding_token_id")),
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,  # transformers 4 and llama.cpp look here
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": int(base.field("llama.vocab_size")),
    }


def tokenizer(base: Metadata) -> Tokenizer:
    """GPT-2's byte-level BPE, after cutting every digit apart (pre-tokenizer "smollm")."""
    names = ("model", "pre", "tokens", "token_type", "merges")
    return gguf_tokenizer.build(
        {f"tokenizer.ggml.{n}": base.field(f"tokenizer.ggml.{n}") for n in names}
    )


def sidecars(base: Metadata, config: dict[str, Any]) -> dict[str, bytes]:
    """config, generation config, tokenizer and chat template: file name -> content."""
    tokens = base.field("tokenizer.ggml.tokens")
    template = base.field("tokenizer.chat_template")

    def token(kind: str) -> str:
        return str(tokens[base.field(f"tokenizer.ggml.{kind}_token_id")])

    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokenizer_config = {
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": config["max_position_embeddings"],
        "pad_token": token("padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": token("unknown"),
    }
    return {
        "config.json": as_json(config),
        "generation_config.json": as_json({name: config[name] for name in ids}),
        "tokenizer.json": tokenizer(base).to_str(pretty=False).encode(),
        "tokenizer_config.json": as_json(tokenizer_config),
        "chat_template.jinja": template.encode(),
    }
