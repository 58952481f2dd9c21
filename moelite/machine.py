"""How much memory this process may use: the machine's, or its control group's if that is less; and
large blocks of it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import psutil


class Memory(NamedTuple):
    """limit_bytes: the most this process can have; kind names what sets it; available_bytes: what
    could be taken now without swapping."""

    limit_bytes: int
    kind: str
    available_bytes: int


def memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Memory:
    """The machine's memory as this process sees it. `root` and `own` are for tests."""
    machine = psutil.virtual_memory()
    best = Memory(machine.total, "physical", machine.available)
    for folder, version in memory_groups(root, own):  # the tightest one counts
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = _number(folder / names[0]), _number(folder / names[1])
        if limit is None or limit >= best.limit_bytes:
            continue
        # file pages that can be dropped do not stand in the way
        free = limit - (used or 0) + _stat(folder / "memory.stat", names[2])
        best = Memory(limit, f"cgroup v{version}", max(0, min(free, best.available_bytes)))
    return best


def memory_groups(root: Path, own: Path) -> list[tuple[Path, int]]:
    """(folder, version) of each memory control group that holds this process, innermost first."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[Path, int]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = root, 2
        elif "memory" in controllers.split(","):
            base, version = root / "memory", 1
        else:
            continue
        folder = base / path.lstrip("/")
        while folder != base and base in folder.parents:
            found.append((folder, version))
            folder = folder.parent
        found.append((base, version))
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(file: Path, key: str) -> int:
    try:
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def allocate(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeros, uint8 [nbytes], page-aligned; on huge pages where the system gives them.

    A page costs memory once it is written, so what is used may grow by 2 MiB at a time. Weights
    streamed from huge pages were multiplied about 20 % faster (docs/LOG.md).
    """
    block = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8, nbytes)


POPULATED_BYTES = 1 << 31


class Populate:
    """Gives the first 2 GiB of a block their memory while other things are done: a thread that runs
    until it is through or closed. What the block holds stays as it is.

    Memory that is used for the first time is cleared by the system, page by page: two seconds a GiB
    in a virtual machine (docs/LOG.md), else paid while a prompt waits.
    """

    _POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; the mmap module lacks it
    _PIECE = 1 << 24

    def __init__(self, block: npt.NDArray[np.uint8]) -> None:
        self._block, self._closing = block, False
        self._thread = threading.Thread(target=self._run, name="moelite-populate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it, at most a piece later."""
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        if not sys.platform.startswith("linux"):
            return
        # ctypes lets go of the interpreter for the call, which the mmap module does not
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        start, size = self._block.ctypes.data, min(self._block.size, POPULATED_BYTES)
        for at in range(0, size, self._PIECE):
            piece = min(self._PIECE, size - at)
            if self._closing or madvise(start + at, piece, self._POPULATE_WRITE):
                return  # an older kernel: pages come when they are used
