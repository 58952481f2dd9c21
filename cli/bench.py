"""`moelite bench`: prefill and decode speed of a store on this machine."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
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
    LookaheadOption,
    MissOption,
    ModelArgument,
    OfflineOption,
    OnMissOption,
    RamOption,
    ReadsOption,
    ThreadsOption,
    VramOption,
    cache_folder,
    open_model,
)
from moelite.cli.forecast import show_beside
from moelite.cli.recorded import replayed
from moelite.cli.render import lookahead_line
from moelite.units import show_bytes

if TYPE_CHECKING:
    from moelite.bench import BenchReport
    from moelite.engine import Model


def bench(  # noqa: PLR0913 - one parameter for each option
    store: ModelArgument = None,
    prompt: Annotated[int, typer.Option(help="Random prompt tokens.")] = 128,
    gen: Annotated[int, typer.Option(help="Tokens to generate, greedily.")] = 32,
    repeat: Annotated[int, typer.Option(help="Runs; medians are reported.")] = 3,
    ram: RamOption = None,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    kv: KVOption = "f16",
    reads: ReadsOption = "auto",
    lookahead: LookaheadOption = "auto",
    on_miss: OnMissOption = "wait",
    device: DeviceOption = "auto",
    vram: VramOption = None,
    miss: MissOption = "auto",
    seed: Annotated[int, typer.Option(help="Of the random prompt.")] = 0,
    route: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            help="Force this recorded routing on the model: position p uses its token p.",
            show_default=False,
        ),
    ] = None,
    offline: OfflineOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill and decode speed, time to first token, peak memory and expert traffic.

    The prompt is random token ids, so experts are used more evenly than by prose; --route gives
    the expert traffic of real text. Decode speed leaves the first token out.
    """
    from moelite.bench import ExpertTraffic
    from moelite.bench import bench as measure
    from moelite.cache.trace import read_trace
    from moelite.hitrates import uniform

    trace = None if route is None else read_trace(route)
    settings: Any = {"ram": ram, "context": context, "threads": threads, "kv": kv}
    settings.update(reads=reads, lookahead=lookahead, on_miss=on_miss)
    settings.update(device=device, vram=vram, miss=miss)
    with open_model(store, offline=offline, **settings) as model:
        folder = cache_folder()
        # random tokens: no published run of real text tells how they are routed
        hits = uniform() if trace is None else replayed(trace)
        forecast = model.forecast(hits, folder, prompt_tokens=prompt, lookahead=trace is None)
        runs: Any = {"prompt": prompt, "gen": gen, "repeat": repeat, "seed": seed}
        with progress_on_stderr("bench", "runs") as progress:
            watch = functools.partial(model.meter, folder)
            report = measure(model, **runs, route=trace, progress=progress, meter=watch)
        report = dataclasses.replace(report, forecast=forecast)
        facts = store_facts(model)
        if isinstance(report.decode_experts.upper, ExpertTraffic):
            facts |= device_facts(model, report, (gen - 1) * repeat)
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), **facts}, indent=2))
    else:
        show(Console(highlight=False), report, facts)


def store_facts(model: Model) -> dict[str, Any]:
    """What was measured: formats, bits per weight of an expert (with scales), budget, threads."""
    layers = model.store.layers.values()
    experts = sum(entry.experts for entry in layers)
    shape = next(iter(layers)).tiers[0].down_shape
    payload = sum(entry.payload_bytes for entry in layers)
    return {
        "store": str(model.store.path),
        "expert_format": model.store.expert_format,
        "dense_format": model.store.dense_format,
        "expert_bpw": round(8 * payload / (3 * shape[0] * shape[1] * experts), 4),
        "record_bytes": sum(entry.record_bytes for entry in layers) // experts,
        "budget_bytes": model.footprint.budget_bytes,
        "experts_resident": model.footprint.experts_resident,
        "experts_total": model.footprint.experts_total,
        "context": model.context,
        "threads": model.footprint.threads,
        "direct_reads": model.store.direct,
        "reads_in_flight": model.drive.depth if model.drive else None,
        "lookahead": lookahead_line(model.lookahead, model.stats()),
        "lookahead_recall": model.lookahead.recall,
    }


def device_facts(model: Any, report: BenchReport, tokens: int) -> dict[str, Any]:
    """What was measured on the device. tokens: decoded, of which `report` has the sums."""
    plan, upper = model.footprint.device, report.decode_experts.upper
    split = {name: None if value == math.inf else value for name, value in model.split.items()}
    return {
        "device": plan.device,
        "card": plan.card,
        "vram_bytes": plan.budget_bytes,
        "device_planned_bytes": plan.used_bytes,
        "device_peak_bytes": model.device.peak_bytes(),
        "device_resident": plan.experts_resident,
        "miss": model.miss,
        "split": split,
        "pinned": model.pinned,
        "nf4_by": model.nf4_by or None,
        "copied_bytes_per_token": upper.bytes_read / tokens if upper else 0.0,
        "on_cpu_per_token": upper.low / tokens if upper else 0.0,
    }


