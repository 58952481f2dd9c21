"""The command line: parse, call the core, show. No maths here."""

from __future__ import annotations

if __name__ != "moelite.cli":
    raise ImportError("import moelite.cli, not cli (run `pip install -e .` first)")
