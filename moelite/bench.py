"""How fast a model runs here: prefill and decode speed, time to first token, expert traffic.

Each run opens a fresh session, reads the same random prompt (token ids drawn uniformly from the
vocabulary with a fixed seed), and then decodes greedily, going on past any end token, so that the
work is the same whatever the model says. Random tokens spread over more experts than prose does:
the hit rate is on the low side. The expert cache is not emptied between runs: the first run finds
what little the warm-up left there, later runs what the run before left.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moelite.cache.stats import CacheStats
from moelite.cache.trace import Trace
from moelite.errors import UsageError
from moelite.forecast import Forecast
from moelite.process import cpu_name, peak_rss_bytes

WARM_TOKENS = 4


class MeterLike(Protocol):
    """Watches one run; see moelite.meter."""

    def first_token(self) -> None: ...
    def done(self, prompt: int, computed: int, decoded: int) -> None: ...


class BenchModel(Protocol):
    """What a benchmark asks of a model; of `arch` only vocab_size, of a session only advance."""

    @property
    def arch(self) -> Any: ...
    @property
    def context(self) -> int: ...
    def session(self) -> Any: ...
    def stats(self) -> CacheStats: ...
    def part_seconds(self) -> dict[str, float]: ...
    @property
    def token_bytes(self) -> int: ...
    def memory_speed(self) -> float: ...
    def drive_speed(self) -> float | None: ...
    def force_routes(self, routes: Any, /) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTraffic:
    """Experts found in memory, read from disk, and what the reads cost: see CacheStats.

    upper: the same of a device's memory, whose misses are looked up here; None without one.
    """

    hits: int
    misses: int
    low: int
    bytes_read: int
    wait_s: float
    read_s: float
    useful: int
    late: int
    wasted: int
    hit_rate: float
    read_bytes_s: float
    upper: ExpertTraffic | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRun:
    """One run. Decode speed counts the tokens after the first, which the prefill gives.

    prefill_ms, decode_ms: milliseconds a token, by part: attention, router, experts, dense
    feed-forward parts, head; then waiting for reads, and the rest, which is Python. memory_bytes_s:
    how fast memory could be read right afterwards. drive_bytes_s: the same of the drive, None where
    nothing is read from it. experts: of prefill and decode; decode_experts: of decode alone.
    """

    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    prefill_ms: dict[str, float]
    decode_ms: dict[str, float]
    memory_bytes_s: float
    drive_bytes_s: float | None
    experts: ExpertTraffic
    decode_experts: ExpertTraffic


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Medians over `runs`; experts, decode_experts: their sums; peak_rss_bytes: this process's,
    since its start. route: the file whose routing was forced on the model, or None.

    token_bytes: weights that a token reads; memory_bytes_s: what the machine's memory gave to as
    many threads right after each run; bandwidth: the share of it that decoding used. drive_bytes_s:
    what the drive gave right after each run; drive_share: the share of it that decoding reached
    while it read; both None where nothing is read from the drive. forecast: what was expected,
    where somebody asked beforehand.
    """

    prompt_tokens: int
    generated_tokens: int
    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    prefill_ms: dict[str, float]
    decode_ms: dict[str, float]
    token_bytes: int
    memory_bytes_s: float
    bandwidth: float
    drive_bytes_s: float | None
    drive_share: float | None
    peak_rss_bytes: int
    experts: ExpertTraffic
    decode_experts: ExpertTraffic
    runs: tuple[BenchRun, ...]
    seed: int
    route: str | None
    cpu: str
    forecast: Forecast | None = None


