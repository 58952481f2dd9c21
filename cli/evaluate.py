"""`moelite eval`: perplexity of a text, and distance from a reference."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from moelite.cli.bars import progress_on_stderr
from moelite.cli.common import (
    KVOption,
    OfflineOption,
    RamOption,
    ThreadsOption,
    find_store,
    stderr_console,
)
from moelite.errors import BudgetError, UsageError
from moelite.units import MIB, parse_bytes, show_bytes

if TYPE_CHECKING:
    from moelite.evaluate import CompareReport, EvalReport
    from moelite.tokenizer import Tokenizer


def evaluate(  # noqa: PLR0913 - one parameter for each option
    store: Annotated[str, typer.Argument(help="The store to judge, or smollm2-moe.")],
    file: Annotated[Path, typer.Argument(help="A text file, UTF-8.")],
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    protocol: Annotated[
        Literal["llama", "paper"],
        typer.Option(help="llama scores the 2nd half of a window, paper all but the 1st token."),
    ] = "llama",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REFERENCE", help="Also KL(REFERENCE || STORE); the two share --ram equally."
        ),
    ] = None,
    ram: RamOption = None,
    limit_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Use the first N tokens of FILE.")
    ] = None,
    threads: ThreadsOption = None,
    kv: KVOption = "f16",
    offline: OfflineOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of STORE on FILE; with --against, how far STORE is from a REFERENCE store.

    Perplexities of different protocols or contexts must not be compared with each other. The text
    is scored in float64 from float32 logits.
    """
    from moelite import evaluate as core
    from moelite.engine import load

    text = read_text(file)
    names = [store] if against is None else [store, against]
    console = stderr_console()
    paths = [find_store(name, offline=offline, console=console) for name in names]
    settings: dict[str, Any] = {"context": context, "threads": threads, "kv": kv}
    shares = budget_shares(paths, ram, **settings)
    with ExitStack() as stack:
        models = [
            stack.enter_context(load(path, ram=share, **settings))
            for path, share in zip(paths, shares, strict=True)
        ]
        ids, bos_id = tokens(models[0].tokenizer, text, protocol)
        if against is not None and tokens(models[1].tokenizer, text, protocol) != (ids, bos_id):
            raise UsageError(
                f"{store} and {against} cut the text into different tokens",
                fix="compare two stores of the same model",
            )
        ids = ids[:limit_tokens]
        progress = stack.enter_context(progress_on_stderr("eval", "tokens"))
        how: dict[str, Any] = {"context": context, "protocol": protocol, "bos_id": bos_id}
        how["progress"] = progress
        report: EvalReport | CompareReport
        if against is None:
            report = core.evaluate(models[0], ids, **how)
        else:
            report = core.compare(models[1], models[0], ids, **how)
    if as_json:
        named = {"store": store, "reference_store": against, "file": str(file)}
        print(json.dumps({**named, **_finite(dataclasses.asdict(report))}, indent=2))
    else:
        show(Console(highlight=False), report, store=store, against=against)


def tokens(
    tokenizer: Tokenizer, text: str, protocol: Literal["llama", "paper"]
) -> tuple[list[int], int | None]:
    """(ids of the text, the BOS id if the llama protocol puts one at the start of a window).

    As llama.cpp does, the whole text then starts with a BOS, too; paper adds none anywhere.
    """
    ids = tokenizer.encode(text, special=False)
    first = tokenizer.encode("", special=True)[:1]
    if protocol == "paper" or tokenizer.bos_id is None or first != [tokenizer.bos_id]:
        return ids, None
    return [*first, *ids], tokenizer.bos_id


def budget_shares(paths: list[Path], ram: str | None, **settings: Any) -> list[int]:
    """Bytes for each model: an equal share of --ram, less what scoring takes.

    Raises BudgetError naming the whole --ram that would do.
    """
    from moelite.evaluate import scoring_bytes
    from moelite.machine import memory
    from moelite.sizing import footprint
    from moelite.store import Store

    machine = memory()
    total = machine.available_bytes * 4 // 5
    if ram is not None:
        total = parse_bytes(ram, total=machine.limit_bytes)
    scoring = 0
    for path in paths:
        store = Store.open(path)
        scoring += scoring_bytes(int(store.config.get("vocab_size", 0)))
        store.close()
    share = (total - scoring) // len(paths)
    plans = [footprint(p, ram=max(share, 1), **settings) for p in paths]
    need = len(paths) * max(plan.minimum_bytes for plan in plans) + scoring
    if total < need:
        sharing = "two models, an equal share each" if len(paths) > 1 else "the model"
        raise BudgetError(
            f"{show_bytes(total)} do not hold {sharing}, and {show_bytes(scoring)} for scoring",
            fix=f"--ram {-(-need // MIB)}MiB, or a smaller --context",
        )
    return [share] * len(paths)


def read_text(file: Path) -> str:
    """The text of a file. Raises UsageError if it is no UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text: byte {error.start}", fix="give a plain text file"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None


def _finite(report: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: an unknown standard error becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return _finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: clean(value) for key, value in report.items()}


def show(
    console: Console, report: EvalReport | CompareReport, *, store: str, against: str | None
) -> None:
    """The report as lines of text; with a reference, which store is which comes first."""
    from moelite.evaluate import CompareReport

    if not isinstance(report, CompareReport):
        _perplexity(console, store, report)
        return
    console.print(f"reference  {against}", soft_wrap=True)
    console.print(f"judged     {store}", soft_wrap=True)
    console.print()
    _perplexity(console, "reference", report.reference)
    _perplexity(console, "judged", report.model)
    for name, value in (
        ("ln(ppl judged / ppl reference)", _pm(report.ln_ratio, report.ln_ratio_se, 6)),
        ("KL(reference || judged), mean", _pm(report.kld_mean, report.kld_se, 6)),
        ("  median", f"{report.kld_median:.6f}"),
        ("  99 %", f"{report.kld_p99:.6f}"),
        ("  99.9 %", f"{report.kld_p999:.6f}"),
        ("  max", f"{report.kld_max:.6f}"),
        ("same first token", _pm(100 * report.top1_agreement, 100 * report.top1_se, 2) + " %"),
    ):
        console.print(f"{name:<32}{value}")


def _pm(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def _perplexity(console: Console, name: str, report: EvalReport) -> None:
    console.print(
        f"{name}: perplexity {_pm(report.ppl, report.ppl_se, 4)}   "
        f"({report.protocol} protocol, context {report.context}, {report.windows} windows, "
        f"{report.tokens:,} tokens scored, {report.seconds:.1f} s)",
        soft_wrap=True,
    )
