"""What a generation shows about this machine's speed, for the forecasts of later runs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moelite.budget import Footprint, Sizes
from moelite.cache.stats import CacheStats
from moelite.lookahead import Lookahead
from moelite.outlook import work_of
from moelite.speeds import Spent, record, sample_of, this_machine

_LEAST_GUESSED = 1000  # experts, before their share says something
_LEAST_READ = 1 << 27  # bytes, the same
_HARDLY = 0.02  # of the time, reading threads read where the page cache holds everything


class Metered(Protocol):
    """What is asked of a model."""

    @property
    def sizes(self) -> Sizes: ...
    @property
    def footprint(self) -> Footprint: ...
    @property
    def lookahead(self) -> Lookahead: ...
    @property
    def store(self) -> Any: ...
    @property
    def forced(self) -> bool: ...
    def stats(self) -> CacheStats: ...
    def part_seconds(self) -> dict[str, float]: ...


class _Moment(NamedTuple):
    clock: float
    compute_s: float
    stats: CacheStats


class Meter:
    """Begins when it is made. Call `first_token` when the prompt is read, `done` at the end."""

    def __init__(self, model: Metered, fingerprint: str, folder: Path) -> None:
        self._model, self._fingerprint, self._folder = model, fingerprint, folder
        self._start = self._first = self._now()
        self._begun = False

    def first_token(self) -> None:
        """The first token is there; later calls change nothing."""
        if not self._begun:
            self._first, self._begun = self._now(), True

    def done(self, prompt: int, computed: int, decoded: int) -> None:
        """Keeps what was seen: of `prompt` tokens `computed` were read, then `decoded` followed.

        decoded: tokens after the first.
        """
        sizes = self._model.sizes
        if not self._begun or sizes.low:  # nobody waits there: it tells nothing of other runs
            return
        prefill = _spent(self._start, self._first, computed)
        decode = _spent(self._first, self._now(), decoded)
        work = work_of(sizes, prompt + decoded // 2)
        here = this_machine(sizes.threads, sizes.expert_format, sizes.dense_format)
        chunk = self._model.footprint.chunk
        reads = self._now().stats - self._first.stats
        cached = not self._model.store.direct and reads.read_s < _HARDLY * decode.compute_s
        sample = sample_of(self._fingerprint, work, chunk, prefill, decode, cached=cached)
        ahead = self._model.lookahead
        if ahead.guessed >= _LEAST_GUESSED and not self._model.forced:
            sample = replace(sample, recall=ahead.recall)
        if self._model.store.direct and reads.bytes_read >= _LEAST_READ:
            sample = replace(sample, drive_bytes_s=reads.read_bytes_s, at=time.time())
        record(self._folder, here, sample)

    def _now(self) -> _Moment:
        compute_s = sum(self._model.part_seconds().values())
        return _Moment(time.perf_counter(), compute_s, self._model.stats())


def _spent(before: _Moment, after: _Moment, tokens: int) -> Spent:
    stats = after.stats - before.stats
    compute_s = after.compute_s - before.compute_s
    passed = after.clock - before.clock
    return Spent(
        tokens=tokens,
        compute_s=compute_s,
        python_s=max(0.0, passed - compute_s - stats.wait_s),
        misses=stats.misses,
        wait_s=stats.wait_s,
    )
