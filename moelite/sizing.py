"""What is to be run, and what it takes: settings, sizes from headers alone, budgets by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from moelite.arch import Arch
from moelite.attention import KVFormat
from moelite.budget import Footprint, Sizes, plan
from moelite.errors import UsageError
from moelite.machine import memory
from moelite.models import build
from moelite.threads import default_threads
from moelite.units import parse_bytes

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


def threads_of(threads: int | None) -> int:
    """Threads to compute with: what was asked for, or the default. Raises UsageError."""
    if threads is None:
        return default_threads()
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise UsageError(f"threads {threads} is not in 1..{most}")
    return threads


class Settings(NamedTuple):
    """How a model is to be run; the formats are for what is not yet a store."""

    context: int | None = None
    kv: KVFormat = "f16"
    threads: int | None = None
    experts: str = "int4"
    dense: str = "int8"


def sizes_of(path: str | Path, settings: Settings) -> Sizes:
    """What a budget is planned for, from headers alone."""
    from moelite.convert import read_config

    config, formats, tokenizer_bytes = read_config(path, settings.experts, settings.dense)
    arch = build(config)
    return Sizes(
        arch=arch,
        expert_format=formats[0],
        dense_format=formats[1],
        tokenizer_bytes=tokenizer_bytes,
        context=context_of(arch, settings.context),
        kv=settings.kv,
        threads=threads_of(settings.threads),
    )


def footprint(
    path: str | Path,
    *,
    ram: str | int | None = None,
    context: int | None = None,
    kv: KVFormat = "f16",
    threads: int | None = None,
    experts: str = "int4",
    dense: str = "int8",
) -> Footprint:
    """What the model at `path` takes, from headers alone; see Footprint.

    path: a store, or a checkpoint folder, hub id or "smollm2-moe", as if quantized to `experts` and
    `dense` (a store keeps its own formats).
    """
    asked = Settings(context=context, kv=kv, threads=threads, experts=experts, dense=dense)
    return plan(sizes_of(path, asked), budget_of(ram))
