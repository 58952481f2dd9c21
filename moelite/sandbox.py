"""A jinja2 environment for chat templates, which are code that came with somebody's weights.

jinja2's own sandbox keeps a template away from Python's internals; it bounds neither memory nor
time. Here every value that a template builds has a bounded weight (characters plus elements, shared
parts counted each time), so that every single step of C code is short; and the steps are Python, so
that a deadline can stop them. What may grow a value is checked before it does: literals, operators,
filters, string methods, calls, and the joining of output.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_WEIGHT = 8_000_000  # characters plus elements of one value: a prompt of 2 million tokens
MAX_NUMBER = 10_000  # a width, a precision or an indentation
MAX_BITS = 4096  # of an integer
MAX_DEPTH = 64  # of lists in lists

_T = TypeVar("_T")

_FILTERS = """
    abs batch capitalize count d default dictsort e escape first float format groupby
    indent int items join last length list lower map max min reject rejectattr replace
    reverse round safe select selectattr slice sort string striptags sum title tojson trim
    truncate unique upper wordcount
""".split()  # noqa: SIM905 - forty words read better than forty strings
_STRING_METHODS = frozenset(
    """
    capitalize casefold center count endswith find format index isalnum isalpha isascii
    isdecimal isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip
    partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit
    rstrip split splitlines startswith strip swapcase title upper zfill
    """.split()  # noqa: SIM905
)
# a width of five digits, or one that comes from the arguments
_WIDE = re.compile(r"\d{5,}|%[-+ #0]*\*|%[-+ #0]*\d*\.\*|\{[^{}]*:[^{}]*\{")
_WITH_NUMBERS = frozenset({"batch", "round", "slice", "truncate"})


class LimitError(Exception):
    """A template asked for more memory or time than a chat prompt can need."""


def weight(value: Any) -> int:
    """Characters plus elements of `value`, shared parts counted each time. Raises LimitError."""
    if isinstance(value, str):
        total = len(value)
    elif isinstance(value, int):
        total = 1 if value.bit_length() <= MAX_BITS else MAX_WEIGHT + 1
    elif isinstance(value, list | tuple | dict):
        total = _weigh(value)
    else:
        total = 1
    if total > MAX_WEIGHT:
        raise LimitError("it builds a value that is too large")
    return total


def _weigh(value: Any) -> int:
    total, stack = 0, [(value, 0)]
    while stack and total <= MAX_WEIGHT:
        item, depth = stack.pop()
        if isinstance(item, str):
            total += len(item) + 1
        elif isinstance(item, list | tuple | dict):
            if depth > MAX_DEPTH:
                raise LimitError("it nests lists too deeply")
            parts = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            total += 1 + len(parts)
            stack += [
                (part, depth + 1) for part in parts if isinstance(part, str | list | tuple | dict)
            ]
        else:
            total += 1
    return total


def bounded(value: _T) -> _T:
    """`value`, if it is small enough."""
    weight(value)
    return value


def concat(pieces: Iterable[str]) -> str:
    """ "".join, refusing before it builds too much."""
    parts, total = [], 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_WEIGHT:
            raise LimitError("its output is too long")
        parts.append(piece)
    return "".join(parts)


def _check_arguments(args: Iterable[Any]) -> None:
    for arg in args:
        if isinstance(arg, int) and abs(arg) > MAX_NUMBER:
            raise LimitError(f"it asks for a width of {arg}")


def _text_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    """Refuse a call of str.<name> whose result would be too large."""
    if name not in _STRING_METHODS:
        raise jinja2.exceptions.SecurityError(f"a chat template may not call str.{name}")
    if name == "replace" and len(args) >= 2:
        places = text.count(str(args[0])) if args[0] else len(text) + 1
        if places * len(str(args[1])) > MAX_WEIGHT:
            raise LimitError("it builds a value that is too large")
    elif name == "format":
        if _WIDE.search(text):
            raise LimitError("it asks for a wide field")
        if (text.count("{") + 1) * weight(list(args)) > MAX_WEIGHT:
            raise LimitError("it builds a value that is too large")
    elif name in {"center", "ljust", "rjust", "zfill"}:
        _check_arguments(args)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """json.dumps: unlike jinja2's own filter it escapes no HTML."""
    spread = len(indent) if isinstance(indent, str) else indent or 0
    if weight(x) * (1 + spread) > MAX_WEIGHT:
        raise LimitError("it indents too much JSON")
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = [item if attribute is None else item[attribute] for item in value]
    return concat(
        piece for i, item in enumerate(items) for piece in ((str(d) if i else ""), str(item))
    )


