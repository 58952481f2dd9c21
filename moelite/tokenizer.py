"""Text to token ids and back, from a checkpoint's tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from moelite.errors import CheckpointError
from moelite.template import ChatTemplate, Message, find_template, read_json, special_tokens

# Private-use characters around a control token that a user spelled, as transformers does it.
_START, _END = "\U000f0000", "\U000f0001"


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    eos_ids: every id that ends an answer. bos_id: the beginning-of-text id, if there is one.
    vocab_size: ids are below it (added tokens included).
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        eos_ids: frozenset[int] = frozenset(),
        bos_id: int | None = None,
        template: ChatTemplate | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._inner = inner
        self._inner.no_truncation()
        self._inner.no_padding()
        self.eos_ids = eos_ids
        self.bos_id = bos_id
        self.template = template
        self.generation_config = dict(generation_config or {})
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """From file bytes by file name. Raises CheckpointError without a usable tokenizer.json."""
        if "tokenizer.json" not in files:
            raise CheckpointError(
                "the checkpoint has no tokenizer.json",
                fix="transformers writes it: AutoTokenizer.from_pretrained(A).save_pretrained(B)",
            )
        try:
            inner = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"tokenizer.json cannot be read: {error}", fix="download it again"
            ) from error
        tokens = special_tokens(files)
        source = find_template(files)
        bos = tokens.get("bos_token")
        return cls(
            inner,
            eos_ids=_eos_ids(inner, files, tokens),
            bos_id=None if bos is None else inner.token_to_id(bos),
            template=None if source is None else ChatTemplate(source, tokens),
            generation_config=read_json(files, "generation_config.json"),
        )

    @property
    def has_template(self) -> bool:
        return self.template is not None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of `text`. special: also what tokenizer.json puts around a text (a BOS)."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens left out; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> TextStream:
        """Decodes one id after the other."""
        return TextStream(self)

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells one id."""
        found: str | None = self._inner.id_to_token(token_id)
        return found

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text for `messages`. Raises CheckpointError if there is no chat template."""
        return self._template().render_chat(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of the rendered `messages`.

        Control tokens come from the template alone: a message that spells one stays text.
        """
        marked = [_mark(message, self._control_text) for message in messages]
        text = self._template().render_chat(marked, add_generation_prompt=add_generation_prompt)
        if _START not in text and _END not in text:
            return self.encode(text, special=False)
        return self._encode_marked(text)

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise CheckpointError("the model has no chat template", fix="use --raw with `run`")
        return self.template

    @cached_property
    def _control_text(self) -> re.Pattern[str]:
        """Matches the added tokens that structure a prompt: special, or written by the template."""
        literals = self.template.literals if self.template is not None else ""
        added = self._inner.get_added_tokens_decoder().values()
        tokens = [t.content for t in added if t.special or t.content in literals]
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer without its added tokens: reads every text as text."""
        spec = json.loads(self._inner.to_str())
        spec["added_tokens"] = []
        spec["post_processor"] = None
        return tokenizers.Tokenizer.from_str(json.dumps(spec))

    def _encode_marked(self, text: str) -> list[int]:
        """Ids of a rendered prompt in which a message's control tokens are marked."""
        control = self._control_text.pattern
        pieces = re.split(f"{_START}({control}){_END}|[{_START}{_END}]", text)
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if piece:  # None where a lone marker was, odd where a marked token was
                ids += self._encode_piece(piece, literal=i % 2 == 1, first=i == 0)
        return ids

    def _encode_piece(self, piece: str, *, literal: bool, first: bool) -> list[int]:
        """Ids of a part of a prompt. literal: as plain text, whatever it spells."""
        inner = self._plain if literal else self._inner

        def ids_of(text: str) -> list[int]:
            found: list[int] = inner.encode(text, add_special_tokens=False).ids
            return found

        # behind a newline, so that no tokenizer adds the space it puts at a text's beginning
        newline, ids = ids_of("\n"), ids_of("\n" + piece)
        lone = first or ids[: len(newline)] != newline
        ids = ids_of(piece) if lone else ids[len(newline) :]
        control = self._inner.token_to_id(piece)
        if literal and control in ids:  # the vocabulary itself holds the spelling as one piece
            ids = [i for char in piece for i in self._encode_char(char)]
        return ids

    def _encode_char(self, char: str) -> list[int]:
        found: list[int] = self._plain.encode(char, add_special_tokens=False).ids
        return found


class TextStream:
    """Text of ids that arrive one by one; never half a character.

    The text of a window of ids is compared with that of the window without its newest ids: what
    is added is new. It works with any decoder, also those that treat the first id differently.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        self._start = 0  # first id of the window
        self._told = 0  # ids whose text is out

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        new = self._fresh()
        if not new or new.endswith("\ufffd"):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return new

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD. The stream is then at its end."""
        new = self._fresh()
        self._start = self._told = len(self._ids)
        return new

    def _fresh(self) -> str:
        before = self._decode(self._ids[self._start : self._told])
        return self._decode(self._ids[self._start :])[len(before) :]


def _mark(value: Any, control: re.Pattern[str]) -> Any:
    """`value` with the control tokens in its strings put between markers."""
    if isinstance(value, str):
        clean = value.replace(_START, "").replace(_END, "")
        return control.sub(f"{_START}\\g<0>{_END}", clean)
    if isinstance(value, Mapping):
        return {key: item if key == "role" else _mark(item, control) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(item, control) for item in value]
    return value


def _eos_ids(
    inner: tokenizers.Tokenizer, files: Mapping[str, bytes], tokens: Mapping[str, str]
) -> frozenset[int]:
    """Every id that some file says ends a text."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        found |= _as_ids(read_json(files, name).get("eos_token_id"), name)
    if (token := tokens.get("eos_token")) is not None:
        known = inner.token_to_id(token)
        found |= set() if known is None else {known}
    return frozenset(found)


def _as_ids(value: Any, name: str) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{name}: eos_token_id is {value!r}, not an id or a list of ids")
    return set(ids)
