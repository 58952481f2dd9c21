"""Every tensor that an Arch names, found by walking its fields, with the shape it must have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from moelite.arch import Arch, Linear, MoE, Norm, TensorRef

Named = tuple[TensorRef, tuple[int, ...]]


def arch_tensors(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape. A name that occurs twice is an error, but for tied embeddings."""
    found = {arch.embed.name: (arch.vocab_size, arch.hidden_size)}
    for ref, shape in _walk(arch.layers):
        assert ref.name not in found, f"{ref.name} is used twice"
        found[ref.name] = shape
    for ref, shape in (*_walk(arch.norm), *_walk(arch.head)):
        assert found.setdefault(ref.name, shape) == shape
    return found


def num_parameters(arch: Arch) -> int:
    """How many numbers the model holds."""
    total = 0
    for shape in arch_tensors(arch).values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def _walk(part: Any) -> Iterator[Named]:
    if isinstance(part, Linear):
        yield part.weight, (part.rows, part.cols)
        if part.bias is not None:
            yield part.bias, (part.rows,)
    elif isinstance(part, Norm):
        yield from ((ref, (part.size,)) for ref in (part.weight, part.bias) if ref is not None)
    elif isinstance(part, tuple):
        for item in part:
            yield from _walk(item)
    elif isinstance(part, MoE):
        for ref, shape in _walk(part.experts):
            yield from ((ref.at(expert), shape) for expert in range(part.num_experts))
        yield from _walk((part.router, part.shared, part.shared_gate))
    elif is_dataclass(part):
        yield from _walk(tuple(getattr(part, field.name) for field in fields(part)))
