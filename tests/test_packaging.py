"""pyproject.toml says what the folders hold: packages, links, data files, dependencies, version."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINKED = ("quant", "cache", "cli")
IGNORED = {"__pycache__"}


def files_of(folder: Path) -> list[Path]:
    """Files below a package folder, links to the other packages not followed."""
    found: list[Path] = []
    for here, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [f for f in folders if f not in IGNORED and not (Path(here) / f).is_symlink()]
        found += [Path(here) / name for name in names]
    return found


def test_every_package_folder_is_listed() -> None:
    """A folder left out works from the source and is missing from the wheel."""
    real = set()
    for top in ("moelite", *LINKED):
        for path in files_of(ROOT / top):
            if path.name == "__init__.py":
                parts = path.parent.relative_to(ROOT).parts
                real.add(".".join(parts if parts[0] == "moelite" else ("moelite", *parts)))
    assert real == set(SETTINGS["tool"]["setuptools"]["packages"])


def test_the_mapping_names_the_root_folders() -> None:
    want = {"moelite": "moelite"} | {f"moelite.{name}": name for name in LINKED}
    assert SETTINGS["tool"]["setuptools"]["package-dir"] == want


@pytest.mark.parametrize("name", LINKED)
def test_the_links_are_relative(name: str) -> None:
    link = ROOT / "moelite" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", LINKED)
def test_a_root_folder_is_refused_as_a_top_level_package(name: str) -> None:
    """Otherwise every module in it would exist twice, with two sets of compiled kernels."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"import moelite.{name}, not {name}" in done.stderr


def test_data_files_are_shipped() -> None:
    """Whatever lies in a package and is no Python file matches a package-data pattern."""
    shipped = SETTINGS["tool"]["setuptools"]["package-data"]
    for top in ("moelite", *LINKED):
        patterns = shipped.get(top if top == "moelite" else f"moelite.{top}", [])
        for path in files_of(ROOT / top):
            if path.suffix in {".py", ".nbi", ".nbc"}:
                continue
            inside = path.relative_to(ROOT / top).as_posix()
            assert any(fnmatch(inside, p) for p in patterns), f"{path} is not in package-data"


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def third_party(path: Path) -> set[str]:
    """Top-level names a file imports that are neither ours nor Python's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"moelite"}


# llvmlite comes with numba, which pins the one release that fits it
IMPLIED = {"llvmlite": "numba"}


def test_the_package_imports_only_what_it_declares() -> None:
    declared = {distribution(r) for r in SETTINGS["project"]["dependencies"]}
    extras = SETTINGS["project"]["optional-dependencies"]
    own = {
        place: {distribution(r) for r in extras[extra]}
        for place, extra in (("gpu", "gpu"), ("plot.py", "report"))
    }
    owners = importlib.metadata.packages_distributions()
    for top in ("moelite", *LINKED):
        for path in files_of(ROOT / top):
            if path.suffix != ".py":
                continue
            allowed = declared | own.get(path.name, own.get(path.parent.name, set()))
            for name in third_party(path):
                dists = {distribution(d) for d in owners.get(IMPLIED.get(name, name), [name])}
                assert dists & allowed, f"{path}: {name} is not a declared dependency"


def test_every_dependency_is_used() -> None:
    used = set().union(
        *(
            third_party(path)
            for top in ("moelite", *LINKED)
            for path in files_of(ROOT / top)
            if path.suffix == ".py"
        )
    )
    owners = importlib.metadata.packages_distributions()
    reached = {distribution(d) for name in used for d in owners.get(name, [])}
    declared = {distribution(r) for r in SETTINGS["project"]["dependencies"]}
    assert declared - reached == set()


def test_the_installed_version_is_the_one_in_the_settings() -> None:
    assert importlib.metadata.version("moelite") == SETTINGS["project"]["version"]


def test_the_changelog_is_ready_for_the_next_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[(Unreleased|\d+\.\d+\.\d+)\]", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["scripts/chat", "scripts/test", "scripts/check", ".ci/run"])
def test_the_scripts_can_be_run(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK), f"{name} is not executable"
    shell = "bash" if name == ".ci/run" else "sh"
    assert subprocess.run([shell, "-n", path], capture_output=True).returncode == 0
