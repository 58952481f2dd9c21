"""scripts/peak-memory with a tiny store, in real control groups where this user may make them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoint
from memory_group import MemoryGroup

import moelite
from moelite.errors import UsageError

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "peak-memory"


def test_a_budget_is_kept_and_one_below_the_minimum_refused(tmp_path: Path) -> None:
    try:
        MemoryGroup().close()
    except UsageError as refused:
        pytest.skip(refused.message)
    tiny_checkpoint.write_checkpoint(tmp_path / "checkpoint", tiny_checkpoint.QWEN3_MOE)
    (tmp_path / "checkpoint" / "tokenizer.json").unlink()  # a stand-in that nothing can read
    moelite.quantize(tmp_path / "checkpoint", tmp_path / "store", experts="int4", dense="int8")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "store"), "--ram", "150MiB,400MiB"]
    command += ["--prompt", "8", "--gen", "4", "--context", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum("refused" in line and "needs at least" in line for line in lines) == 2
    assert sum(line.split()[:2] == ["400", "MiB"] for line in lines) == 2
    assert "NOT KEPT" not in done.stdout
