"""NamedTuples as rows of int64 words, so that compiled code gets its arguments without Python.

An array is two words, its address and its size; the caller keeps it alive. A float32 is its bits, a
nested tuple the words of its fields. `words_of` writes a row, the `reader` of a class makes the
compiled function that reads it back: about 3 microseconds of Python a call become one load a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt

from moelite import raw
from moelite.jit import inner
from moelite.quant.base import F32, U8

I8 = npt.NDArray[np.int8]
U16 = npt.NDArray[np.uint16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_ARRAYS = (
    (F32, "f32_at"),
    (U8, "u8_at"),
    (I8, "i8_at"),
    (U16, "u16_at"),
    (I32, "i32_at"),
    (I64, "i64_at"),
)


def words_of(value: Any) -> list[int]:
    """The words of a NamedTuple, an array or a number. ValueError if an array is not contiguous."""
    if isinstance(value, tuple):
        return [word for part in value for word in words_of(part)]
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError("an array must be contiguous to be named by its address")
        return [value.ctypes.data, value.size]
    if isinstance(value, np.floating):
        return [int(np.float32(value).view(np.int32))]
    return [int(value)]


def size_of(kind: Any) -> int:
    """How many words a field or a NamedTuple class takes."""
    if any(kind == array for array, _ in _ARRAYS):
        return 2
    if isinstance(kind, type) and hasattr(kind, "_fields"):
        return sum(size_of(field) for field in get_type_hints(kind).values())
    if kind in (int, bool, np.float32):
        return 1
    raise TypeError(f"{kind} has no words")


def value_text(kind: Any, at: int, word: Callable[[int], str], scope: dict[str, Any]) -> str:
    """The expression, in compiled code, of the `kind` whose words are word(at), word(at + 1), ...

    scope: gets the names that the expression uses.
    """
    for array, maker in _ARRAYS:
        if kind == array:
            scope[maker] = getattr(raw, maker)
            return f"{maker}({word(at)}, {word(at + 1)})"
    if kind is np.float32:
        scope["f32_of"] = raw.f32_of
        return f"f32_of({word(at)})"
    if kind in (int, bool):
        return word(at) if kind is int else f"{word(at)} != 0"
    scope[kind.__name__] = kind
    parts = []
    for part in get_type_hints(kind).values():
        parts.append(value_text(part, at, word, scope))
        at += size_of(part)
    return f"{kind.__name__}({', '.join(parts)})"


def reader(kind: Any, name: str, start: int = 0) -> Any:
    """The compiled read(words, at): the `kind` whose words begin at words[at + start]."""
    scope: dict[str, Any] = {"__name__": __name__}
    text = value_text(kind, start, "words[at + {}]".format, scope)
    exec(f"def read(words, at):\n    return {text}", scope)
    return inner(scope["read"], name)


def flat_text(kind: Any, value: str) -> list[str]:
    """Expressions, in compiled code, for the words of a `kind` held in the variable `value`."""
    if any(kind == array for array, _ in _ARRAYS):
        return [f"address({value})", f"{value}.size"]
    if kind is int:
        return [value]
    hints = get_type_hints(kind)
    return [t for name, part in hints.items() for t in flat_text(part, f"{value}.{name}")]


def offset_of(kind: Any, path: str) -> int:
    """How many words of a `kind` come before one of its fields, dotted."""
    return _field(kind, path)[0]


def _field(kind: Any, path: str) -> tuple[int, Any]:
    at, part = 0, kind
    for name in path.split("."):
        hints = get_type_hints(part)
        at += sum(size_of(hints[before]) for before in list(hints)[: list(hints).index(name)])
        part = hints[name]
    return at, part


@functools.cache
def field(kind: Any, path: str) -> Any:
    """The compiled read(words, at) of one field, dotted, of the `kind` that begins at words[at]."""
    at, part = _field(kind, path)
    return reader(part, f"{kind.__name__}.{path}", at)
