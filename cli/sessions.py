"""Conversations on disk: JSON lines, the first one says what the file is."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelite.errors import UsageError

VERSION = 1
_KEY = "moelite_session"
_ROLES = ("user", "assistant")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a session file holds. messages: user and assistant turns; system: "" for none."""

    model: str
    system: str
    messages: tuple[Message, ...]


def user_path(text: str) -> Path:
    """The path a user typed: quotes around it and a leading ~ mean what they do in a shell."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1]
    return Path(text).expanduser()


def new_path(folder: Path) -> Path:
    """A name for a conversation that was not given one."""
    return folder / "sessions" / time.strftime("%Y-%m-%d-%H%M%S.jsonl")


def save(path: Path, conversation: Conversation) -> None:
    """Write a session file: whole or not at all, readable by its owner only.

    Raises UsageError where it cannot be written, or would replace a file that is no session.
    """
    if path.exists():
        load(path)
    head = {_KEY: VERSION, "model": conversation.model, "system": conversation.system}
    lines = [json.dumps(item, ensure_ascii=False) for item in (head, *conversation.messages)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", fix="name a file in a folder of yours"
        ) from error


def load(path: Path) -> Conversation:
    """Read a session file. Raises UsageError if there is none, or it is something else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise _foreign(path) from error
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", fix="name a file that /save wrote"
        ) from error
    try:
        head, *messages = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise _foreign(path) from error
    if not isinstance(head, dict) or _KEY not in head:
        raise _foreign(path)
    if head[_KEY] != VERSION:
        raise UsageError(
            f"{path} is a session of version {head[_KEY]}; this moelite reads version {VERSION}",
            fix="use the moelite that wrote it",
        )
    if not all(_is_message(m) for m in messages) or not _in_turns(messages):
        raise _foreign(path)
    system, model = head.get("system", ""), head.get("model", "")
    if not isinstance(system, str) or not isinstance(model, str):
        raise _foreign(path)
    return Conversation(model=model, system=system, messages=tuple(messages))


def private_file(path: Path) -> Path:
    """Make `path` a file that only its owner reads; its folders too if they are new."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
    path.chmod(0o600)
    return path


def _replace(path: Path, text: str) -> None:
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in _ROLES
        and isinstance(value.get("content"), str)
    )


def _in_turns(messages: Sequence[Message]) -> bool:
    return all(m["role"] == _ROLES[i % 2] for i, m in enumerate(messages))


def _foreign(path: Path) -> UsageError:
    return UsageError(
        f"{path} is not a saved conversation", fix="name a file that /save wrote, or a new one"
    )
