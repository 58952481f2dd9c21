"""How fast this machine is: what runs showed, kept in a small file, else what a short probe shows.

The file, speeds.json in the cache folder, is a help and no more: damaged or unwritable, it is as if
it were not there.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from platformdirs import user_cache_path

from moelite.drive import drive_speed, noted_speed
from moelite.forecast import LAYER_S, Rate, Speeds, Work, around, slowed
from moelite.machine import allocate, memory
from moelite.notes import read_notes, write_notes
from moelite.process import cpu_name
from moelite.units import MIB

FILE = "speeds.json"
UNKNOWN_DRIVE = 1e9
_KEPT = 12  # runs of one machine and one pair of formats
_LEAST_PREFILL, _LEAST_DECODE = 64, 16  # tokens that say something
_LEAST_EACH = 8  # tokens of an expert from which a tile is unpacked once for all of them
_RECENT = 5  # of which the median counts

# Share of the memory's speed that decoding reaches: 87 % on two threads of a CPU with AVX-512, 60
# to 70 % elsewhere and on one thread (docs/LOG.md, 2026-11-24).
_DECODE_SHARE = 0.75
# Multiply-adds a second and thread in a prompt of 128 tokens: OLMoE's 1.2 G weights a token at 165
# and 80 tokens a second on two threads (the same place); with AVX2 two thirds of it.
# Others by their kernels' speed at 64 tokens beside int4's (docs/log).
_PREFILL_MACS = {"int4": 95e9, "int8": 47e9, "bf16": 12e9, "f32": 12e9}
_PREFILL_MACS |= {"int4-f16": 95e9, "mxfp4": 95e9, "nf4": 36e9, "nf4-dq": 30e9}
_PREFILL_MACS |= {"vq-0.5": 95e9, "vq-1": 95e9, "vq-1.5": 90e9, "vq-2": 90e9, "vq-2.5": 90e9}
_PREFILL_MACS |= {"vq-3": 85e9, "qmoe": 39e9, "qmoe-ls": 39e9}
_NARROW = 0.65
_COPIED_S = 0.07e-3  # the same where it is copied from the page cache (docs/LOG.md)
_MISS_S = 0.15e-3  # to handle a miss in Python: 0.09 to 0.2 ms, by the size of a record
# Of lookahead: 79 % on the built-in model, 81 to 89 in published runs of Qwen models (docs/LOG.md)
RECALL = Rate(0.72, 0.85, 0.96, "estimated")
_NEARLY_ALL = 0.95  # of the pages looked at
_PAGES = 128  # looked at to see what the page cache holds
_DRIVE_S, _ANOTHER = 900.0, 4.0
_TOUCH_BYTES = 16 * MIB  # little: a loaded model may hold its whole budget by now
_PROBE_BYTES, _PROBE_S = 96 * MIB, 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a measured speed holds for."""

    threads: int
    expert_format: str
    dense_format: str
    cpu: str

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.cpu} | {self.threads} | {self.expert_format} | {self.dense_format}"


