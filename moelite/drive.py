"""How this machine's drive reads records: with or past the page cache, how many at once, how fast.

Positional reads of whole records at random places, as a run makes them. A read past the page cache
(O_DIRECT; F_NOCACHE on macOS) costs no memory beside the slot it fills and no copy; where a file
system refuses it, or is faster with it, the page cache is used. What was found is kept for each
device and record size; the speed, which changes with what else uses the drive, is measured anew.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from moelite.machine import allocate
from moelite.notes import read_notes, write_notes
from moelite.quant.base import U8
from moelite.tensorfile import pread_into

DEPTHS = (2, 4, 8)  # reads in flight; one alone leaves the drive idle while its bytes are checked
PAGE = 4096
_NOTES = "drives.json"
_FRESH_S = 30.0  # a speed younger than this is not measured again
_LARGE = 1 << 23  # a larger record is read no faster, and its blocks would take the budget
_FILES = 64  # at most
_WARM, _MOST = 1 << 27, 1024  # bytes and records copied from the page cache, at most
_AHEAD_S = 0.03  # reads in flight before they count
_TRIAL_S = 0.1
_QUICK_S = 0.25
_F_NOCACHE = 48  # fcntl.F_NOCACHE, which the module lacks


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveSpeed:
    """What a drive gives at one record size.

    direct: past the page cache. depth: reads in flight. bytes_s: bytes a second at both.
    cached_bytes_s: of records that the page cache holds, copied by several threads.
    """

    direct: bool
    depth: int
    bytes_s: float
    cached_bytes_s: float


def open_for_reading(path: Path, *, direct: bool) -> int:
    """A file descriptor for positional reads. direct: offsets, sizes and addresses must be
    multiples of 4096. OSError where the file system has no such reads."""
    if direct and hasattr(os, "O_DIRECT"):
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # Windows reads text else
    if direct:
        try:
            import fcntl

            fcntl.fcntl(fd, _F_NOCACHE, 1)
        except (ImportError, OSError) as problem:
            os.close(fd)
            raise OSError("no reads past the page cache here") from problem
    return fd


def let_go(fd: int, offset: int = 0, size: int = 0) -> None:
    """Tells the system that this part of a file (size 0: to its end) need not stay in memory."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def drive_speed(path: Path, record_bytes: int) -> DriveSpeed:
    """Of the drive that holds `path`, a file or a folder whose large files are read from.

    The first time for a device and record size about a second of reads, then a quarter of one.
    OSError if nothing there can be read.
    """
    files = _large_files(path)
    key, notes = _key(files[0], record_bytes), read_notes(_NOTES)
    found = _noted(notes.get(key))
    if found is not None and time.time() - notes[key]["at"] < _FRESH_S:
        return found
    trial = _Trial(files, record_bytes)
    if found is None:
        found = trial.choose()
    else:
        before, found = found.bytes_s, trial.again(found)
        if found.bytes_s < before / 2:  # a stall of a moment looks the same
            found = max(found, trial.again(found), key=lambda speed: speed.bytes_s)
    note = {name: getattr(found, name) for name in DriveSpeed.__dataclass_fields__}
    write_notes(_NOTES, {**read_notes(_NOTES), key: {**note, "at": time.time()}})
    return found


