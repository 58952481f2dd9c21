"""Which format each matrix gets when a store must not be larger than so many bytes.

Every unit (the gate and up, or the down, of one expert; the dense matrices of one kind in one
layer) has in each format a size and a cost: the error it adds to the model's output, as far as it
can be told. The sum of costs is to be least. Formats that lie above the lower convex hull of a
unit's (size, cost) are never worth their bytes; along the hulls, steps are taken in order of cost
saved a byte, over all units at once. That is the best there is up to one step (Everett 1963,
Operations Research 11(3): a Lagrange multiplier for the bytes).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moelite.errors import UsageError
from moelite.units import show_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What gets one format. sizes: bytes in each format; costs: error in each, any common unit.

    part: as in a recipe. layer: None where there is one for the model; expert: of routed experts.
    """

    part: str
    layer: int | None
    expert: int | None
    sizes: Mapping[str, int]
    costs: Mapping[str, float]


def hull(unit: Unit) -> list[str]:
    """Formats worth their bytes, the smallest first; each saves more a byte than the next."""
    points = sorted(unit.sizes, key=lambda name: (unit.sizes[name], unit.costs[name]))
    found: list[str] = []
    for name in points:
        if found and unit.costs[name] >= unit.costs[found[-1]]:
            continue
        while len(found) > 1 and _rate(unit, found[-2], found[-1]) <= _rate(unit, found[-1], name):
            found.pop()
        found.append(name)
    return found


def _rate(unit: Unit, old: str, new: str) -> float:
    # cost saved for each byte more
    gap = unit.sizes[new] - unit.sizes[old]
    saved = unit.costs[old] - unit.costs[new]
    return saved / gap if gap else math.inf


def allocate(units: Sequence[Unit], budget_bytes: int) -> list[str]:
    """The format of each unit: least cost within `budget_bytes`. Raises UsageError if none fits."""
    hulls = [hull(unit) for unit in units]
    chosen = [0] * len(units)
    used = sum(unit.sizes[names[0]] for unit, names in zip(units, hulls, strict=True))
    if used > budget_bytes:
        raise UsageError(
            f"the smallest formats take {show_bytes(used)}; asked for {show_bytes(budget_bytes)}",
            fix="name a larger target, or allow smaller formats",
        )
    steps = [_step(unit, hulls[i], 0, i) for i, unit in enumerate(units) if len(hulls[i]) > 1]
    heapq.heapify(steps)
    while steps:
        _, i = heapq.heappop(steps)
        unit, names = units[i], hulls[i]
        gap = unit.sizes[names[chosen[i] + 1]] - unit.sizes[names[chosen[i]]]
        if used + gap > budget_bytes:
            continue  # smaller steps of others may still fit
        chosen[i] += 1
        used += gap
        if chosen[i] + 1 < len(names):
            heapq.heappush(steps, _step(unit, names, chosen[i], i))
    return [names[at] for names, at in zip(hulls, chosen, strict=True)]


def _step(unit: Unit, names: Sequence[str], at: int, i: int) -> tuple[float, int]:
    return -_rate(unit, names[at], names[at + 1]), i
