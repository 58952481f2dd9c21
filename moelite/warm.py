"""Compiles every kernel once, in a process of its own, before a model is loaded.

Compiling takes memory that a budget would have to hold for good (docs/LOG.md has the figure), so a
child process does it and leaves the machine code in the kernel cache.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from moelite import jit, ops, step
from moelite.arch import Linear, Router, TensorRef
from moelite.bandwidth import read_speed
from moelite.crc import crc32
from moelite.dispatch import matrix_of, new_act, round_row
from moelite.errors import BudgetError, MoeliteError
from moelite.machine import memory
from moelite.quant import FORMATS
from moelite.routing import route
from moelite.sync import RING, sync_size
from moelite.units import MIB, show_bytes

# This process waiting (98 MiB) and one child that compiles everything (403), or two that share it
# (285 each), measured
COMPILE_BYTES, SIDE_BY_SIDE_BYTES = 512 * MIB, 704 * MIB


def ensure(formats: Iterable[str], on_compile: Callable[[str], None] | None = None) -> None:
    """Returns once the kernels, and those of `formats`, are in the cache.

    What is missing is compiled by two child processes side by side, or by one where memory is
    short. This happens once for a version of moelite on a CPU, before a model takes any memory, and
    is not bounded by the model's budget.
    Raises BudgetError if the machine has not enough free for it.
    """
    parts = ["step", "attention", "feed", *sorted({"f32", *formats})]
    missing = [part for part in parts if not _mark(part).exists()]
    if not missing or not jit.ours():
        return
    free = memory().available_bytes
    both = free >= SIDE_BY_SIDE_BYTES
    if free < COMPILE_BYTES:
        raise BudgetError(
            f"compiling the kernels for this CPU, once, takes {show_bytes(COMPILE_BYTES)}; "
            f"{show_bytes(free)} are free",
            fix="make room for half a minute; afterwards the model needs only its budget",
        )
    if on_compile is not None:
        takes = show_bytes(SIDE_BY_SIDE_BYTES if both else COMPILE_BYTES)
        on_compile(f"compiling kernels for this CPU (once: half a minute, {takes})")
    children = [_start(group) for group in (_halves(missing) if both else [missing])]
    for group, child in children:
        said = child.communicate()[1]
        if child.returncode:
            for _, other in children:
                other.kill()
            raise MoeliteError(
                f"the kernels could not be compiled: {said.strip().splitlines()[-1:]}",
                fix=f"see that {jit.CACHE_FOLDER} can be written and that "
                f"{show_bytes(COMPILE_BYTES)} of memory are free",
            )
        for part in group:
            _set_mark(part)


# What there is to compile besides formats, and the seconds it took, to divide it among two children
_SECONDS = {"step": 12, "attention": 10, "feed": 6, "int4": 7, "int8": 7, "f32": 4, "bf16": 4}
_SECONDS |= {"nf4": 12, "nf4-dq": 12, "int4-f16": 7, "mxfp4": 7, "qmoe": 9, "qmoe-ls": 9}


def _halves(parts: list[str]) -> list[list[str]]:
    halves: list[list[str]] = [[], []]
    for part in sorted(parts, key=lambda part: -_SECONDS.get(part, 6)):
        min(halves, key=lambda half: sum(_SECONDS.get(p, 6) for p in half)).append(part)
    return [half for half in halves if half]


def _mark(part: str) -> Path:
    return jit.CACHE_FOLDER / f"complete-{part}"


def _set_mark(part: str) -> None:
    try:
        _mark(part).parent.mkdir(parents=True, exist_ok=True)
        _mark(part).touch()
    except OSError:
        pass  # an unwritable cache folder: kernels are then compiled in every process


def _start(parts: list[str]) -> tuple[list[str], subprocess.Popen[str]]:
    command = [sys.executable, "-c", f"from moelite import warm; warm.compile_parts({parts!r})"]
    return parts, subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def compile_parts(parts: Iterable[str]) -> None:
    """Compiles formats, by name, and what all models share: "step", "attention", "feed"."""
    for part in parts:
        if part == "step":
            _compile_step()
        elif part not in FORMATS:
            step.part_address(part)
        else:
            matrix_of(part, np.zeros(64, np.uint8), 0, 8, 32)


def _compile_step() -> None:
    # every kernel that does not belong to a format, run once; the job does nothing
    freq = np.ones(1, np.float32)
    ops.rope_table(freq, 1.0, 0, np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))
    router = Router(linear=Linear(weight=TensorRef(name="none"), rows=2, cols=1), top_k=1)
    route(router, np.zeros((1, 2), np.float32))
    step.clock()
    round_row(new_act(1, 32, quantized=True))
    read_speed(np.zeros(256, np.uint8), 1)
    crc32(np.zeros(512, np.uint8))
    sync = np.zeros(sync_size(1, 1), np.int64)
    jobs = np.zeros(RING * step.JOB_WORDS, np.int64)
    step.work(1, 1, sync, jobs, 0, 0, 0)  # a helper that looks once and finds no job
