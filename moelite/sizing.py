"""What is to be run, and what it takes: settings, sizes from headers alone, budgets by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from moelite.arch import Arch
from moelite.attention import KVFormat
from moelite.budget import Footprint, Sizes, plan
from moelite.errors import UsageError
from moelite.gpu.devices import Place, check, seek
from moelite.gpu.plan import plan_both
from moelite.inventory import dense_items, plan_layers
from moelite.machine import memory
from moelite.models import build
from moelite.process import rss_bytes
from moelite.recipe import Recipe, check_layers, choose
from moelite.storefile import FileEntry, LayerEntry, Manifest
from moelite.threads import default_threads
from moelite.units import GIB, parse_bytes

DEFAULT_CONTEXT = 4096


def context_of(arch: Arch, context: int | None) -> int:
    """Tokens to keep: what was asked for, or the default. Raises UsageError for too many."""
    if context is None:
        return min(DEFAULT_CONTEXT, arch.max_positions)
    if not 1 <= context <= arch.max_positions:
        raise UsageError(
            f"context {context} is not in 1..{arch.max_positions}, the positions this model knows"
        )
    return context


def budget_of(ram: str | int | None) -> int:
    """Bytes named by `ram`; without it, four fifths of what is free now."""
    machine = memory()
    if ram is None:
        return machine.available_bytes * 4 // 5
    return parse_bytes(ram, total=machine.limit_bytes)


def budget_beside(device: str, ram: str | int | None) -> int:
    """As `budget_of`, beside a device; one without memory of its own takes the other two fifths."""
    shared = device.partition(":")[0] in {"mps", "torch"}
    return memory().available_bytes * 2 // 5 if ram is None and shared else budget_of(ram)


def packing_budget(ram: str | int | None) -> int:
    """Bytes named by `ram`; without it, 2 GiB more than this process holds already."""
    return rss_bytes() + 2 * GIB if ram is None else budget_of(ram)


def threads_of(threads: int | None) -> int:
    """Threads to compute with: what was asked for, or the default. Raises UsageError."""
    if threads is None:
        return default_threads()
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise UsageError(f"threads {threads} is not in 1..{most}")
    return threads


class Settings(NamedTuple):
    """How a model is to be run. recipe: for what is not yet a store. low: keep the low plane."""

    context: int | None = None
    kv: KVFormat = "f16"
    threads: int | None = None
    recipe: Recipe = Recipe()
    low: bool = False


class Stored(NamedTuple):
    """What a store, or a recipe, adds to Sizes."""

    layers: Mapping[int, LayerEntry]
    dense: Mapping[str, str]
    tokenizer_bytes: int


def stored(manifest: Manifest) -> Stored:
    """What a store tells of its sizes."""
    nothing = FileEntry(bytes=0, sha256="")
    return Stored(
        manifest.layers,
        {key: spec.format for key, spec in manifest.tensors.items()},
        manifest.files.get("tokenizer.json", nothing).bytes,
    )


def need_low_plane(layers: Mapping[int, LayerEntry], path: str | Path) -> None:
    """Raises UsageError for a store, or a recipe, without a low plane."""
    if any(entry.low is None for entry in layers.values()):
        raise UsageError(
            f"{path} has no low plane to answer from",
            fix="quantize with --low FORMAT, or run with --on-miss wait",
        )


def sizes_of(path: str | Path, settings: Settings) -> Sizes:
    """What a budget is planned for, from headers alone.

    path: a store, which keeps its own formats, or a checkpoint as `inputs.open_source` takes it.
    """
    from moelite.inputs import read_config

    found = read_config(path)
    arch = build(found.config)
    if found.manifest is not None:
        parts = stored(found.manifest)
    else:
        check_layers(settings.recipe, arch)
        parts = Stored(
            plan_layers(arch, settings.recipe),
            {item.ref.key: item.spec.format for item in dense_items(arch, settings.recipe)},
            found.tokenizer_bytes,
        )
    if settings.low:
        need_low_plane(parts.layers, path)
    return Sizes(
        arch=arch,
        **parts._asdict(),
        context=context_of(arch, settings.context),
        kv=settings.kv,
        threads=threads_of(settings.threads),
        low=settings.low,
    )


def planned(
    sizes: Sizes, ram: str | int | None, place: Place | None = None, vram: str | int | None = None
) -> Footprint:
    """The plan for the CPU, or for a device and what is beside it."""
    if place is None:
        return plan(sizes, budget_of(ram))
    return plan_both(sizes, place, budget_beside(place.name, ram), vram)


def placed(device: str, vram: str | int | None, *, low: bool) -> Place | None:
    """The device to plan for, which may be elsewhere; None for the CPU. Raises UsageError."""
    place = seek(device)
    check(None if place is None else place.name, vram, low=low)
    return place


def footprint(  # noqa: PLR0913 - what `load` takes, and the formats of what is no store yet
    path: str | Path,
    *,
    ram: str | int | None = None,
    context: int | None = None,
    kv: KVFormat = "f16",
    threads: int | None = None,
    experts: str | None = None,
    dense: str | None = None,
    recipe: str | Recipe | None = None,
    low: bool = False,
    device: str = "cpu",
    vram: str | int | None = None,
) -> Footprint:
    """What the model at `path` takes, from headers alone; see Footprint.

    path: a store, or a checkpoint folder, hub id or "smollm2-moe", as if quantized to `experts` and
    `dense`, or by `recipe` (a store keeps its own formats). low: with the low plane in memory, as
    `load(on_miss="low")`. device, vram: as of `load`; a device that is not here can be planned for
    where vram says how much memory it has.
    """
    place = placed(device, vram, low=low)
    asked = Settings(context, kv, threads, choose(recipe, experts, dense), low)
    return planned(sizes_of(path, asked), ram, place, vram)
