"""scripts/memory_group.py and scripts/drive.py: real groups where this user may make them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import drive
import memory_group
import pytest
from memory_group import MemoryGroup

from moelite.errors import UsageError

MIB = 1 << 20
ALLOCATE = "import sys; held = bytearray(b'x') * (int(sys.argv[1]) << 20)"


@pytest.fixture
def may_make_groups() -> None:
    try:
        MemoryGroup().close()
    except UsageError as refused:
        pytest.skip(refused.message)


def allocate(group: MemoryGroup, mib: int) -> int:
    command = [sys.executable, "-S", "-c", ALLOCATE, str(mib)]
    return subprocess.run(command, preexec_fn=group.enter, check=False).returncode


@pytest.mark.usefixtures("may_make_groups")
def test_the_peak_is_what_the_child_took() -> None:
    with MemoryGroup() as group:
        assert allocate(group, 100) == 0
        inside = group.peak_bytes()
    assert inside is not None
    assert 100 * MIB < inside < 140 * MIB
    assert group.peak_bytes() == inside  # after the group is gone, too
    assert group.killed() == 0
    assert not group.folder.exists()


@pytest.mark.usefixtures("may_make_groups")
def test_a_child_above_the_limit_is_killed() -> None:
    with MemoryGroup(64 * MIB) as group:
        assert allocate(group, 20) == 0
        assert group.killed() == 0
        assert allocate(group, 200) == -signal.SIGKILL
    assert group.killed() == 1
    peak = group.peak_bytes()
    assert peak is not None
    assert 20 * MIB < peak <= 64 * MIB


@pytest.mark.usefixtures("may_make_groups")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_group_goes_after_an_error_and_what_runs_in_it(error: type[BaseException]) -> None:
    group = MemoryGroup()
    sleeper = subprocess.Popen(["sleep", "60"], preexec_fn=group.enter)
    with pytest.raises(error), group:
        raise error
    assert sleeper.wait(timeout=5) == -signal.SIGKILL
    assert not group.folder.exists()


class Kernel:
    """A folder that stands for a mounted cgroup file system of one version."""

    def __init__(self, tmp: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
        self.root, self.own, self.files = tmp / "cg", tmp / "own", {"cgroup.procs": ""}
        self.own.write_text(own)
        monkeypatch.setattr(memory_group, "_make", self.make)
        monkeypatch.setattr(memory_group, "_remove", self.remove)

    def folder(self, name: str, **files: str) -> None:
        for file, text in {"cgroup.procs": "", **files}.items():
            path = self.root / name / file.replace("__", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def make(self, folder: Path) -> None:
        folder.mkdir()
        for file, text in self.files.items():
            (folder / file).write_text(text)

    def remove(self, folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    def group(self, limit: int | None) -> MemoryGroup:
        group = MemoryGroup(limit, root=self.root, own=self.own)
        (group.folder / "cgroup.procs").write_text("")  # nobody is really there
        return group


def test_version_2_limits_memory_and_forbids_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(tmp_path, monkeypatch, "0::/user/app\n")
    kernel.folder("user", cgroup__subtree_control="cpu memory\n")
    kernel.folder("user/app", cgroup__subtree_control="memory\n")
    kernel.files |= {
        "memory.swap.max": "max",
        "memory.peak": "12345\n",
        "memory.events": "low 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n",
    }
    with kernel.group(8 * MIB) as group:
        assert group.folder.parent == kernel.root / "user" / "app"
        assert int((group.folder / "memory.max").read_text()) == 8 * MIB
        assert int((group.folder / "memory.swap.max").read_text()) == 0
    assert (group.peak_bytes(), group.killed()) == (12345, 2)
    assert not group.folder.exists()


def test_version_2_goes_beside_a_group_that_cannot_have_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(tmp_path, monkeypatch, "0::/user/app\n")
    kernel.folder("user", cgroup__subtree_control="memory\n")
    kernel.folder("user/app")
    with kernel.group(None) as group:
        assert group.folder.parent == kernel.root / "user"
        assert not (group.folder / "memory.max").exists()
    assert group.peak_bytes() is None


@pytest.mark.parametrize("swap", [True, False])
def test_version_1_limits_memory_and_memory_with_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    kernel = Kernel(tmp_path, monkeypatch, "4:memory:/box\n0::/\n")
    kernel.folder("memory/box", memory__limit_in_bytes="9223372036854771712")
    names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"][: 1 + swap]
    kernel.files |= {**dict.fromkeys(names, "9"), "memory.oom_control": "under_oom 1\noom_kill 4\n"}
    with kernel.group(8 * MIB) as group:
        assert group.version == 1
        assert [int((group.folder / name).read_text()) for name in names] == [8 * MIB] * len(names)
        assert (group.folder / "memory.memsw.limit_in_bytes").exists() == swap
    assert group.killed() == 4


def test_no_right_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(tmp_path, monkeypatch, "4:memory:/box\n")
    kernel.folder("memory/box", memory__limit_in_bytes="9223372036854771712")

    def forbidden(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(memory_group, "_make", forbidden)
    with pytest.raises(UsageError, match="Permission denied") as refused:
        kernel.group(MIB)
    assert "root" in refused.value.fix


def test_no_right_to_move_a_process_removes_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(tmp_path, monkeypatch, "4:memory:/box\n")
    kernel.folder("memory/box", memory__limit_in_bytes="9223372036854771712")

    def make(folder: Path) -> None:
        (folder / "cgroup.procs" / "a folder").mkdir(
            parents=True
        )  # cannot be written, even by root

    monkeypatch.setattr(memory_group, "_make", make)
    removed: list[Path] = []
    monkeypatch.setattr(memory_group, "_remove", removed.append)
    with pytest.raises(UsageError, match="no memory control group can be made"):
        kernel.group(MIB)
    assert len(removed) == 1


def test_a_system_without_groups(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no memory control groups"):
        MemoryGroup(MIB, root=tmp_path, own=tmp_path / "missing")


def test_the_speed_of_a_drive(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(9 * MIB + 5))
    start = time.perf_counter()
    speed = drive.read_speed(file, 0.1)
    assert time.perf_counter() - start < 20
    if speed is None:
        pytest.skip("no reads past the page cache here")
    assert speed > 4 * MIB
    file.write_bytes(b"short")
    assert drive.read_speed(file, 0.1) is None


def test_files_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "_DROP", tmp_path / "drop")
    monkeypatch.setattr(os, "sync", lambda: None)
    seen: list[str] = []
    monkeypatch.setattr(drive, "_forget_file", lambda file: seen.append(file.name))
    (tmp_path / "store").mkdir()
    for name in ("store/a", "store/b", "gguf"):
        (tmp_path / name).write_bytes(b"x")
    assert drive.forget([tmp_path / "store", tmp_path / "gguf"])
    assert seen == ["a", "b", "gguf"]
    assert (tmp_path / "drop").read_text() == "3\n"
    monkeypatch.setattr(drive, "_DROP", tmp_path / "missing" / "drop")
    assert not drive.forget([])
