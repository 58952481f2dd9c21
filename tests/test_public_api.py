"""The names users import, the words they read: kept equal to what the code really offers."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moelite

ROOT = Path(__file__).resolve().parent.parent


def test_all_lists_exactly_the_public_names() -> None:
    tree = ast.parse((ROOT / "moelite" / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moelite")
        for alias in node.names
    }
    assert imported | {"__version__"} == set(moelite.__all__)
    assert sorted(moelite.__all__) == dir(moelite)


def test_what_type_checkers_see_is_what_loads_lazily() -> None:
    tree = ast.parse((ROOT / "moelite" / "__init__.py").read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If)]
    typed = {
        alias.name: node.module
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "moelite"
        for alias in node.names
    }
    assert typed == moelite._LAZY


@pytest.mark.parametrize("name", moelite.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    value = getattr(moelite, name)
    assert value is getattr(moelite, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), f"moelite.{name} has no docstring"


def test_every_error_is_public() -> None:
    errors = importlib.import_module("moelite.errors")
    classes = {n for n, v in vars(errors).items() if inspect.isclass(v)}
    assert {n for n in moelite.__all__ if n.endswith("Error")} == classes


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'moelite' has no attribute 'laod'"):
        moelite.laod  # noqa: B018


def test_the_library_logs_nothing_by_itself() -> None:
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("moelite").handlers)


def help_blocks() -> list[tuple[str, str]]:
    """(command, text) of the fenced blocks of README.md that start with `$ moelite ... --help`."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```[a-z]*\n\$ (moelite [^\n]*--help)\n(.*?)^```", text, re.M | re.S)
    return [(command, body) for command, body in blocks]


@pytest.mark.parametrize("block", help_blocks(), ids=lambda b: b[0])
def test_help_in_the_readme_is_the_real_help(block: tuple[str, str]) -> None:
    command, text = block
    done = subprocess.run(
        [sys.executable, "-m", "moelite.cli", *command.split()[1:]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"COLUMNS": "80", "TERM": "dumb", "PATH": "", "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr

    def lines(s: str) -> list[str]:
        return [line.rstrip() for line in s.strip().splitlines()]

    assert lines(text) == lines(done.stdout), f"run `COLUMNS=80 {command}` and paste it"
