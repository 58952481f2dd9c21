"""Where a line comes from: prompt-toolkit between two terminals, plain lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completion
    from prompt_toolkit.key_binding import KeyBindings

PROMPT, MORE = "> ", ". "
FENCE = '"""'


class LineReader(Protocol):
    """Gives what the user typed; EOFError at the end, KeyboardInterrupt on Ctrl-C."""

    def read(self, prompt: str) -> str: ...


class PlainLines:
    """Lines of stdin. The prompt is shown (on stderr) only if somebody types at a terminal."""

    def read(self, prompt: str) -> str:
        if sys.stdin.isatty():
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class Editor:
    """A line editor with history, a menu of commands, and multi-line input.

    Alt+Enter (or Esc, Enter) makes a new line; a pasted text stays one input.
    """

    def __init__(self, commands: Mapping[str, str], history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if history is None else FileHistory(str(history)),
            completer=_completer(commands),
            complete_while_typing=True,
            key_bindings=_keys(),
            prompt_continuation=lambda width, number, wrapped: MORE.rjust(width),
            reserve_space_for_menu=5,
        )

    def read(self, prompt: str) -> str:
        return self._session.prompt(prompt)


def read_message(reader: LineReader) -> str:
    '''One message: a line, or everything between a line that starts with """ and its end.'''
    line = reader.read(PROMPT)
    if not line.startswith(FENCE):
        return line
    text = line.removeprefix(FENCE)
    while FENCE not in text:
        text += "\n" + reader.read(MORE)
    return text[: text.index(FENCE)].strip("\n")


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def newline(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(commands: Mapping[str, str]) -> Any:
    from prompt_toolkit.completion import Completer, Completion

    class Commands(Completer):
        def get_completions(self, document: Any, event: Any) -> Iterable[Completion]:
            return completions(document.text)

    def completions(text: str) -> Iterator[Completion]:
        if text.startswith("/") and not text.startswith("//"):
            for name, about in commands.items():
                if name.startswith(text):
                    yield Completion(name, start_position=-len(text), display_meta=about)

    return Commands()
