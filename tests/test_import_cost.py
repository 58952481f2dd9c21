"""`import moelite` and `moelite --help` pay for no compiler, no torch, no tokenizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"numba", "llvmlite", "torch", "transformers", "tokenizers", "gguf", "huggingface_hub"}


def loaded(*arguments: str) -> set[str]:
    """Top-level packages that a fresh interpreter imports while it runs `arguments`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_import_moelite_is_light() -> None:
    found = loaded("-c", "import moelite")
    assert "moelite" in found
    assert not found & (HEAVY | {"numpy", "rich", "typer", "jinja2"})


@pytest.mark.parametrize("command", [["--help"], ["chat", "--help"], ["quantize", "--help"]])
def test_help_is_light(command: list[str]) -> None:
    found = loaded("-m", "moelite.cli", *command)
    assert "typer" in found
    assert not found & HEAVY


def test_the_probe_sees_a_heavy_import() -> None:
    assert "numba" in loaded("-c", "import numba")
