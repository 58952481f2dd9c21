"""A drive between two measurements: its speed at this moment, and files made to be read anew."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 4 << 20
_PAGE = 4096
_READERS = 4
_DROP = Path("/proc/sys/vm/drop_caches")


def read_speed(file: Path, seconds: float = 0.7) -> float | None:
    """Bytes per second of random reads past the page cache, 4 MiB each, 4 in flight.

    None where the file system has no such reads, or the file is below a page.
    """
    block = min(_BLOCK, file.stat().st_size // _PAGE * _PAGE)
    direct = getattr(os, "O_DIRECT", 0)
    if not block or not direct:
        return None
    starts = (file.stat().st_size - block) // _PAGE + 1

    def read_on(seed: int) -> int:
        draw, done = random.Random(seed), 0
        with mmap.mmap(-1, block) as slot:
            while time.perf_counter() < until:
                done += os.preadv(number, [slot], draw.randrange(starts) * _PAGE)
        return done

    try:
        number = os.open(file, os.O_RDONLY | direct)
    except OSError:
        return None
    try:
        start = time.perf_counter()
        until = start + seconds
        with ThreadPoolExecutor(_READERS) as readers:
            seeds = [random.getrandbits(64) for _ in range(_READERS)]
            total = sum(readers.map(read_on, seeds))
        return total / (time.perf_counter() - start)
    except OSError:
        return None
    finally:
        os.close(number)


def forget(paths: Iterable[Path]) -> bool:
    """Drops these files, or the files in these folders, from the page cache, and all else too.

    False where only the files could be dropped: the rest needs root.
    """
    os.sync()
    dropped = False
    with contextlib.suppress(OSError):
        _DROP.write_text("3\n")
        dropped = True
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                if file.is_file():
                    _forget_file(file)
    return dropped


def _forget_file(file: Path) -> None:
    number = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)
