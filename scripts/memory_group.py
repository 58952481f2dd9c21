"""A control group for memory, made for one measurement: a hard limit or none, and the peak inside.

    with MemoryGroup(limit_bytes) as group:
        subprocess.run(command, preexec_fn=group.enter)
    group.peak_bytes(), group.killed()

The kernel counts everything of the processes inside, file pages they were the first to read
included; what was in the page cache before costs them nothing. Linux only, version 1 or 2.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

from moelite.errors import UsageError
from moelite.machine import memory_groups

_PEAK = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
_KILLS = {1: "memory.oom_control", 2: "memory.events"}
_END_S = 10.0  # for the processes inside to be gone once they are killed
_FIX = "run as root, or as `systemd-run --user --scope -p Delegate=yes COMMAND`"
_numbers = itertools.count(1)


class MemoryGroup:
    """A new child of this process's group. Its processes may use `limit_bytes`, without swap.

    UsageError where no group can be made. At the end of the block what still runs inside is killed
    and the group removed; its numbers stay. `root` and `own` are for tests.
    """

    def __init__(
        self,
        limit_bytes: int | None = None,
        *,
        root: Path = Path("/sys/fs/cgroup"),
        own: Path = Path("/proc/self/cgroup"),
    ) -> None:
        self.limit_bytes = limit_bytes
        self._peak: int | None = None
        self._kills = 0
        self._gone = False
        self.folder, self.version = _make_child(root, own)
        try:
            self._limit()
            _try_to_enter(self.folder)
        except BaseException as problem:
            self.close()
            if isinstance(problem, OSError):
                raise _refusal(problem) from problem
            raise

    def enter(self) -> None:
        """Moves the calling process into the group: the preexec_fn of a child to be."""
        with open(self.folder / "cgroup.procs", "w") as file:
            file.write("0")

    def peak_bytes(self) -> int | None:
        """The most memory the group has had; None where the kernel does not tell (before 5.19)."""
        if not self._gone:
            with contextlib.suppress(OSError):
                self._peak = int((self.folder / _PEAK[self.version]).read_text())
        return self._peak

    def killed(self) -> int:
        """Processes that the kernel killed because the limit was reached."""
        if not self._gone:
            with contextlib.suppress(OSError):
                lines = (self.folder / _KILLS[self.version]).read_text().splitlines()
                found = [line.split() for line in lines]
                self._kills = sum(int(value) for name, value in found if name == "oom_kill")
        return self._kills

    def close(self) -> None:
        """Kills what still runs inside and removes the group."""
        if self._gone:
            return
        self.peak_bytes()
        self.killed()
        until = time.monotonic() + _END_S
        while True:
            self._kill_all()
            try:
                _remove(self.folder)
                break
            except FileNotFoundError:
                break
            except OSError:  # busy: a killed process takes a moment to leave
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        self._gone = True

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _limit(self) -> None:
        if self.limit_bytes is None:
            return
        if self.version == 2:
            names = {"memory.max": self.limit_bytes, "memory.swap.max": 0}
        else:  # in this order: memory with swap is never less than memory
            names = dict.fromkeys(
                ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), self.limit_bytes
            )
        for name, value in names.items():
            file = self.folder / name
            if "sw" in name and not file.exists():  # a kernel that does not account for swap
                continue
            file.write_text(f"{value}\n")

    def _kill_all(self) -> None:
        with contextlib.suppress(OSError):
            for process in map(int, (self.folder / "cgroup.procs").read_text().split()):
                if process > 0:  # 0: one that this namespace has no number for
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)


def _make_child(root: Path, own: Path) -> tuple[Path, int]:
    groups = memory_groups(root, own)
    # version 2 has none inside a group that holds processes itself: then beside it, and so upwards
    problem: OSError | None = None
    for parent, version in groups:
        folder = parent / f"moelite-{os.getpid()}-{next(_numbers)}"
        try:
            if version == 2:
                _pass_memory_on(parent)
            elif not (parent / "memory.limit_in_bytes").exists():
                continue
            _make(folder)
            return folder, version
        except OSError as found:
            if (parent / "cgroup.procs").exists():
                problem = problem or found
    raise _refusal(problem)


def _pass_memory_on(parent: Path) -> None:
    # raises OSError unless children of `parent` can have a limit of their own
    file = parent / "cgroup.subtree_control"
    if "memory" not in file.read_text().split():
        with open(file, "r+") as control:
            control.write("+memory")


def _try_to_enter(folder: Path) -> None:
    # making a group does not give the right to move a process there
    command = ["/bin/sh", "-c", 'echo 0 >"$1"', "sh", str(folder / "cgroup.procs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 0:
        raise OSError(done.stderr.strip())


def _refusal(problem: OSError | None) -> UsageError:
    if problem is None:
        return UsageError(
            "this system has no memory control groups", fix="measure on Linux with cgroups mounted"
        )
    return UsageError(f"no memory control group can be made: {problem}", fix=_FIX)


def _make(folder: Path) -> None:
    folder.mkdir()


def _remove(folder: Path) -> None:
    folder.rmdir()
