"""Triton's kernels: what they compute, in Triton's interpreter, and that they compile for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import gpu_checks

from moelite.quant import FORMATS

HERE = Path(__file__).parent


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / program), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_interpreter_agrees_for_every_kernel() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    done = run("gpu_checks.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-4000:]
    passed = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    assert len(passed) == len(gpu_checks.BY_FORMAT) * len(gpu_checks.KINDS) + 3


@pytest.mark.parametrize("names", [[*FORMATS], ["steps", "attention"]], ids=["formats", "others"])
def test_kernels_compile_for_a_gpu(names: list[str], tmp_path: Path) -> None:
    code = "import triton, sys; sys.exit('nvidia' not in triton.backends.backends)"
    if subprocess.run([sys.executable, "-c", code]).returncode:
        pytest.skip("this triton cannot compile for NVIDIA's GPUs")
    done = run("gpu_compile.py", *names, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(names) == {line.split()[0] for line in done.stdout.splitlines()}


def test_a_whole_model_in_the_interpreter(tmp_path: Path) -> None:
    import tiny_checkpoint

    import moelite

    tiny_checkpoint.write_checkpoint(tmp_path / "c", tiny_checkpoint.QWEN3_MOE)
    (tmp_path / "c" / "tokenizer.json").unlink()
    moelite.quantize(tmp_path / "c", tmp_path / "int4.store", experts="int4", dense="int8")
    done = run("gpu_interpreted.py", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-4000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in found] == ["int4", "int4"]
    assert max(float(error) for _, error in found) < 1e-3
