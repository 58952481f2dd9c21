"""What a checkpoint holds, tensor by tensor, as a recipe will store it; checked before any work.

Reads headers and a few rows, never whole weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from moelite.arch import Arch, GatedMLP, Linear, MoE, Norm, TensorRef
from moelite.checkpoint import READABLE, Source, ref_shape
from moelite.errors import CheckpointError, UnsupportedError, UsageError
from moelite.models import build
from moelite.quant import FORMATS
from moelite.quant.base import RecordLayout, record_layout
from moelite.storefile import DenseSpec, TensorClass, packed_bytes

DENSE_FORMATS = ("int4", "int8", "bf16", "f32")
_SAMPLES, _SAMPLE_LIMIT = 32, 1 << 20  # tensors and weights a row that identify a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseItem:
    """One tensor that is not a routed expert. kind: its row in the table of classes."""

    ref: TensorRef
    kind: str
    spec: DenseSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Everything to store. layers: {MoE layer: its MoE}; ignored: tensors the model has no use for.

    encodings: {dtype as the checkpoint has it: bytes read of it}, largest first. source_bytes: of
    all that is read.
    """

    arch: Arch
    experts: str
    dense: str
    layout: RecordLayout
    items: dict[str, DenseItem]
    layers: dict[int, MoE]
    classes: tuple[TensorClass, ...]
    ignored: tuple[str, ...]
    encodings: dict[str, int]
    fingerprint: str

    @property
    def source_bytes(self) -> int:
        return sum(c.bytes_before for c in self.classes)

    @property
    def store_bytes(self) -> int:
        return sum(c.bytes_after for c in self.classes)


def take_inventory(source: Source, experts: str, dense: str) -> Inventory:
    """Walk the architecture and check every tensor that it needs.

    Raises UsageError for an unknown format, UnsupportedError, or CheckpointError naming the tensor
    that is missing or has another shape.
    """
    _check_recipe(experts, dense)
    arch = build(source.config)
    layers = {i: arch.layers[i].mlp for i in arch.moe_layers}
    moe = {i: mlp for i, mlp in layers.items() if isinstance(mlp, MoE)}
    layout = _layout(arch, moe, experts)
    table = _Table(source, frozenset(source.names()))
    items = {item.ref.key: item for item in _dense_items(arch, dense)}
    for item in items.values():
        size = packed_bytes(item.spec.format, item.spec.shape)
        table.add(item.ref, item.spec.shape, (item.kind, item.spec.format), size)
    for mlp in moe.values():
        for expert in range(mlp.num_experts):
            size = layout.record_bytes
            for part in mlp.experts.matrices:
                shape = (part.rows, part.cols)
                table.add(part.weight.at(expert), shape, ("routed experts", experts), size)
                size = 0  # the record counts once for its three matrices
    return Inventory(
        arch=arch,
        experts=experts,
        dense=dense,
        layout=layout,
        items=dict(sorted(items.items())),
        layers=moe,
        classes=table.classes(),
        ignored=tuple(sorted(table.names - table.used)),
        encodings=dict(sorted(table.encodings.items(), key=lambda e: (-e[1], e[0]))),
        fingerprint=_fingerprint(source),
    )


def _check_recipe(experts: str, dense: str) -> None:
    recipe = (("experts", experts, tuple(FORMATS)), ("dense", dense, DENSE_FORMATS))
    for part, value, allowed in recipe:
        if value not in allowed:
            raise UsageError(
                f"{value!r} is no format for {part}",
                fix=f"choose one of {', '.join(allowed)}",
            )


def _layout(arch: Arch, layers: dict[int, MoE], experts: str) -> RecordLayout:
    """One record layout for all layers, as a store of this version has."""
    sizes = {mlp.experts.gate.rows for mlp in layers.values()}
    if len(sizes) != 1:
        raise UnsupportedError(
            f"the routed experts of this {arch.model_type} have the sizes {sorted(sizes)};"
            f" moelite needs one size, and at least one layer of experts"
        )
    for mlp in layers.values():
        for part in mlp.experts.matrices:
            if part.bias is not None:
                raise UnsupportedError(f"routed experts with biases ({part.bias.name})")
    return record_layout(FORMATS[experts], arch.hidden_size, sizes.pop())


def source_bytes(source: Source, ref: TensorRef, shape: tuple[int, ...]) -> int:
    """What the part of `shape` that `ref` names takes in the checkpoint, its share of a tensor.

    Raises UnsupportedError if it cannot be read.
    """
    size = source.nbytes(ref.name)
    if size is None:
        raise UnsupportedError(
            f"tensor {ref.name!r} is {source.dtype(ref.name)}; moelite reads {', '.join(READABLE)}",
            fix="use the unquantized checkpoint of this model",
        )
    return size * math.prod(shape) // max(1, math.prod(source.shape(ref.name)))