def noted_speed(path: Path, record_bytes: int) -> DriveSpeed | None:
    """What was found before for the device that `path` is on or would be; nothing is read."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return _noted(read_notes(_NOTES).get(_key(path, record_bytes)))


def _key(path: Path, record_bytes: int) -> str:
    device = path.stat().st_dev
    return f"{device >> 8}:{device & 255} {1 << (record_bytes - 1).bit_length()}"


def speed_now(path: Path, record_bytes: int, found: DriveSpeed) -> float:
    """Bytes a second of this moment, at the way and depth found before; takes a quarter of one."""
    return _Trial(_large_files(path), record_bytes).again(found).bytes_s


def _large_files(path: Path) -> list[Path]:
    # as a run reads: from all layers' files, since parts of a drive may be cached further down
    if not path.is_dir():
        return [path]
    sizes = {p: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file()}
    return [p for p, size in sizes.items() if 2 * size >= max(sizes.values())]


def _noted(note: object) -> DriveSpeed | None:
    try:
        assert isinstance(note, dict)
        float(note["at"])
        found = DriveSpeed(
            direct=bool(note["direct"]),
            depth=int(note["depth"]),
            bytes_s=float(note["bytes_s"]),
            cached_bytes_s=float(note["cached_bytes_s"]),
        )
    except (AssertionError, KeyError, TypeError, ValueError):
        return None
    return found if 1 <= found.depth <= 64 and found.bytes_s > 0 else None


class _Trial:
    """Reads random records of a file for a while, into memory like the one that a run reads into:
    on huge pages a read is cut into far fewer requests."""

    def __init__(self, files: list[Path], record_bytes: int) -> None:
        self._random = random.Random()  # other places each time: none that are cached by now
        self._files = self._random.sample(files, min(len(files), _FILES))
        size = min(file.stat().st_size for file in files)
        if size < PAGE:
            raise OSError(f"{files[0]} is too small to measure a drive with")
        self._record = max(PAGE, min(record_bytes, size, _LARGE) // PAGE * PAGE)
        self._places = max(1, size // self._record)
        self._blocks: list[U8] = []

    def choose(self) -> DriveSpeed:
        """Tries the depths in turn, twice, then the page cache."""
        direct = True
        try:
            self._speed(1, direct=True, seconds=0)
        except OSError:
            direct = False
        speeds = dict.fromkeys(DEPTHS, 0.0)
        buffered = 0.0
        for _ in range(2):
            for depth in DEPTHS:
                speed = self._speed(depth, direct=direct, seconds=_TRIAL_S)
                speeds[depth] = max(speeds[depth], speed)
            if direct:
                speed = self._speed(4, direct=False, seconds=_TRIAL_S)
                buffered = max(buffered, speed)
        best = max(speeds.values())
        depth = next(d for d in DEPTHS if speeds[d] >= 0.9 * best)
        if direct and buffered > 1.25 * best:  # it must pay for the memory it takes
            direct, depth, best = False, 4, buffered
        return DriveSpeed(
            direct=direct,
            depth=depth,
            bytes_s=speeds[depth] or best,
            cached_bytes_s=self._warm(),
        )

    def again(self, found: DriveSpeed) -> DriveSpeed:
        """The speed of now, at what was chosen before."""
        try:
            speed = self._speed(found.depth, direct=found.direct, seconds=_QUICK_S)
        except OSError:  # another file system on the same device number
            return self.choose()
        return DriveSpeed(
            direct=found.direct,
            depth=found.depth,
            bytes_s=speed,
            cached_bytes_s=found.cached_bytes_s,
        )

    def _speed(self, depth: int, *, direct: bool, seconds: float) -> float:
        # Bytes a second that arrive in a window of `seconds`. It begins when reads are under way
        # and ends while they still are: short trials would else count idle ends. A drive
        # too slow for that is timed from its first read to its last.
        while len(self._blocks) < depth:  # no more than it takes: a model may hold its whole budget
            self._blocks.append(allocate(self._record))
            self._blocks[-1][:] = 0
        fds = [open_for_reading(file, direct=direct) for file in self._files]
        failed: list[OSError] = []
        try:
            counts: list[list[int]] = [[0, 0] for _ in range(depth)]  # in the window, in all
            begun = time.perf_counter()
            window = begun + min(_AHEAD_S, seconds), begun + min(_AHEAD_S, seconds) + seconds
            team = [
                threading.Thread(
                    target=self._read, args=(fds, block.data, window, done, failed, direct)
                )
                for block, done in zip(self._blocks, counts, strict=False)
            ]
            for thread in team:
                thread.start()
            for thread in team:
                thread.join()
            passed = time.perf_counter() - begun
        finally:
            for fd in fds:
                os.close(fd)
        if failed:
            raise failed[0]
        inside, whole = (sum(done[i] for done in counts) for i in range(2))
        return inside / seconds if inside >= 2 * depth * self._record else whole / passed

    def _read(
        self,
        fds: list[int],
        view: memoryview,
        window: tuple[float, float],
        done: list[int],
        failed: list[OSError],
        direct: bool,
    ) -> None:
        try:
            while True:
                place = self._random.randrange(self._places) * self._record
                fd = self._random.choice(fds)
                if not direct:  # a small store would soon be read from memory
                    let_go(fd, place, self._record)
                count = pread_into(fd, view, place)
                now = time.perf_counter()
                done[1] += count
                if window[0] <= now < window[1]:
                    done[0] += count
                if now >= window[1]:
                    return
        except OSError as problem:
            failed.append(problem)

    def _warm(self) -> float:
        # of records read again, more than a processor's own caches hold, on a thread a core
        count = max(1, min(self._places, _WARM // self._record, _MOST))
        fd, best = open_for_reading(self._files[0], direct=False), 0.0
        team = min(len(self._blocks), os.cpu_count() or 1)

        def copy(thread: int) -> None:
            for place in range(thread, count, team):
                pread_into(fd, self._blocks[thread].data, place * self._record)

        for _ in range(4):
            threads = [threading.Thread(target=copy, args=(i,)) for i in range(team)]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            best = max(best, count * self._record / (time.perf_counter() - start))
        os.close(fd)
        return best
