"""A model's own chat template: messages in, the prompt's text out.

The template is found in chat_template.jinja or in tokenizer_config.json ("chat_template", a string
or a list of named ones) and rendered as transformers renders it, in a bounded sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from moelite.errors import CheckpointError
from moelite.sandbox import ChatEnvironment, LimitError, deadline, plain

MAX_SOURCE = 1 << 20  # characters of a template
TIME_LIMIT_S = 5.0

_REASONING = ("reasoning_content", "thinking", "reasoning")
_FAILURES = (
    *(jinja2.TemplateError, LimitError, RecursionError, MemoryError),
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
)

Message = Mapping[str, Any]


class TemplateError(CheckpointError):
    """The template refused the messages (as some do with a system role) or could not run."""


class ChatTemplate:
    """One compiled chat template.

    source: jinja2 text. special_tokens: bos_token, eos_token and so on, as the template sees them.
    Raises CheckpointError if the text is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        if len(source) > MAX_SOURCE:
            raise CheckpointError(
                f"the chat template has {len(source):,} characters; at most {MAX_SOURCE:,} are"
                " read",
                fix="use --raw, which needs no template",
            )
        environment = ChatEnvironment()
        try:
            with deadline(TIME_LIMIT_S):
                self._template = environment.from_string(source)
                tree = environment.parse(source)
        except _FAILURES as error:
            raise CheckpointError(
                f"the model's chat template cannot be read: {_reason(error)}",
                fix="use --raw, which needs no template",
            ) from error
        texts = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
        texts |= {c.value for c in tree.find_all(jinja2.nodes.Const) if isinstance(c.value, str)}
        self.literals = "\0".join(texts)  # what the template itself may write

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        time_limit_s: float = TIME_LIMIT_S,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`: dicts with "role" and "content", plain JSON values.

        variables: what else the template may ask for (tools, enable_thinking, ...).
        Raises TemplateError if the template refuses the messages, fails, or exceeds its limits.
        """
        chat = [_with_reasoning(plain(message)) for message in messages]
        values = {"tools": None, "documents": None} | self._special_tokens | plain(variables)
        try:
            with deadline(time_limit_s):
                return self._template.render(
                    messages=chat, add_generation_prompt=add_generation_prompt, **values
                )
        except _FAILURES as error:
            raise TemplateError(
                f"the model's chat template failed: {_reason(error)}",
                fix="use --raw, which needs no template",
            ) from error

    def render_chat(self, messages: Sequence[Message], **variables: Any) -> str:
        """Like `render`, but a template that refuses the system role gets it in the first turn."""
        try:
            return self.render(messages, **variables)
        except TemplateError:
            merged = merge_system(messages)
            if merged is None:
                raise
            return self.render(merged, **variables)


def merge_system(messages: Sequence[Message]) -> list[Message] | None:
    """`messages` with a leading system message moved into the first user message, if both exist."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def find_template(files: Mapping[str, bytes]) -> str | None:
    """The template's text among a checkpoint's files (bytes by name), or None."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"chat_template.jinja is not UTF-8: {error}") from error
    found = read_json(files, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = {t["name"]: t["template"] for t in found if isinstance(t, dict) and "name" in t}
        found = named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else None


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """bos_token, eos_token and the like, from tokenizer_config.json and special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_json(files, name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if re.fullmatch(r"[a-z_]+_token", key) and isinstance(text, str):
                found[key] = text
    return found


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in `files[name]`; empty if there is no such file. Raises CheckpointError."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON: {error}", fix="download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds no JSON object", fix="download it again")
    return value


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under every name that templates read it by."""
    thought = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    return str(error) or type(error).__name__