def bench(  # noqa: PLR0913 - one for each choice a user has, and who watches
    model: BenchModel,
    *,
    prompt: int = 128,
    gen: int = 32,
    repeat: int = 3,
    seed: int = 0,
    route: Trace | None = None,
    progress: Callable[[int, int], None] | None = None,
    meter: Callable[[], MeterLike] | None = None,
) -> BenchReport:
    """Runs `repeat` times: a prompt of `prompt` random tokens, then `gen` tokens.

    route: the token at position p then uses the experts of the trace's token p (beginning again
    after its last), so that any weights of that shape have the expert traffic of real text.
    progress(runs done, runs in all). meter: makes what watches one run. Raises UsageError where
    there is nothing to measure, the tokens exceed the model's context, or the trace does not fit
    the model.
    """
    for name, value, least in (("prompt", prompt, 1), ("gen", gen, 2), ("repeat", repeat, 1)):
        if value < least:
            raise UsageError(f"--{name} {value} measures nothing", fix=f"--{name} {least} or more")
    if prompt + gen > model.context:
        raise UsageError(
            f"{prompt} + {gen} tokens exceed the context of {model.context}",
            fix=f"--context {prompt + gen}",
        )
    drawn = np.random.default_rng(seed).integers(0, model.arch.vocab_size, prompt)
    ids = [int(i) for i in drawn]
    if route is not None:
        model.force_routes(route.routes)
    try:
        # Compiles kernels and touches code paths; a first call may take a hundred times its usual
        # time.
        _run(model, ids[:WARM_TOKENS], 2)
        runs = []
        for done in range(repeat):
            watch = meter() if meter else None
            runs.append(_run(model, ids, gen, watch))
            if watch:
                watch.done(prompt, prompt, gen - 1)
            if progress:
                progress(done + 1, repeat)
    finally:
        if route is not None:
            model.force_routes(None)
    return BenchReport(
        prompt_tokens=prompt,
        generated_tokens=gen,
        prefill_tok_s=statistics.median(run.prefill_tok_s for run in runs),
        decode_tok_s=statistics.median(run.decode_tok_s for run in runs),
        ttft_s=statistics.median(run.ttft_s for run in runs),
        prefill_ms=_medians([run.prefill_ms for run in runs]),
        decode_ms=_medians([run.decode_ms for run in runs]),
        token_bytes=model.token_bytes,
        memory_bytes_s=statistics.median(run.memory_bytes_s for run in runs),
        bandwidth=statistics.median(
            run.decode_tok_s * model.token_bytes / run.memory_bytes_s for run in runs
        ),
        drive_bytes_s=_median([run.drive_bytes_s for run in runs]),
        drive_share=_median([_share(run) for run in runs]),
        peak_rss_bytes=peak_rss_bytes(),
        experts=_sum([run.experts for run in runs]),
        decode_experts=_sum([run.decode_experts for run in runs]),
        runs=tuple(runs),
        seed=seed,
        route=None if route is None else route.name,
        cpu=cpu_name(),
    )


def _run(model: BenchModel, ids: list[int], gen: int, watch: MeterLike | None = None) -> BenchRun:
    session = model.session()
    before = model.stats()
    started = _moment(model)
    token = int(np.argmax(session.advance(ids)))
    first, prefilled = _moment(model), model.stats()
    if watch:
        watch.first_token()
    for _ in range(gen - 1):
        token = int(np.argmax(session.advance([token])))
    ended = _moment(model)
    after = model.stats()
    prefill_s, decode_s = first["all"] - started["all"], ended["all"] - first["all"]
    return BenchRun(
        prefill_tok_s=len(ids) / prefill_s,
        decode_tok_s=(gen - 1) / decode_s,
        ttft_s=prefill_s,
        prefill_ms=_milliseconds(started, first, len(ids)),
        decode_ms=_milliseconds(first, ended, gen - 1),
        memory_bytes_s=model.memory_speed(),
        drive_bytes_s=model.drive_speed(),
        experts=_traffic(after - before),
        decode_experts=_traffic(after - prefilled),
    )


def _moment(model: BenchModel) -> dict[str, float]:
    # seconds so far: of every part, of waiting for reads, and of the clock ("all")
    parts = model.part_seconds()
    return {**parts, "read wait": model.stats().wait_s, "all": time.perf_counter()}


def _milliseconds(
    before: dict[str, float], after: dict[str, float], tokens: int
) -> dict[str, float]:
    spent = {name: 1e3 * (after[name] - before[name]) / tokens for name in after}
    rest = spent.pop("all") - sum(spent.values())
    return {**spent, "interpreter": rest}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _share(run: BenchRun) -> float | None:
    reads = run.decode_experts
    if run.drive_bytes_s is None or not reads.bytes_read:
        return None
    return reads.read_bytes_s / run.drive_bytes_s


_COUNTS = [field.name for field in dataclasses.fields(CacheStats) if field.name != "upper"]


def _traffic(stats: CacheStats) -> ExpertTraffic:
    return ExpertTraffic(
        **{name: getattr(stats, name) for name in _COUNTS},
        hit_rate=stats.hit_rate,
        read_bytes_s=stats.read_bytes_s,
        upper=None if stats.upper is None else _traffic(stats.upper),
    )


def _sum(runs: list[ExpertTraffic]) -> ExpertTraffic:
    total = _traffic(CacheStats(**{n: sum(getattr(run, n) for run in runs) for n in _COUNTS}))
    uppers = [run.upper for run in runs if run.upper is not None]
    return dataclasses.replace(total, upper=_sum(uppers)) if uppers else total
