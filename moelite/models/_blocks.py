"""Parts that architectures share: the sizes every decoder has, and blocks under their usual names.

A file that differs in one field takes the block and replaces that field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moelite.arch import (
    Arch,
    Attention,
    GatedMLP,
    Layer,
    Linear,
    MoE,
    Norm,
    Rope,
    Router,
    TensorRef,
)
from moelite.config import MAX_LAYERS, MAX_POSITIONS, REQUIRED, HFConfig
from moelite.errors import CheckpointError, UnsupportedError
from moelite.rope import read_rope

PROJ = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the config says about every layer alike."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    max_positions: int
    rope: Rope


def read_sizes(hf: HFConfig, *, kv_heads_may_be_absent: bool = False) -> Sizes:
    """The sizes, checked against each other."""
    hidden_size = hf.integer("hidden_size", high=1 << 17)
    num_heads = hf.integer("num_attention_heads", high=4096)
    num_kv_heads = hf.integer(
        "num_key_value_heads",
        high=4096,
        default=num_heads if kv_heads_may_be_absent else REQUIRED,
    )
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = "
            f"{num_kv_heads}",
            fix="download config.json again, or correct it",
        )
    head_dim = hf.integer("head_dim", high=4096, default=None)
    if head_dim is None:
        if hidden_size % num_heads:
            raise CheckpointError(
                f"hidden_size = {hidden_size} is not a multiple of num_attention_heads = "
                f"{num_heads}, and head_dim is not given",
                fix="add head_dim to config.json",
            )
        head_dim = hidden_size // num_heads
    max_positions = hf.integer("max_position_embeddings", high=MAX_POSITIONS)
    return Sizes(
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=hf.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        eps=hf.number("rms_norm_eps", low=0.0, high=1.0),
        max_positions=max_positions,
        rope=read_rope(hf, head_dim=head_dim, max_positions=max_positions),
    )


def linear(name: str, rows: int, cols: int, *, bias: bool = False) -> Linear:
    """The matrix `name`.weight [rows, cols] with `name`.bias [rows] if it has one."""
    return Linear(
        weight=TensorRef(name=f"{name}.weight"),
        rows=rows,
        cols=cols,
        bias=TensorRef(name=f"{name}.bias") if bias else None,
    )


def rms_norm(name: str, size: int, eps: float) -> Norm:
    return Norm(weight=TensorRef(name=f"{name}.weight"), size=size, eps=eps)


def gated_mlp(
    prefix: str, hidden_size: int, expert_size: int, *, names: tuple[str, str, str] = PROJ
) -> GatedMLP:
    """gate, up and down under `prefix`, called `names` in that order."""
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return GatedMLP(
        gate=linear(gate, expert_size, hidden_size),
        up=linear(up, expert_size, hidden_size),
        down=linear(down, hidden_size, expert_size),
    )


def attention(
    prefix: str,
    sizes: Sizes,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    window: int | None = None,
) -> Attention:
    """Grouped-query attention with rotary positions and scale 1 / sqrt(head_dim)."""
    width = sizes.num_heads * sizes.head_dim
    kv_width = sizes.num_kv_heads * sizes.head_dim
    hidden = sizes.hidden_size
    return Attention(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        q=linear(f"{prefix}.q_proj", width, hidden, bias=qkv_bias),
        k=linear(f"{prefix}.k_proj", kv_width, hidden, bias=qkv_bias),
        v=linear(f"{prefix}.v_proj", kv_width, hidden, bias=qkv_bias),
        o=linear(f"{prefix}.o_proj", hidden, width, bias=o_bias),
        rope=sizes.rope,
        window=window,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """What the config says about every layer's experts alike."""

    num_experts: int
    top_k: int
    expert_size: int
    renormalize: bool


def read_experts(hf: HFConfig, *, size_key: str, renormalize: bool) -> Experts:
    """The experts, whose width is under `size_key`."""
    # transformers writes either name for the same number, by version and model type.
    num_experts = hf.integer("num_experts", "num_local_experts", high=1 << 16)
    return Experts(
        num_experts=num_experts,
        top_k=hf.integer("num_experts_per_tok", high=num_experts),
        expert_size=hf.integer(size_key),
        renormalize=renormalize,
    )


def routed(
    prefix: str, sizes: Sizes, experts: Experts, *, names: tuple[str, str, str] = PROJ
) -> MoE:
    """Softmax router `prefix`.gate [E, H] over `prefix`.experts.{expert}."""
    expert = f"{prefix}.experts.{{expert}}"
    return MoE(
        router=Router(
            linear=linear(f"{prefix}.gate", experts.num_experts, sizes.hidden_size),
            top_k=experts.top_k,
            renormalize=experts.renormalize,
        ),
        num_experts=experts.num_experts,
        experts=gated_mlp(expert, sizes.hidden_size, experts.expert_size, names=names),
    )


def sparse_layers(hf: HFConfig, num_layers: int) -> tuple[bool, ...]:
    """Which layers hold experts, by `decoder_sparse_step` and `mlp_only_layers` (absent: none)."""
    step = hf.integer("decoder_sparse_step", high=MAX_LAYERS)
    dense = hf.items("mlp_only_layers", int) or ()
    if any(not 0 <= i < num_layers for i in dense):
        raise CheckpointError(
            f"mlp_only_layers = {list(dense)} names a layer that is not there; the model has "
            f"{num_layers}",
            fix="download config.json again, or correct it",
        )
    sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
    if not any(sparse):
        raise UnsupportedError(
            "no layer of this model holds experts; moelite runs mixture-of-experts models",
            fix="use an ordinary runtime for dense models",
        )
    return sparse


def layer(prefix: str, sizes: Sizes, attn: Attention, mlp: GatedMLP | MoE) -> Layer:
    """A pre-norm layer under the usual norm names."""
    return Layer(
        input_norm=rms_norm(f"{prefix}.input_layernorm", sizes.hidden_size, sizes.eps),
        attention=attn,
        post_norm=rms_norm(f"{prefix}.post_attention_layernorm", sizes.hidden_size, sizes.eps),
        mlp=mlp,
    )


def decoder(hf: HFConfig, model_type: str, sizes: Sizes, layers: Sequence[Layer]) -> Arch:
    """The whole model; the last reader of the config, so unknown keys are refused here."""
    hf.must_be("hidden_act", "silu")
    hf.must_be("is_encoder_decoder", False)
    hf.must_be("add_cross_attention", False)
    embed = TensorRef(name="model.embed_tokens.weight")
    tied = hf.flag("tie_word_embeddings", default=False)
    head = embed if tied else TensorRef(name="lm_head.weight")
    hf.finish()
    return Arch(
        model_type=model_type,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        max_positions=sizes.max_positions,
        embed=embed,
        layers=tuple(layers),
        norm=rms_norm("model.norm", sizes.hidden_size, sizes.eps),
        head=Linear(weight=head, rows=sizes.vocab_size, cols=sizes.hidden_size),
    )
