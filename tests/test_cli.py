"""The command line: exit codes, messages, and what lands on which stream."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from fakes import FakeModel

from moelite.cli import common, main
from moelite.cli.run import prompt_ids, read_prompt
from moelite.errors import CheckpointError, MoeliteError, UsageError

FAKES = str(Path(__file__).parent / "fakes.py")
COMMANDS = (
    "chat",
    "run",
    "quantize",
    "footprint",
    "bench",
    "eval",
    "trace",
    "replay",
    "verify",
    "demo-checkpoint",
)


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in this process are given no pipe."""
    monkeypatch.setattr(sys, "stdin", None)


def fake(
    *arguments: str, stdin: str = "", settings: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FAKES, json.dumps(settings or {}), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def moelite(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moelite.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_every_command_has_help() -> None:
    listed = moelite("--help")
    assert listed.returncode == 0
    for name in COMMANDS:
        assert f"  {name} " in listed.stdout
    assert "..." not in listed.stdout.replace("[ARGS]...", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.exit_code([name, "--help"]) == 0
    assert f"Usage: moelite {name}" in capsys.readouterr().out


def test_help_is_quick() -> None:
    """Well under half a second of work; the time of a busy machine does not count."""
    before = os.times()
    moelite("--help")
    after = os.times()
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.8


def test_version() -> None:
    done = moelite("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("moelite 0.")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run", "--nope"], "No such option"),
        (["rnu"], "No such command"),
        (["run", "--seed", "x"], "--seed"),
        (["chat", "--kv", "f8"], "--kv"),
        ([], "Usage: moelite"),
        (["run", "-p", "x", "--top-p", "3"], "top_p is 3.0"),
        (["chat", "./nowhere"], "there is no folder ./nowhere"),
        (["chat", "nowhere"], "there is no folder nowhere"),
        (["run", __file__, "-p", "x"], "is a file"),
    ],
)
def test_usage_errors_are_exit_2(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.exit_code(arguments) == 2
    out, err = capsys.readouterr()
    assert problem in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("kind", [MoeliteError, *MoeliteError.__subclasses__()])
def test_errors_are_told_with_their_exit_code(
    kind: type[MoeliteError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("the [red]thing[/red] is 3", fix="make it 4")

    monkeypatch.setattr("moelite.cli.run.open_model", fail)
    assert main.exit_code(["run", "-p", "x"]) == kind.exit_code
    assert capsys.readouterr().err == "error: the [red]thing[/red] is 3\n  fix: make it 4\n"
    with pytest.raises(kind):
        main.exit_code(["--debug", "run", "-p", "x"])


def test_our_own_faults_are_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moelite.cli.run.open_model", lambda *_, **__: 1 / 0)
    assert main.exit_code(["run", "-p", "x"]) == 1
    assert "error: ZeroDivisionError: division by zero\n  fix: " in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main.exit_code(["--debug", "run", "-p", "x"])


def test_a_keyboard_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moelite.cli.run.open_model", fail)
    assert main.exit_code(["run", "-p", "x"]) == 130


def test_run_gives_exactly_the_answer() -> None:
    done = fake("run", "-p", "hello")
    assert (done.stdout, done.stderr, done.returncode) == ("You said: hello\n", "", 0)
    ends = fake("run", "-p", "x", settings={"replies": {"x": "line\n"}})
    assert ends.stdout == "line\n"


def test_run_reads_the_argument_then_the_pipe() -> None:
    assert fake("run", "-p", "sum up:", stdin="a\nb\n").stdout == "You said: sum up:\na\nb\n"
    assert fake("run", stdin="only this\n").stdout == "You said: only this\n"
    nothing = fake("run")
    assert nothing.returncode == 2
    assert "there is no prompt" in nothing.stderr


def test_run_stop_and_limits() -> None:
    assert fake("run", "-p", "a b c", "--stop", "zz", "--stop", " c").stdout == "You said: a b\n"
    assert fake("run", "-p", "abcdef", "--max-tokens", "3").stdout == "You\n"


def test_run_json_is_one_object_with_the_record() -> None:
    done = fake("run", "-p", "hi", "--json", "--seed", "5")
    found = json.loads(done.stdout)
    assert found["text"] == "You said: hi"
    assert found["finish_reason"] == "stop"
    assert found["seed"] == 5
    assert found["model"] == "smollm2-moe"
    assert found["generated_tokens"] == 12
    assert found["prompt_tokens"] > 10
    assert found["peak_rss_bytes"] > 10 << 20
    assert set(found["experts"]) == {"hits", "misses", "bytes_read", "wait_s"}
    assert found["ttft_s"] > 0
    assert found["prefill_tok_s"] > 0
    assert found["decode_tok_s"] > 0


def test_run_raw_uses_no_template() -> None:
    model = FakeModel()
    assert prompt_ids(model, "hi", "", raw=True) == model.tokenizer.encode("hi", special=True)
    with_system = prompt_ids(model, "hi", "S", raw=False)
    assert model.tokenizer.decode(with_system).startswith("system\nS\n")
    with pytest.raises(UsageError, match="--raw knows no system prompt"):
        prompt_ids(model, "hi", "S", raw=True)
    model.tokenizer.template = None
    with pytest.raises(CheckpointError, match="no chat template"):
        prompt_ids(model, "hi", "", raw=False)


def test_read_prompt_without_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert read_prompt("x") == "x"


def test_run_leaves_quietly_when_nobody_reads() -> None:
    settings = {"replies": {"x": "many words " * 300}, "delay_s": 0.001}
    process = subprocess.Popen(
        [sys.executable, FAKES, json.dumps(settings), "run", "-p", "x"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(4) == "many"
    process.stdout.close()
    assert process.wait(30) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_run_interrupted_keeps_what_was_said() -> None:
    settings = {"replies": {"x": "tick " * 500}, "delay_s": 0.02}
    with subprocess.Popen(
        [sys.executable, FAKES, json.dumps(settings), "run", "-p", "x"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == "tick tick "
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(30) == 130
        assert rest.replace("tick ", "").replace("tick", "").strip(" ticnk\n") == ""
        assert rest.endswith("\n")
        assert "Traceback" not in process.stderr.read()


def test_where_things_are_kept(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert common.cache_folder() == isolated / "cache"
    assert common.state_folder() == isolated / "state"
    monkeypatch.delenv("MOELITE_HOME")
    assert common.cache_folder().name == "moelite"
    assert common.state_folder() == isolated / "state" / "moelite" or sys.platform == "darwin"


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345678")
    return folder


class Packer:
    """Stands for the process that quantizes."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command[3:])
        if not self.code:
            out = Path(command[5])
            out.mkdir(parents=True)
            (out / "moelite.json").write_text("{}")
        return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def packer(monkeypatch: pytest.MonkeyPatch) -> Packer:
    packer = Packer()
    monkeypatch.setattr(common.subprocess, "run", packer)
    return packer


def find(name: str | None, *, offline: bool = False) -> Path:
    return common.find_store(name, offline=offline, console=common.stderr_console())


def test_a_store_is_taken_as_it_is(tmp_path: Path, packer: Packer) -> None:
    (tmp_path / "moelite.json").write_text("{}")
    assert find(str(tmp_path)) == tmp_path
    assert packer.calls == []


def test_the_built_in_model_is_built_once(
    isolated: Path, packer: Packer, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = isolated / "cache" / "stores" / "smollm2-moe-0123456789ab"  # of other weights
    stale.mkdir(parents=True)
    out = find(None)
    assert out.parent == stale.parent
    assert out.name.startswith("smollm2-moe-")
    assert find("smollm2-moe") == out
    assert not stale.exists()
    assert packer.calls == [["quantize", "smollm2-moe", str(out)]]
    assert "Building the built-in model" in capsys.readouterr().err


def test_a_checkpoint_is_quantized_once_and_again_when_it_changes(
    tmp_path: Path, packer: Packer
) -> None:
    folder = checkpoint(tmp_path / "my model")
    first = find(str(folder), offline=True)
    assert first.name.startswith("my model-")
    assert find(str(folder)) == first
    assert packer.calls == [["quantize", str(folder), str(first), "--offline"]]
    os.utime(folder / "model.safetensors", (1, 1))
    assert find(str(folder)) != first


def test_a_failed_quantization_ends_the_command_with_its_code(
    tmp_path: Path, packer: Packer
) -> None:
    packer.code = 6
    with pytest.raises(typer.Exit) as caught:
        find(str(checkpoint(tmp_path / "m")))
    assert caught.value.exit_code == 6
    assert main.exit_code(["run", str(tmp_path / "m"), "-p", "x"]) == 6


def test_tests_are_offline() -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match="tests are offline"):
        socket.create_connection(("192.0.2.1", 80), timeout=5)
    assert time.monotonic() - start < 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
