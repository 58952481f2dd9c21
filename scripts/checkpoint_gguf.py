"""A GGUF of a checkpoint's own weights, for llama.cpp: token ids in, no tokenizer.

Matrices are bf16, as the checkpoint has them, or float32; norms and routers are float32. Of a layer
the experts are stacked [E, O, I].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from synthetic_gguf import NAMES, add_facts

from moelite.arch import Arch, Linear, MoE, Norm, TensorRef
from moelite.checkpoint import Source, read
from moelite.models import build
from moelite.quant.base import F32

Change = Callable[[F32], F32]  # what becomes of an expert's matrix [O, I]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of the file. refs: its matrices, more than one where experts are stacked.

    heads: rows are reordered head by head, or 0. plain: float32 whatever the file's type.
    """

    name: str
    refs: tuple[TensorRef, ...]
    shape: tuple[int, ...]
    heads: int = 0
    plain: bool = False

    @property
    def expert(self) -> bool:
        return len(self.shape) == 3


def parts(arch: Arch) -> Iterator[Part]:
    """All tensors of the model in the order of the file. Biases are not known here."""
    shape = arch.vocab_size, arch.hidden_size
    yield Part(name="token_embd.weight", refs=(arch.embed,), shape=shape)
    yield _norm("output_norm", arch.norm)
    if not arch.tied:
        yield _matrix("output", arch.head)
    for i, layer in enumerate(arch.layers):
        a, mlp, blk = layer.attention, layer.mlp, f"blk.{i}"
        assert isinstance(mlp, MoE)
        yield _norm(f"{blk}.attn_norm", layer.input_norm)
        yield _norm(f"{blk}.ffn_norm", layer.post_norm)
        # llama.cpp turns neighbours where "half" pairs row i with i + n: only its llama does
        pairs = NAMES[arch.model_type] == "llama"
        yield _matrix(f"{blk}.attn_q", a.q, a.num_heads if pairs else 0)
        yield _matrix(f"{blk}.attn_k", a.k, a.num_kv_heads if pairs else 0)
        yield _matrix(f"{blk}.attn_v", a.v)
        yield _matrix(f"{blk}.attn_output", a.o)
        for name, norm in (("q", a.q_norm), ("k", a.k_norm)):
            if norm is not None:
                yield _norm(f"{blk}.attn_{name}_norm", norm)
        router = mlp.router.linear
        name, shape = f"{blk}.ffn_gate_inp.weight", (router.rows, router.cols)
        yield Part(name=name, refs=(router.weight,), shape=shape, plain=True)
        for name in ("gate", "up", "down"):
            one: Linear = getattr(mlp.experts, name)
            refs = tuple(one.weight.at(e) for e in range(mlp.num_experts))
            stack = (len(refs), one.rows, one.cols)
            yield Part(name=f"{blk}.ffn_{name}_exps.weight", refs=refs, shape=stack)


def _norm(name: str, norm: Norm) -> Part:
    return Part(name=f"{name}.weight", refs=(norm.weight,), shape=(norm.size,), plain=True)


def _matrix(name: str, linear: Linear, heads: int = 0) -> Part:
    shape = linear.rows, linear.cols
    return Part(name=f"{name}.weight", refs=(linear.weight,), shape=shape, heads=heads)


def by_neighbours(weight: F32, heads: int) -> F32:
    """Rows [heads * D, I] so that those D/2 apart in a head become neighbours."""
    half = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(half.swapaxes(1, 2)).reshape(weight.shape)


def write(
    source: Source,
    path: Path,
    *,
    dtype: Literal["bf16", "f32"] = "bf16",
    change: Change | None = None,
    ready: Mapping[str, gguf.ReaderTensor] | None = None,
) -> None:
    """The GGUF of `source`, one tensor in memory at a time. change: applied to every expert matrix.
    ready: tensors of another file that are taken from there as they are, quantized or not.

    bf16 rounds to nearest even, which leaves a bf16 checkpoint as it is.
    """
    ready = ready or {}
    arch = build(source.config)
    writer = gguf.GGUFWriter(path, NAMES[arch.model_type])
    add_facts(writer, arch, source.config, path.stem)
    found = list(parts(arch))
    kinds = [_kind("f32" if part.plain else dtype) for part in found]
    for part, (kind, itemsize) in zip(found, kinds, strict=True):
        if part.name in ready:
            data, kind = ready[part.name].data, ready[part.name].tensor_type
            writer.add_tensor_info(part.name, data.shape, data.dtype, data.nbytes, raw_dtype=kind)
            continue
        size, shape = math.prod(part.shape), part.shape
        if itemsize == 2:  # the writer wants the shape in bytes for what numpy has no type for
            shape = (*shape[:-1], 2 * shape[-1])
        stored = np.dtype(np.float32 if itemsize == 4 else np.uint8)
        writer.add_tensor_info(part.name, shape, stored, size * itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part, (kind, _) in zip(found, kinds, strict=True):
        if part.name in ready:
            writer.write_tensor_data(ready[part.name].data)
        else:
            writer.write_tensor_data(gguf.quantize(_read(source, part, change), kind))
    writer.close()


def _kind(dtype: str) -> tuple[gguf.GGMLQuantizationType, int]:
    if dtype == "f32":
        return gguf.GGMLQuantizationType.F32, 4
    return gguf.GGMLQuantizationType.BF16, 2


def _read(source: Source, part: Part, change: Change | None) -> F32:
    if not part.expert:
        weight = read(source, part.refs[0])
        return by_neighbours(weight, part.heads) if part.heads else weight
    out = np.empty(part.shape, np.float32)
    for expert, ref in enumerate(part.refs):
        weight = read(source, ref)
        out[expert] = weight if change is None else change(weight)
    return out
