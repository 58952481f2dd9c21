"""`moelite footprint`: where the memory would go, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moelite.cli.bars import Segment, bar
from moelite.cli.common import (
    ContextOption,
    DeviceOption,
    KVOption,
    OnMissOption,
    RamOption,
    RecipeOption,
    ThreadsOption,
    VramOption,
    cache_folder,
)
from moelite.cli.forecast import mib, show_forecast
from moelite.errors import BudgetError
from moelite.units import MIB, show_bytes

if TYPE_CHECKING:
    from moelite.budget import Footprint
    from moelite.forecast import Forecast
    from moelite.gpu.plan import DevicePlan

BAR_LABEL = 10  # columns before a bar
BAR_VALUE = 12  # and after it

# sign, plain sign, colour of each part; a part of another name gets the last line
LOOK = {
    "runtime": ("▒", "r", "bright_black"),
    "tokenizer": ("▚", "t", "bright_black"),
    "dense weights": ("█", "d", "blue"),
    "kv": ("▓", "k", "magenta"),
    "workspace": ("▞", "w", "yellow"),
    "low plane": ("▤", "l", "cyan"),
    "device runtime": ("▒", "r", "bright_black"),
    "transfer": ("▞", "w", "yellow"),
    "experts": ("■", "E", "green"),
    "free": ("·", ".", "bright_black"),
    "not resident": ("□", "e", "green"),
    "": ("?", "?", "red"),
}


def footprint(  # noqa: PLR0913 - one parameter for each option
    model: Annotated[
        str, typer.Argument(help="A store, a checkpoint folder, a hub id, or smollm2-moe.")
    ],
    ram: RamOption = None,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    kv: KVOption = "f16",
    experts: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="As if its experts were.", show_default="int4"),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="As if its other weights were.", show_default="int8"),
    ] = None,
    recipe: RecipeOption = None,
    on_miss: OnMissOption = "wait",
    device: DeviceOption = "auto",
    vram: VramOption = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Recorded routing of this model, for the forecast.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a model takes in memory and on disk and how fast it will be; nothing is loaded.

    Sizes come from headers alone. Speeds come from earlier runs on this machine, else from a short
    look at its memory and drive; how often an expert is in memory comes from published runs of such
    models, or from --trace.

    --experts, --dense and --recipe are for what is not yet a store: a store has its formats. A
    --device that is not here can be planned for with --vram. Exit code 3 if the model does not fit.
    """
    from moelite import foresee

    settings: Any = {"context": context, "threads": threads, "kv": kv, "folder": cache_folder()}
    if trace is not None:
        from moelite.cli.recorded import recorded_hits

        settings["hits"] = recorded_hits(trace, foresee.experts_of(model))
    settings.update(experts=experts, dense=dense, recipe=recipe, low=on_miss == "low")
    found, forecast = foresee.foresee(model, ram=ram, device=device, vram=vram, **settings)
    alone: Forecast | None = None
    if found.device is not None:
        alone = foresee.foresee(model, ram=ram, **settings)[1]
    if as_json:
        facts = {**as_dict(model, found), "forecast": dataclasses.asdict(forecast)}
        facts |= {} if alone is None else {"forecast_cpu": dataclasses.asdict(alone)}
        print(json.dumps(facts, indent=2))
    else:
        show(Console(highlight=False), model, found, forecast, alone)
    if not found.fits:
        raise typer.Exit(BudgetError.exit_code)


def as_dict(model: str, found: Footprint) -> dict[str, Any]:
    """The whole Footprint, with the model's name and the sum of its parts."""
    return {"model": model, **dataclasses.asdict(found), "used_bytes": found.used_bytes}


def show(
    console: Console,
    model: str,
    found: Footprint,
    forecast: Forecast | None = None,
    alone: Forecast | None = None,
) -> None:
    """Verdict, bars, table, advice; then how fast it will be.

    alone: the forecast for the CPU alone, where `found` is of a device.
    """
    console.print(
        Text.assemble(
            (model, "bold"),
            f"   experts {found.expert_format}, dense {found.dense_format}, "
            f"context {found.context:,} tokens, {found.threads} threads",
        )
    )
    console.print()
    if found.device is not None:
        from moelite.cli.device import show_device

        show_device(console, found, found.device, forecast, alone)
        return
    console.print(verdict(found))
    console.print()
    _bars(console, found)
    console.print()
    console.print(table_of(found, ascii_only=console.options.ascii_only))
    helpful = advice(found, sped_up=forecast is not None)
    if helpful:
        console.print()
    for line in helpful:
        console.print(Text("  " + line))
    if forecast is not None:
        console.print()
        budget, machine = found.budget_bytes, found.machine_bytes
        show_forecast(console, forecast, asked_bytes=budget, most_bytes=machine)


def verdict(found: Footprint) -> Text:
    """One sentence: whether it fits, and the least budget that would."""
    least = f"the least at this context is --ram {mib(found.minimum_bytes)}"
    if found.fits:
        share = 100 * found.experts_resident // max(found.experts_total, 1)
        rest = (
            "all experts stay in memory"
            if found.experts_resident >= found.experts_total
            else f"{found.experts_resident:,} of {found.experts_total:,} experts ({share} %) stay "
            "in memory, the others are read from disk when used"
        )
        return Text.assemble(
            ("YES", "bold green"),
            f", it fits in {show_bytes(found.budget_bytes)}: {rest}; {least}.",
        )
    if found.budget_bytes > found.machine_bytes:
        why = (
            f"a budget of {show_bytes(found.budget_bytes)} is more than this machine has, "
            f"{show_bytes(found.machine_bytes)} ({found.machine_limit})"
        )
    else:
        why = f"it does not fit in {show_bytes(found.budget_bytes)}"
    return Text.assemble(("NO", "bold red"), f", {why}: {least}.")


