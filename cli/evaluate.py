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
    DeviceOption,
    KVOption,
    MissOption,
    OfflineOption,
    RamOption,
    ThreadsOption,
    VramOption,
    find_store,
    stderr_console,
)
from moelite.errors import BudgetError, UsageError
from moelite.units import MIB, parse_bytes, show_bytes

if TYPE_CHECKING:
    from moelite.agreement import RouterReport
    from moelite.scores import CompareReport, EvalReport
    from moelite.storesize import StoreSize
    from moelite.tokenizer import Tokenizer

ContextOfWindows = Annotated[
    int | None,
    typer.Option(
        "--context",
        help="Tokens of a window. Default: 512 for llama, 2048 for paper.",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit-tokens", metavar="N", help="Use the first N tokens.")
]
_WORST = 3  # layers shown of those whose routers agree least


def evaluate(  # noqa: PLR0913 - one parameter for each option
    store: Annotated[str, typer.Argument(help="The store to judge, or smollm2-moe.")],
    file: Annotated[Path, typer.Argument(help="A text file, UTF-8.")],
    context: ContextOfWindows = None,
    protocol: Annotated[
        Literal["llama", "paper", "both"],
        typer.Option(help="llama scores the 2nd half of a window, paper all but the 1st token."),
    ] = "llama",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REFERENCE", help="Also KL(REFERENCE || STORE); the two share --ram equally."
        ),
    ] = None,
    ram: RamOption = None,
    limit_tokens: LimitOption = None,
    threads: ThreadsOption = None,
    kv: KVOption = "f16",
    device: DeviceOption = "cpu",
    vram: VramOption = None,
    miss: MissOption = "auto",
    offline: OfflineOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity of STORE on FILE; with --against, how far STORE is from a REFERENCE store.

    Perplexities of different protocols or contexts must not be compared with each other. The text
    is scored in float64 from float32 logits. Bits are those of all files of a store, and of its
    experts. A store that was calibrated on FILE is refused.
    """
    from moelite import storesize
    from moelite.engine import load
    from moelite.evaluate import CONTEXTS

    text = read_text(file)
    names = [store] if against is None else [store, against]
    console = stderr_console()
    paths = [find_store(name, offline=offline, console=console) for name in names]
    for path in paths:
        storesize.check_calibration(path, file)
    sizes = [storesize.store_size(path) for path in paths]
    asked = [protocol] if protocol != "both" else list(CONTEXTS)
    contexts = {name: context or CONTEXTS[name] for name in asked}
    settings: dict[str, Any] = {"context": max(contexts.values()), "threads": threads, "kv": kv}
    settings |= {"device": device, "vram": vram}
    if against is not None and device != "cpu" and vram is None:
        raise UsageError(
            "two models on a device have to be told how much of it each may take",
            fix="--vram SIZE, for each of the two, or --device cpu",
        )
    shares = budget_shares(paths, ram, **settings)
    reports = {}
    with ExitStack() as stack:
        models = [
            stack.enter_context(load(path, ram=share, miss=miss, **settings))
            for path, share in zip(paths, shares, strict=True)
        ]
        progress = stack.enter_context(progress_on_stderr("eval", "tokens"))
        for name, length in contexts.items():
            how = {"context": length, "protocol": name, "progress": progress}
            reports[name] = _judge(names, models, text, limit_tokens, how)
    if as_json:
        found = {"store": store, "reference_store": against, "file": str(file)}
        keys = ("store", "reference_store")
        told = {key: size.as_dict() for key, size in zip(keys, sizes, strict=False)}
        print(json.dumps({**found, "sizes": told, **_as_json(reports)}, indent=2))
    else:
        show(Console(highlight=False), reports, names, sizes)


def _judge(
    names: list[str], models: list[Any], text: str, limit: int | None, how: dict[str, Any]
) -> EvalReport | CompareReport:
    """One protocol's report of the first model, with a second one as the reference."""
    from moelite import evaluate as core

    ids, bos_id = tokens(models[0].tokenizer, text, how["protocol"])
    if len(models) == 1:
        return core.evaluate(models[0], ids[:limit], bos_id=bos_id, **how)
    if tokens(models[1].tokenizer, text, how["protocol"]) != (ids, bos_id):
        raise different_tokens(*names)
    return core.compare(models[1], models[0], ids[:limit], bos_id=bos_id, **how)


def different_tokens(store: str, reference: str) -> UsageError:
    """What is to be said where two tokenizers disagree."""
    return UsageError(
        f"{store} and {reference} cut the text into different tokens",
        fix="compare two stores of the same model",
    )