class _Table:
    """Bytes before and after by class, and the check of every tensor on the way."""

    def __init__(self, source: Source, names: frozenset[str]) -> None:
        self.names = names
        self.used: set[str] = set()
        self._source = source
        self.encodings: dict[str, int] = {}
        self._rows: dict[tuple[str, str], list[int]] = {}

    def add(self, ref: TensorRef, shape: tuple[int, ...], row: tuple[str, str], after: int) -> None:
        if ref.name not in self.names:
            raise CheckpointError(
                f"the checkpoint has no tensor {ref.name!r}, which its config.json calls for",
                fix="fetch the checkpoint again, complete",
            )
        found = ref_shape(self._source, ref)
        if found != shape:
            raise CheckpointError(
                f"tensor {ref.key!r} is {list(found)}; its config.json calls for {list(shape)}"
            )
        before = source_bytes(self._source, ref, shape)
        dtype = self._source.dtype(ref.name)
        self.encodings[dtype] = self.encodings.get(dtype, 0) + before
        self.used.add(ref.name)
        params = math.prod(shape)
        sums = self._rows.setdefault(row, [0, 0, 0, 0])
        for i, value in enumerate((1, params, before, after)):
            sums[i] += value

    def classes(self) -> tuple[TensorClass, ...]:
        """Largest first, as they were in the checkpoint."""
        found = [
            TensorClass(
                name=name,
                format=fmt,
                tensors=sums[0],
                params=sums[1],
                bytes_before=sums[2],
                bytes_after=sums[3],
            )
            for (name, fmt), sums in self._rows.items()
        ]
        return tuple(sorted(found, key=lambda c: (-c.bytes_before, c.name)))


def _dense_items(arch: Arch, dense: str) -> Iterator[DenseItem]:
    yield _item(arch.embed, "embeddings", dense, (arch.vocab_size, arch.hidden_size))
    for layer in arch.layers:
        a = layer.attention
        for norm in (layer.input_norm, layer.post_norm, a.q_norm, a.k_norm):
            yield from _norm(norm)
        for part in (a.q, a.k, a.v, a.o):
            yield from _linear(part, "attention", dense)
        if isinstance(layer.mlp, MoE):
            yield from _linear(layer.mlp.router.linear, "router", "f32")
            yield from _gated(layer.mlp.shared, "shared experts", dense)
            if layer.mlp.shared_gate is not None:
                yield from _linear(layer.mlp.shared_gate, "shared experts", dense)
        else:
            yield from _gated(layer.mlp, "dense layers", dense)
    yield from _norm(arch.norm)
    if not arch.tied:
        yield from _linear(arch.head, "head", dense)


def _item(ref: TensorRef, kind: str, fmt: str, shape: tuple[int, ...]) -> DenseItem:
    return DenseItem(ref=ref, kind=kind, spec=DenseSpec(format=fmt, shape=shape))


def _norm(norm: Norm | None) -> Iterator[DenseItem]:
    for ref in () if norm is None else (norm.weight, norm.bias):
        if ref is not None and norm is not None:
            yield _item(ref, "norms and biases", "f32", (norm.size,))


def _linear(part: Linear, kind: str, fmt: str) -> Iterator[DenseItem]:
    yield _item(part.weight, kind, fmt, (part.rows, part.cols))
    if part.bias is not None:
        yield _item(part.bias, "norms and biases", "f32", (part.rows,))


def _gated(mlp: GatedMLP | None, kind: str, fmt: str) -> Iterator[DenseItem]:
    for part in () if mlp is None else mlp.matrices:
        yield from _linear(part, kind, fmt)


def _fingerprint(source: Source) -> str:
    """Tells two checkpoints apart: config, every shape, and a first row of some tensors."""
    shapes = [(name, source.dtype(name), source.shape(name)) for name in source.names()]
    digest = hashlib.sha256(json.dumps([source.config, shapes], sort_keys=True).encode())
    small = [
        name
        for name, _, shape in shapes
        if source.nbytes(name) is not None and shape and 0 < math.prod(shape[1:]) <= _SAMPLE_LIMIT
    ]
    for name in small[:: max(1, len(small) // _SAMPLES)]:
        digest.update(source.raw(name, 0, 1).tobytes())
    return digest.hexdigest()
