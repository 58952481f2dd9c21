"""A GGUF model as a checkpoint: names and shapes of Hugging Face, experts one by one.

    blk.N.ffn_gate_exps.weight [E, I, H], ffn_up_exps, ffn_down_exps: all experts of a layer
    (or ffn_gate_up_exps [E, 2 I, H], gate's rows first; in old files ffn_gate.3.weight, one each)
    blk.N.ffn_gate_inp.weight [E, H]: the router

Of a split model every part is read; the first holds the metadata.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from moelite.errors import CheckpointError, UnsupportedError
from moelite.sources.gguf_config import Kind, config_of, files_of, kind_of
from moelite.sources.gguf_file import GGUF, Entry, read_gguf
from moelite.sources.gguf_tensors import Rows
from moelite.sources.tensor import Assembled, Tensor

_PARTS = 1024
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_STACK = re.compile(r"ffn_(gate|up|down|gate_up)_exps")
_SINGLE = re.compile(r"ffn_(gate|up|down)\.(\d+)")
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_WHICH = {"gate": (0,), "up": (1,), "down": (2,), "gate_up": (0, 1)}


def open_gguf(path: Path) -> Assembled:
    """The model in a GGUF file (of a split, its first part). Reads headers, no weights.

    Raises CheckpointError for what is damaged or missing, UnsupportedError for a model, tensor type
    or tokenizer that cannot be read.
    """
    file = _with_parts(read_gguf(path), path)
    kind = kind_of(file)
    config = config_of(file, {name: entry.shape for name, entry in file.tensors.items()})
    tensors: dict[str, Tensor] = {}
    for entry in file.tensors.values():
        made = _logical(entry, kind, config)
        if made is None:
            raise UnsupportedError(
                f"{path}: tensor {entry.name!r} is nothing that moelite knows of"
                f" a {kind.model_type}; it could change what the model computes",
                fix="use the model's checkpoint",
            )
        tensors |= made
    return Assembled(path.resolve().name, config, files_of(file, config), tensors)


def _with_parts(first: GGUF, path: Path) -> GGUF:
    """All parts of a split as one."""
    count = first.metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count <= _PARTS:
        raise CheckpointError(f"{path} says split.count = {count!r}", fix="fetch it again")
    if count <= 1:
        return first
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match[3]) != count or first.metadata.get("split.no") != 0:
        raise CheckpointError(
            f"{path} is part {first.metadata.get('split.no')} of {count}, and not named as the"
            f" first",
            fix=f"name the part that ends in -00001-of-{count:05}.gguf",
        )
    tensors = dict(first.tensors)
    for i in range(1, count):
        other = path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf")
        if not other.is_file():
            raise CheckpointError(f"{other} is missing", fix="fetch all parts of the model")
        part = read_gguf(other)
        if part.metadata.get("split.no") != i or part.tensors.keys() & tensors.keys():
            raise CheckpointError(f"{other} is not part {i + 1} of {path}", fix="fetch it again")
        tensors |= part.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(f"{path}: the parts hold {len(tensors)} tensors, not {total}")
    return replace(first, tensors=tensors)


def _logical(entry: Entry, kind: Kind, config: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors, by their names in a checkpoint, that one of a GGUF holds; None if unknown."""
    if entry.name in _TOP:
        return {_TOP[entry.name]: Rows(entry, entry.shape)}
    match = _BLOCK.fullmatch(entry.name)
    if match is None:
        return None
    layer, part, suffix = f"model.layers.{match[1]}", match[2], match[3]
    if part == "ffn_gate_inp":
        return {f"{layer}.{kind.block}.gate.{suffix}": Rows(entry, entry.shape)}
    stem = f"{layer}.{kind.block}.experts"
    if (stack := _STACK.fullmatch(part)) is not None and len(entry.shape) == 3:
        return _experts(entry, stem, [kind.experts[i] for i in _WHICH[stack[1]]])
    if (single := _SINGLE.fullmatch(part)) is not None:
        expert = f"{stem}.{single[2]}.{kind.experts[_WHICH[single[1]][0]]}"
        return {f"{expert}.{suffix}": Rows(entry, entry.shape)}
    if part not in _LAYER:
        return None
    shape = entry.shape
    if part == "ffn_gate_inp_shexp":  # a matrix of one row
        shape = (1, shape[-1])
    heads = config["head_dim"] if kind.halves_in_turn and part in {"attn_q", "attn_k"} else 0
    if heads and (len(shape) != 2 or shape[0] % heads or heads % 2):
        raise CheckpointError(
            f"tensor {entry.name!r} is {list(shape)}: no whole heads of {heads} rows"
        )
    return {f"{layer}.{_LAYER[part]}.{suffix}": Rows(entry, shape, heads=heads)}


def _experts(entry: Entry, stem: str, names: list[str]) -> dict[str, Tensor]:
    """Each expert's matrices of a stack [E, rows, cols]; several share the rows of one expert."""
    experts, rows, cols = entry.shape
    if rows % len(names):
        raise CheckpointError(f"tensor {entry.name!r} is {list(entry.shape)}: rows do not halve")
    size = rows // len(names)
    return {
        f"{stem}.{expert}.{name}.weight": Rows(entry, (size, cols), expert * rows + i * size)
        for expert in range(experts)
        for i, name in enumerate(names)
    }
