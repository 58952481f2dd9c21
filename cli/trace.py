"""`moelite trace`: record which experts each token of a text uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moelite.cli.bars import progress_on_stderr
from moelite.cli.common import (
    ContextOption,
    DeviceOption,
    KVOption,
    MissOption,
    OfflineOption,
    RamOption,
    ThreadsOption,
    VramOption,
    open_model,
)
from moelite.errors import UsageError

if TYPE_CHECKING:
    from moelite.cache.trace import Trace
    from moelite.engine import Model

FRACTIONS = (0.125, 0.25, 0.5, 0.75)  # of a layer's experts: the table's rows


def trace(  # noqa: PLR0913 - one parameter for each option
    store: Annotated[str, typer.Argument(help="The store to run, or smollm2-moe.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="TRACE", help="The trace to write (t.jsonl).")
    ],
    file: Annotated[
        Path | None, typer.Argument(help="A text file, UTF-8.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Of the text, at most.")] = 512,
    random: Annotated[
        bool, typer.Option("--random", help="Random token ids instead of a FILE.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of --random.")] = 0,
    ram: RamOption = None,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    kv: KVOption = "f16",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    miss: MissOption = "auto",
    offline: OfflineOption = False,
) -> None:
    """Run a text through the model and write down which experts every token used.

    One line a token; `moelite replay` and `moelite bench --route` read it. Random tokens spread
    over more experts than text does.
    """
    from moelite.cache.trace import write_trace
    from moelite.cli.evaluate import read_text
    from moelite.trace import record

    if (file is None) != random:
        raise UsageError(
            "either a FILE or --random says what to run, not both"
            if random
            else "there is neither a FILE nor --random",
            fix=f"moelite trace {store} text.txt -o {out}",
        )
    if tokens < 1:
        raise UsageError(f"--tokens {tokens} records nothing", fix="--tokens 512")
    if out.is_dir() or not out.parent.is_dir():  # known before the model runs for minutes
        raise UsageError(f"cannot write {out}", fix="name a file in a folder that is there")
    text = None if file is None else read_text(file)
    settings: Any = {"ram": ram, "context": context, "threads": threads, "kv": kv}
    settings.update(device=device, vram=vram, miss=miss)
    with open_model(store, offline=offline, **settings) as model:
        ids = _random(model, tokens, seed) if text is None else _encode(model, text)[:tokens]
        with progress_on_stderr("trace", "tokens") as progress:
            found = record(model, ids, name=str(out), progress=progress)
    write_trace(out, found.routes)
    show(Console(highlight=False), found)


def _encode(model: Model, text: str) -> list[int]:
    # as `moelite eval` reads it: the text's own tokens, and the BOS token where one is usual
    from moelite.cli.evaluate import tokens

    return tokens(model.tokenizer, text, "llama")[0]


def _random(model: Model, tokens: int, seed: int) -> list[int]:
    import numpy as np

    drawn = np.random.default_rng(seed).integers(0, model.arch.vocab_size, tokens)
    return [int(i) for i in drawn]


def show(console: Console, found: Trace) -> None:
    """Hit rates at some cache sizes, and how much two tokens in a row have in common."""
    from moelite.cache.policy import POLICIES, curve, kept, overlap

    rates = [curve(found, FRACTIONS, policy=policy) for policy in POLICIES]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("cached", "experts a layer", *(f"{policy} hits" for policy in POLICIES)):
        table.add_column(title, justify="right")
    for i, fraction in enumerate(FRACTIONS):
        size = f"{kept(fraction, found.experts)} of {found.experts}"
        shares = (f"{100 * row[i]:.1f} %" for row in rates)
        table.add_row(f"{100 * fraction:g} %", size, *shares)
    console.print(table)
    console.print(
        f"  {found.tokens:,} tokens, {found.layers} MoE layers, {found.top_k} experts each; a "
        f"token shares {100 * overlap(found):.1f} % of them with the one before",
        soft_wrap=True,
    )
    console.print(f"  wrote {found.name}", soft_wrap=True, markup=False)
