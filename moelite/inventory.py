"""What a checkpoint holds, tensor by tensor, as a recipe will store it; checked before any work.

Reads headers and a few rows, never whole weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moelite.arch import Arch, Linear, MoE, Norm, TensorRef
from moelite.checkpoint import READABLE, Source, ref_shape
from moelite.errors import CheckpointError, UnsupportedError
from moelite.models import build
from moelite.quant.record import RecordLayout, record_layout
from moelite.recipe import ATTENTION_PARTS, Recipe, check_layers
from moelite.storefile import DenseSpec, LayerEntry, TensorClass, packed_bytes

ROUTED = "routed experts"  # the class of them, in reports
_SAMPLES, _SAMPLE_LIMIT = 32, 1 << 20  # tensors and weights a row that identify a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseItem:
    """One tensor that is not a routed expert. kind: its row in the table of classes."""

    ref: TensorRef
    kind: str
    spec: DenseSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Everything to store. layers: {MoE layer: its MoE}; entries: how each is stored; ignored:
    tensors the model has no use for.

    encodings: {dtype as the checkpoint has it: bytes read of it}, largest first. source_bytes: of
    all that is read.
    """

    arch: Arch
    recipe: Recipe
    entries: dict[int, LayerEntry]
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
    def params(self) -> int:
        return sum(c.params for c in self.classes)

    @property
    def store_bytes(self) -> int:
        return sum(c.bytes_after for c in self.classes)

    @property
    def formats(self) -> set[str]:
        """Every format that weights are packed in."""
        found = {name for entry in self.entries.values() for name in entry.formats}
        return found | {item.spec.format for item in self.items.values()}


def take_inventory(source: Source, recipe: Recipe) -> Inventory:
    """Walk the architecture and check every tensor that it needs.

    Raises UsageError for a recipe that does not fit, UnsupportedError, or CheckpointError naming
    the tensor that is missing or has another shape.
    """
    arch = build(source.config)
    moe = moe_layers(arch)
    check_layers(recipe, arch)
    entries = plan_layers(arch, recipe)
    table = _Table(source, frozenset(source.names()))
    items = {item.ref.key: item for item in dense_items(arch, recipe)}
    for item in items.values():
        size = packed_bytes(item.spec.format, item.spec.shape)
        table.add(item.ref, item.spec.shape, (item.kind, item.spec.format), size)
    for number, mlp in moe.items():
        entry = entries[number]
        for expert in range(mlp.num_experts):
            layout = entry.layout_of(expert)
            parts = zip(mlp.experts.matrices, _each(layout), _shares(layout), strict=True)
            for part, fmt, size in parts:
                row = ROUTED, fmt
                table.add(part.weight.at(expert), (part.rows, part.cols), row, size)
        if entry.low is not None:
            table.low(entry)
    return Inventory(
        arch=arch,
        recipe=recipe,
        entries=entries,
        items=dict(sorted(items.items())),
        layers=moe,
        classes=table.classes(),
        ignored=tuple(sorted(table.names - table.used)),
        encodings=dict(sorted(table.encodings.items(), key=lambda e: (-e[1], e[0]))),
        fingerprint=_fingerprint(source),
    )


def classes_of(inventory: Inventory, entries: Mapping[int, LayerEntry]) -> tuple[TensorClass, ...]:
    """The inventory's classes with the bytes that its experts really take."""
    after: Counter[tuple[str, str]] = Counter()
    for entry in entries.values():
        for tier in entry.tier_of:
            layout = entry.tiers[tier]
            for fmt, size in zip(_each(layout), _shares(layout), strict=True):
                after[ROUTED, fmt] += size
        if entry.low is not None:
            after["low plane", entry.low.gate_up_format] += entry.low_bytes
    return tuple(
        replace(c, bytes_after=after.get((c.name, c.format), c.bytes_after))
        for c in inventory.classes
    )


def _each(layout: RecordLayout) -> tuple[str, str, str]:
    # the formats of gate, up and down
    return layout.gate_up_format, layout.gate_up_format, layout.down_format


def _shares(layout: RecordLayout) -> tuple[int, int, int]:
    # a record's bytes by gate, up and down; what fills its last page counts as down's
    half = layout.down // 2
    return half, layout.down - half, layout.record_bytes - layout.down


def moe_layers(arch: Arch) -> dict[int, MoE]:
    """{MoE layer: its MoE}. Raises UnsupportedError for experts that a store cannot hold."""
    found = {i: arch.layers[i].mlp for i in arch.moe_layers}
    moe = {i: mlp for i, mlp in found.items() if isinstance(mlp, MoE)}
    sizes = {mlp.experts.gate.rows for mlp in moe.values()}
    if len(sizes) != 1:
        raise UnsupportedError(
            f"the routed experts of this {arch.model_type} have the sizes {sorted(sizes)};"
            f" moelite needs one size, and at least one layer of experts"
        )
    for mlp in moe.values():
        for part in mlp.experts.matrices:
            if part.bias is not None:
                raise UnsupportedError(f"routed experts with biases ({part.bias.name})")
    return moe


def plan_layers(arch: Arch, recipe: Recipe) -> dict[int, LayerEntry]:
    """{MoE layer: how a recipe stores it}, by what formats plan with."""
    entries = {}
    for number, mlp in moe_layers(arch).items():
        shape = arch.hidden_size, mlp.experts.gate.rows
        formats = [recipe.expert(number, expert) for expert in range(mlp.num_experts)]
        tiers = sorted(set(formats), key=formats.index)
        entries[number] = LayerEntry(
            tiers=tuple(record_layout(tier, *shape) for tier in tiers),
            tier_of=tuple(tiers.index(found) for found in formats),
            low=None if recipe.low is None else record_layout((recipe.low, recipe.low), *shape),
        )
    return entries


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

    def low(self, entry: LayerEntry) -> None:
        """Counts a layer's low plane: weights that are there already, in more bytes."""
        assert entry.low is not None
        sums = self._rows.setdefault(("low plane", entry.low.gate_up_format), [0, 0, 0, 0])
        sums[0] += 3 * entry.experts
        sums[3] += entry.low_bytes

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


def dense_items(arch: Arch, recipe: Recipe) -> Iterator[DenseItem]:
    """Every tensor that is not a routed expert, in the format that a recipe gives it."""
    embed = recipe.matrix("embeddings", None)
    yield _item(arch.embed, "embeddings", embed, (arch.vocab_size, arch.hidden_size))
    for number, layer in enumerate(arch.layers):

        def linear(part: Linear, kind: str, layer: int = number) -> Iterator[DenseItem]:
            return _linear(part, kind, recipe.matrix(kind, layer))

        a = layer.attention
        for norm in (layer.input_norm, layer.post_norm, a.q_norm, a.k_norm):
            yield from _norm(norm)
        for name, part in zip(ATTENTION_PARTS, a.linears, strict=True):
            yield from _linear(part, "attention", recipe.matrix("attention", number, name))
        if isinstance(layer.mlp, MoE):
            yield from _linear(layer.mlp.router.linear, "router", "f32")
            if layer.mlp.shared_gate is not None:
                yield from linear(layer.mlp.shared_gate, "shared experts")
            for part in () if layer.mlp.shared is None else layer.mlp.shared.matrices:
                yield from linear(part, "shared experts")
        else:
            for part in layer.mlp.matrices:
                yield from linear(part, "dense layers")
    yield from _norm(arch.norm)
    if not arch.tied:
        yield from _linear(arch.head, "head", recipe.matrix("head", None))


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
