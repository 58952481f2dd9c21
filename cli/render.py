"""Numbers and model text as people see them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from moelite.units import show_bytes

if TYPE_CHECKING:
    from moelite.cache.stats import CacheStats
    from moelite.generate import GenerationStats

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


def percent(part: float, whole: float) -> str:
    """A share, "-" of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def answer_line(stats: GenerationStats, used: int, context: int) -> str:
    """What an answer cost, in one line: tokens, speed, first token, hit rate, context used."""
    parts = [f"{stats.generated_tokens:,} tok"]
    if stats.decode_tok_s:
        parts.append(f"{stats.decode_tok_s:.1f} tok/s")
    if stats.ttft_s:
        parts.append(f"first {seconds(stats.ttft_s)}")
    looked_up = stats.experts.hits + stats.experts.misses
    if looked_up:
        parts.append(f"hit {percent(stats.experts.hits, looked_up)}")
    parts.append(f"ctx {used:,}/{context:,}")
    return " · ".join(parts)


def stats_table(last: GenerationStats | None, total: CacheStats) -> list[tuple[str, str]]:
    """(what, value) pairs: the last answer, then the experts since the model was loaded."""
    rows: list[tuple[str, str]] = []
    if last is not None:
        rows += [
            ("prompt", f"{last.prompt_tokens:,} tokens, {last.reused_tokens:,} of them kept"),
            ("prefill", f"{last.prefill_tok_s:.1f} tok/s"),
            ("first token", seconds(last.ttft_s)),
            ("answer", f"{last.generated_tokens:,} tokens"),
            ("decode", f"{last.decode_tok_s:.1f} tok/s"),
            ("seed", str(last.seed)),
            *_expert_rows("experts, last answer", last.experts),
        ]
    return [*rows, *_expert_rows("experts, since start", total)]


def _expert_rows(title: str, stats: CacheStats) -> list[tuple[str, str]]:
    looked_up = stats.hits + stats.misses
    return [
        (
            title,
            f"{stats.hits:,} hits, {stats.misses:,} misses"
            f" ({percent(stats.hits, looked_up)} hit), {show_bytes(stats.bytes_read)} read,"
            f" {seconds(stats.wait_s)} waiting",
        )
    ]
