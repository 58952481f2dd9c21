"""What a model takes in memory at a budget, computed before anything is loaded.

The same plan sizes the buffers when the model is loaded, so what is promised is what is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moelite.arch import Arch, GatedMLP, Linear, MoE, Norm, TensorRef
from moelite.attention import KVFormat
from moelite.errors import BudgetError, UnsupportedError
from moelite.kv import kv_bytes
from moelite.layers import rope_bytes
from moelite.machine import memory
from moelite.quant import FORMATS
from moelite.quant.base import RecordLayout, pad, record_layout
from moelite.units import MIB, show_bytes
from moelite.workspace import workspace_bytes

# Interpreter, numpy, numba, loaded kernels, terminal and template libraries: see docs/LOG.md.
RUNTIME_BYTES = 190 * MIB
CHUNKS = (1024, 512, 256, 128, 64, 32, 16)
FAST_CHUNK = 256  # from here on a larger chunk computes no faster; it only reads less from disk
MIN_SLOTS = 2  # one record being multiplied while the next is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One owner of memory. basis: exact (computed from shapes), measured or estimated."""

    name: str
    bytes: int
    basis: Literal["exact", "measured", "estimated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Where memory goes when a model runs in `budget_bytes`.

    parts: every owner, the expert arena last. minimum_bytes: the least budget that works at this
    context. slots: expert records that fit; experts_resident: how many experts stay in memory.
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
    record_bytes: int
    slots: int
    context: int
    chunk: int
    threads: int
    store_bytes: int
    expert_format: str
    dense_format: str

    @property
    def used_bytes(self) -> int:
        """The sum of the parts."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a budget is planned for: an architecture in two formats, and how it is run."""

    arch: Arch
    expert_format: str
    dense_format: str
    tokenizer_bytes: int  # of the tokenizer's file
    context: int
    kv: KVFormat
    threads: int


def expert_layout(arch: Arch, expert_format: str) -> RecordLayout:
    """The record layout that serves every MoE layer. Raises UnsupportedError if they differ."""
    sizes = {layer.mlp.experts.gate.rows for layer in arch.layers if isinstance(layer.mlp, MoE)}
    if len(sizes) != 1:
        raise UnsupportedError(
            f"the routed experts of {arch.model_type} have sizes {sorted(sizes)}, not one size"
        )
    return record_layout(FORMATS[expert_format], arch.hidden_size, sizes.pop())


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


def dense_bytes(arch: Arch, dense_format: str) -> int:
    """Bytes of everything but routed experts, as the decoder holds it."""
    fmt, f32 = FORMATS[dense_format], FORMATS["f32"]
    linears = _linears(arch)
    total = fmt.nbytes(arch.vocab_size, arch.hidden_size) + _norm_bytes(arch.norm)
    total += sum(fmt.nbytes(part.rows, part.cols) for part in linears)
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
    arch = sizes.arch
    layout = expert_layout(arch, sizes.expert_format)
    record = layout.record_bytes
    total = sum(layer.mlp.num_experts for layer in arch.layers if isinstance(layer.mlp, MoE))

    def fixed(chunk: int) -> tuple[Part, ...]:
        work = workspace_bytes(arch, chunk, sizes.threads)
        work += rope_bytes(arch, sizes.context) + 2 * 4 * pad(arch.vocab_size, 8)
        return (
            Part(name="runtime", bytes=RUNTIME_BYTES, basis="measured"),
            Part(name="tokenizer", bytes=_tokenizer_bytes(sizes), basis="estimated"),
            Part(name="dense weights", bytes=dense_bytes(arch, sizes.dense_format), basis="exact"),
            Part(name="kv", bytes=kv_bytes(arch, sizes.context, sizes.kv), basis="exact"),
            Part(name="workspace", bytes=work, basis="exact"),
        )

    least = CHUNKS[-1] if chunk is None else chunk
    if chunk is None:
        # A chunk reads each expert once, so a larger one reads less for a long prompt, but its
        # buffers cost experts: it gets a sixth of what is left over, or all that no expert can use.
        spare = budget_bytes - sum(part.bytes for part in fixed(least))
        unused = spare - (total + floating_slots(arch)) * record
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
    room = (budget_bytes - sum(part.bytes for part in parts)) // record
    slots = max(0, min(room, total + floating_slots(arch)))
    machine = memory()
    return Footprint(
        parts=(*parts, Part(name="experts", bytes=slots * record, basis="exact")),
        budget_bytes=budget_bytes,
        minimum_bytes=sum(part.bytes for part in fixed(least)) + MIN_SLOTS * record,
        machine_bytes=machine.limit_bytes,
        machine_limit=machine.kind,
        fits=slots >= MIN_SLOTS and budget_bytes <= machine.limit_bytes,
        experts_total=total,
        experts_resident=sum(quotas(arch, slots).values()),
        experts_bytes=total * record,
        record_bytes=record,
        slots=slots,
        context=sizes.context,
        chunk=chunk,
        threads=sizes.threads,
        store_bytes=total * record + parts[2].bytes,
        expert_format=sizes.expert_format,
        dense_format=sizes.dense_format,
    )


def _tokenizer_bytes(sizes: Sizes) -> int:
    # vocabulary, merges and added tokens as the library holds them: see docs/LOG.md
    return 22 * MIB + 11 * sizes.tokenizer_bytes


def floating_slots(arch: Arch) -> int:
    """Slots for records that are being read or multiplied but not kept: one token's worth."""
    return max(x.mlp.router.top_k for x in arch.layers if isinstance(x.mlp, MoE))


def quotas(arch: Arch, slots: int) -> Mapping[int, int]:
    """{layer: experts kept} for an arena of `slots`: an even share, after the floating slots."""
    layers = arch.moe_layers
    floating = min(floating_slots(arch), max(slots // 2, 1))
    share, rest = divmod(max(slots - floating, 0), len(layers))
    out = {}
    for i, layer in enumerate(layers):
        mlp = arch.layers[layer].mlp
        assert isinstance(mlp, MoE)
        out[layer] = min(share + (i < rest), mlp.num_experts)
    return out


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
