"""The slash commands of a conversation. A new one is a function and a line in COMMANDS."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from moelite.cli import sessions
from moelite.cli.common import state_folder, stderr_console
from moelite.cli.footprint import show
from moelite.cli.render import lookahead_line, stats_table
from moelite.errors import UsageError
from moelite.units import show_bytes

if TYPE_CHECKING:
    from moelite.cli.repl import Conversing


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """run(conversing, argument) does it; False leaves the conversation. usage: its argument."""

    run: Callable[[Conversing, str], bool | None]
    about: str
    usage: str = ""


def run_command(chat: Conversing, text: str) -> bool:
    """Do a line that starts with "/"; False leaves. An unknown command never reaches the model."""
    name, _, argument = text.strip().partition(" ")
    command = COMMANDS.get(name.lower())
    if command is None:
        near = difflib.get_close_matches(name.lower(), COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
        raise UsageError(f"there is no command {name}", fix=f"{hint} (// sends a / to the model)")
    return command.run(chat, argument.strip()) is not False


def _help(chat: Conversing, argument: str) -> None:
    width = max(len(f"{name} {c.usage}") for name, c in COMMANDS.items())
    for name, command in COMMANDS.items():
        if name not in _ALIASES:
            chat.say(f"  {f'{name} {command.usage}':<{width}}  {command.about}")
    chat.say('  Alt+Enter or """ for several lines · // sends a / to the model')
    chat.say("  Ctrl-C stops an answer and keeps it · Ctrl-D leaves")


def _system(chat: Conversing, argument: str) -> None:
    if not argument:
        chat.say(
            f"system: {chat.system}" if chat.system else "no system prompt; /system TEXT sets one"
        )
        return
    chat.system = "" if argument == "off" else argument
    chat.say(
        "system prompt removed" if not chat.system else "system prompt set, from the next answer on"
    )


def _clear(chat: Conversing, argument: str) -> None:
    chat.messages.clear()
    chat.asked = None
    chat.session.truncate(0)
    chat.say("the conversation starts anew" + (" (the system prompt stays)" if chat.system else ""))


def _retry(chat: Conversing, argument: str) -> None:
    question = chat.asked
    if question is None:
        raise UsageError("there is nothing to retry", fix="ask something first")
    kept = list(chat.messages)
    if kept and kept[-2]["content"] == question:
        del chat.messages[-2:]
    before = len(chat.messages)
    chat.ask(question)
    if len(chat.messages) == before:  # no new answer came: the old one stays
        chat.messages[:] = kept


def _undo(chat: Conversing, argument: str) -> None:
    if not chat.messages:
        raise UsageError("there is nothing to undo", fix="ask something first")
    question = chat.messages[-2]["content"]
    del chat.messages[-2:]
    chat.asked = chat.messages[-2]["content"] if chat.messages else None
    chat.say(f"forgot the last turn ({_brief(question)})")


def _drop(chat: Conversing, argument: str) -> None:
    if not chat.messages:
        raise UsageError(
            "there is nothing to drop", fix="shorten the question or the system prompt"
        )
    question = chat.messages[0]["content"]
    del chat.messages[:2]
    chat.say(f"forgot the oldest turn ({_brief(question)}); {len(chat.messages) // 2} left")


def _save(chat: Conversing, argument: str) -> None:
    path = sessions.user_path(argument) if argument else chat.saved_to
    if path is None:
        path = sessions.new_path(state_folder())
    talk = sessions.Conversation(model=chat.name, system=chat.system, messages=tuple(chat.messages))
    sessions.save(path, talk)
    chat.saved_to = path
    chat.say(f"saved {len(chat.messages) // 2} turns to {path}")


def _load(chat: Conversing, argument: str) -> None:
    if not argument:
        found = sorted((state_folder() / "sessions").glob("*.jsonl"))[-10:]
        names = "\n".join(f"  {path}" for path in found)
        chat.say(
            f"/load FILE; saved here:\n{names}" if found else "/load FILE; nothing is saved yet"
        )
        return
    path = sessions.user_path(argument)
    talk = sessions.load(path)
    if len(talk.messages) % 2:
        raise UsageError(f"{path} ends with a question", fix="add its answer, or remove it")
    chat.messages = [dict(m) for m in talk.messages]
    chat.system = talk.system
    chat.asked = chat.messages[-2]["content"] if chat.messages else None
    chat.saved_to = path
    origin = "" if talk.model == chat.name else f" (held with {talk.model})"
    chat.say(f"loaded {len(chat.messages) // 2} turns{origin}; the next answer reads them first")


