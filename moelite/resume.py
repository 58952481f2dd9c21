"""What an earlier run of quantize left in a store's folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelite.errors import StoreError
from moelite.packing import TEMPORARY, size_of
from moelite.storefile import (
    MANIFEST,
    PARTIAL,
    FileEntry,
    LayerEntry,
    TensorClass,
    check_version,
    file_entry,
    layer_entry,
    read_json,
    read_manifest,
)


@dataclass(slots=True)
class State:
    """What is in the folder already. dense: layers that are packed in a dense file that is still
    being written; None if there is none."""

    finished: bool = False
    kept: dict[str, FileEntry] = field(default_factory=dict)
    entries: dict[int, LayerEntry] = field(default_factory=dict)
    dense: list[int] | None = None
    classes: tuple[TensorClass, ...] = ()


def look(out: Path, wanted: dict[str, Any]) -> State:
    """Finished, begun or nothing. wanted: what tells the store from others, as in its manifest.

    Raises StoreError for a folder that is not this store's.
    """
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file", fix="name a new folder")
    present = {p.name for p in out.iterdir()} if out.exists() else set()
    dense = None
    if not present - {PARTIAL + TEMPORARY}:
        return State()
    if MANIFEST in present:
        manifest = read_manifest(out / MANIFEST)
        _refuse_other(out, {k: getattr(manifest, k) for k in wanted}, wanted)
        files, entries = manifest.files, manifest.layers
    elif PARTIAL in present:
        raw = read_json(out / PARTIAL)
        check_version(out / PARTIAL, raw)
        _refuse_other(out, raw, wanted)
        files = {name: file_entry(entry) for name, entry in raw.get("files", {}).items()}
        entries = {int(k): layer_entry(v) for k, v in raw.get("layers", {}).items()}
        dense = raw.get("dense")
    else:
        raise StoreError(
            f"{out} is not empty and not a store: it holds {sorted(present)[0]}",
            fix="name a new folder; nothing was touched",
        )
    kept = {n: e for n, e in files.items() if size_of(out / n) == e.bytes}
    finished = MANIFEST in present and kept == files
    return State(finished=finished, kept=kept, entries=entries, dense=dense)


def _refuse_other(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    def show(facts: dict[str, Any]) -> str:
        recipe = facts.get("recipe")
        found = recipe if isinstance(recipe, dict) else {}
        names = [key for key in ("experts", "dense", "low", "rule") if key in found]
        rest = ", ".join(f"{key} {found[key]}" for key in names)
        text = facts.get("calibration")
        rest += f", calibrated by {text['ids'][:8]}" if isinstance(text, dict) else ""
        return f"{facts.get('source')} with {rest}"

    if any(found.get(key) != value for key, value in wanted.items()):
        other = "" if show(found) != show(wanted) else " (the same name, other weights)"
        raise StoreError(
            f"{out} is the store of {show(found)}; asked for {show(wanted)}{other}",
            fix="name a new folder, or delete this one",
        )
