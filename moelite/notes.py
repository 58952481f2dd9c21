"""What was measured on this machine, kept in the cache folder as small JSON files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path


def read_notes(name: str, folder: Path | None = None) -> dict[str, Any]:
    """What `write_notes` wrote; {} if there is none, or none that can be read.

    folder: instead of the cache folder.
    """
    try:
        found = json.loads(((folder or user_cache_path("moelite")) / name).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_notes(name: str, notes: dict[str, Any], folder: Path | None = None) -> None:
    """Keeps a small JSON object; a folder that cannot be written does no harm."""
    with contextlib.suppress(OSError):
        folder = folder or user_cache_path("moelite")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{name}.{os.getpid()}.part"
        temporary.write_text(json.dumps(notes, indent=1, sort_keys=True))
        temporary.replace(folder / name)
