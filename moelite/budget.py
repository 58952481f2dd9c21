"""What a model takes in memory at a budget, computed before anything is loaded.

The same plan sizes the buffers when the model is loaded, so what is promised is what is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moelite.arch import Arch, GatedMLP, Linear, MoE, Norm, TensorRef
from moelite.attention import KVFormat
from moelite.errors import BudgetError
from moelite.kv import kv_bytes
from moelite.layers import rope_bytes
from moelite.machine import memory
from moelite.quant import FORMATS
from moelite.quant.base import pad
from moelite.storefile import LayerEntry, format_label
from moelite.units import MIB, show_bytes
from moelite.workspace import workspace_bytes

if TYPE_CHECKING:
    from moelite.gpu.plan import DevicePlan

# Interpreter, numpy, numba, loaded kernels, terminal and template libraries: see docs/LOG.md.
RUNTIME_BYTES = 190 * MIB
CHUNKS = (1024, 512, 256, 128, 64, 32, 16)
LOW_READS = 4
FAST_CHUNK = 256  # from here on a larger chunk computes no faster; it only reads less from disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One owner of memory. basis: exact (computed from shapes), measured or estimated."""

    name: str
    bytes: int
    basis: Literal["exact", "measured", "estimated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How an arena is divided. quotas: {layer: experts kept}, in slots of the layer's size;
    floating: {bytes: slots of that size that keep nothing}."""

    quotas: dict[int, int]
    floating: dict[int, int]

    @property
    def count(self) -> int:
        return sum(self.quotas.values()) + sum(self.floating.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Where memory goes when a model runs in `budget_bytes`.

    parts: every owner, the expert arena last. minimum_bytes: the least budget that works at this
    context. slots: how the arena is divided; experts_resident: how many experts stay in memory;
    resident_bytes: their slots; experts_bytes: the slots of all; record_bytes: the largest slot.
    device: where a device computes, what lies in its memory; the parts are then those beside it.
    """

    parts: tuple[Part, ...]
    budget_bytes: int
    minimum_bytes: int
    machine_bytes: int
    machine_limit: str
    fits: bool
    experts_total: int
    experts_resident: int
    experts_bytes: int
    resident_bytes: int
    record_bytes: int
    slots: Slots
    context: int
    chunk: int
    threads: int
    store_bytes: int
    expert_format: str
    dense_format: str
    device: DevicePlan | None = None

    @property
    def used_bytes(self) -> int:
        """The sum of the parts."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a budget is planned for: an architecture, how it is stored, and how it is run.

    layers: of every MoE layer. dense: {key: format} of all other matrices. low: whether the low
    plane is kept in memory.
    """

    arch: Arch
    layers: Mapping[int, LayerEntry]
    dense: Mapping[str, str]
    tokenizer_bytes: int  # of the tokenizer's file
    context: int
    kv: KVFormat
    threads: int
    low: bool = False

    @property
    def expert_format(self) -> str:
        """Formats of routed experts, in words."""
        return format_label(self.layers.values())

    @property
    def dense_format(self) -> str:
        """Formats of the other matrices, in words, that of the embeddings first."""
        others = set(self.dense.values()) - {"f32"}
        first = self.dense[self.arch.embed.key]
        return " + ".join([first, *sorted(others - {first})])


def _linears(arch: Arch) -> list[Linear]:
    out: list[Linear] = []
    for layer in arch.layers:
        a, mlp = layer.attention, layer.mlp
        out += [a.q, a.k, a.v, a.o]
        dense: GatedMLP | None = mlp.shared if isinstance(mlp, MoE) else mlp
        if dense is not None:
            out += dense.matrices
        if isinstance(mlp, MoE) and mlp.shared_gate is not None:
            out.append(mlp.shared_gate)
    return out if arch.tied else [*out, arch.head]


def _norm_bytes(norm: Norm | None) -> int:
    if norm is None:
        return 0
    return 4 * norm.size * ((norm.weight is not None) + (norm.bias is not None))


def embed_bytes(arch: Arch, dense: Mapping[str, str]) -> int:
    """Bytes of the embeddings."""
    return FORMATS[dense[arch.embed.key]].nbytes(arch.vocab_size, arch.hidden_size)


def dense_bytes(arch: Arch, dense: Mapping[str, str]) -> int:
    """Bytes of everything but routed experts, as the decoder holds it. dense: {key: format}."""
    f32, linears = FORMATS["f32"], _linears(arch)
    total = embed_bytes(arch, dense) + _norm_bytes(arch.norm)
    total += sum(FORMATS[dense[p.weight.key]].nbytes(p.rows, p.cols) for p in linears)
    biased: list[TensorRef | None] = [part.bias for part in linears]
    total += sum(4 * part.rows for part, bias in zip(linears, biased, strict=True) if bias)
    for layer in arch.layers:
        a = layer.attention
        for norm in (layer.input_norm, layer.post_norm, a.q_norm, a.k_norm):
            total += _norm_bytes(norm)
        if isinstance(layer.mlp, MoE):
            router = layer.mlp.router.linear
            total += f32.nbytes(router.rows, router.cols) + (4 * router.rows if router.bias else 0)
    return total


def plan(sizes: Sizes, budget_bytes: int, chunk: int | None = None) -> Footprint:
    """How `budget_bytes` are divided. Never raises for a budget that is too small: see `fits`."""
    arch, floating = sizes.arch, floating_slots(sizes.arch)
    if sizes.low:
        floating *= LOW_READS  # nobody waits for reads, so more of them are under way
    classes = {entry.slot_bytes for entry in sizes.layers.values()}
    all_bytes = sum(entry.experts * entry.slot_bytes for entry in sizes.layers.values())
    low = sum(entry.low_bytes for entry in sizes.layers.values()) if sizes.low else 0

    def fixed(chunk: int) -> tuple[Part, ...]:
        work = workspace_bytes(arch, chunk, sizes.threads)
        work += rope_bytes(arch, sizes.context) + 2 * 4 * pad(arch.vocab_size, 8)
        return (
            Part(name="runtime", bytes=RUNTIME_BYTES, basis="measured"),
            Part(name="tokenizer", bytes=_tokenizer_bytes(sizes), basis="estimated"),
            Part(name="dense weights", bytes=dense_bytes(arch, sizes.dense), basis="exact"),
            *([Part(name="low plane", bytes=low, basis="exact")] if low else []),
            Part(name="kv", bytes=kv_bytes(arch, sizes.context, sizes.kv), basis="exact"),
            Part(name="workspace", bytes=work, basis="exact"),
        )

    least = CHUNKS[-1] if chunk is None else chunk
    if chunk is None:
        # A chunk reads each expert once, so a larger one reads less for a long prompt, but its
        # buffers cost experts: it gets a sixth of what is left over, or all that no expert can use.
        spare = budget_bytes - sum(part.bytes for part in fixed(least))
        unused = spare - all_bytes - floating * sum(classes)
        share = max(spare // 6, unused)
        chunk = next(
            c
            for c in CHUNKS
            if c == least
            or (
                fixed(c)[-1].bytes - fixed(least)[-1].bytes <= share
                and (c <= FAST_CHUNK or unused < 0)
            )
        )
    parts = fixed(chunk)
    slots = divide(sizes.layers, floating, budget_bytes - sum(part.bytes for part in parts))
    # one record of each size being multiplied while the next is read
    minimum = sum(part.bytes for part in fixed(least)) + sum(classes) + max(classes)
    resident = sum(n * sizes.layers[layer].slot_bytes for layer, n in slots.quotas.items())
    arena = resident + sum(size * count for size, count in slots.floating.items())
    machine = memory()
    return Footprint(
        parts=(*parts, Part(name="experts", bytes=arena, basis="exact")),
        budget_bytes=budget_bytes,
        minimum_bytes=minimum,
        machine_bytes=machine.limit_bytes,
        machine_limit=machine.kind,
        fits=minimum <= budget_bytes <= machine.limit_bytes and slots.count > 1,
        experts_total=sum(entry.experts for entry in sizes.layers.values()),
        experts_resident=sum(slots.quotas.values()),
        experts_bytes=all_bytes,
        resident_bytes=resident,
        record_bytes=max(classes),
        slots=slots,
        context=sizes.context,
        chunk=chunk,
        threads=sizes.threads,
        store_bytes=sum(e.record_bytes + e.low_bytes for e in sizes.layers.values())
        + parts[2].bytes,
        expert_format=sizes.expert_format,
        dense_format=sizes.dense_format,
    )


def _tokenizer_bytes(sizes: Sizes) -> int:
    # vocabulary, merges and added tokens as the library holds them: see docs/LOG.md
    return 22 * MIB + 11 * sizes.tokenizer_bytes


def floating_slots(arch: Arch) -> int:
    """Slots for records that are being read or multiplied but not kept: one token's worth."""
    return max(x.mlp.router.top_k for x in arch.layers if isinstance(x.mlp, MoE))


def divide(layers: Mapping[int, LayerEntry], floating: int, room: int) -> Slots:
    """How an arena of `room` bytes is divided; nothing in it if it holds not even two records.

    floating: slots wanted for records that are being read or multiplied but not kept, of each size.
    Every layer keeps the same number of experts, its own at most.
    """
    sizes = sorted({entry.slot_bytes for entry in layers.values()})
    if room < sum(sizes) + sizes[-1]:
        return Slots(quotas=dict.fromkeys(layers, 0), floating=dict.fromkeys(sizes, 0))
    each = min(floating, max(room // 2 // sum(sizes), 1))
    room -= each * sum(sizes)
    quotas = dict.fromkeys(layers, 0)
    while True:  # a round gives all layers as many as the smallest still takes, or fit
        wanting = [k for k, entry in layers.items() if quotas[k] < entry.experts]
        rounds = min((layers[k].experts - quotas[k] for k in wanting), default=0)
        round_bytes = sum(layers[k].slot_bytes for k in wanting)
        rounds = min(rounds, room // max(round_bytes, 1))
        if not rounds:
            break
        for layer in wanting:
            quotas[layer] += rounds
        room -= rounds * round_bytes
    for layer in wanting:
        if layers[layer].slot_bytes <= room:
            quotas[layer] += 1
            room -= layers[layer].slot_bytes
    return Slots(quotas=quotas, floating=dict.fromkeys(sizes, each))


def slot_counts(layers: Mapping[int, LayerEntry], slots: Slots) -> dict[int, int]:
    """{bytes of a slot: how many} of an arena divided so, those that keep experts and the rest."""
    counts = dict(slots.floating)
    for layer, kept in slots.quotas.items():
        counts[layers[layer].slot_bytes] += kept
    return counts


def refuse(footprint: Footprint, name: str) -> BudgetError:
    """The error for a footprint that does not fit."""
    budget, need = footprint.budget_bytes, footprint.minimum_bytes
    if budget > footprint.machine_bytes:
        return BudgetError(
            f"a budget of {show_bytes(budget)} is more than this machine has: "
            f"{show_bytes(footprint.machine_bytes)} ({footprint.machine_limit})",
            fix=f"name at most that; {name} needs at least {show_bytes(need)}",
        )
    biggest = max(footprint.parts[1:-1], key=lambda part: part.bytes)
    return BudgetError(
        f"{name} does not fit {show_bytes(budget)}: it needs at least {show_bytes(need)} "
        f"({biggest.name} {show_bytes(biggest.bytes)}, context {footprint.context})",
        fix=f"--ram {-(-need // MIB)}MiB, or a smaller --context, or smaller dense weights",
    )
