"""`moelite quantize`: from a checkpoint to a store."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moelite.cli.common import OfflineOption, RecipeOption, progress, stderr_console
from moelite.cli.render import seconds
from moelite.errors import UsageError
from moelite.units import parse_bytes, show_bytes

if TYPE_CHECKING:
    from moelite.convert import QuantizeReport

INTERRUPTED = 130
_SHOWN_IGNORED = 5
_SHOWN_FEW = 5
_CHOICE = "vq-0.5 to vq-3, int4, int8"
_LINE_S = 10.0  # seconds between two lines where there is no bar


def quantize(  # noqa: PLR0913 - one parameter per option
    src: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder (quantized ones too), a GGUF file, a hub id"
            " (org/name[@revision]), or smollm2-moe."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The store's folder: a new one, or to go on with.")],
    experts: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="Of the routed experts.", show_default="int4"),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="Of the other weights.", show_default="int8"),
    ] = None,
    recipe: RecipeOption = None,
    low: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Also a plane of all experts in few bits, for --on-miss low.",
            show_default=False,
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Choose formats of experts so that the store fits."),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="The same, in bits for each parameter of the model."),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="F,G,...", help="What to choose from for a target.", show_default=_CHOICE
        ),
    ] = None,
    ram: Annotated[
        str, typer.Option("--ram", metavar="SIZE", help="Memory to use at most, e.g. 2GiB.")
    ] = "2GiB",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the sizes; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    offline: OfflineOption = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text to run through the model: experts are fitted to it."
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="How much of it to read.")
    ] = 32_768,
) -> None:
    """Write the store of a checkpoint: its experts in a small format, one read each.

    Interrupted, it keeps the finished layers; the same command goes on from there.
    """
    from moelite.convert import quantize as convert

    console = stderr_console()
    try:
        with _progress(console, quiet=as_json) as update:
            report = convert(
                src,
                out,
                experts=experts,
                dense=dense,
                recipe=recipe,
                low=low,
                target=_target(target_size, target_bpw, formats),
                ram=ram,
                dry_run=dry_run,
                progress=update,
                offline=offline,
                calibrate=calibrate,
                calibrate_tokens=calibrate_tokens,
            )
    except KeyboardInterrupt:
        print("interrupted: finished layers are kept; the same command continues", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print(json.dumps(as_dict(report), indent=2))
    else:
        show(Console(highlight=False), report)


def _target(size: str | None, bpw: float | None, formats: str | None) -> Any:
    """What the options of a target mean; None without one."""
    from moelite.target import Target

    if size is None and bpw is None:
        if formats is not None:
            raise UsageError("--formats are for a target", fix="--target-size or --target-bpw")
        return None
    found = Target(None if size is None else parse_bytes(size), bpw)
    if formats is None:
        return found
    return found._replace(formats=tuple(name.strip() for name in formats.split(",")))


def as_dict(report: QuantizeReport) -> dict[str, Any]:
    """The whole report, with the sums and the bits per weight."""
    found = dataclasses.asdict(report)
    for row, entry in zip(report.classes, found["classes"], strict=True):
        entry["bpw"] = round(row.bpw, 4)
    found["bytes_before"] = report.bytes_before
    found["bytes_after"] = report.bytes_after
    return found


def show(console: Console, report: QuantizeReport) -> None:
    """The table by tensor class, what was left out, and what to do next."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("tensors", "format"):
        table.add_column(title, no_wrap=True)
    for title in ("count", "weights", "before", "after", "bits/weight"):
        table.add_column(title, justify="right", no_wrap=True)
    params = 0
    for row in report.classes:
        params += row.params
        table.add_row(
            row.name,
            row.format,
            f"{row.tensors:,}",
            f"{row.params:,}",
            show_bytes(row.bytes_before),
            show_bytes(row.bytes_after),
            f"{row.bpw:.2f}",
        )
    table.add_row(
        "all",
        "",
        f"{sum(row.tensors for row in report.classes):,}",
        f"{params:,}",
        show_bytes(report.bytes_before),
        show_bytes(report.bytes_after),
        f"{8 * report.bytes_after / max(1, params):.2f}",
        style="bold",
    )
    console.print(table)
    console.print(Text(f"read from: {_shares(report.encodings)}"))
    if report.ternary is not None:
        zeros, bits, entropy = report.ternary
        console.print(
            Text(
                f"ternary experts, one of each layer: {100 * zeros:.1f} % zeros, {bits:.3f} bits a"
                f" weight, where their entropy is {entropy:.3f}"
            )
        )
    if report.recipe.get("target"):
        console.print(Text("\n".join(_chosen(report.recipe))))
    if report.ignored:
        some = ", ".join(report.ignored[:_SHOWN_IGNORED])
        more = len(report.ignored) - _SHOWN_IGNORED
        note = f"not used by this model: {some}" + (f" and {more} more" if more > 0 else "")
        console.print(Text(note))
    if report.rare:
        console.print(Text(_few(report)))
    console.print(Text(_verdict(report)))


def _few(report: QuantizeReport) -> str:
    least = sorted(report.rare, key=lambda rare: rare.tokens)
    some = ", ".join(f"layer {r.layer} expert {r.expert} {r.tokens}" for r in least[:_SHOWN_FEW])
    more = len(least) - _SHOWN_FEW
    return f"experts that few tokens of the text reached: {some}" + (
        f" and {more} more" if more > 0 else ""
    )


def _shares(encodings: dict[str, int]) -> str:
    """How the checkpoint keeps what was read, in shares of its bytes."""
    total = max(1, sum(encodings.values()))
    return ", ".join(f"{name} ({100 * size / total:.3g}%)" for name, size in encodings.items())


def _chosen(recipe: dict[str, Any]) -> Iterator[str]:
    """The recipe that a target led to, a line for each part and format."""
    yield f"chosen for {recipe['target']}: {recipe['experts']}, but"
    for rule in recipe.get("rule", []):
        experts = f" experts {rule['experts']}" if "experts" in rule else ""
        yield f"  {rule['part']:<8} {rule['format']:<7} in layers {rule['layers']}{experts}"


def _verdict(report: QuantizeReport) -> str:
    if report.dry_run:
        return f"dry run: nothing was written; {report.out} would hold {report.layers} MoE layers"
    if report.reused:
        return f"already done: {report.out} holds this model in these formats"
    kept = f", {report.resumed} files kept from before" if report.resumed else ""
    return (
        f"wrote {report.out} in {seconds(report.seconds)}{kept};"
        f" peak memory {show_bytes(report.peak_rss_bytes)}"
    )


@contextmanager
def _progress(console: Console, *, quiet: bool) -> Iterator[Any]:
    """A bar on a terminal, a line now and then elsewhere, nothing when quiet."""
    if quiet:
        yield None
    elif console.is_terminal:
        with progress(console, "quantizing") as update:
            yield update
    else:
        yield _lines(console)


def _lines(console: Console) -> Any:
    start = time.monotonic()
    last = start

    def update(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_S and done < total:
            return
        last = now
        left = seconds((now - start) * (total - done) / done) if done else "?"
        console.print(Text(f"{show_bytes(done)} of {show_bytes(total)}, {note}, {left} left"))

    return update
