"""`moelite chat` between two terminals: keys in, text out."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pexpect

from moelite.cli import sessions

FAKES = str(Path(__file__).parent / "fakes.py")


def spawn(home: Path, *arguments: str, **settings: Any) -> pexpect.spawn:
    command = [FAKES, json.dumps(settings), "chat", *arguments]
    return pexpect.spawn(
        sys.executable,
        command,
        encoding="utf-8",
        timeout=20,
        dimensions=(30, 100),
        env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1"},  # nobody answers where the cursor is
    )


READY = r"\x1b\[\?25h"  # the editor shows the cursor: it waits for keys
UP, CTRL_C, CTRL_D, ALT_ENTER = "\x1b[A", "\x03", "\x04", "\x1b\r"


def test_answers_with_a_stats_line_and_leaves(isolated: Path) -> None:
    child = spawn(isolated)
    child.expect("context 4,096")
    child.expect(READY)
    child.send("hello\r")
    child.expect("You said: hello\r\n")
    child.expect(r"\d+ tok · .* tok/s \(forecast .*\) · first .* s · hit 90 % · ctx \d+/4,096")
    child.expect(READY)
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_stops_an_answer_and_keeps_it(isolated: Path, tmp_path: Path) -> None:
    child = spawn(isolated, replies={"go": "tick " * 400}, delay_s=0.02)
    child.expect(READY)
    child.send("go\r")
    child.expect("tick tick tick")
    child.send(CTRL_C)
    child.expect(r"\[stopped\]")
    assert "^C" not in child.before
    child.expect(READY)
    child.send("next\r")
    child.expect("You said: next")
    child.expect(READY)
    child.send(f"/save {tmp_path}/s.jsonl\r")
    child.expect("saved 2 turns")
    child.send("/stats\r")
    child.expect(r"prompt +([\d,]+) tokens, ([\d,]+) of them kept")
    prompt, kept = (int(child.match[i].replace(",", "")) for i in (1, 2))
    assert 0 < prompt - kept < 40
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    stopped = sessions.load(tmp_path / "s.jsonl").messages[1]
    assert stopped["content"].startswith("tick tick tick")
    assert len(stopped["content"]) < 1000
    assert stopped["stopped"] is True


def test_ctrl_c_stops_the_reading_of_a_prompt(isolated: Path) -> None:
    child = spawn(isolated, prefill_delay_s=0.2, replies={})
    child.expect(READY)
    child.send("long " * 300 + "\r")
    child.expect(r"reading [\d,]+ of 1,\d+ tokens")
    child.send(CTRL_C)
    child.expect("stopped before the first word; /retry asks again")
    child.expect(READY)
    child.send(CTRL_D)
    child.expect(pexpect.EOF)


def test_ctrl_c_at_the_prompt_clears_the_line(isolated: Path) -> None:
    child = spawn(isolated)
    child.expect(READY)
    child.send("rubbish")
    child.expect("rubbish")
    child.send(CTRL_C)
    child.expect(READY)
    child.send("hello\r")
    child.expect("You said: hello\r\n")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)


def test_history_lasts_and_is_private(isolated: Path) -> None:
    for keys in ("first words\r", UP + "\r"):
        child = spawn(isolated)
        child.expect(READY)
        child.send(keys)
        child.expect("You said: first words")
        child.expect("tok/s")
        child.send(CTRL_D)
        child.expect(pexpect.EOF)
    history = isolated / "state" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "first words" in history.read_text()
    child = spawn(isolated, "--no-history")
    child.expect(READY)
    child.send("secret\r")
    child.expect("You said: secret")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    assert "secret" not in history.read_text()


def test_several_lines(isolated: Path, tmp_path: Path) -> None:
    child = spawn(isolated)
    child.expect(READY)
    child.send(f"one{ALT_ENTER}two\r")
    child.expect("tok/s")
    child.expect(READY)
    child.send("\x1b[200~pasted\nlines\x1b[201~")
    child.send("\r")
    child.expect("tok/s")
    child.expect(READY)
    child.send('"""a\r')
    child.expect(READY)
    child.send('b"""\r')
    child.expect("tok/s")
    child.expect(READY)
    child.send(f"/save {tmp_path}/s.jsonl\r")
    child.expect("saved 3 turns")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    questions = [m["content"] for m in sessions.load(tmp_path / "s.jsonl").messages[::2]]
    assert questions == ["one\ntwo", "pasted\nlines", "a\nb"]


def test_completes_commands(isolated: Path) -> None:
    child = spawn(isolated)
    child.expect(READY)
    child.send("/sy")
    child.expect("show, set or remove the system prompt")
    child.send("\t\r")
    child.expect("no system prompt")
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