def _replace(s: Any, old: str, new: str, count: int | None = None) -> str:
    _text_method(str(s), "replace", (old, new))
    return str(s).replace(str(old), str(new), -1 if count is None else count)


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    return _percent(str(value), kwargs or args)


def _percent(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        if _WIDE.search(left):
            raise LimitError("it asks for a wide field")
        if (left.count("%") + 1) * weight(right) > MAX_WEIGHT:
            raise LimitError("it builds a value that is too large")
    return left % right


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(s)
    size = len(width) if isinstance(width, str) else abs(width)
    if (text.count("\n") + 1) * size > MAX_WEIGHT:
        raise LimitError("it indents too much")
    return do_indent(text, width, first, blank)


def _guard(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with its numbers and its result checked. Keeps jinja2's marks (pass_environment)."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if name in _WITH_NUMBERS:
            _check_arguments((*args[1:], *kwargs.values()))
        return bounded(function(*args, **kwargs))

    guarded.__dict__.update(getattr(function, "__dict__", {}))
    return guarded


class _Generator(CodeGenerator):
    """Sends literals and `~` through the environment's checks."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.tie((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.bounded(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.bounded(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.bounded(")
        super().visit_Tuple(node, frame)
        self.write(")")


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}, which marks training text: here just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """`dict(...)` for templates: callable, and nothing to climb out by."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """A namespace that refuses names with an underscore in front, and prints nothing of itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # no named self, so that `namespace(self=...)` works as in jinja2
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _Namespace.check(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace.check(name)
        super().__setitem__(name, bounded(value))

    def __repr__(self) -> str:
        return "<Namespace>"

    @staticmethod
    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that transformers gives to chat templates, bounded."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(concat)
    bounded = staticmethod(bounded)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # folding constants would run before the deadline
            extensions=[_GenerationTag, loopcontrols],
        )
        own: dict[str, Callable[..., Any]] = {
            "format": _format,
            "indent": _indent,
            "join": _join,
            "replace": _replace,
            "tojson": _tojson,
        }
        self.filters = {n: _guard(n, own.get(n) or self.filters[n]) for n in _FILTERS}
        self.globals = {
            "range": self.globals["range"],
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
        }

    def tie(self, parts: Iterable[Any]) -> str:
        """a ~ b ~ c."""
        return concat(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """One of + * ** %, refused where its result would be too large."""
        if operator == "%":
            return bounded(_percent(left, right))
        if operator == "**":
            if _bits(left) * abs(int(right)) > MAX_BITS:
                raise LimitError("it computes a number that is too large")
        elif operator == "*":
            sized, times = (left, right) if isinstance(right, int) else (right, left)
            repeats = isinstance(sized, str | list | tuple) and isinstance(times, int)
            if repeats and weight(sized) * abs(times) > MAX_WEIGHT:
                raise LimitError("it builds a value that is too large")
        elif weight(left) + weight(right) > MAX_WEIGHT:
            raise LimitError("it builds a value that is too large")
        return bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call in a template, refused where its result would be too large."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            name = method.__name__
            if name == "join" and len(args) == 1:
                return concat(_between(owner, args[0]))
            _text_method(owner, name, (*args, *kwargs.values()))
        return bounded(super().call(__context, __obj, *args, **kwargs))


def _between(separator: str, items: Iterable[str]) -> Iterator[str]:
    for i, item in enumerate(items):
        if i:
            yield separator
        yield item


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > MAX_NUMBER or _WIDE.search(format):
        raise LimitError("it asks for a wide field")
    return datetime.now().strftime(format)


def plain(value: Any) -> Any:
    """`value` rebuilt from plain JSON types: objects with methods never reach a template."""
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Stop the Python code inside after `seconds` with LimitError, at the next line it runs."""
    end = time.monotonic() + seconds
    before = sys.gettrace()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise LimitError(f"it runs longer than {seconds:g} s")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
