"""The conversation: turns, commands, files, and what a terminal shows."""

from __future__ import annotations

import signal
import stat
from pathlib import Path

import pytest
from chat_templates import QWEN3, STRICT_ROLES
from fakes import FakeModel, sidecars

from moelite.cli import sessions
from moelite.cli.answer import Thoughts
from moelite.cli.commands import COMMANDS, run_command
from moelite.cli.interrupt import Interrupt, Stopped
from moelite.cli.render import answer_line, clean, seconds
from moelite.cli.repl import Conversing
from moelite.errors import UsageError
from moelite.sampling import SamplingOptions

Capture = pytest.CaptureFixture[str]


class Lines:
    """Input from a list; an exception in it is raised."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = list(lines)

    def read(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if not isinstance(line, str):
            raise line
        return line


def talk(model: FakeModel | None = None, *lines: str | type[BaseException]) -> Conversing:
    chat = Conversing(
        model or FakeModel(), "fake", Lines(*lines), system="", options=SamplingOptions()
    )
    chat.loop()
    return chat


def said(chat: Conversing) -> list[str]:
    return [m["content"] for m in chat.messages]


def test_piped_chat_prints_answers_only(capsys: Capture) -> None:
    chat = talk(None, "hello", "", "again")
    assert capsys.readouterr().out == "You said: hello\nYou said: again\n"
    assert said(chat) == ["hello", "You said: hello", "again", "You said: again"]


def test_a_turn_computes_only_what_is_new() -> None:
    chat = talk(None, "hello there", "again")
    assert chat.last is not None
    new = chat.model.tokenizer.encode("again", special=False)
    assert 0 < chat.last.prompt_tokens - chat.last.reused_tokens < len(new) + 24
    assert chat.last.reused_tokens > 30


def test_several_lines_between_fences(capsys: Capture) -> None:
    chat = talk(None, '"""one', "/quit", 'two"""', '"""x"""')
    assert said(chat)[::2] == ["one\n/quit", "two"] or said(chat)[::2] == ["one\n/quit\ntwo", "x"]
    assert said(chat)[0] == "one\n/quit\ntwo"


def test_unknown_commands_stay_here(capsys: Capture) -> None:
    chat = talk(None, "/halp", "//halp", "/xyzzy")
    err = capsys.readouterr().err
    assert "there is no command /halp" in err
    assert "did you mean /help?" in err
    assert "/help lists the commands" in err
    assert said(chat) == ["/halp", "You said: /halp"]


def test_every_command_is_in_help(capsys: Capture) -> None:
    talk(None, "/help")
    err = capsys.readouterr().err
    wanted = "/help /system /clear /retry /undo /save /load /set /mem /stats /quit".split()  # noqa: SIM905
    assert set(wanted) <= set(COMMANDS)
    assert all(name in err for name in wanted)


def test_quit_leaves() -> None:
    assert said(talk(None, "/quit", "hello")) == []
    assert said(talk(None, "/exit", "hello")) == []


def test_clear_undo_drop_retry(capsys: Capture) -> None:
    chat = talk(None, "one", "two", "/undo")
    assert said(chat) == ["one", "You said: one"]
    chat = talk(None, "one", "two", "/drop")
    assert said(chat) == ["two", "You said: two"]
    chat = talk(None, "one", "two", "/clear")
    assert said(chat) == []
    assert chat.session.ids == []
    capsys.readouterr()
    chat = talk(None, "one", "two", "/retry")
    assert said(chat) == ["one", "You said: one", "two", "You said: two"]
    assert capsys.readouterr().out.count("You said: two") == 2
    talk(None, "/retry", "/undo", "/drop")
    assert capsys.readouterr().err.count("error: there is nothing to") == 3


def test_a_retry_that_fails_keeps_the_old_answer() -> None:
    chat = talk(None, "one")
    chat.model.replies["one"] = ""  # type: ignore[attr-defined]
    run_command(chat, "/retry")
    assert said(chat) == ["one", "You said: one"]


def test_system(capsys: Capture) -> None:
    chat = talk(None, "/system  Be brief. ", "hello")
    assert chat.prompt_messages()[0] == {"role": "system", "content": "Be brief."}
    run_command(chat, "/system")
    assert "system: Be brief." in capsys.readouterr().err
    run_command(chat, "/system off")
    assert chat.prompt_messages()[0]["role"] == "user"


def test_a_model_without_a_system_role_still_gets_it() -> None:
    model = FakeModel(files=sidecars(STRICT_ROLES))
    text = model.tokenizer.render(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    )
    assert text == "user: S\n\nU\nmodel:"


def test_set(capsys: Capture) -> None:
    chat = talk(None, "/set temperature 0.5", "/set top_k 7", '/set stop "END" "\\n\\n"')
    assert chat.options == SamplingOptions(temperature=0.5, top_k=7, stop=("END", "\n\n"))
    run_command(chat, "/set")
    err = capsys.readouterr().err
    assert "temperature          0.5          (you)" in err
    assert "top_p                1.0          (default)" in err
    run_command(chat, "/set temperature default")
    run_command(chat, "/set stop off")
    assert chat.options == SamplingOptions(top_k=7)
    for line, problem in {
        "/set temperature x": "not a number",
        "/set temperature": "",
        "/set temprature 1": "did you mean temperature",
        "/set top_p 3": "top_p is 3.0",
        "/set seed 1 2": "not a number",
        '/set stop "': "close the quotes",
    }.items():
        if problem:
            with pytest.raises(UsageError) as caught:
                run_command(chat, line)
            assert problem in str(caught.value)
        else:
            run_command(chat, line)


def test_max_tokens_is_set_and_said(capsys: Capture) -> None:
    chat = talk(FakeModel({"x": "a b c d"}), "/set max_tokens 3", "x")
    assert said(chat)[1] == "a b"


def test_mem_and_stats(capsys: Capture) -> None:
    talk(None, "/mem", "hello", "/stats")
    out, err = capsys.readouterr()
    assert "dense weights" in err
    assert "this process holds" in err
    assert "hits" in err
    assert "of 4,096 tokens" in err
    assert out == "You said: hello\n"


def test_sessions_come_back(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "with space" / "talk.jsonl"
    chat = talk(None, "/system S", "hello ☃", f'/save "{path}"')
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["talk.jsonl"]
    again = talk(None, f"/load {path}", "more")
    assert said(again)[:2] == said(chat)
    assert again.system == "S"
    assert len(again.messages) == 4
    run_command(again, "/save")
    assert len(sessions.load(path).messages) == 4


def test_a_session_without_a_name_goes_to_its_folder(isolated: Path, capsys: Capture) -> None:
    talk(None, "hello", "/save", "/load")
    (file,) = (isolated / "state" / "sessions").iterdir()
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "",
        "hello",
        "{}",
        "[1]",
        '{"moelite_session": 1}\n{"role": "user"}',
        '{"moelite_session": 1}\n{"role": "assistant", "content": "first"}',
        '{"moelite_session": 1, "system": 3}',
        '{"moelite_session": 1}\n{"role": "user", "content": "cut',
    ],
)
def test_other_files_are_neither_loaded_nor_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    chat = talk(None, "hello")
    with pytest.raises(UsageError, match="is not a saved conversation"):
        run_command(chat, f"/load {path}")
    with pytest.raises(UsageError, match="is not a saved conversation"):
        run_command(chat, f"/save {path}")
    assert path.read_text() == content
    assert said(chat) == ["hello", "You said: hello"]


def test_sessions_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    chat = talk(None, "hello")
    with pytest.raises(UsageError, match="cannot read"):
        run_command(chat, f"/load {tmp_path / 'none'}")
    with pytest.raises(UsageError, match="cannot read"):
        run_command(chat, f"/load {tmp_path}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        run_command(chat, f"/save {tmp_path / 'file' / 'x'}")
    (tmp_path / "new.jsonl").write_text('{"moelite_session": 9}')
    with pytest.raises(UsageError, match="version 9; this moelite reads version 1"):
        run_command(chat, f"/load {tmp_path / 'new.jsonl'}")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(UsageError, match="not a saved conversation"):
        run_command(chat, f"/load {tmp_path / 'binary'}")
    assert sessions.user_path("'~/x y'") == Path.home() / "x y"


def test_a_full_context_is_said_and_left_as_it_was(capsys: Capture) -> None:
    model = FakeModel({"long": "x" * 500}, context=120)
    chat = talk(model, "hello", "y" * 100, "/drop", "hello", "/clear", "long")
    err = capsys.readouterr().err
    assert "The conversation would be 1" in err
    assert "the context holds 120" in err
    assert "/drop forgets the oldest turn" in err
    assert "[the context of 120 tokens is full" in err
    assert said(chat)[0] == "long"
    assert 50 < len(said(chat)[1]) < 120


def test_control_characters_do_not_reach_the_terminal(capsys: Capture) -> None:
    evil = "a\x1b[2Jb\x07\r\x9b1mc\td\ne\x00[/INST][red]"
    chat = talk(FakeModel({"x": evil}), "x")
    assert capsys.readouterr().out == "a[2Jb1mc\td\ne[/INST][red]\n"
    assert said(chat)[1] == evil
    assert clean("é☃\u202a") == "é☃\u202a"


def test_thoughts_are_kept_apart(capsys: Capture) -> None:
    model = FakeModel({"x": "<think>\nhm\n</think>\n\nFour."}, files=sidecars(QWEN3))
    chat = talk(model, "x")
    assert chat.messages[1] == {
        "role": "assistant",
        "content": "Four.",
        "reasoning_content": "hm",
    }
    assert capsys.readouterr().out.strip() == "Four."


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "inside", "thought", "answer"),
    [
        ("plain </think> text", False, "", "plain </think> text"),
        ("<think>a</think>b<think>c", False, "a", "b<think>c"),
        ("\n<think>a<b</thin", False, "a<b</thin", "\n"),
        ("a</think>b", True, "a", "b"),
        ("a <think> b", False, "", "a <think> b"),
        ("<thin", False, "", "<thin"),
    ],
)
def test_splitting_thoughts(text: str, inside: bool, thought: str, answer: str, size: int) -> None:
    thoughts = Thoughts(inside=inside)
    parts = [p for i in range(0, len(text), size) for p in thoughts.push(text[i : i + size])]
    parts += thoughts.flush()
    assert (thoughts.thought, thoughts.answer) == (thought, answer)
    assert "".join(p for kind, p in parts if kind == "answer") == answer


def test_the_stats_line() -> None:
    chat = talk(FakeModel({"x": "abc"}), "x")
    assert chat.last is not None
    line = answer_line(chat.last, 61, 4096)
    assert line.startswith("3 tok · ")
    assert line.endswith(" · hit 90 % · ctx 61/4,096")
    assert [seconds(t) for t in (0.04, 9.94, 12.4, 200)] == ["0.0 s", "9.9 s", "12 s", "3 min 20 s"]


def test_every_answer_is_measured_for_later_forecasts() -> None:
    model = FakeModel({"x": "abc", "y": "de"})
    talk(model, "x", "y")
    first, second = (meter.told for meter in model.meters)
    assert [len(told) for told in (first, second)] == [2, 2]
    prompt, computed, decoded = first[1]
    assert (prompt, decoded) == (computed, 2)
    assert 0 < second[1][1] < second[1][0]  # what was kept of the conversation was not computed


def test_interrupt_is_a_wish_then_an_order() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        interrupt.check()
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(Stopped):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_reading_a_pipe_leaves() -> None:
    with pytest.raises(KeyboardInterrupt):
        talk(None, KeyboardInterrupt, "never")