def show(console: Console, report: BenchReport, facts: dict[str, Any]) -> None:
    """A row per run and the medians, then what was measured on what."""
    table = Table(box=None, padding=(0, 1))
    for name in (
        "run",
        "prefill tok/s",
        "decode tok/s",
        "first token s",
        *(["on device"] if report.experts.upper else []),
        "hits",
        "read",
        "wait s",
    ):
        table.add_column(name, justify="right")
    median = (report.prefill_tok_s, report.decode_tok_s, report.ttft_s)
    rows = [
        (str(i), (r.prefill_tok_s, r.decode_tok_s, r.ttft_s), r.experts)
        for i, r in enumerate(report.runs, 1)
    ]
    for name, (prefill, decode, ttft), experts in [*rows, ("median", median, report.experts)]:
        table.add_row(
            name,
            f"{prefill:.1f}",
            f"{decode:.2f}",
            f"{ttft:.3f}",
            *([f"{100 * experts.upper.hit_rate:.1f} %"] if experts.upper else []),
            f"{100 * experts.hit_rate:.1f} %",
            show_bytes(experts.bytes_read),
            f"{experts.wait_s:.2f}",
            style="bold" if name == "median" else None,
        )
    console.print(table)
    for name, parts in (("prefill", report.prefill_ms), ("decode", report.decode_ms)):
        spent = ", ".join(f"{part} {ms:.3g}" for part, ms in parts.items() if ms >= 0.0005)
        console.print(f"  {name} ms/token: {spent}", soft_wrap=True)
    console.print(
        f"  {report.prompt_tokens} prompt + {report.generated_tokens} generated tokens, "
        f"seed {report.seed}; the last line's reads are sums",
        soft_wrap=True,
    )
    routed = "the router's own choice" if report.route is None else f"routing of {report.route}"
    console.print(
        f"  {routed}; experts in memory while decoding: "
        f"{100 * report.decode_experts.hit_rate:.1f} %",
        soft_wrap=True,
        markup=False,
    )
    whose = f"memory gave to {facts['threads']} threads"
    if "device" in facts:
        whose = f"{facts['device']} gave"
    console.print(
        f"  a token reads {show_bytes(report.token_bytes)} of weights: "
        f"{100 * report.bandwidth:.0f} % of what {whose} right after "
        f"({show_bytes(int(report.memory_bytes_s))}/s)",
        soft_wrap=True,
    )
    _show_device(console, report, facts)
    if report.drive_share is not None and report.drive_bytes_s is not None:
        reads = report.decode_experts
        console.print(
            f"  decoding read {show_bytes(int(reads.read_bytes_s))}/s while it read: "
            f"{100 * report.drive_share:.0f} % of what the drive gave right after "
            f"({show_bytes(int(report.drive_bytes_s))}/s)",
            soft_wrap=True,
        )
    console.print(f"  lookahead {facts['lookahead']}", soft_wrap=True, markup=False)
    peak, budget = show_bytes(report.peak_rss_bytes), show_bytes(facts["budget_bytes"])
    console.print(
        f"  peak memory {peak} of {budget}, "
        f"{facts['experts_resident']} of {facts['experts_total']} experts resident"
    )
    console.print(
        f"  experts {facts['expert_format']} ({facts['expert_bpw']} bpw), dense "
        f"{facts['dense_format']}; {report.cpu}, {facts['threads']} threads"
    )
    show_beside(console, report)


def _show_device(console: Console, report: BenchReport, facts: dict[str, Any]) -> None:
    upper = report.decode_experts.upper
    if upper is None:
        return
    console.print(
        f"  decoding: {100 * upper.hit_rate:.1f} % of experts on the device; "
        f"{show_bytes(round(facts['copied_bytes_per_token']))} copied and "
        f"{facts['on_cpu_per_token']:.2g} experts computed on the CPU for a token; ahead of need "
        f"{upper.useful} in time, {upper.late} late, {upper.wasted} in vain",
        soft_wrap=True,
    )
    split, peak = facts["split"], facts["device_peak_bytes"]
    times = ", ".join(f"{k.removesuffix('_s')} {1e3 * v:.3g} ms" for k, v in split.items() if v)
    console.print(f"  an expert (copied, on the host, to hand over): {times}", soft_wrap=True)
    if facts["nf4_by"]:
        console.print(f"  nf4 there by {facts['nf4_by']}", soft_wrap=True, markup=False)
    seen = "peak not counted here" if peak is None else f"peak {show_bytes(peak)}"
    name = f"{facts['device']} ({facts['card']})" if facts["card"] else facts["device"]
    console.print(
        f"  {name}: {seen}, planned {show_bytes(facts['device_planned_bytes'])} of "
        f"{show_bytes(facts['vram_bytes'])}, {facts['device_resident']} of "
        f"{facts['experts_total']} experts resident there",
        soft_wrap=True,
        markup=False,
    )
