"""Kernels at their limits and on shapes nobody chose, on this CPU's target and on forced ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernel_checks
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite.quant import FORMATS


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 9, 21])
def test_worst_cases(fmt: str, tokens: int) -> None:
    kernel_checks.worst(fmt, tokens)


@pytest.mark.parametrize("tokens", [1, 5, 9, 21])
def test_tables_that_use_all_of_int8(tokens: int) -> None:
    kernel_checks.carried(tokens)


@settings(max_examples=120, deadline=None)
@given(
    fmt=st.sampled_from(list(FORMATS)),
    rows=st.integers(1, 70),
    cols=st.one_of(st.integers(1, 300), st.sampled_from([1024, 2047, 2048])),
    tokens=st.integers(1, 20),
    base=st.sampled_from([0, 64, 4096]),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_of_any_shape(fmt, rows, cols, tokens, base, seed) -> None:
    kernel_checks.random(fmt, seed, (rows, cols), tokens, base)


@pytest.mark.parametrize("target", kernel_checks.FORCED)
def test_kernels_compiled_for_other_targets(target: str) -> None:
    if not kernel_checks.runs_here(target):
        pytest.skip(f"this CPU cannot run {target} code")
    program = Path(__file__).parent / "kernel_checks.py"
    env = {**os.environ, **kernel_checks.FORCED[target]}
    done = subprocess.run(
        [sys.executable, str(program)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == target
