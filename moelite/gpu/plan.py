"""What a model takes in a device's memory, and beside it in the machine's, before it is loaded.

No torch here: `moelite footprint` plans for devices, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

from moelite.arch import Arch, GatedMLP, MoE
from moelite.budget import (
    Footprint,
    Part,
    Sizes,
    Slots,
    divide,
    embed_bytes,
    floating_slots,
)
from moelite.errors import BudgetError, UsageError
from moelite.gpu.devices import Place
from moelite.layers import rope_bytes
from moelite.machine import memory
from moelite.quant import FORMATS
from moelite.quant.base import ALIGN, pad, pair_rows
from moelite.units import MIB, parse_bytes, show_bytes
from moelite.workspace import workspace_bytes

CHUNK = 256  # prompt tokens at once, whatever the budget: so the numbers do not depend on it
SCRATCH_BYTES = 64 * MIB  # of a matrix as float32
SCORES_BYTES = 32 * MIB  # float32 scores at once: queries are taken in pieces
CONTEXT_BYTES = 512 * MIB  # assumed for a CUDA context, beside torch's allocator
RUNTIME_BYTES = 420 * MIB  # of this process with torch, on the CPU: docs/log/gpu.md
CUDA_RUNTIME_BYTES = 1200 * MIB  # assumed with a CUDA context and its libraries
BITSANDBYTES_BYTES = 180 * MIB  # of importing it: docs/log/gpu.md
_TEMPORARIES = 6  # rows of activations alive at once, of each width


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """Where a device's memory goes.

    Fields as of Footprint; free_bytes: of the device, None if unknown. here: whether the device is.
    """

    device: str
    card: str
    parts: tuple[Part, ...]
    budget_bytes: int
    minimum_bytes: int
    total_bytes: int | None
    free_bytes: int | None
    fits: bool
    experts_resident: int
    resident_bytes: int
    slots: Slots
    chunk: int
    here: bool = True

    @property
    def used_bytes(self) -> int:
        """The sum of the parts."""
        return sum(part.bytes for part in self.parts)


def block_bytes(arch: Arch, formats: Mapping[str, str]) -> int:
    """Bytes of the block that holds all dense tensors, each on a cache line. formats: of keys."""
    total = 0

    def add(fmt: str, rows: int, cols: int) -> None:
        nonlocal total
        total += pad(FORMATS[fmt].nbytes(rows, cols), ALIGN)

    def vector(size: int) -> None:
        nonlocal total
        total += pad(4 * size, ALIGN)

    add(formats[arch.embed.key], arch.vocab_size, arch.hidden_size)
    norms, parts, gated = [arch.norm], [] if arch.tied else [arch.head], list[GatedMLP]()
    for layer in arch.layers:
        a, mlp = layer.attention, layer.mlp
        parts += [a.q, a.k, a.v, a.o]
        norms += [n for n in (layer.input_norm, layer.post_norm, a.q_norm, a.k_norm) if n]
        if isinstance(mlp, MoE):
            parts += [p for p in (mlp.router.linear, mlp.shared_gate) if p is not None]
            gated += [mlp.shared] if mlp.shared is not None else []
        else:
            gated.append(mlp)
    for part in parts:
        add(formats[part.weight.key], part.rows, part.cols)
        vector(part.rows if part.bias else 0)
    for both in gated:
        add(formats[both.gate.weight.key], pair_rows(both.gate.rows), both.gate.cols)
        add(formats[both.down.weight.key], both.down.rows, both.down.cols)
    for norm in norms:
        vector(norm.size if norm.weight else 0)
        vector(norm.size if norm.bias else 0)
    return total


def _kv_bytes(sizes: Sizes) -> int:
    each = {"f32": 4, "f16": 2}.get(sizes.kv, 2)
    return sum(
        2 * each * x.attention.num_kv_heads * x.attention.head_dim * sizes.context
        for x in sizes.arch.layers
    )


def _workspace(sizes: Sizes, chunk: int) -> int:
    """Float32 temporaries of a chunk, by what is alive at once: see tests/test_gpu_memory.py."""
    arch = sizes.arch
    attention = [x.attention for x in arch.layers]
    wide = max(a.q.rows + 2 * a.k.rows for a in attention)
    moes = [x.mlp for x in arch.layers if isinstance(x.mlp, MoE)]
    dense = [x.mlp for x in arch.layers if isinstance(x.mlp, GatedMLP)]
    dense += [m.shared for m in moes if m.shared is not None]
    top_k = max(m.router.top_k for m in moes)
    inner = max([m.experts.gate.rows for m in moes] + [d.gate.rows for d in dense])
    rows = chunk * (top_k * arch.hidden_size + _TEMPORARIES * (arch.hidden_size + wide))
    rows += _TEMPORARIES * chunk * inner
    keys = max(2 * a.num_kv_heads * a.head_dim for a in attention) * sizes.context
    logits = 33 * arch.vocab_size
    largest = [SCRATCH_BYTES]
    for entry in sizes.layers.values():  # what cannot be unpacked in strips
        for tier in entry.tiers:
            shapes = zip(tier.formats, (tier.gate_up_shape, tier.down_shape), strict=True)
            largest += [4 * math.prod(shape) for fmt, shape in shapes if not FORMATS[fmt].exact]
    # attention, or products: torch unpacks with indices that take more than their result
    return 4 * (rows + logits) + max(4 * keys + 3 * SCORES_BYTES, 4 * max(largest))


def floating_on_device(arch: Arch) -> int:
    """Slots for records that are not kept: one token's, and the next layer's on their way."""
    return 2 * floating_slots(arch)


def plan_device(
    sizes: Sizes,
    device: str,
    budget_bytes: int,
    chunk: int | None = None,
    card: tuple[str, int | None, int | None] = ("", None, None),
) -> DevicePlan:
    """How `budget_bytes` of a device are divided. card: its name, its memory, what is free.

    Never raises for a budget that is too small: see `fits`.
    """
    arch, chunk = sizes.arch, CHUNK if chunk is None else chunk
    floating = floating_on_device(arch)
    classes = sorted({entry.slot_bytes for entry in sizes.layers.values()})
    context = CONTEXT_BYTES if device.partition(":")[0] == "cuda" else 0
    dense = block_bytes(arch, sizes.dense)
    parts = (
        *([Part(name="device runtime", bytes=context, basis="estimated")] if context else []),
        Part(name="dense weights", bytes=dense, basis="exact"),
        Part(name="kv", bytes=_kv_bytes(sizes), basis="exact"),
        Part(
            name="workspace",
            bytes=_workspace(sizes, chunk) + rope_bytes(arch, sizes.context),
            basis="estimated",
        ),
    )
    fixed = sum(part.bytes for part in parts)
    slots = divide(sizes.layers, floating, budget_bytes - fixed)
    resident = sum(n * sizes.layers[layer].slot_bytes for layer, n in slots.quotas.items())
    arena = resident + sum(size * count for size, count in slots.floating.items())
    minimum = fixed + sum(classes) + classes[-1]
    name, total, free = card
    return DevicePlan(
        device=device,
        card=name,
        parts=(*parts, Part(name="experts", bytes=arena, basis="exact")),
        budget_bytes=budget_bytes,
        minimum_bytes=minimum,
        total_bytes=total,
        free_bytes=free,
        fits=minimum <= budget_bytes and (total is None or budget_bytes <= total),
        experts_resident=sum(slots.quotas.values()),
        resident_bytes=resident,
        slots=slots,
        chunk=chunk,
    )


def _cuda_runtime(sizes: Sizes) -> int:
    formats = {fmt for entry in sizes.layers.values() for fmt in entry.formats}
    may = "nf4" in formats | {*sizes.dense.values()} and find_spec("bitsandbytes") is not None
    return CUDA_RUNTIME_BYTES + (BITSANDBYTES_BYTES if may else 0)


def plan_beside(sizes: Sizes, budget_bytes: int, device: DevicePlan) -> Footprint:
    """The machine's memory where a device computes: its part of the experts, and what moves them.

    Never raises for a budget that is too small: see `fits`.
    """
    arch = sizes.arch
    classes = sorted({entry.slot_bytes for entry in sizes.layers.values()})
    cuda = device.device.partition(":")[0] == "cuda"
    # a dense tensor on its way to the device; later what computes experts of one token here
    largest = max(
        [embed_bytes(arch, sizes.dense)]
        + [FORMATS[fmt].nbytes(1, 64) for fmt in sizes.dense.values()]
    )
    work = max(largest, workspace_bytes(arch, 1, sizes.threads)) + 8 * arch.vocab_size
    parts = (
        Part(
            name="runtime",
            bytes=_cuda_runtime(sizes) if cuda else RUNTIME_BYTES,
            basis="estimated" if cuda else "measured",
        ),
        Part(name="tokenizer", bytes=22 * MIB + 11 * sizes.tokenizer_bytes, basis="estimated"),
        Part(name="transfer", bytes=work, basis="exact"),
    )
    fixed = sum(part.bytes for part in parts)
    slots = divide(sizes.layers, floating_slots(arch), budget_bytes - fixed)
    resident = sum(n * sizes.layers[layer].slot_bytes for layer, n in slots.quotas.items())
    arena = resident + sum(size * count for size, count in slots.floating.items())
    minimum, machine = fixed + sum(classes) + classes[-1], memory()
    dense = next(part.bytes for part in device.parts if part.name == "dense weights")
    return Footprint(
        parts=(*parts, Part(name="experts", bytes=arena, basis="exact")),
        budget_bytes=budget_bytes,
        minimum_bytes=minimum,
        machine_bytes=machine.limit_bytes,
        machine_limit=machine.kind,
        fits=minimum <= budget_bytes <= machine.limit_bytes and slots.count > 1 and device.fits,
        experts_total=sum(entry.experts for entry in sizes.layers.values()),
        experts_resident=sum(slots.quotas.values()),
        experts_bytes=sum(e.experts * e.slot_bytes for e in sizes.layers.values()),
        resident_bytes=resident,
        record_bytes=max(classes),
        slots=slots,
        context=sizes.context,
        chunk=device.chunk,
        threads=sizes.threads,
        store_bytes=sum(e.record_bytes + e.low_bytes for e in sizes.layers.values()) + dense,
        expert_format=sizes.expert_format,
        dense_format=sizes.dense_format,
        device=device,
    )


def vram_budget(vram: str | int | None, place: Place) -> int:
    """Bytes named by `vram`; without it nine tenths of what is free on the device, or where a
    device has no memory of its own, two fifths of what is free in the machine."""
    free = place.free
    if not place.here and (vram is None or "%" in str(vram)):
        raise UsageError(
            f"there is no {place.name} device here, so its memory is not known",
            fix="say how much it has: --vram 6GiB",
        )
    if vram is not None:
        return parse_bytes(vram, total=memory().limit_bytes if free is None else free.total_bytes)
    return memory().available_bytes * 2 // 5 if free is None else free.free_bytes * 9 // 10


def plan_both(
    sizes: Sizes, place: Place, ram: int, vram: str | int | None, chunk: int | None = None
) -> Footprint:
    """Where the memory of the machine and of the device goes."""
    free = place.free
    card = ("", None, None) if free is None else (free.name, free.total_bytes, free.free_bytes)
    found = plan_device(sizes, place.name, vram_budget(vram, place), chunk, card)
    return plan_beside(sizes, ram, replace(found, here=place.here))


def refuse_device(plan: DevicePlan, name: str) -> BudgetError:
    """The error for a device plan that does not fit."""
    budget, need = plan.budget_bytes, plan.minimum_bytes
    if plan.total_bytes is not None and budget > plan.total_bytes:
        return BudgetError(
            f"a budget of {show_bytes(budget)} is more than {plan.card or plan.device} has: "
            f"{show_bytes(plan.total_bytes)}",
            fix=f"name at most that; {name} needs at least {show_bytes(need)}",
        )
    biggest = max(plan.parts[:-1], key=lambda part: part.bytes)
    return BudgetError(
        f"{name} does not fit {show_bytes(budget)} of {plan.device}: it needs at least "
        f"{show_bytes(need)} ({biggest.name} {show_bytes(biggest.bytes)})",
        fix=f"--vram {-(-need // MIB)}MiB, a smaller --context, or --device cpu",
    )
