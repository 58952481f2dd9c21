"""`moelite run`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelite.cli.common import (
    BUILTIN,
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
from moelite.errors import UsageError

if TYPE_CHECKING:
    from moelite.cache.stats import CacheStats
    from moelite.cli.repl import ChatModel
    from moelite.forecast import Forecast
    from moelite.generate import Generation


def _number(flag: str, about: str) -> Any:
    return typer.Option(flag, help=about, show_default=False)


def run(  # noqa: PLR0913 - one parameter for each option
    model: ModelArgument = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="The prompt; piped text follows it.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="A system prompt.", show_default=False)
    ] = "",
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    max_tokens: Annotated[int | None, _number("--max-tokens", "Stop after so many tokens.")] = None,
    temperature: Annotated[float | None, _number("--temperature", "0 picks the likeliest.")] = None,
    top_p: Annotated[float | None, _number("--top-p", "Keep this share of likeliness.")] = None,
    min_p: Annotated[float | None, _number("--min-p", "Drop what is so much less likely.")] = None,
    top_k: Annotated[int | None, _number("--top-k", "Keep so many tokens.")] = None,
    seed: Annotated[int | None, _number("--seed", "The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", metavar="TEXT", help="End before this text; repeatable.", show_default=False
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, with the times.")
    ] = False,
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
    offline: OfflineOption = False,
) -> None:
    """Answer one prompt, from -p, from a pipe, or from both.

    Settings that are not given are the model's own (generation_config.json), else greedy.
    """
    text = read_prompt(prompt)
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    check(changes)
    settings: Any = {"ram": ram, "context": context, "threads": threads, "kv": kv}
    settings.update(reads=reads, lookahead=lookahead, on_miss=on_miss)
    settings.update(device=device, vram=vram, miss=miss)
    with open_model(model, offline=offline, **settings) as loaded:
        answer(
            loaded, model or BUILTIN, prompt_ids(loaded, text, system, raw=raw), changes, as_json
        )


def read_prompt(prompt: str | None) -> str:
    """The prompt: the argument, then what is piped in."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    parts = [part for part in (prompt, piped.rstrip("\n")) if part]
    if not parts:
        raise UsageError("there is no prompt", fix='give one: moelite run MODEL -p "Hello"')
    return "\n".join(parts)


def check(changes: dict[str, Any]) -> None:
    """Refuse a senseless setting before a model is loaded for it."""
    from moelite.sampling import SamplingOptions

    SamplingOptions(**changes)


def prompt_ids(model: ChatModel, text: str, system: str, *, raw: bool) -> list[int]:
    """The prompt as tokens: by the chat template, or raw."""
    tokenizer = model.tokenizer
    if raw and system:
        raise UsageError("--raw knows no system prompt", fix="put its text into the prompt")
    if raw:
        ids: list[int] = tokenizer.encode(text, special=True)
        return ids
    messages = [{"role": "system", "content": system}] if system else []
    chat: list[int] = tokenizer.encode_chat([*messages, {"role": "user", "content": text}])
    return chat


def answer(
    model: ChatModel, name: str, ids: list[int], changes: dict[str, Any], as_json: bool
) -> None:
    """Generate and print: plain text as it comes, or one JSON object at the end."""
    from moelite.cli.answer import Paper
    from moelite.cli.interrupt import Interrupt, Stopped
    from moelite.generate import stream

    paper = Paper()
    watched = sys.stderr.isatty() and not as_json
    forecast = model.forecast(folder=cache_folder()) if watched else None
    with Interrupt() as interrupt:

        def reading(done: int, total: int) -> None:
            interrupt.check()
            if not as_json:
                paper.reading(done, total)

        generation = stream(model, ids, on_prefill=reading, **changes)
        meter = model.meter(cache_folder())
        paper.begin()
        try:
            for step in generation:
                meter.first_token()
                if not as_json:
                    paper.text("answer", step.text)
                if interrupt.asked:
                    break
        except Stopped:
            pass
    stats = generation.stats
    fresh = stats.prompt_tokens - stats.reused_tokens
    meter.done(stats.prompt_tokens, fresh, stats.generated_tokens - 1)
    if as_json:
        print(json.dumps(report(generation, name, stopped=interrupt.asked), ensure_ascii=False))
    else:
        paper.end()
        _stats_line(generation, forecast)
    if interrupt.asked and generation.finish_reason is None:
        raise KeyboardInterrupt


def report(generation: Generation, name: str, *, stopped: bool) -> dict[str, Any]:
    """What --json prints."""
    from moelite.process import peak_rss_bytes

    stats = generation.stats
    return {
        "text": generation.text,
        "finish_reason": generation.finish_reason or ("interrupted" if stopped else None),
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "prefill_tok_s": stats.prefill_tok_s,
        "decode_tok_s": stats.decode_tok_s,
        "ttft_s": stats.ttft_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "experts": {
            "hits": stats.experts.hits,
            "misses": stats.experts.misses,
            "bytes_read": stats.experts.bytes_read,
            "wait_s": stats.experts.wait_s,
            **_on_device(stats.experts.upper),
        },
        "model": name,
        "seed": stats.seed,
    }


def _on_device(upper: CacheStats | None) -> dict[str, Any]:
    """Of a device's memory, whose misses are looked up in the machine's."""
    if upper is None:
        return {}
    return {
        "device": {
            "hits": upper.hits,
            "misses": upper.misses,
            "bytes_copied": upper.bytes_read,
            "computed_on_cpu": upper.low,
            "wait_s": upper.wait_s,
        }
    }


def _stats_line(generation: Generation, forecast: Forecast | None) -> None:
    """The cost of the answer, for a person who watches."""
    if not sys.stderr.isatty():
        return
    from rich.text import Text

    from moelite.cli.common import stderr_console
    from moelite.cli.render import answer_line

    stats = generation.stats
    used = stats.prompt_tokens + stats.generated_tokens
    line = answer_line(stats, used, generation.session.context, forecast)
    stderr_console().print(Text(line, style="dim"))
