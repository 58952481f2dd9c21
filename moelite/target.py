"""A store of a given size: the recipe that loses least in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moelite.calibrate import Text
from moelite.calibration import must_spill
from moelite.checkpoint import Source
from moelite.errors import StoreError, UsageError
from moelite.inventory import ROUTED, take_inventory
from moelite.models import build
from moelite.quant import FORMATS
from moelite.recipe import Recipe, parse
from moelite.storefile import MANIFEST, PARTIAL, read_json
from moelite.tradeoff import CANDIDATES, experts_room, measure, solve

_HEADERS = 12_288  # bytes of a file's header and of its lines in the manifest, at most

Progress = Callable[[int, int, str], None]


class Target(NamedTuple):
    """How large a store may become. size: bytes of all its files; or bpw: bits for each parameter
    of the model. formats: of experts, to choose from."""

    size: int | None = None
    bpw: float | None = None
    formats: tuple[str, ...] = CANDIDATES


class Way(NamedTuple):
    """How a target is met. out: the store's folder; write: whether it is to be written; budget:
    bytes of memory to use at most."""

    out: Path
    write: bool
    budget: int
    progress: Progress


def fit(source: Source, base: Recipe, target: Target, text: Text | None, way: Way) -> Recipe:
    """`base` with formats of experts chosen for a target; those of the folder, if it has them.

    Raises StoreError for a folder that holds something else, before anything is measured, and
    BudgetError if measuring takes more than the budget.
    """
    arch = build(source.config)
    _check(target)
    inventory = take_inventory(source, replace(base, experts="int4", rules=()))
    size = target.size or int((target.bpw or 0) * inventory.params / 8)
    base = replace(base, rules=(), target=f"{size} bytes of {', '.join(target.formats)}")
    found = _begun(way.out)
    asked = base.target, base.dense, base.low
    if found is not None and (found.target, found.dense, found.low) == asked:
        return found
    if way.write and way.out.exists() and (not way.out.is_dir() or any(way.out.iterdir())):
        raise StoreError(
            f"{way.out} is not empty, and no store of this target", fix="name a new folder"
        )
    others = sum(map(len, source.files.values())) + _HEADERS * (1 + len(inventory.layers))
    others += sum(c.bytes_after for c in inventory.classes if c.name != ROUTED)
    room, spill = experts_room(size, others), None
    if text is not None and must_spill(arch, text, target.formats, way.budget):
        spill = next(p for p in way.out.absolute().parents if p.is_dir())
    units = measure(source, arch, text, target.formats, way.progress, spill)
    return solve(units, base, room)


def _begun(out: Path) -> Recipe | None:
    """The recipe of a store that is in the folder, finished or not."""
    for name in (MANIFEST, PARTIAL):
        if (out / name).is_file():
            raw = read_json(out / name).get("recipe")
            return parse(raw, name) if isinstance(raw, dict) else None
    return None


def _check(target: Target) -> None:
    if (target.size is None) == (target.bpw is None):
        raise UsageError("a target is a size or bits a parameter, one of them")
    if target.bpw is not None and not 0 < target.bpw <= 32:
        raise UsageError(f"{target.bpw} bits a parameter is not in 0..32")
    for name in target.formats:
        if name not in FORMATS or not FORMATS[name].exact:
            sized = [name for name, fmt in FORMATS.items() if fmt.exact]
            raise UsageError(
                f"{name!r} is no format to choose from", fix=f"some of {', '.join(sized)}"
            )
