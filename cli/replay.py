"""`moelite replay`: hit rates of a recorded routing at other cache sizes, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moelite.errors import UsageError

if TYPE_CHECKING:
    from moelite.cache.trace import Trace


def replay(
    file: Annotated[Path, typer.Argument(help="A trace, as `moelite trace` writes it.")],
    cache: Annotated[
        str,
        typer.Option(
            metavar="SIZES",
            help="Of each layer's cache: shares of its experts (0.25 or 25%) or numbers (16).",
        ),
    ] = "0.125,0.25,0.5,0.75",
    policy: Annotated[
        str, typer.Option(metavar="NAMES", help="lru, which a run uses; belady, the best possible.")
    ] = "lru,belady",
    experts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Experts of a layer. Default: the highest id of the trace, plus one.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        int, typer.Option(metavar="N", help="First tokens that fill the caches, uncounted.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay recorded routing through caches of other sizes: what would hit, what would miss.

    A lookup covers all experts of a token, layer by layer, from empty caches, as in a run.
    """
    from moelite.cache.policy import count
    from moelite.cache.trace import read_trace

    trace = read_trace(file, experts=experts)
    sizes = cache_sizes(cache, trace.experts)
    results = []
    for name in _parts(policy):
        for text, size in sizes:
            found = count(trace, [size] * trace.layers, policy=name, skip=skip)
            results.append(
                {
                    "cache": text,
                    "experts_kept": size,
                    "policy": name,
                    "hits": found.hits,
                    "misses": found.misses,
                    "hit_rate": found.hit_rate,
                }
            )
    facts = {
        "file": str(file),
        "tokens": trace.tokens,
        "skipped": skip,
        "layers": trace.layers,
        "top_k": trace.top_k,
        "experts": trace.experts,
        "experts_assumed": experts is None,
    }
    if as_json:
        print(json.dumps({**facts, "results": results}, indent=2))
        return
    console = Console(highlight=False)
    show(console, trace, results)
    counted = f"{trace.tokens - skip:,} tokens counted after {skip:,} uncounted ones"
    console.print(f"  {counted}, caches empty at first", soft_wrap=True)
    if experts is None:
        console.print(
            f"  {trace.experts} experts a layer are assumed, from the highest id; "
            "--experts N if there are more",
            soft_wrap=True,
        )


def cache_sizes(text: str, experts: int) -> list[tuple[str, int]]:
    """[(as given, experts kept)] of "0.25,50%,16". UsageError for what is no size of a layer."""
    from moelite.cache.policy import kept

    sizes = []
    for part in _parts(text):
        try:
            if part.isdecimal():
                size = int(part)
            elif part.endswith("%"):
                size = kept(float(part[:-1]) / 100, experts)
            else:
                size = kept(float(part), experts)
        except ValueError:
            raise UsageError(
                f"{part!r} is not a cache size", fix="write --cache 0.25,0.5 or --cache 16,32"
            ) from None
        if not 1 <= size <= experts:
            raise UsageError(
                f"a cache of {size} experts is not in 1..{experts}, a layer's experts",
                fix="a smaller --cache, or --experts N if a layer has more than the trace shows",
            )
        sizes.append((part, size))
    return sizes


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def show(console: Console, trace: Trace, results: list[dict[str, Any]]) -> None:
    """A row for each cache size, a column for each policy."""
    policies = list(dict.fromkeys(r["policy"] for r in results))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("cache", justify="right")
    table.add_column("kept a layer", justify="right")
    for policy in policies:
        table.add_column(f"{policy} hits", justify="right")
    for text, kept in dict.fromkeys((r["cache"], r["experts_kept"]) for r in results):
        rates = [r["hit_rate"] for r in results if r["cache"] == text]
        table.add_row(text, f"{kept} of {trace.experts}", *(f"{100 * x:.1f} %" for x in rates))
    console.print(table)