_NUMBERS = {"max_tokens": int, "top_k": int, "seed": int}
_SETTABLE = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "seed", "stop"),
)


def _set(chat: Conversing, argument: str) -> None:
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise UsageError(f"/set {argument}: {error}", fix="close the quotes") from error
    if not words:
        for name in _SETTABLE:
            _show_setting(chat, name)
        return
    name, *values = words
    if name not in _SETTABLE:
        near = difflib.get_close_matches(name, _SETTABLE, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_SETTABLE)}"
        raise UsageError(f"there is no setting {name}", fix=hint)
    if values:
        chat.options = chat.options.updated(**{name: _setting(chat, name, values)})
    _show_setting(chat, name)


def _setting(chat: Conversing, name: str, values: list[str]) -> Any:
    """The value that the words after `/set NAME` mean."""
    if values == ["default"]:
        return getattr(chat.advised, name)
    if values == ["off"]:
        return {f.name: f.default for f in fields(chat.options)}[name]
    if name == "stop":
        return tuple(v.replace("\\n", "\n").replace("\\t", "\t") for v in values)
    try:
        (value,) = values
        return _NUMBERS.get(name, float)(value)
    except ValueError as error:
        raise UsageError(
            f"/set {name} {' '.join(values)}: not a number", fix=f"/set {name} NUMBER|off|default"
        ) from error


def _show_setting(chat: Conversing, name: str) -> None:
    value = getattr(chat.options, name)
    origin = "you" if value != getattr(chat.advised, name) else "default"
    shown = " ".join(map(repr, value)) if name == "stop" else value
    chat.say(f"  {name:<20} {'off' if value in (None, ()) else shown!s:<12} ({origin})")


def _mem(chat: Conversing, argument: str) -> None:
    from moelite.process import peak_rss_bytes, rss_bytes

    console = chat.console if chat.paper.terminal else stderr_console()
    show(console, chat.name, chat.model.footprint)
    now, peak = show_bytes(rss_bytes()), show_bytes(peak_rss_bytes())
    chat.say(f"  this process holds {now} now, {peak} at most so far")


def _stats(chat: Conversing, argument: str) -> None:
    total = chat.model.stats()
    rows = stats_table(chat.last, total, chat.forecast)
    rows.append(("lookahead", lookahead_line(chat.model.lookahead, total)))
    if by := getattr(chat.model, "nf4_by", ""):  # of a model on a device
        rows.append(("nf4 on the device", by))
    rows.append(("context", f"{len(chat.session.ids):,} of {chat.session.context:,} tokens"))
    for name, value in rows:
        chat.say(f"  {name:<22} {value}")


def _quit(chat: Conversing, argument: str) -> bool:
    return False


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"


COMMANDS = {
    "/help": Command(run=_help, about="this list"),
    "/system": Command(
        run=_system, about="show, set or remove the system prompt", usage="[TEXT|off]"
    ),
    "/clear": Command(run=_clear, about="forget the conversation"),
    "/retry": Command(run=_retry, about="answer the last question again"),
    "/undo": Command(run=_undo, about="forget the last question and answer"),
    "/drop": Command(run=_drop, about="forget the oldest question and answer"),
    "/save": Command(run=_save, about="keep the conversation in a file", usage="[FILE]"),
    "/load": Command(run=_load, about="go on with a kept conversation", usage="FILE"),
    "/set": Command(run=_set, about="show or change how words are picked", usage="[NAME VALUE]"),
    "/mem": Command(run=_mem, about="where the memory goes"),
    "/stats": Command(run=_stats, about="times and expert hits"),
    "/quit": Command(run=_quit, about="leave (also Ctrl-D)"),
    "/exit": Command(run=_quit, about="leave"),
    "/?": Command(run=_help, about="this list"),
}
_ALIASES = ("/exit", "/?")