def this_machine(threads: int, expert_format: str, dense_format: str) -> Machine:
    """Here, with so many threads and these formats."""
    return Machine(
        threads=threads, expert_format=expert_format, dense_format=dense_format, cpu=cpu_name()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one run showed; None where it was too short or had nothing to show. model: which.

    recall: share of the experts that lookahead guessed. drive_bytes_s: what the drive gave
    while it was read from, at the time `at`, seconds since 1970. copied_s: of a miss that the page
    cache held, the copy included.
    """

    model: str
    weight_bytes_s: float | None = None
    prefill_macs_s: float | None = None
    miss_s: float | None = None
    recall: float | None = None
    drive_bytes_s: float | None = None
    at: float | None = None
    copied_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds that some tokens took: computing, waiting for reads, and the rest."""

    tokens: int
    compute_s: float
    python_s: float
    misses: int
    wait_s: float = 0.0


class Reading(NamedTuple):
    """How fast records are read; cached: they are copied from the page cache, nearly all."""

    bytes_s: Rate
    cached: bool


def sample_of(
    model: str, work: Work, chunk: int, prefill: Spent, decode: Spent, *, cached: bool = False
) -> Sample:
    """What a run of `model` showed, read `chunk` tokens at a time. Too few tokens say nothing.

    cached: every miss was a copy from the page cache.
    """
    sample = Sample(model=model)
    each = min([k / experts for experts, k in work.moe], default=1.0)  # tokens of an expert
    enough = each * min(chunk, prefill.tokens) >= _LEAST_EACH
    if enough and prefill.tokens >= _LEAST_PREFILL and prefill.compute_s > 0:
        macs = prefill.tokens * (work.dense_macs + work.used_experts * work.expert_macs)
        sample = replace(sample, prefill_macs_s=macs / prefill.compute_s)
    if decode.tokens >= _LEAST_DECODE and decode.compute_s > 0:
        read = decode.tokens * (work.dense_bytes + work.used_experts * work.expert_bytes)
        beside = 1.0 if cached else slowed(decode.misses / decode.tokens, work.used_experts)
        sample = replace(sample, weight_bytes_s=read * beside / decode.compute_s)
        if decode.misses >= decode.tokens:
            rest = decode.python_s - decode.tokens * work.layers * LAYER_S
            each = max(0.0, rest + (decode.wait_s if cached else 0.0)) / decode.misses
            sample = replace(sample, copied_s=each) if cached else replace(sample, miss_s=each)
    return sample


def load_samples(folder: Path, machine: Machine) -> list[Sample]:
    """What runs on this machine showed, oldest first. Anything that is not sound is left out."""
    entries = read_notes(FILE, folder).get(machine.key, [])
    return [s for s in map(_sample, entries if isinstance(entries, list) else []) if s is not None]


def record(folder: Path, machine: Machine, sample: Sample) -> None:
    """Adds what a run showed. Never raises: a machine that cannot keep it goes without."""
    if sample == Sample(model=sample.model):
        return
    kept = [asdict(s) for s in load_samples(folder, machine)]
    found = read_notes(FILE, folder)
    found[machine.key] = [*kept, asdict(sample)][-_KEPT:]
    write_notes(FILE, found, folder)


def _sample(entry: Any) -> Sample | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        return None
    return Sample(
        model=entry["model"],
        weight_bytes_s=_within(entry.get("weight_bytes_s"), 1e6, 1e14),
        prefill_macs_s=_within(entry.get("prefill_macs_s"), 1e6, 1e16),
        miss_s=_within(entry.get("miss_s"), 0.0, 10.0),
        recall=_within(entry.get("recall"), 0.0, 1.0),
        drive_bytes_s=_within(entry.get("drive_bytes_s"), 1e4, 1e13),
        at=_within(entry.get("at"), 0.0, 1e12),
        copied_s=_within(entry.get("copied_s"), 0.0, 10.0),
    )


def _within(value: Any, least: float, most: float) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if least <= value <= most else None


def speeds(
    samples: list[Sample],
    machine: Machine,
    model: str | None,
    memory_bytes_s: Rate | None,
    drive: Rate,
) -> Speeds:
    """What to expect of `model` here: runs of it, else of others, else from the memory's speed.

    memory_bytes_s: None where runs showed how fast weights are multiplied.
    """
    weights = _measured(samples, "weight_bytes_s", model)
    macs = _measured(samples, "prefill_macs_s", model)
    miss = _measured(samples, "miss_s", model)
    recall = _measured([s for s in samples if s.model == model], "recall", model)
    if drive.basis == "measured":
        drive = _steadied(drive, samples)
    if weights is None:
        assert memory_bytes_s is not None
        weights = around(memory_bytes_s.likely * _DECODE_SHARE, 0.4, "estimated")
    if macs is None:
        fmt = machine.expert_format.partition(" + ")[0]  # that of most bytes
        rate = _PREFILL_MACS.get(fmt, _PREFILL_MACS["f32"]) * machine.threads
        macs = Rate(0.5 * _NARROW * rate, 0.8 * rate, 1.2 * rate, "estimated")
    return Speeds(
        weight_bytes_s=weights,
        prefill_macs_s=macs,
        drive_bytes_s=drive,
        miss_s=_MISS_S if miss is None else miss.likely,
        recall=RECALL if recall is None else replace(recall, high=min(1.0, recall.high)),
    )


def from_page_cache(
    found: Speeds, samples: list[Sample], model: str | None, record_bytes: int
) -> Speeds:
    """Where the page cache holds the records: the threads that compute copy what is missing, so it
    hides behind nothing, and there is nothing to read ahead."""
    seen = _measured(samples, "copied_s", model)
    copied = record_bytes / found.drive_bytes_s.likely + _COPIED_S
    return replace(found, miss_s=seen.likely if seen else copied, recall=None, beside=False)


def _measured(samples: list[Sample], name: str, model: str | None) -> Rate | None:
    own = [s for s in samples if s.model == model]
    for found, spread in ((own, 0.15), (samples, 0.25)):
        values = [v for s in found if (v := getattr(s, name)) is not None][-_RECENT:]
        if values:
            return around(statistics.median(values), spread, "measured")
    return None


def _steadied(probe: Rate, samples: list[Sample]) -> Rate:
    """A probe of a quarter of a second was off by up to half; what the last two runs of the last
    quarter of an hour got counts as much, unless the drive is now another altogether."""
    since = time.time() - _DRIVE_S
    runs = [s.drive_bytes_s for s in samples if s.drive_bytes_s and s.at and s.at >= since]
    by = statistics.median([probe.likely, *runs[-2:]]) / probe.likely
    if not 1 / _ANOTHER < by < _ANOTHER:
        return probe
    return Rate(by * probe.low, by * probe.likely, by * probe.high, "measured")


def probe_memory(threads: int) -> float:
    """Bytes per second at which `threads` threads read memory, from a fifth of a second of it."""
    size = min(_PROBE_BYTES, memory().available_bytes // 8) // 4096 * 4096
    if size < MIB:
        return 5e9
    block = allocate(size)
    block[:] = 1
    words = block.view(np.uint64)
    cuts = [words.size * i // threads for i in range(threads + 1)]
    until, best = time.perf_counter() + _PROBE_S, 0.0
    while not best or time.perf_counter() < until:
        # numpy lets go of the interpreter while it reduces: the threads read side by side
        team = [
            threading.Thread(target=np.bitwise_or.reduce, args=(words[cuts[i] : cuts[i + 1]],))
            for i in range(threads)
        ]
        start = time.perf_counter()
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        best = max(best, size / (time.perf_counter() - start))
    return best


def probe_touch(threads: int) -> float:
    """Bytes per second at which memory is used for the first time: the system clears it, and a
    virtual machine may have to be given it."""
    block = allocate(_TOUCH_BYTES)
    cuts = [block.size * i // threads for i in range(threads + 1)]
    team = [
        threading.Thread(target=block[cuts[i] : cuts[i + 1]].fill, args=(1,))
        for i in range(threads)
    ]
    start = time.perf_counter()
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    return block.size / (time.perf_counter() - start)


def drive_rate(store: Path | None, record_bytes: int, *, cacheable: bool) -> Reading:
    """How fast records of `store` are read; without one, as the drive that would hold it
    was read before, else an assumption.

    cacheable: memory outside the budget can keep every record, so that a run reads through the page
    cache: what is not there yet once from the drive, later from memory.
    """
    if store is None:
        noted = noted_speed(user_cache_path("moelite"), record_bytes)
        return Reading(around(noted.bytes_s if noted else UNKNOWN_DRIVE, 0.5, "estimated"), False)
    try:
        found = drive_speed(store, record_bytes)
    except OSError:
        return Reading(around(UNKNOWN_DRIVE, 0.5, "estimated"), False)
    drive, cached = found.bytes_s, found.cached_bytes_s
    if not cacheable or cached <= drive:
        return Reading(around(drive, 0.2, "measured"), False)
    share = _in_page_cache(store)
    now = 1 / (share / cached + (1 - share) / drive)
    return Reading(Rate(0.8 * now, now, cached, "measured"), share >= _NEARLY_ALL)


def _in_page_cache(store: Path) -> float:
    """Share of the experts that the page cache holds, by pages at random places; 0 if unknown."""
    files = sorted(store.glob("experts-*.safetensors"))
    if not files or not hasattr(os, "RWF_NOWAIT"):
        return 0.0
    draw, held = random.Random(), 0  # other places each time: a look may bring a page in
    for i in range(_PAGES):
        number = os.open(files[i % len(files)], os.O_RDONLY)
        try:
            os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)  # and none of its neighbours
            place = draw.randrange(os.fstat(number).st_size)
            held += os.preadv(number, [bytearray(1)], place, os.RWF_NOWAIT) == 1
        except OSError:
            pass  # BlockingIOError: it would have to be read from the drive
        finally:
            os.close(number)
    return held / _PAGES
