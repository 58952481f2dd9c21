"""GGUF files of random weights, as `synthetic` writes stores: the same shapes for llama.cpp.

Matrices are Q4_0 or Q8_0, embeddings and output too; norms and routers are F32. There is no
vocabulary (tokenizer.ggml.model = "none"): llama.cpp takes token ids as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from synthetic import INT8_RMS, SCALE_RMS, fill, generator, random_plain, spread_scales, std_of

from moelite.arch import Arch, Linear, MoE, Norm
from moelite.errors import UsageError
from moelite.models import build
from moelite.quant.base import BLOCK, U8

NAMES = {"olmoe": "olmoe", "mixtral": "llama", "qwen3_moe": "qwen3moe"}  # as GGUF calls them
TYPES = {"int4": gguf.GGMLQuantizationType.Q4_0, "int8": gguf.GGMLQuantizationType.Q8_0}
_BLOCKS = {  # one block of 32 columns: scale, codes, and the root mean square of the codes
    "int4": (np.dtype([("d", "<f2"), ("codes", "u1", 16)]), math.sqrt(21.5)),  # codes - 8
    "int8": (np.dtype([("d", "<f2"), ("codes", "i1", 32)]), INT8_RMS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of the file. shape: slowest axis first; std 0: F32, a norm or a router."""

    name: str
    shape: tuple[int, ...]
    std: float = 0.0


def tensors(arch: Arch) -> Iterator[Tensor]:
    """All tensors of the model in the order of the file."""
    embed = (arch.vocab_size, arch.hidden_size)
    yield Tensor(name="token_embd.weight", shape=embed, std=1.0)
    yield from _part("output_norm", arch.norm)
    if not arch.tied:
        yield from _part("output", arch.head)
    for i, layer in enumerate(arch.layers):
        a, mlp, blk = layer.attention, layer.mlp, f"blk.{i}"
        assert isinstance(mlp, MoE)
        yield from _part(f"{blk}.attn_norm", layer.input_norm)
        yield from _part(f"{blk}.ffn_norm", layer.post_norm)
        for name, part in (("q", a.q), ("k", a.k), ("v", a.v)):
            yield from _part(f"{blk}.attn_{name}", part)
        yield from _part(f"{blk}.attn_output", a.o, len(arch.layers))
        yield from _part(f"{blk}.attn_q_norm", a.q_norm)
        yield from _part(f"{blk}.attn_k_norm", a.k_norm)
        router = mlp.router.linear
        yield Tensor(name=f"{blk}.ffn_gate_inp.weight", shape=(router.rows, router.cols))
        for name in ("gate", "up", "down"):
            one: Linear = getattr(mlp.experts, name)
            shape = (mlp.num_experts, one.rows, one.cols)
            std = std_of(one.cols, len(arch.layers) if name == "down" else None)
            yield Tensor(name=f"{blk}.ffn_{name}_exps.weight", shape=shape, std=std)


def _part(name: str, part: Linear | Norm | None, layers: int | None = None) -> Iterator[Tensor]:
    if isinstance(part, Linear):
        std = std_of(part.cols, layers)
        yield Tensor(name=f"{name}.weight", shape=(part.rows, part.cols), std=std)
    elif part is not None:
        yield Tensor(name=f"{name}.weight", shape=(part.size,))


def random_blocks(
    fmt: str, shape: tuple[int, ...], std: float, rng: np.random.Generator
) -> np.ndarray:
    """Random Q4_0 or Q8_0 blocks of zero mean: uint8 [..., bytes of a row]."""
    kind, rms = _BLOCKS[fmt]
    if shape[-1] % BLOCK:
        raise UsageError(f"{shape[-1]} columns are not whole blocks of {BLOCK}")
    blocks = np.empty(math.prod(shape) // BLOCK, kind)
    blocks["d"] = spread_scales(blocks.size, rng) * np.float32(std / (rms * SCALE_RMS))
    # whole rows of codes at once: a block's codes do not lie together with the next block's
    codes: U8 = np.empty((1 << 16, kind["codes"].itemsize), np.uint8)
    for at in range(0, blocks.size, len(codes)):
        part = codes[: blocks.size - at]
        fill(part, rng)
        drawn = part.view(kind["codes"].base)
        if fmt == "int8":
            drawn[drawn == -128] = 0
        blocks["codes"][at : at + len(part)] = drawn
    return blocks.view(np.uint8).reshape(*shape[:-1], -1)


def write_gguf(
    config: dict[str, Any],
    path: Path,
    *,
    fmt: str = "int4",
    seed: int = 0,
    progress: Callable[[str], None] = lambda note: None,
) -> None:
    """A GGUF of random weights of the model that `config` describes; one tensor in memory."""
    arch = build(config)
    writer = gguf.GGUFWriter(path, NAMES[arch.model_type])
    add_facts(writer, arch, config, "synthetic")
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_Q4_0 if fmt == "int4" else gguf.LlamaFileType.MOSTLY_Q8_0
    )
    kind = TYPES[fmt]
    found = list(tensors(arch))
    for tensor in found:
        if tensor.std:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            *rest, cols = tensor.shape
            shape = (*rest, cols // block * size)
            writer.add_tensor_info(
                tensor.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind
            )
        else:
            size = 4 * math.prod(tensor.shape)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, tensor in enumerate(found):
        rng = generator(seed, 5, i)
        if tensor.std:
            data = random_blocks(fmt, tensor.shape, tensor.std, rng)
        else:
            data = random_plain(tensor.shape, rng)
        writer.write_tensor_data(data)
        if i % 50 == 0:
            progress(f"tensor {i} of {len(found)}")
    writer.close()


def add_facts(writer: gguf.GGUFWriter, arch: Arch, config: dict[str, Any], name: str) -> None:
    """Everything llama.cpp must know of a model beside its tensors; no tokenizer."""
    mlp, a = arch.layers[0].mlp, arch.layers[0].attention
    assert isinstance(mlp, MoE)
    expert_size = mlp.experts.gate.rows
    writer.add_name(name)
    writer.add_block_count(len(arch.layers))
    writer.add_context_length(arch.max_positions)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(config["intermediate_size"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(expert_size)
    writer.add_head_count(a.num_heads)
    writer.add_head_count_kv(a.num_kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(arch.norm.eps)
    writer.add_expert_count(mlp.num_experts)
    writer.add_expert_used_count(mlp.router.top_k)
    writer.add_vocab_size(arch.vocab_size)
    writer.add_tokenizer_model("none")