def _as_json(reports: dict[str, EvalReport | CompareReport]) -> dict[str, Any]:
    """One protocol's numbers as they are; those of two under the protocols' names."""
    found = {name: finite(dataclasses.asdict(report)) for name, report in reports.items()}
    return found if len(found) > 1 else next(iter(found.values()))


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


def budget_shares(
    paths: list[Path], ram: str | None, *, at_once: int | None = None, **settings: Any
) -> list[int]:
    """Bytes for each model: an equal share of --ram, less what scoring takes.

    at_once: how many of them are in memory together (default: all). Raises BudgetError naming the
    whole --ram that would do.
    """
    from moelite.evaluate import scoring_bytes
    from moelite.machine import memory
    from moelite.sizing import footprint
    from moelite.store import Store

    machine = memory()
    total = machine.available_bytes * 4 // 5
    if ram is not None:
        total = parse_bytes(ram, total=machine.limit_bytes)
    vocabulary = 0
    for path in paths:
        store = Store.open(path)
        vocabulary = max(vocabulary, int(store.config.get("vocab_size", 0)))
        store.close()
    scoring = min(len(paths), 2) * scoring_bytes(vocabulary)  # of the model, and of the reference
    models = at_once or len(paths)
    share = (total - scoring) // models
    plans = [footprint(p, ram=max(share, 1), **settings) for p in paths]
    need = models * max(plan.minimum_bytes for plan in plans) + scoring
    if total < need:
        sharing = "two models, an equal share each" if models > 1 else "the model"
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


def finite(report: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: an unknown standard error becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return finite(value)
        if isinstance(value, list | tuple):
            return [clean(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: clean(value) for key, value in report.items()}


def show(
    console: Console,
    reports: dict[str, EvalReport | CompareReport],
    names: list[str],
    sizes: list[StoreSize],
) -> None:
    """What each store weighs, then the reports as lines of text, one protocol after the other."""
    roles = ["judged", "reference"] if len(names) > 1 else [""]
    for role, name, size in reversed(list(zip(roles, names, sizes, strict=True))):
        console.print(f"{role:<11}{name}".strip(), soft_wrap=True)
        console.print(f"{'':<11}{weight(size)}", soft_wrap=True)
    for report in reports.values():
        console.print()
        _show_report(console, report, names[0])


def weight(size: StoreSize) -> str:
    """A store's bits, and where its bytes are."""
    return (
        f"{size.bits_per_parameter:.2f} bits per parameter, experts {size.formats} at "
        f"{size.expert_bpw:.2f} ({show_bytes(size.bytes)} in all, "
        f"{show_bytes(size.other_bytes)} of it no experts)"
    )


def _show_report(console: Console, report: EvalReport | CompareReport, store: str) -> None:
    from moelite.scores import CompareReport

    if not isinstance(report, CompareReport):
        _perplexity(console, store, report)
        return
    _perplexity(console, "reference", report.reference)
    _perplexity(console, "judged", report.model)
    for name, value in (
        ("ln(ppl judged / ppl reference)", pm(report.ln_ratio, report.ln_ratio_se, 6)),
        ("KL(reference || judged), mean", pm(report.kld_mean, report.kld_se, 6)),
        ("  median", f"{report.kld_median:.6f}"),
        ("  99 %", f"{report.kld_p99:.6f}"),
        ("  99.9 %", f"{report.kld_p999:.6f}"),
        ("  max", f"{report.kld_max:.6f}"),
        ("same first token", percent(report.top1_agreement, report.top1_se)),
        ("change of p(right token), rms", percent(report.rms_dp, report.rms_dp_se)),
        *_router_lines(report.routers),
    ):
        console.print(f"{name:<32}{value}")


def _router_lines(routers: RouterReport | None) -> list[tuple[str, str]]:
    if routers is None:
        return []
    worst = ", ".join(f"{layer}: {100 * share:.2f} %" for layer, share in routers.worst(_WORST))
    return [
        ("same experts chosen", percent(routers.mean, routers.mean_se)),
        ("  least, in layers", worst),
    ]


def percent(value: float, error: float) -> str:
    """A share 0..1 with its standard error, in per cent."""
    return pm(100 * value, 100 * error, 2) + " %"


def pm(value: float, error: float, digits: int) -> str:
    """A number with its standard error, if that is known."""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def _perplexity(console: Console, name: str, report: EvalReport) -> None:
    console.print(
        f"{name}: perplexity {pm(report.ppl, report.ppl_se, 4)}   "
        f"({report.protocol} protocol, context {report.context}, {report.windows} windows, "
        f"{report.tokens:,} tokens scored, {report.seconds:.1f} s)",
        soft_wrap=True,
    )
