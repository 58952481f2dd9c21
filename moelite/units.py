"""Sizes as people type them ("6GiB", "80%") and as the program holds them (int bytes).

The only place that knows 2**30. A bare suffix is binary, as memory is sold: 4G = 4GiB = 4 * 2**30.
"""

from __future__ import annotations

import re

from moelite.errors import UsageError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_FACTOR = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def parse_bytes(text: str | int, *, total: int | None = None) -> int:
    """Bytes named by `text`: an int, "4GiB", "4g", "512 MiB", or "80%" of `total` if it is given.

    Raises UsageError when the text is no size or is not above zero.
    """
    if isinstance(text, int):
        value = text
    elif (match := _PERCENT.fullmatch(text.strip())) and total is not None:
        value = int(total * float(match[1]) / 100)
    elif match := _SIZE.fullmatch(text.strip()):
        value = int(float(match[1]) * _FACTOR[match[2].lower()])
    else:
        raise UsageError(f"{text!r} is not a size", fix="write it as 4GiB, 512MiB or 80%")
    if value <= 0:
        raise UsageError(f"a size must be above zero, not {text!r}", fix="write it as 4GiB")
    return value


def show_bytes(count: int) -> str:
    """`count` bytes in the largest binary unit that keeps it at 1 or more: "3.4 GiB"."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= factor:
            value = count / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{count} B"
