"""A footprint and a forecast of a model on a device, beside what the CPU alone would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moelite.cli.footprint import draw, segment, segments_of, table_of
from moelite.cli.forecast import BOUND, curve, mib, say
from moelite.cli.render import band, seconds, tok_s
from moelite.units import MIB, show_bytes

if TYPE_CHECKING:
    from moelite.budget import Footprint
    from moelite.forecast import Forecast
    from moelite.gpu.plan import DevicePlan
    from moelite.tiers import DeviceForecast


def show_device(
    console: Console,
    found: Footprint,
    plan: DevicePlan,
    forecast: Forecast | None,
    alone: Forecast | None,
) -> None:
    """Card, verdict, bars, table, advice; then how fast it will be with the device and without."""
    from moelite.tiers import DeviceForecast

    console.print(Text(card_line(plan)))
    console.print(verdict(found, plan))
    console.print()
    _bars(console, found, plan)
    console.print()
    console.print(table_of(found, ascii_only=console.options.ascii_only))
    helpful = advice(found, plan)
    if helpful:
        console.print()
    for line in helpful:
        console.print(Text("  " + line))
    if isinstance(forecast, DeviceForecast):
        console.print()
        _forecast(console, forecast, alone, asked=(plan.budget_bytes, found.budget_bytes))


def card_line(plan: DevicePlan) -> str:
    """Which device, and what it has."""
    if not plan.here:
        return f"device {plan.device}: not found on this machine; planned by --vram alone"
    parts = [f"device {plan.device}"]
    if plan.card:
        parts.append(plan.card)
    if plan.total_bytes is not None and plan.free_bytes is not None:
        parts.append(f"{show_bytes(plan.total_bytes)}, {show_bytes(plan.free_bytes)} of it free")
    else:
        parts.append("it shares this machine's memory")
    return ": ".join(parts[:2]) + "".join(", " + part for part in parts[2:])


def _short(found: Footprint, plan: DevicePlan) -> list[str]:
    """Which budgets cannot be had, or are too small."""
    why = []
    if plan.total_bytes is not None and plan.budget_bytes > plan.total_bytes:
        why.append(f"--vram {mib(plan.budget_bytes)} is more than the device has")
    if plan.budget_bytes < plan.minimum_bytes:
        why.append(
            f"{show_bytes(plan.budget_bytes)} of the device's memory are too little, it takes "
            f"{show_bytes(plan.minimum_bytes)}"
        )
    if found.budget_bytes > found.machine_bytes:
        why.append(
            f"--ram {mib(found.budget_bytes)} is more than this machine has, "
            f"{show_bytes(found.machine_bytes)} ({found.machine_limit})"
        )
    if found.budget_bytes < found.minimum_bytes:
        why.append(
            f"{show_bytes(found.budget_bytes)} of memory are too little, it takes "
            f"{show_bytes(found.minimum_bytes)}"
        )
    return why


def verdict(found: Footprint, plan: DevicePlan) -> Text:
    """One sentence: whether both budgets fit, and the least of each."""
    least = f"--vram {mib(plan.minimum_bytes)} --ram {mib(found.minimum_bytes)}"
    if not found.fits:
        why = "; ".join(_short(found, plan)) or "it does not fit"
        return Text.assemble(("NO", "bold red"), f", {why}. The least at this context is {least}.")
    total = max(found.experts_total, 1)
    if plan.experts_resident >= found.experts_total:
        rest = "all experts stay on the device"
    else:
        held, kept = plan.experts_resident, found.experts_resident
        below = "all" if kept >= total else f"{kept:,} ({100 * kept // total} %)"
        rest = (
            f"{held:,} of {found.experts_total:,} experts ({100 * held // total} %) stay on the "
            f"device, {below} in memory"
        )
        rest += "" if kept >= total else ", others are read from disk when used"
    return Text.assemble(
        ("YES", "bold green"),
        f", it fits in {show_bytes(plan.budget_bytes)} of the device's memory and "
        f"{show_bytes(found.budget_bytes)} of this machine's: {rest}; the least at this context "
        f"is {least}.",
    )


def advice(found: Footprint, plan: DevicePlan) -> list[str]:
    """What would help, as something to type; what is faster, the forecast tells."""
    lines = []
    if plan.budget_bytes < plan.minimum_bytes:
        if plan.total_bytes is None or plan.minimum_bytes <= plan.total_bytes:
            lines.append(f"--vram {mib(plan.minimum_bytes)}: the least that works")
        else:
            lines.append(f"the device has {show_bytes(plan.total_bytes)}, too little: --device cpu")
    elif plan.total_bytes is not None and plan.budget_bytes > plan.total_bytes:
        lines.append(f"--vram {plan.total_bytes // MIB}MiB at most")
    if found.budget_bytes < found.minimum_bytes:
        if found.minimum_bytes <= found.machine_bytes:
            lines.append(f"--ram {mib(found.minimum_bytes)}: the least that works")
        else:
            lines.append(f"this machine has {show_bytes(found.machine_bytes)}, too little")
    if plan.free_bytes is not None and found.fits and plan.budget_bytes > plan.free_bytes:
        free = show_bytes(plan.free_bytes)
        lines.append(f"other programs hold the device's memory: {free} of it are free now")
    kv = next((part.bytes for part in plan.parts if part.name == "kv"), 0)
    crowded = plan.experts_resident < found.experts_total
    if crowded and found.context >= 1024 and kv >= MIB:
        lines.append(f"--context {found.context // 2}: frees {show_bytes(kv // 2)} of the device")
    if crowded and found.expert_format != "int4":
        lines.append("--experts int4 when quantizing: smaller experts, more of them on the device")
    return ["what would help:", *("  " + line for line in lines)] if lines else []


def _bars(console: Console, found: Footprint, plan: DevicePlan) -> None:
    dense = next(part.bytes for part in plan.parts if part.name == "dense weights")
    experts = found.store_bytes - dense
    share = min(1.0, plan.resident_bytes / max(found.experts_bytes, 1))
    resident = int(experts * share) if found.fits else 0
    disk = [
        segment("dense weights", dense),
        segment("experts", resident),
        segment("not resident", experts - resident),
    ]
    draw(
        console,
        [
            ("vram", segments_of(plan), plan),
            ("memory", segments_of(found), found),
            ("disk", disk, None),
        ],
    )


def _forecast(
    console: Console, found: DeviceForecast, alone: Forecast | None, asked: tuple[int, int]
) -> None:
    at = "" if asked == (found.budget_bytes, found.ram_bytes) else ", if it had what it needs"
    title = f"forecast for --vram {mib(found.budget_bytes)} --ram {mib(found.ram_bytes)}{at}:"
    console.print(Text.assemble("  ", (title, "bold")))
    console.print(_numbers(found, alone))
    for line in _reasons(found, alone):
        say(console, line, 2)
    console.print()
    most = max(point.budget_bytes for point in found.curve)
    notes = {found.budget_bytes: "here", found.resident_bytes: "all experts"}
    curve(console, found, most, option="--vram", notes=notes)
    if found.helps:
        console.print()
        console.print(Text("  what would make it faster:"))
    for help_ in found.helps:
        what = {
            "resident": f"--vram {mib(help_.budget_bytes)}, every expert on the device",
            "ram": f"--ram {mib(help_.budget_bytes)}, no more disk reads",
        }[help_.kind]
        now, then = found.decode_tok_s.likely, help_.decode_tok_s
        say(console, f"{what}: {tok_s(now)} to {tok_s(then)} tok/s", 4)


def _numbers(found: DeviceForecast, alone: Forecast | None) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=True)
    table.add_column("")
    for name in ("likely", "least", "most", "basis", "CPU"):
        table.add_column(name, justify="left" if name == "basis" else "right", overflow="fold")

    def share(value: float) -> str:
        return f"{100 * value:.0f} %"

    def size(value: float) -> str:
        return show_bytes(round(value))

    def speed(value: float) -> str:
        return f"{tok_s(value)} tok/s"

    for name, rate, show, beside in (
        ("answer", found.decode_tok_s, speed, alone and speed(alone.decode_tok_s.likely)),
        ("first token", found.ttft_s, seconds, alone and seconds(alone.ttft_s.likely)),
        ("hits on device", found.hit_rate, share, ""),
        ("hits in memory", found.memory_hit_rate, share, ""),
        ("copied a token", found.copied_bytes, size, ""),
        ("read a token", found.read_bytes, size, alone and size(alone.read_bytes.likely)),
    ):
        cells = (show(rate.likely), show(rate.low), show(rate.high))
        table.add_row(name, *cells, rate.basis, beside or "")
    return table


def _reasons(found: DeviceForecast, alone: Forecast | None) -> list[str]:
    token, speeds = found.token, found.speeds
    parts = [f"{1e3 * token.compute_s:.3g} ms computing"]
    if token.misses:
        parts.append(f"{1e3 * token.handling_s:.3g} handling misses")
        parts.append(f"{1e3 * token.wait_s:.3g} waiting for experts")
    lines = [f"a token: {', '.join(parts)}; most of it is {BOUND[found.bound]}"]
    if token.misses:
        lines.append(
            f"of {token.misses:.3g} experts that miss on the device {found.on_cpu:.2g} are "
            f"computed on the CPU; both take {1e3 * found.link_s:.3g} ms, reads "
            f"{1e3 * found.drive_s:.3g} ms where nothing hides them"
        )
    lines += [
        f"first token: of {found.prompt_tokens} prompt tokens, no expert in memory yet",
        f"hits: {found.hit_about}" + ("; in memory: of what misses above" if token.misses else ""),
        f"weights on the device at {_rate(speeds.weight_bytes_s.likely)} "
        f"({speeds.weight_bytes_s.basis}), link {_rate(found.link_bytes_s.likely)} "
        f"({found.link_bytes_s.basis}), drive {_rate(found.disk_bytes_s.likely)} "
        f"({found.disk_bytes_s.basis}); from {found.about}",
    ]
    if alone is not None:
        budget = alone.budget_bytes
        missing = "" if budget <= found.ram_bytes else f", which needs --ram {mib(budget)}"
        gain = found.decode_tok_s.likely / alone.decode_tok_s.likely
        lines.append(
            f"CPU alone: {band(alone.decode_tok_s)} tok/s{missing}; the device makes an answer "
            f"{gain:.2g} times as fast"
        )
    return lines


def _rate(value: float) -> str:
    return f"{show_bytes(round(value))}/s"