def advice(found: Footprint, *, sped_up: bool = False) -> list[str]:
    """What would help, as something to type. sped_up: a forecast tells what makes it faster."""
    kv = _part(found, "kv")
    lines = []
    if not found.fits:
        if found.minimum_bytes <= found.machine_bytes:
            lines.append(f"--ram {mib(found.minimum_bytes)}: the least that works")
        else:
            lines.append(
                f"this machine has {show_bytes(found.machine_bytes)} ({found.machine_limit}), "
                "too little at this context"
            )
        if found.dense_format in {"bf16", "f32"}:
            lines.append("--dense int8 when quantizing: a smaller dense part")
    whole = found.used_bytes - _part(found, "experts") + found.experts_bytes
    if found.fits and found.experts_resident < found.experts_total and not sped_up:
        # the slots that hold no resident expert are needed beside a full set, too
        whole += _part(found, "experts") - found.resident_bytes
        if whole <= found.machine_bytes:
            lines.append(f"--ram {mib(whole)}: about what keeps every expert in memory")
    crowded = not found.fits or found.experts_resident < found.experts_total
    if crowded and found.context >= 1024 and kv >= MIB:
        lines.append(f"--context {found.context // 2}: frees {show_bytes(kv // 2)}")
    if crowded and found.expert_format != "int4" and not (sped_up and found.fits):
        lines.append("--experts int4 when quantizing: smaller experts, more of them in memory")
    return ["what would help:", *("  " + line for line in lines)] if lines else []


def _part(found: Footprint, name: str) -> int:
    return sum(part.bytes for part in found.parts if part.name == name)


def segment(name: str, count: int) -> Segment:
    sign, plain, style = LOOK.get(name, LOOK[""])
    return Segment(name=name, bytes=count, sign=sign, plain=plain, style=style)


def segments_of(plan: Footprint | DevicePlan) -> list[Segment]:
    """The parts of a budget, and what is left of it."""
    parts = [segment(part.name, part.bytes) for part in plan.parts]
    return [*parts, segment("free", max(0, plan.budget_bytes - plan.used_bytes))]


def _bars(console: Console, found: Footprint) -> None:
    dense, low = _part(found, "dense weights"), _part(found, "low plane")
    experts = found.store_bytes - dense - low
    resident = experts * found.resident_bytes // found.experts_bytes if found.fits else 0
    disk = [
        segment("dense weights", dense),
        segment("low plane", low),
        segment("experts", resident),
        segment("not resident", experts - resident),
    ]
    draw(console, [("memory", segments_of(found), found), ("disk", disk, None)])


def draw(
    console: Console, rows: list[tuple[str, list[Segment], Footprint | DevicePlan | None]]
) -> None:
    """Bars on one scale; under a budget that is too small for its plan, a mark where it ends."""
    scale = max(sum(s.bytes for s in segments) for _, segments, _ in rows)
    width = max(10, min(console.width, 100) - BAR_LABEL - BAR_VALUE)
    for label, segments, plan in rows:
        line = Text(f"  {label:<{BAR_LABEL - 2}}")
        line.append(bar(segments, scale, width, ascii_only=console.options.ascii_only))
        line.append(f"  {show_bytes(sum(s.bytes for s in segments))}")
        console.print(line, no_wrap=True, overflow="crop")
        if plan is not None and plan.budget_bytes < plan.minimum_bytes:
            place = min(width - 1, plan.budget_bytes * width // scale)
            line = Text(" " * (BAR_LABEL + place) + "^ budget " + show_bytes(plan.budget_bytes))
            console.print(line, style="red", no_wrap=True, overflow="crop")


def table_of(found: Footprint, *, ascii_only: bool) -> Table:
    """The parts of a budget, those of a device's first, then the experts on disk."""
    plans: list[tuple[str, Footprint | DevicePlan]] = [("memory", found)]
    if found.device is not None:
        plans.insert(0, ("vram", found.device))
    table = Table(box=None, padding=(0, 2), pad_edge=True)
    table.add_column("")
    table.add_column(plans[0][0])
    table.add_column("size", justify="right")
    table.add_column("share", justify="right")
    table.add_column("basis")
    for i, (title, plan) in enumerate(plans):
        if i:
            table.add_row("", "", "", "", "")
            table.add_row("", Text(title, style="bold"), "", "", "")
        free = plan.budget_bytes - plan.used_bytes
        rows: list[tuple[str, int, str]] = [(p.name, p.bytes, p.basis) for p in plan.parts]
        if free >= 0:
            rows.append(("free", free, "budget - parts"))
        for name, count, basis in rows:
            sign, plain, style = LOOK.get(name, LOOK[""])
            table.add_row(
                Text(plain if ascii_only else sign, style=style),
                name,
                show_bytes(count),
                f"{100 * count / plan.budget_bytes:.0f} %",
                basis,
            )
    table.add_row("", "", "", "", "")
    table.add_row(
        Text(LOOK["not resident"][ascii_only], style=LOOK["not resident"][2]),
        "experts on disk",
        show_bytes(found.experts_bytes),
        "",
        f"{found.experts_total:,} of {show_bytes(found.record_bytes)} each",
    )
    return table
