"""How a forecast is shown: before a run, and beside what came of it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moelite.cli.bars import Segment, bar
from moelite.cli.render import band, seconds, tok_s
from moelite.units import MIB, show_bytes

if TYPE_CHECKING:
    from moelite.bench import BenchReport
    from moelite.forecast import Forecast, Help, Rate

BAR_LABEL = 14  # columns before a bar of the curve
BAR_VALUE = 7  # and of the number behind it
BOUND = {
    "memory": "reading weights from memory",
    "drive": "waiting for the drive",
    "misses": "handling experts that are not in memory",
    "link": "bringing experts to the device",
}


def show_forecast(console: Console, found: Forecast, *, asked_bytes: int, most_bytes: int) -> None:
    """Speeds, the curve over budgets, what would help.

    asked_bytes: the budget that was asked for; most_bytes: what the machine has.
    """
    at = "" if found.budget_bytes == asked_bytes else ", if it had what it needs"
    title = f"forecast for --ram {mib(found.budget_bytes)}{at}:"
    console.print(Text.assemble(("  "), (title, "bold")))
    console.print(_numbers(found))
    for line in _reasons(found):
        say(console, line, 2)
    console.print()
    curve(console, found, most_bytes)
    if found.helps:
        console.print()
        console.print(Text("  what would make it faster:"))
    for help_ in found.helps:
        say(console, _help_line(help_, found, most_bytes), 4)


def say(console: Console, text: str, indent: int) -> None:
    """A line, and its continuation a little further in."""
    width = min(console.width, 100)
    first, then = " " * indent, " " * (indent + 2)
    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=then)
    console.print(Text("\n".join(lines)))


def _numbers(found: Forecast) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=True)
    for name in ("", "likely", "least", "most", "basis"):
        right = name in {"likely", "least", "most"}
        table.add_column(name, justify="right" if right else "left", overflow="fold")

    def row(name: str, rate: Rate, show: Callable[[float], str]) -> None:
        table.add_row(name, show(rate.likely), show(rate.low), show(rate.high), rate.basis)

    row("answer", found.decode_tok_s, lambda v: f"{tok_s(v)} tok/s")
    row("first token", found.ttft_s, seconds)
    row("experts in memory", found.hit_rate, lambda v: f"{100 * v:.0f} %")
    row("read for a token", found.read_bytes, lambda v: show_bytes(round(v)))
    return table


def _reasons(found: Forecast) -> list[str]:
    token, speeds = found.token, found.speeds
    parts = [f"{1e3 * token.compute_s:.3g} ms computing"]
    if token.misses:
        parts.append(f"{1e3 * token.handling_s:.3g} handling misses")
        parts.append(f"{1e3 * token.wait_s:.3g} waiting for reads")
    weights, drive = speeds.weight_bytes_s, speeds.drive_bytes_s
    known = "reads at" if drive.basis == "measured" else "unknown drive: assuming"
    cached = "; up to {}/s once the page cache holds the experts"
    more = cached.format(show_bytes(round(drive.high))) if drive.high > 2 * drive.likely else ""
    return [
        f"a token: {', '.join(parts)}; most of it is {BOUND[found.bound]}",
        f"first token: of {found.prompt_tokens} prompt tokens, no expert in memory yet",
        f"experts in memory: {found.hit_about}",
        f"weights at {show_bytes(round(weights.likely))}/s ({weights.basis}), "
        f"{known} {show_bytes(round(drive.likely))}/s ({drive.basis}){more}",
    ]


def curve(
    console: Console,
    found: Forecast,
    most_bytes: int,
    *,
    option: str = "--ram",
    notes: dict[int, str] | None = None,
) -> None:
    """tok/s over budgets. notes: at some of them (default: where reads end, and the like)."""
    ascii_only = console.options.ascii_only
    top = max((p.decode_tok_s for p in found.curve), default=1.0)
    width = max(8, min(console.width, 100) - BAR_LABEL - BAR_VALUE - 26)
    console.print(Text(f"  tok/s over {option}"))
    for point in found.curve:
        here = point.budget_bytes == found.budget_bytes
        style = "green" if here else "blue"
        if point.budget_bytes > most_bytes:
            style = "bright_black"
        size = max(1, round(1000 * point.decode_tok_s / top))
        segment = Segment(name="", bytes=size, sign="█", plain="#", style=style)
        line = Text(f"  {mib(point.budget_bytes):>{BAR_LABEL - 4}}  ")
        line.append(bar([segment], 1000, width, ascii_only=ascii_only))
        line.append(f"  {tok_s(point.decode_tok_s)}")
        note = (notes or _notes(found)).get(point.budget_bytes)
        if note:
            line.append(f"  < {note}", style="bold" if here else "")
        console.print(line, no_wrap=True, overflow="crop")
    if any(point.budget_bytes > most_bytes for point in found.curve):
        console.print(Text(f"  (this machine has {show_bytes(most_bytes)})"))


def _notes(found: Forecast) -> dict[int, str]:
    here, notes = found.budget_bytes, {found.working_set_bytes: "holds one token's experts"}
    notes[found.resident_bytes] = "no more disk reads"
    notes[here] = f"here, {notes[here]}" if here in notes else "here"
    return notes


def _help_line(help_: Help, found: Forecast, most_bytes: int) -> str:
    what = {
        "resident": f"--ram {mib(help_.budget_bytes)}, every expert in memory",
        "ram": f"{show_bytes(help_.amount)} more, --ram {mib(help_.budget_bytes)}",
        "drive": "a drive twice as fast",
        "experts": "--experts int4 when quantizing",
    }[help_.kind]
    if help_.budget_bytes > most_bytes:
        what += f" (this machine has {show_bytes(most_bytes)})"
    now = found.decode_tok_s.likely
    return f"{what}: {tok_s(now)} to {tok_s(help_.decode_tok_s)} tok/s"


def show_beside(console: Console, report: BenchReport) -> None:
    """Forecast and actual, with the deviation."""
    found = report.forecast
    if found is None:
        return
    table = Table(box=None, padding=(0, 1))
    for name in ("", "forecast", "actual", "off by"):
        table.add_column(name, justify="left" if not name else "right")
    reads = report.decode_experts
    hit, seen = found.hit_rate.likely, (reads.upper or reads).hit_rate
    cold, speed = report.runs[0].ttft_s, report.decode_tok_s
    table.add_row(
        "decode tok/s", band(found.decode_tok_s), tok_s(speed), _off(speed, found.decode_tok_s)
    )
    shown = band(found.ttft_s, "{:.2f}".format)
    table.add_row("first token s, first run", shown, f"{cold:.2f}", _off(cold, found.ttft_s))
    off = f"{100 * (seen - hit):+.1f} points"
    table.add_row("hits while decoding", f"{100 * hit:.1f} %", f"{100 * seen:.1f} %", off)
    console.print(table)
    console.print(
        f"  forecast from {found.hit_about}, weights {found.speeds.weight_bytes_s.basis}, "
        f"drive {found.speeds.drive_bytes_s.basis}",
        soft_wrap=True,
    )


def _off(actual: float, found: Rate) -> str:
    return f"{100 * (actual / found.likely - 1):+.0f} %"


def mib(count: int) -> str:
    """A size as --ram takes it."""
    return f"{-(-count // MIB)}MiB"
