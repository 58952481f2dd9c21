"""What every architecture file owes: read configs as published, refuse the rest by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
from arch_tensors import arch_tensors, num_parameters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moelite.arch import Arch, MoE
from moelite.errors import CheckpointError, MoeliteError, UnsupportedError
from moelite.models import build, supported

# config.json of four releases, in the spelling of the files on the hub.
_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
HUB: dict[str, dict[str, Any]] = {
    "mixtral": {
        **_COMMON,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "qwen2_moe": {
        **_COMMON,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3_moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "olmoe": {
        **_COMMON,
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 50304,
    },
}
# As the releases are advertised: Mixtral 8x7B 46.7 B, Qwen1.5-MoE 14.3 B, Qwen3-30B-A3B 30.5 B,
# OLMoE 6.9 B.
PARAMETERS = {"mixtral": 46.7, "qwen2_moe": 14.3, "qwen3_moe": 30.5, "olmoe": 6.9}

# Absent in files older than the key, and then meaning one thing only.
OPTIONAL = {
    "mixtral": {"sliding_window"},
    "qwen2_moe": {"use_sliding_window"},
    "qwen3_moe": {"use_sliding_window", "attention_bias", "mlp_only_layers"},
    "olmoe": {"num_key_value_heads", "attention_bias", "clip_qkv"},
}
UNREAD = set(_COMMON) | {
    "architectures",
    "head_dim",  # absent: hidden_size / num_attention_heads, in every version of transformers
    "max_window_layers",
    "pad_token_id",
    "rope_scaling",
    "sliding_window",
}


def small(model_type: str, **changes: Any) -> dict[str, Any]:
    """A hub config cut to two layers, changed."""
    raw = copy.deepcopy(HUB[model_type])
    return {**raw, "num_hidden_layers": 2, **changes}


def test_every_type_has_tiny_models_and_a_published_config() -> None:
    assert set(supported()) == set(tiny_models.model_types()) == set(HUB)
    assert all(not name.startswith("_") for name in supported())


@pytest.mark.parametrize("model_type", supported())
def test_published_config_gives_the_published_size(model_type: str) -> None:
    arch = build(HUB[model_type])
    assert arch.model_type == model_type
    assert round(num_parameters(arch) / 1e9, 1) == PARAMETERS[model_type]


@pytest.mark.parametrize("model_type", supported())
def test_both_spellings_are_one_architecture(model_type: str) -> None:
    old = small(model_type)
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": old["rope_theta"]},
    }
    for key, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if key in old:
            new[other] = new.pop(key)
            break
    assert build(new) == build(old)


@pytest.mark.parametrize("model_type", supported())
def test_unknown_keys_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match="'attention_sink'"):
        build(small(model_type, attention_sink=True))
    assert build(small(model_type, attention_sink=None)) == build(small(model_type))


@pytest.mark.parametrize("model_type", supported())
def test_missing_keys_are_never_guessed(model_type: str) -> None:
    whole = build(small(model_type))
    for key in set(HUB[model_type]) - UNREAD:
        raw = small(model_type)
        del raw[key]
        if key in OPTIONAL[model_type]:
            assert build(raw) == whole, key
        else:
            with pytest.raises(CheckpointError, match=key):
                build(raw)


@pytest.mark.parametrize("model_type", supported())
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("auto_map", {"AutoModel": "modeling_x.X"}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "longrope", "long_factor": [1.0]}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "spread": 3}),
        ("partial_rotary_factor", 0.5),
        ("is_encoder_decoder", True),
    ],
)
def test_settings_not_implemented_are_refused(model_type: str, key: str, value: object) -> None:
    with pytest.raises(
        UnsupportedError, match=key if key != "rope_scaling" else "rope_type|spread"
    ):
        build(small(model_type, **{key: value}))


@pytest.mark.parametrize("model_type", supported())
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", 4096.0),
        ("hidden_size", True),
        ("vocab_size", 10**12),
        ("num_hidden_layers", 10**6),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 7),
        ("num_experts_per_tok", 1000),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_theta", 10**400),
        ("rope_theta", -1.0),
        ("head_dim", 65),
        ("tie_word_embeddings", "yes"),
        ("rope_scaling", "yarn"),
    ],
)
def test_nonsense_is_refused_by_name(model_type: str, key: str, value: object) -> None:
    names = {"head_dim": "head", "rope_scaling": "rope_scaling"}
    with pytest.raises(CheckpointError, match=names.get(key, key)):
        build(small(model_type, **{key: value}))


_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 5000),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 5), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor"]), st.floats(), max_size=2),
)


@pytest.mark.parametrize("model_type", supported())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_anywhere_builds_or_is_refused(model_type: str, data: st.DataObject) -> None:
    """No config, however broken, may end in another exception or in a model that cannot be."""
    raw = small(model_type)
    extra = ["rope_parameters", "mlp_only_layers", "layer_types", "head_dim", "qkv_bias"]
    for key in data.draw(st.lists(st.sampled_from([*raw, *extra]), max_size=3)):
        raw[key] = data.draw(_JUNK)
    try:
        arch = build(raw)
    except MoeliteError:
        return
    check(arch)


def check(arch: Arch) -> None:
    """What the decoder relies on."""
    assert arch.moe_layers
    assert all(min(shape) >= 1 for shape in arch_tensors(arch).values())
    for layer in arch.layers:
        a = layer.attention
        assert a.num_heads % a.num_kv_heads == 0
        assert a.q.rows == a.o.cols == a.num_heads * a.head_dim
        assert a.rope is not None
        assert 2 * len(a.rope.inv_freq) == a.head_dim
        if isinstance(layer.mlp, MoE):
            assert 1 <= layer.mlp.router.top_k <= layer.mlp.num_experts


def test_unknown_model_types_are_refused() -> None:
    for name in ("llama", "../mixtral", "_blocks", "__init__", ""):
        with pytest.raises(UnsupportedError, match="supported: mixtral"):
            build({"model_type": name})
    with pytest.raises(CheckpointError, match="model_type"):
        build({})
    with pytest.raises(CheckpointError, match="not a JSON object"):
        build([])  # type: ignore[arg-type]


def test_qwen2_windows() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 9}
    kinds = ["sliding_attention", "full_attention"]
    arch = build(small("qwen2_moe", **sliding, layer_types=kinds))
    assert [layer.attention.window for layer in arch.layers] == [9, None]
    with pytest.raises(UnsupportedError, match="layer_types"):
        build(small("qwen2_moe", **sliding))
    with pytest.raises(CheckpointError, match="layer_types"):
        build(small("qwen2_moe", **sliding, layer_types=kinds[:1]))
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        build(small("qwen2_moe", layer_types=kinds))


def test_qwen3_windows() -> None:
    raw = small("qwen3_moe", use_sliding_window=True, sliding_window=9)
    with pytest.raises(UnsupportedError, match="max_window_layers"):
        build(raw)
    arch = build({**raw, "max_window_layers": None})
    assert [layer.attention.window for layer in arch.layers] == [9, 9]


def test_sparse_layers() -> None:
    raw = small("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1])
    assert build(raw).moe_layers == (3, 5)
    with pytest.raises(UnsupportedError, match="no layer"):
        build(small("qwen3_moe", mlp_only_layers=[0, 1]))
    with pytest.raises(CheckpointError, match="mlp_only_layers"):
        build(small("qwen3_moe", mlp_only_layers=[2]))


def test_qwen2_files_older_than_qkv_bias_have_biases() -> None:
    assert "qkv_bias" not in HUB["qwen2_moe"]
    for raw, expected in ((small("qwen2_moe"), True), (small("qwen2_moe", qkv_bias=False), False)):
        a = build(raw).layers[0].attention
        assert [p.bias is not None for p in (a.q, a.k, a.v, a.o)] == [expected] * 3 + [False]


def test_olmoe_heads_must_fill_the_hidden_size() -> None:
    with pytest.raises(CheckpointError, match="hidden_size, not 1024 and 2048"):
        build(small("olmoe", head_dim=64))
