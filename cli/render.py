"""Numbers and model text as people see them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from moelite.units import show_bytes

if TYPE_CHECKING:
    from moelite.cache.stats import CacheStats
    from moelite.forecast import Forecast, Rate
    from moelite.generate import GenerationStats
    from moelite.lookahead import Lookahead

# what could move the cursor, ring, or start an escape sequence; \n and \t stay
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Model text without the characters that a terminal obeys."""
    return _CONTROL.sub("", text)


def seconds(value: float) -> str:
    """A duration: "0.3 s", "12 s", "3 min 20 s"."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 60:
        return f"{value:.0f} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


def tok_s(value: float) -> str:
    """A speed: "0.42", "9.4", "42"."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def band(rate: Rate, show: Callable[[float], str] = tok_s) -> str:
    """A forecast in short: "9.1 to 13"; one number where both ends look alike."""
    low, high = show(rate.low), show(rate.high)
    return low if low == high else f"{low} to {high}"


def percent(part: float, whole: float) -> str:
    """A share, "-" of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def answer_line(
    stats: GenerationStats, used: int, context: int, forecast: Forecast | None = None
) -> str:
    """What an answer cost, in one line: tokens, speed, first token, hit rate, context used."""
    parts = [f"{stats.generated_tokens:,} tok"]
    if stats.decode_tok_s:
        expected = f" (forecast {band(forecast.decode_tok_s)})" if forecast else ""
        parts.append(f"{stats.decode_tok_s:.1f} tok/s{expected}")
    if stats.ttft_s:
        parts.append(f"first {seconds(stats.ttft_s)}")
    looked_up, upper = stats.experts.hits + stats.experts.misses, stats.experts.upper
    if upper is not None:
        parts += _device_parts(upper, stats.experts)
    elif looked_up:
        parts.append(f"hit {percent(stats.experts.hits, looked_up)}")
    parts.append(f"ctx {used:,}/{context:,}")
    return " · ".join(parts)


def _device_parts(upper: CacheStats, below: CacheStats) -> list[str]:
    """Hits on the device, of its misses those in memory, and what became of the misses."""
    parts = [f"device hit {percent(upper.hits, upper.hits + upper.misses)}"]
    if below.hits + below.misses:
        parts[0] += f", memory {percent(below.hits, below.hits + below.misses)}"
    if upper.bytes_read:
        parts.append(f"copied {show_bytes(upper.bytes_read)}")
    if upper.low:
        parts.append(f"{upper.low:,} on the CPU")
    return parts


def stats_table(
    last: GenerationStats | None, total: CacheStats, forecast: Forecast | None = None
) -> list[tuple[str, str]]:
    """(what, value) pairs: the last answer, then the experts since the model was loaded."""
    rows: list[tuple[str, str]] = []
    if last is not None:
        rows += [
            ("prompt", f"{last.prompt_tokens:,} tokens, {last.reused_tokens:,} of them kept"),
            ("prefill", f"{last.prefill_tok_s:.1f} tok/s"),
            ("first token", seconds(last.ttft_s)),
            ("answer", f"{last.generated_tokens:,} tokens"),
            ("decode", f"{last.decode_tok_s:.1f} tok/s"),
            *_forecast_rows(forecast),
            ("seed", str(last.seed)),
            *_expert_rows("experts, last answer", last.experts),
        ]
    return [*rows, *_expert_rows("experts, since start", total)]


def lookahead_line(lookahead: Lookahead, total: CacheStats) -> str:
    """What reading ahead does, and what came of it."""
    parts = [lookahead.state()]
    if lookahead.recall is not None:
        parts.append(f"{percent(lookahead.recall, 1)} of the experts guessed")
    if total.useful or total.late or total.wasted:
        parts.append(
            f"read ahead: {total.useful:,} in time, {total.late:,} late, {total.wasted:,} in vain"
        )
    return "; ".join(parts)


def _forecast_rows(forecast: Forecast | None) -> list[tuple[str, str]]:
    if forecast is None:
        return []
    hit = forecast.hit_rate
    found = f"{percent(hit.low, 1)} to {percent(hit.high, 1)} hit, {forecast.hit_about}"
    speed = f"{band(forecast.decode_tok_s)} tok/s ({forecast.decode_tok_s.basis})"
    return [("forecast", speed), ("forecast, experts", found)]


def _expert_rows(title: str, stats: CacheStats) -> list[tuple[str, str]]:
    looked_up, upper, rows = stats.hits + stats.misses, stats.upper, []
    if upper is not None:
        share = percent(upper.hits, upper.hits + upper.misses)
        rows.append(
            (
                title,
                f"on the device {upper.hits:,} hits, {upper.misses:,} misses ({share} hit), "
                f"{show_bytes(upper.bytes_read)} copied, {upper.low:,} computed on the CPU",
            )
        )
        title = "  in memory below it"
    low = f", {stats.low:,} in few bits" if stats.low else ""
    return [
        *rows,
        (
            title,
            f"{stats.hits:,} hits, {stats.misses:,} misses"
            f"{low} ({percent(stats.hits, looked_up)} hit), {show_bytes(stats.bytes_read)} read,"
            f" {seconds(stats.wait_s)} waiting",
        ),
    ]
