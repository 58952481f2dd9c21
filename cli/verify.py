"""`moelite verify`: is the store sound, and does a budget change a token on this machine?"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelite.cli.bars import progress_on_stderr
from moelite.cli.common import (
    ContextOption,
    KVOption,
    ModelArgument,
    OfflineOption,
    ThreadsOption,
    find_store,
    progress,
    stderr_console,
)
from moelite.errors import VerificationError
from moelite.units import show_bytes

if TYPE_CHECKING:
    from moelite.verify import VerifyReport


def verify(  # noqa: PLR0913 - one parameter for each option
    store: ModelArgument = None,
    ram: Annotated[
        str | None,
        typer.Option(
            "--ram",
            metavar="SIZE",
            help="The budget to verify. Default: the least that works.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate, greedily.")] = 32,
    quick: Annotated[bool, typer.Option("--quick", help="Checksums only; run no model.")] = False,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    kv: KVOption = "f16",
    offline: OfflineOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every file of a store, then that a budget gives the bits that plenty of memory gives.

    A prompt and greedy tokens run at the budget, then with every expert in memory, or as many as
    this machine holds. Exit code 6: the store is damaged; 7: the two runs differ.
    """
    from moelite import verify as core

    console = stderr_console()
    path = find_store(store, offline=offline, console=console)
    with progress(console, "verifying") as update:
        files, size = core.verify_files(path, update)
    if not as_json:
        print(f"checksums: all {files} files ({show_bytes(size)}) are as they were written")
    found: dict[str, Any] = {"store": str(path), "files": files, "bytes": size}
    if quick:
        if as_json:
            print(json.dumps(found, indent=2))
        return
    settings: Any = {"ram": ram, "context": context, "threads": threads, "kv": kv}
    with progress_on_stderr("running", "tokens") as bar:

        def told(done: int, total: int, _: str) -> None:
            if bar is not None:
                bar(done, total)

        report = core.verify_tokens(path, **settings, tokens=tokens, progress=told)
    verdict = core.verdict(report)
    if as_json:
        print(json.dumps({**found, **as_dict(report), "verdict": verdict}, indent=2))
    else:
        show(report)
    if not report.equal:
        raise VerificationError(
            f"{path}: {verdict}",
            fix="this must not happen: run it again, then report it with the output of --json",
        )
    if not as_json:
        print(f"verified: {verdict}")


def as_dict(report: VerifyReport) -> dict[str, Any]:
    """The whole report, with its conclusions."""
    return {
        **dataclasses.asdict(report),
        "equal": report.equal,
        "first_difference": report.first_difference,
    }


def show(report: VerifyReport) -> None:
    """A line for each run."""
    for name, run in (("at the budget", report.model), ("in memory", report.reference)):
        print(
            f"{name}: {show_bytes(run.budget_bytes)}, {run.experts_resident:,} of "
            f"{run.experts_total:,} experts resident, {run.misses:,} of "
            f"{run.hits + run.misses:,} lookups read from disk"
        )
    if report.reference.experts_resident < report.reference.experts_total:
        print("  this machine has no room for every expert now: compared with the most it holds")
    if report.model.experts_resident == report.reference.experts_resident:
        print("  both runs kept the same experts in memory; a smaller --ram would prove more")
