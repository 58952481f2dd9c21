"""scripts/chat on a machine that exists only on paper: a stand-in Python that records its calls."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent

PYTHON = r"""#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in
*"version_info <"*) exit "${OLD:-0}" ;;
*"import venv"*) exit "${NO_VENV:-0}" ;;
*"version_info[:2]"*) echo 3.12 ;;
*"print(sys.version)"*) echo "${VERSION:-3.12.1}" ;;
"-m venv"*)
    for folder in "$@"; do :; done
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    printf '#!/bin/sh\necho "started: $*"\n' >"$folder/bin/moelite"
    chmod +x "$folder/bin/moelite"
    ;;
"-m pip"*) exit "${PIP_FAILS:-0}" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A repository of scripts, and a PATH with the usual tools and one stand-in python3."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "cat", "cksum", "dirname", "mkdir", "cp", "chmod"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    python = tools / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    repo = tmp_path / "a repo"
    shutil.copytree(ROOT / "scripts", repo / "scripts", ignore=lambda _, names: names_but(names))
    (repo / "pyproject.toml").write_text("[project]\n")
    log = tmp_path / "log"

    def chat(*arguments: str, **environment: str):
        log.write_text("")
        done = subprocess.run(
            [repo / "scripts" / "chat", *arguments],
            capture_output=True,
            text=True,
            env={"PATH": str(tools), "LOG": str(log), **environment},
        )
        calls = [line for line in log.read_text().splitlines() if line.startswith("-m")]
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, calls=calls)

    return SimpleNamespace(chat=chat, repo=repo, python=python, tmp=tmp_path)


def names_but(names: list[str]) -> set[str]:
    return set(names) - {"_env", "chat"}


def kinds(calls: list[str]) -> list[str]:
    return [call.split()[1] for call in calls]


def test_the_first_run_installs_and_starts(machine) -> None:
    result = machine.chat("model", "--ram", "4GiB")
    assert result.out == "started: chat model --ram 4GiB\n"
    assert kinds(result.calls) == ["venv", "pip"]
    assert f"--editable {machine.repo}" in result.calls[1]
    assert "==> making a virtual environment" in result.err
    assert "==> installing moelite" in result.err


def test_the_second_run_starts_at_once(machine) -> None:
    machine.chat()
    result = machine.chat()
    assert (result.out, result.calls, result.err) == ("started: chat\n", [], "")


def test_new_settings_are_installed(machine) -> None:
    machine.chat()
    (machine.repo / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    assert kinds(machine.chat().calls) == ["pip"]


def test_another_interpreter_is_installed_for(machine) -> None:
    machine.chat()
    assert kinds(machine.chat(VERSION="3.13.0").calls) == ["pip"]


def test_a_failed_installation_is_told_and_tried_again(machine) -> None:
    failed = machine.chat(PIP_FAILS="1")
    assert failed.code == 1
    assert failed.out == ""
    assert "error: the installation did not finish" in failed.err
    assert kinds(machine.chat().calls) == ["pip"]


def test_a_moved_repository_gets_a_new_environment(machine) -> None:
    machine.chat()
    moved = machine.tmp / "moved"
    machine.repo.rename(moved)
    machine.repo.symlink_to(moved)  # the fixture still calls the old name
    assert kinds(machine.chat().calls) == ["venv", "pip"]


def test_an_installation_for_tests_serves_a_chat(machine) -> None:
    machine.chat()
    stamp = machine.repo / ".venv" / ".installed-run"
    stamp.rename(stamp.with_name(".installed-dev"))
    assert machine.chat().calls == []


def test_a_machine_without_python_is_told_where_to_get_it(machine) -> None:
    machine.python.unlink()
    result = machine.chat()
    assert result.code == 1
    assert "needs Python 3.11 or newer" in result.err
    assert "apt install python3" in result.err
    assert "brew install python" in result.err


def test_an_old_python_is_no_python(machine) -> None:
    assert "needs Python 3.11 or newer" in machine.chat(OLD="1").err


def test_a_python_without_venv_names_the_package(machine) -> None:
    result = machine.chat(NO_VENV="1")
    assert result.code == 1
    assert "sudo apt install python3.12-venv" in result.err


def test_a_named_python_comes_first(machine) -> None:
    mine = machine.tmp / "mine"
    machine.python.rename(mine)
    result = machine.chat(PYTHON=str(mine))
    assert result.out == "started: chat\n"
    assert str(mine) in result.err
