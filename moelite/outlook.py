"""The forecast of a model on this machine: its plan at many budgets, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from platformdirs import user_cache_path

from moelite.arch import Arch, GatedMLP, MoE
from moelite.budget import Footprint, Sizes, dense_bytes, embed_bytes, plan
from moelite.forecast import (
    Change,
    Forecast,
    Hits,
    Nearby,
    Rate,
    Setting,
    Speeds,
    Work,
    around,
    forecast,
)
from moelite.hitrates import prior
from moelite.inventory import plan_layers
from moelite.kv import kv_bytes
from moelite.machine import POPULATED_BYTES, memory
from moelite.recipe import Recipe
from moelite.speeds import (
    drive_rate,
    from_page_cache,
    load_samples,
    probe_memory,
    probe_touch,
    speeds,
    this_machine,
)
from moelite.storefile import MANIFEST, read_manifest
from moelite.units import GIB, MIB

PROMPT_TOKENS = 512  # of the example whose first token is timed, and where decoding is timed
POINTS = 10


def work_of(sizes: Sizes, position: int = PROMPT_TOKENS) -> Work:
    """What one token of an architecture takes in these formats, behind `position` others."""
    arch = sizes.arch
    experts = sum(entry.experts for entry in sizes.layers.values())
    dense = dense_bytes(arch, sizes.dense)
    if not arch.tied:  # of the embeddings a token takes one row
        dense -= embed_bytes(arch, sizes.dense)
    dense += kv_bytes(arch, min(position, sizes.context), sizes.kv)
    moes = [layer.mlp for layer in arch.layers if isinstance(layer.mlp, MoE)]
    return Work(
        dense_bytes=dense,
        expert_bytes=sum(entry.payload_bytes for entry in sizes.layers.values()) // experts,
        record_bytes=sum(entry.record_bytes for entry in sizes.layers.values()) // experts,
        layers=len(arch.layers),
        moe=tuple((moe.num_experts, moe.router.top_k) for moe in moes),
        dense_macs=_dense_macs(arch),
        expert_macs=_macs(moes[0].experts),
    )


def _macs(mlp: GatedMLP) -> int:
    return sum(part.rows * part.cols for part in mlp.matrices)


def _dense_macs(arch: Arch) -> int:
    total = 0
    for layer in arch.layers:
        a, mlp = layer.attention, layer.mlp
        total += sum(part.rows * part.cols for part in (a.q, a.k, a.v, a.o))
        dense = mlp.shared if isinstance(mlp, MoE) else mlp
        if dense is not None:
            total += _macs(dense)
        if isinstance(mlp, MoE):
            total += mlp.router.linear.rows * mlp.router.linear.cols
    return total


def setting_of(arch: Arch, found: Footprint) -> Setting:
    """How a plan runs."""
    kept = found.slots.quotas
    return Setting(
        budget_bytes=found.budget_bytes,
        quotas=tuple(kept[layer] for layer in arch.moe_layers),
        chunk=found.chunk,
    )


def speeds_here(  # noqa: PLR0913 - what decides how a run reads
    sizes: Sizes,
    found: Footprint,
    store: Path | None,
    folder: Path | None = None,
    *,
    memory_speed: Callable[[], float] | None = None,
    direct: bool | None = None,
    lookahead: bool = True,
    copies: bool = True,
) -> Speeds:
    """How fast this machine runs a plan: from earlier runs, else from a short probe.

    store: None if it is not written yet. folder: holds the file of earlier runs (default: the
    user's cache folder). memory_speed: instead of the probe, which takes memory of its own.
    direct: whether records are read past the page cache (default: as `load` would decide).
    lookahead: whether the next layer's experts may be read ahead. copies: whether the threads that
    compute copy what the page cache holds.
    """
    folder = user_cache_path("moelite") if folder is None else folder
    here = this_machine(sizes.threads, sizes.expert_format, sizes.dense_format)
    samples = load_samples(folder, here)
    reading: Rate | None = None
    if not any(sample.weight_bytes_s is not None for sample in samples):
        speed = memory_speed() if memory_speed else probe_memory(sizes.threads)
        reading = around(speed, 0.4, "estimated")
    if direct is None:
        direct = memory().available_bytes - found.used_bytes < found.experts_bytes
    drive = drive_rate(store, found.record_bytes, cacheable=not direct)
    model = None if store is None else read_manifest(store / MANIFEST).fingerprint
    found_here = speeds(samples, here, model, reading, drive.bytes_s)
    if drive.cached and copies:
        found_here = from_page_cache(found_here, samples, model, found.record_bytes)
    return replace(
        found_here,
        recall=found_here.recall if lookahead else None,
        touch_bytes_s=probe_touch(sizes.threads),
        touched_bytes=POPULATED_BYTES,
    )


def usual_hits(arch: Arch) -> Hits:
    """What real text gave in published runs of such models."""
    moe = arch.layers[arch.moe_layers[0]].mlp
    assert isinstance(moe, MoE)
    return prior(arch.model_type, moe.num_experts, moe.router.top_k)


def outlook(
    sizes: Sizes,
    found: Footprint,
    hits: Hits,
    here: Speeds,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
) -> Forecast:
    """The forecast for a plan, or for the least budget if it does not fit."""
    arch, work = sizes.arch, work_of(sizes)
    least = _up(found.minimum_bytes)
    now = found if found.slots.count > 1 else plan(sizes, least)

    def at(budget: int) -> Setting:
        return setting_of(arch, plan(sizes, budget))

    def all_stay(setting: Setting) -> bool:
        return all(q >= e for q, (e, _) in zip(setting.quotas, work.moe, strict=True))

    def a_token_stays(setting: Setting) -> bool:
        return all(q >= min(e, k) for q, (e, k) in zip(setting.quotas, work.moe, strict=True))

    most = _up(2 * (least + found.experts_bytes) + GIB)
    resident = _first(lambda budget: all_stay(at(budget)), least, most)
    one_token = _first(lambda budget: a_token_stays(at(budget)), least, resident)
    budgets = {_up(least + (resident - least) * i // (POINTS - 1)) for i in range(POINTS)}
    budgets |= {one_token}
    if least <= now.budget_bytes <= resident:
        budgets -= {_nearest(sorted(budgets - {least, resident, one_token}), now.budget_bytes)}
        budgets |= {now.budget_bytes}
    present = setting_of(arch, now)
    return forecast(
        work,
        present,
        hits,
        here,
        prompt_tokens=max(1, min(prompt_tokens, sizes.context - 1)),
        nearby=Nearby(
            curve=tuple(at(budget) for budget in sorted(budgets)),
            resident_bytes=resident,
            working_set_bytes=one_token,
            changes=tuple(_changes(sizes, present, (work, here), at(resident))),
        ),
    )


def _changes(
    sizes: Sizes, present: Setting, now: tuple[Work, Speeds], whole: Setting
) -> list[Change]:
    """What a user could have instead of the present setting."""
    work, here = now
    gap = whole.budget_bytes - present.budget_bytes
    out = []
    if present.resident < whole.resident:
        out.append(Change(kind="resident", amount=1, work=work, setting=whole, speeds=here))
        step = next((s for s in (GIB, 256 * MIB, 64 * MIB) if s < gap), 0)
        if step:
            more = setting_of(sizes.arch, plan(sizes, present.budget_bytes + step))
            out.append(Change(kind="ram", amount=step, work=work, setting=more, speeds=here))
        rate = here.drive_bytes_s
        twice = replace(rate, low=2 * rate.low, likely=2 * rate.likely, high=2 * rate.high)
        faster = replace(here, drive_bytes_s=twice)
        out.append(Change(kind="drive", amount=2, work=work, setting=present, speeds=faster))
    small = replace(sizes, layers=plan_layers(sizes.arch, Recipe(experts="int4")), low=False)
    if work_of(small).record_bytes < work.record_bytes:
        setting = setting_of(sizes.arch, plan(small, present.budget_bytes))
        work = work_of(small)
        out.append(Change(kind="experts", amount=4, work=work, setting=setting, speeds=here))
    return out


def _up(count: int) -> int:
    return -(-count // MIB) * MIB


def _nearest(values: Sequence[int], to: int) -> int:
    return min(values, key=lambda value: abs(value - to), default=-1)


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least whole MiB in low..high from which `holds` is true."""
    if holds(low):
        return low
    low, high = low // MIB, high // MIB
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle * MIB) else (middle, high)
    return high * MIB
