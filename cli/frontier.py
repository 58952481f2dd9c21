"""`moelite frontier`: several stores beside one reference, by size and by distance."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moelite.cli import plot as drawing
from moelite.cli.bars import progress_on_stderr
from moelite.cli.common import (
    DeviceOption,
    KVOption,
    MissOption,
    OfflineOption,
    RamOption,
    ThreadsOption,
    VramOption,
    cache_folder,
    find_store,
    stderr_console,
)
from moelite.cli.evaluate import (
    ContextOfWindows,
    LimitOption,
    budget_shares,
    different_tokens,
    finite,
    pm,
    read_text,
    tokens,
    weight,
)
from moelite.errors import UsageError
from moelite.units import show_bytes

if TYPE_CHECKING:
    from moelite.frontier import Recording
    from moelite.scores import CompareReport
    from moelite.storesize import StoreSize

OURS = "moelite"
_WIDE = 140  # columns of the table where no terminal says how many there are


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What all stores are asked. settings: of the engine, its context that of a window; miss: one
    that plans do not ask for."""

    words: str
    limit: int | None
    protocol: Literal["llama", "paper"]
    settings: dict[str, Any]
    miss: Literal["auto", "copy", "cpu"] = "auto"

    def tokens(self, model: Any) -> tuple[list[int], int | None]:
        """The text as the model's tokenizer cuts it, and its BOS id if windows begin with one."""
        ids, bos_id = tokens(model.tokenizer, self.words, self.protocol)
        return ids[: self.limit], bos_id

    def how(self, **more: Any) -> dict[str, Any]:
        return {"context": self.settings["context"], "protocol": self.protocol, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One store's size, and its distance from the reference."""

    name: str
    size: StoreSize
    report: CompareReport


def frontier(  # noqa: PLR0913 - one parameter for each option
    reference: Annotated[str, typer.Argument(help="The store that the others are judged by.")],
    stores: Annotated[list[str], typer.Argument(help="Stores of the same model.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="A text file, UTF-8.")],
    context: ContextOfWindows = None,
    protocol: Annotated[
        Literal["llama", "paper"],
        typer.Option(help="llama scores the 2nd half of a window, paper all but the 1st token."),
    ] = "llama",
    also: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON rows of other tools: name, bits_per_parameter, kld_mean, and perhaps "
            "kld_se, tool, text.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw size and distance: .html, .png or .svg.", show_default=False
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
    """Judge STORES by one REFERENCE: bits per parameter of all files, and KL(REFERENCE || STORE).

    The reference runs once; its logits lie in a temporary file meanwhile (4 bytes for each scored
    token and entry of the vocabulary), so that one model at a time has the whole of --ram. A star
    marks what nothing else beats in both size and distance.
    """
    from moelite.evaluate import CONTEXTS

    asked = Asked(
        words=read_text(text),
        limit=limit_tokens,
        protocol=protocol,
        settings={"context": context or CONTEXTS[protocol], "threads": threads, "kv": kv}
        | {"device": device, "vram": vram},
        miss=miss,
    )
    others = [] if also is None else _others(also, text)
    if plot is not None:
        drawing.check(plot)
    console = stderr_console()
    names = [reference, *stores]
    paths = [find_store(name, offline=offline, console=console) for name in names]
    sizes = _sizes(paths, text)
    reports = _judge(asked, names, paths, budget_shares(paths, ram, at_once=1, **asked.settings))
    judged = [
        Judged(name=name, size=size, report=report)
        for name, size, report in zip(stores, sizes[1:], reports, strict=True)
    ]
    best = _best(judged, others)
    if plot is not None:
        marks = _marks(judged, others, best)
        drawing.draw(
            plot,
            marks,
            title=f"distance from {Path(reference).name} on {text.name}",
            about=_about(judged),
        )
        console.print(Text(f"drew {plot}"))
    if as_json:
        print(json.dumps(_as_json((reference, sizes[0]), judged, others, best), indent=2))
    else:
        show((reference, sizes[0]), judged, others, best)


def _sizes(paths: list[Path], text: Path) -> list[StoreSize]:
    """Of each store; UsageError if one was calibrated on the text."""
    from moelite import storesize

    for path in paths:
        storesize.check_calibration(path, text)
    return [storesize.store_size(path) for path in paths]


def _others(file: Path, text: Path) -> list[dict[str, Any]]:
    """The rows of a file; those that name another text than `text` are left out."""
    from moelite.frontier import check_points

    try:
        rows = check_points(json.loads(read_text(file)), str(file))
    except ValueError as problem:
        raise UsageError(f"{file} is no JSON: {problem}") from None
    return [row for row in rows if row.get("text", text.name) == text.name]


def _judge(
    asked: Asked, names: list[str], paths: list[Path], shares: list[int]
) -> list[CompareReport]:
    """The report of every store but the first, which is the reference."""
    from moelite import evaluate as core
    from moelite.engine import load

    reports = []
    with ExitStack() as stack:
        progress = stack.enter_context(progress_on_stderr("frontier", "tokens"))
        file = stack.enter_context(_scratch())
        with load(paths[0], ram=shares[0], miss=asked.miss, **asked.settings) as model:
            ids, bos_id = asked.tokens(model)
            how = asked.how(bos_id=bos_id, progress=progress)
            recording = _record(model, ids, file, how)
        for name, path, share in zip(names[1:], paths[1:], shares[1:], strict=True):
            with load(path, ram=share, miss=asked.miss, **asked.settings) as model:
                if asked.tokens(model) != (ids, bos_id):
                    raise different_tokens(name, names[0])
                report = core.compare(recording, model, ids, **how)
            known = dataclasses.replace(report.reference, seconds=recording.seconds)
            reports.append(dataclasses.replace(report, reference=known))
    return reports


def _scratch() -> IO[bytes]:
    """A file that goes when it is closed, where large files may lie."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def _record(model: Any, ids: list[int], file: IO[bytes], how: dict[str, Any]) -> Recording:
    from moelite.frontier import record, recorded_bytes

    need = recorded_bytes(len(ids), how["context"], how["protocol"], model.arch.vocab_size)
    free = shutil.disk_usage(cache_folder()).free
    if need > free:
        raise UsageError(
            f"the reference's logits take {show_bytes(need)}, and {show_bytes(free)} are free "
            f"in {cache_folder()}",
            fix=f"--limit-tokens {len(ids) * free // (2 * need)}, or make room",
        )
    return record(model, ids, file, **how)


def _best(judged: list[Judged], others: list[dict[str, Any]]) -> list[bool]:
    """Of stores, then others: whether nothing beats it in both size and distance."""
    from moelite.frontier import undominated

    points = [(one.size.bits_per_parameter, one.report.kld_mean) for one in judged]
    return undominated(points + [(row["bits_per_parameter"], row["kld_mean"]) for row in others])


def _about(judged: list[Judged]) -> str:
    report = judged[0].report.model
    return f"{report.protocol} protocol, context {report.context}, {report.tokens:,} tokens scored"


def _marks(
    judged: list[Judged], others: list[dict[str, Any]], best: list[bool]
) -> list[drawing.Mark]:
    stores = [
        drawing.Mark(
            name=Path(one.name).name,
            tool=OURS,
            bits=one.size.bits_per_parameter,
            kld=one.report.kld_mean,
            se=one.report.kld_se,
            best=flag,
        )
        for one, flag in zip(judged, best, strict=False)
    ]
    return stores + [
        drawing.Mark(
            name=row["name"],
            tool=row.get("tool", "others"),
            bits=row["bits_per_parameter"],
            kld=row["kld_mean"],
            se=row.get("kld_se") or 0.0,
            best=flag,
        )
        for row, flag in zip(others, best[len(judged) :], strict=True)
    ]


def _as_json(
    reference: tuple[str, StoreSize],
    judged: list[Judged],
    others: list[dict[str, Any]],
    best: list[bool],
) -> dict[str, Any]:
    base = finite(dataclasses.asdict(judged[0].report.reference))
    stores = []
    for one, flag in zip(judged, best, strict=False):
        report = finite(dataclasses.asdict(one.report))
        del report["reference"]  # the same for all
        stores.append({"store": one.name, **one.size.as_dict(), **report, "unbeaten": flag})
    rest = [
        {**row, "unbeaten": flag} for row, flag in zip(others, best[len(judged) :], strict=True)
    ]
    told = {"store": reference[0], **reference[1].as_dict(), **base}
    return {"reference": told, "stores": stores, "others": rest}


def show(
    reference: tuple[str, StoreSize],
    judged: list[Judged],
    others: list[dict[str, Any]],
    best: list[bool],
) -> None:
    """A table of everything, the largest first."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    base = judged[0].report.reference
    console.print(
        Text(f"judged by {reference[0]}: {weight(reference[1])}; perplexity {base.ppl:.4f}")
    )
    console.print(Text(_about(judged)))
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("store")
    for title in (
        *("bits/param", "experts", "KL mean", "99 %", "99.9 %"),
        *("same 1st %", "same experts %", "perplexity"),
    ):
        table.add_column(title, justify="right", no_wrap=True)
    rows = [(one.size.bits_per_parameter, _row(one)) for one in judged]
    rows += [(row["bits_per_parameter"], _other_row(row)) for row in others]
    for (_, cells), flag in sorted(zip(rows, best, strict=True), key=lambda row: -row[0][0]):
        table.add_row("*" if flag else "", *cells)
    console.print(table)


def _row(one: Judged) -> list[str]:
    report = one.report
    return [
        one.name,
        f"{one.size.bits_per_parameter:.2f}",
        f"{one.size.expert_bpw:.2f}",
        pm(report.kld_mean, report.kld_se, 5),
        f"{report.kld_p99:.4f}",
        f"{report.kld_p999:.4f}",
        pm(100 * report.top1_agreement, 100 * report.top1_se, 1),
        f"{100 * report.routers.mean:.2f}" if report.routers else "",
        f"{report.model.ppl:.4f}",
    ]


def _other_row(row: dict[str, Any]) -> list[str]:
    def number(key: str, digits: int, factor: float = 1.0) -> str:
        value = row.get(key)
        return "" if value is None else f"{factor * value:.{digits}f}"

    return [
        f"{row['name']} ({row.get('tool', 'others')})",
        number("bits_per_parameter", 2),
        number("expert_bpw", 2),
        pm(row["kld_mean"], row.get("kld_se") or math.nan, 5),
        number("kld_p99", 4),
        number("kld_p999", 4),
        number("top1_agreement", 1, 100),
        "",
        number("ppl", 4),
    ]
