"""The memory limit of a control group counts as the machine's."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from moelite.machine import Populate, allocate, memory
from moelite.process import rss_bytes


def groups(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cg").mkdir()
    return tmp_path / "cg"


def test_without_groups_it_is_the_machine(root: Path, tmp_path: Path) -> None:
    found = memory(root, tmp_path / "missing")
    assert found.kind == "physical"
    assert found.limit_bytes == psutil.virtual_memory().total


def test_version_2_takes_the_tightest_ancestor(root: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/user/app\n")
    groups(
        root,
        {
            "user/app/memory.max": "max\n",
            "user/memory.max": "1000000\n",
            "user/memory.current": "400000\n",
            "user/memory.stat": "anon 5\ninactive_file 100000\n",
        },
    )
    found = memory(root, tmp_path / "own")
    assert found == (1_000_000, "cgroup v2", 700_000)


def test_version_1(root: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:cpu,cpuacct:/a\n4:memory:/box\n")
    groups(
        root,
        {
            "memory/box/memory.limit_in_bytes": "2000000",
            "memory/box/memory.usage_in_bytes": "500000",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    assert memory(root, tmp_path / "own") == (2_000_000, "cgroup v1", 1_500_000)


def test_a_group_above_the_machine_does_not_count(root: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    groups(root, {"memory.max": str(1 << 60)})
    assert memory(root, tmp_path / "own").kind == "physical"


def test_a_block_gets_its_memory_and_keeps_its_bytes() -> None:
    block = allocate(40 << 20)
    block[5], block[-1] = 7, 9
    before = rss_bytes()
    filling = Populate(block)
    filling._thread.join()
    assert (block[5], block[-1], int(block.sum())) == (7, 9, 16)
    if sys.platform.startswith("linux"):
        assert rss_bytes() - before > 30 << 20
    filling.close()


def test_a_block_may_be_let_go_of_at_once() -> None:
    Populate(allocate(1 << 30)).close()
