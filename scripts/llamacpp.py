"""moelite and llama.cpp side by side: two processes, each with its model loaded, taking turns.

Both get the same random token ids, in the prompt and after it: decoding is measured with given
tokens, so that neither side's choice of tokens changes the work. Each turn starts with an empty kv.
The order within a pair alternates, and a pair's ratio compares turns that ran next to each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from memory_group import MemoryGroup

from moelite.errors import MoeliteError, UsageError
from moelite.machine import memory
from moelite.process import cpu_name

WORKER = Path(__file__).with_name("llamacpp_worker.py")
NAMES = ("moelite", "llama.cpp")
_WARM_UPS = 4  # at most; where not every expert fits into memory, reads never end
_PAUSE_S = 0.3  # idle threads of the side that just finished stop spinning


class Ended(MoeliteError):
    """A side's process ended or was ended. code: as subprocess has it, or None: too slow."""

    def __init__(self, message: str, code: int | None, *, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.code = code


class NotLoaded(MoeliteError):
    """A side's library refused its model."""


class Worker:
    """A process that has loaded one side's model. Raises MoeliteError if it cannot.

    group: where the process runs from its first instruction on. limit_s: for loading and all runs.
    """

    def __init__(
        self,
        name: str,
        python: str,
        settings: dict[str, Any],
        *,
        group: MemoryGroup | None = None,
        limit_s: float | None = None,
    ) -> None:
        self.name = name
        self._limit_s = limit_s
        self._until = None if limit_s is None else time.monotonic() + limit_s
        command = [python, str(WORKER), name, json.dumps(settings)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=group.enter if group else None,
            )
        except OSError as problem:
            raise UsageError(f"{python} cannot be run: {problem.strerror}") from problem
        try:
            self.facts = self._answer()
            self._refuse(python)
        except BaseException:
            self._process.kill()
            self.close()
            raise

    def run(self, prompt: Sequence[int], feed: Sequence[int]) -> dict[str, Any]:
        """One measurement; see llamacpp_worker.measure."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone: the missing answer says so
            self._process.stdin.write(json.dumps({"prompt": prompt, "feed": feed}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # what was left in the pipe went with the process
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()  # it may be busy for minutes
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if self._until is not None:
            left = max(0.0, self._until - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()
                raise Ended(f"the {self.name} process took over {self._limit_s:.0f} s", None)
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise Ended(
                f"the {self.name} process ended with code {code}",
                code,
                fix="its message is above; -9 means that memory ran out",
            )
        found: dict[str, Any] = json.loads(line)
        return found

    def _refuse(self, python: str) -> None:
        if missing := self.facts.get("missing"):
            package = {"llama_cpp": "llama-cpp-python"}.get(missing, missing)
            raise UsageError(
                f"{python} has no module {missing}",
                fix=f"{python} -m pip install {package} (llama.cpp is compiled: 10 to 20 minutes)"
                if missing == "llama_cpp"
                else f"{python} -m pip install {package}",
            )
        if problem := self.facts.get("error"):
            raise NotLoaded(f"{self.name} cannot load its model: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """What the expert cache counted: found in memory, not found, bytes read from disk."""

    hits: int
    misses: int
    bytes_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One measurement of one side. bytes_read: expert bytes read from disk meanwhile, if known."""

    prefill_tok_s: float
    decode_tok_s: float
    bytes_read: int | None
    prefill_experts: Experts | None = None
    decode_experts: Experts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of several measurements."""

    median: float
    min: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All pairs (moelite, llama.cpp), and the spread of each speed and of moelite / llama.cpp.

    speeds and ratios have the keys "prefill" and "decode"; speeds by side first.
    """

    pairs: tuple[tuple[Turn, Turn], ...]
    speeds: dict[str, dict[str, Spread]]
    ratios: dict[str, Spread]


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest."""
    return Spread(median=statistics.median(values), min=min(values), max=max(values))


def summarize(pairs: Sequence[tuple[Turn, Turn]]) -> Comparison:
    """What the pairs show."""

    def speeds(side: int) -> dict[str, Spread]:
        return {
            "prefill": spread([pair[side].prefill_tok_s for pair in pairs]),
            "decode": spread([pair[side].decode_tok_s for pair in pairs]),
        }

    return Comparison(
        pairs=tuple(pairs),
        speeds={name: speeds(i) for i, name in enumerate(NAMES)},
        ratios={
            "prefill": spread([ours.prefill_tok_s / other.prefill_tok_s for ours, other in pairs]),
            "decode": spread([ours.decode_tok_s / other.decode_tok_s for ours, other in pairs]),
        },
    )


def turn(found: dict[str, Any], prompt: int, gen: int) -> Turn:
    """A worker's answer, for so many tokens."""
    parts = [found["prefill_experts"], found["decode_experts"]]
    prefill, decode = (None if part is None else Experts(**part) for part in parts)
    return Turn(
        prefill_tok_s=prompt / found["prefill_s"],
        decode_tok_s=gen / found["decode_s"],
        bytes_read=prefill.bytes_read + decode.bytes_read if prefill and decode else None,
        prefill_experts=prefill,
        decode_experts=decode,
    )


def tokens(vocab_size: int, prompt: int, gen: int, seed: int) -> tuple[list[int], list[int]]:
    """Random ids for the prompt and to feed after it."""
    drawn = np.random.default_rng(seed).integers(0, vocab_size, prompt + gen).tolist()
    return drawn[:prompt], drawn[prompt:]


def check_alike(ours: dict[str, Any], other: dict[str, Any]) -> None:
    """UsageError unless both models have the same vocabulary size and number of layers."""
    for key in ("vocab_size", "layers"):
        if ours[key] != other[key]:
            raise UsageError(
                f"the two models differ: {key} {ours[key]} and {other[key]}",
                fix="write both with one call of scripts/synthetic-checkpoint --gguf",
            )


def compare(
    workers: tuple[Worker, Worker],
    *,
    prompt: int,
    gen: int,
    repeat: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda note: None,
) -> Comparison:
    """`repeat` pairs of turns, after untimed ones; workers: (moelite, llama.cpp).

    Untimed turns go on, with other tokens each, until moelite reads no expert from disk.
    """
    ours, other = workers
    check_alike(ours.facts, other.facts)
    ids = tokens(int(ours.facts["vocab_size"]), prompt, gen, seed)
    for i in range(_WARM_UPS):
        progress(f"warming up, {i + 1}")
        warm = tokens(int(ours.facts["vocab_size"]), prompt, gen, seed + i)
        other.run(*warm)
        if not turn(ours.run(*warm), prompt, gen).bytes_read:
            break
    pairs = []
    for i in range(repeat):
        turns: dict[str, Turn] = {}
        for worker in workers if i % 2 == 0 else workers[::-1]:
            time.sleep(_PAUSE_S)
            turns[worker.name] = turn(worker.run(*ids), prompt, gen)
        pairs.append((turns[ours.name], turns[other.name]))
        progress(f"pair {i + 1} of {repeat}: {_line(pairs[-1])}")
    return summarize(pairs)


def _line(pair: tuple[Turn, Turn]) -> str:
    ours, other = pair
    return (
        f"prefill {ours.prefill_tok_s:.1f} and {other.prefill_tok_s:.1f},"
        f" decode {ours.decode_tok_s:.2f} and {other.decode_tok_s:.2f} tok/s"
    )


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size


def machine(threads: int) -> dict[str, Any]:
    """Where this was measured, and how busy that machine is with other things."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": memory().limit_bytes,
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "threads": threads,
        "load_average": os.getloadavg()[0],
    }
