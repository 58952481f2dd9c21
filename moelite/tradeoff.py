"""A recipe for a size: what each format costs each expert, measured, and the best mix of them.

The cost of a format is the error that it adds to the residual stream, as a share of it, summed over
the tokens of a text: (routing weight)^2 / mean(residual^2) times |E x|^2, for every token that an
expert meets. So it holds both how badly the format fits the matrix and how often, and with what
weight, the expert is used. E is measured on SAMPLE rows of each matrix, packed as they would be; an
error of gate and up is taken to be the same share of what down makes of it. Without a text, inputs
count as independent, and all experts as used alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from moelite.allocation import Unit, allocate
from moelite.arch import Arch, Linear, MoE, TensorRef
from moelite.calibrate import Calibrator, Inputs, Matrices, Text
from moelite.checkpoint import Source, read
from moelite.errors import UsageError
from moelite.forward import EMBED_ROWS, Rows
from moelite.inventory import moe_layers
from moelite.quant import FORMATS
from moelite.quant.base import F32, PAGE, TILE_ROWS, QuantFormat, pair_rows
from moelite.quant.curvature import Curvature
from moelite.recipe import Recipe, Rule

CANDIDATES = ("vq-0.5", "vq-1", "vq-1.5", "vq-2", "vq-2.5", "vq-3", "int4", "int8")
SAMPLE = 64  # rows of a matrix, in runs of a tile from all over it
_GAIN = 0.9  # of the cost, at most, that formats by expert must leave to be worth uneven slots

Progress = Callable[[int, int, str], None]


class SourceWeights:
    """The dense weights of a checkpoint as float32, for `Calibrator`."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def matrix(self, part: Linear) -> F32:
        return read(self._source, part.weight)

    def vector(self, ref: TensorRef) -> F32:
        return read(self._source, ref)

    def embed(self, ref: TensorRef, ids: Sequence[int]) -> Iterator[tuple[Rows, F32]]:
        wanted = np.asarray(ids)
        for start in range(0, int(wanted.max()) + 1, EMBED_ROWS):
            here = np.flatnonzero((wanted >= start) & (wanted < start + EMBED_ROWS))
            if here.size:
                yield here, read(self._source, ref, start, start + EMBED_ROWS)[wanted[here] - start]


def measure(
    source: Source,
    arch: Arch,
    text: Text | None,
    candidates: Sequence[str] = CANDIDATES,
    progress: Progress | None = None,
    spill: Path | None = None,
) -> list[Unit]:
    """Size and cost of each candidate for gate and up, and for down, of every expert.

    With a text, the unquantized model reads it. spill: as `Calibrator` takes it.
    """
    walk = None
    if text is not None:
        walk = Calibrator(arch, SourceWeights(source), text, _nothing_finished, spill)
    layers, units, done = moe_layers(arch), [], 0
    total = sum(mlp.num_experts * _bytes(mlp) for mlp in layers.values())
    try:
        for number, mlp in layers.items():
            costs: list[tuple[dict[str, float], dict[str, float]]] = []
            for expert in range(mlp.num_experts if walk is not None else 1):
                matrices = _matrices(source, mlp, expert)
                inputs = None if walk is None else walk.look(number, expert, matrices)
                costs.append(_costs(matrices, inputs, candidates))
                done += _bytes(mlp) if walk is not None else mlp.num_experts * _bytes(mlp)
                if progress is not None:
                    progress(done, total, f"measuring formats, layer {number}")
            sizes = _sizes(arch, mlp, candidates)
            for expert in range(mlp.num_experts):
                pair = costs[min(expert, len(costs) - 1)]
                for part, size, cost in zip(("gate_up", "down"), sizes, pair, strict=True):
                    units.append(
                        Unit(part=part, layer=number, expert=expert, sizes=size, costs=cost)
                    )
    finally:
        if walk is not None:
            walk.close()
    return units


def solve(units: Sequence[Unit], base: Recipe, experts_bytes: int) -> Recipe:
    """`base` with the formats of routed experts chosen so that they take at most `experts_bytes`.

    One format for all experts of a layer's part, since slots of a layer are all as large as its
    largest record; formats by expert only where that saves a tenth of the cost. Raises UsageError
    if the smallest formats take more.
    """
    room = experts_bytes - PAGE * len({(u.layer, u.expert) for u in units})  # records' last pages
    even = [_merged(list(group)) for _, group in groupby(_sorted(units), key=_place)]
    together = allocate(even, room)
    apart = allocate(units, room)
    cost = sum(u.costs[name] for u, name in zip(even, together, strict=True))
    single = sum(u.costs[name] for u, name in zip(units, apart, strict=True))
    chosen = zip(units, apart, strict=True) if single < _GAIN * cost else None
    pairs = list(chosen or zip(even, together, strict=True))
    names = [name for _, name in pairs]
    most = max(set(names), key=lambda name: (names.count(name), name))
    return replace(base, experts=most, rules=_rules(pairs, most))


def experts_room(target_bytes: int, other_bytes: int) -> int:
    """What is left for routed experts. UsageError where nothing is."""
    if target_bytes <= other_bytes:
        raise UsageError(
            f"all but the routed experts takes {other_bytes} bytes already; the target is"
            f" {target_bytes}",
            fix="name a larger target, or smaller dense weights (--dense int4)",
        )
    return target_bytes - other_bytes


def _bytes(mlp: MoE) -> int:
    # of an expert, as 16-bit numbers: what progress counts
    return 2 * sum(part.rows * part.cols for part in mlp.experts.matrices)


def _place(unit: Unit) -> tuple[int, str]:
    assert unit.layer is not None
    return unit.layer, unit.part


def _sorted(units: Sequence[Unit]) -> list[Unit]:
    return sorted(units, key=_place)


def _merged(units: Sequence[Unit]) -> Unit:
    first, names = units[0], units[0].sizes
    return replace(
        first,
        expert=None,
        sizes={name: sum(u.sizes[name] for u in units) for name in names},
        costs={name: sum(u.costs[name] for u in units) for name in names},
    )


def _rules(pairs: Sequence[tuple[Unit, str]], most: str) -> tuple[Rule, ...]:
    """Rules for all that is not in `most`: layers alike share one, experts of a layer, too."""
    found: dict[tuple[str, str, frozenset[int] | None], set[int]] = {}
    by_place: dict[tuple[int, str, str], set[int]] = {}
    for unit, name in pairs:
        if name == most:
            continue
        layer, part = _place(unit)
        if unit.expert is None:
            found.setdefault((part, name, None), set()).add(layer)
        else:
            by_place.setdefault((layer, part, name), set()).add(unit.expert)
    for (layer, part, name), experts in by_place.items():
        found.setdefault((part, name, frozenset(experts)), set()).add(layer)
    rules = [
        Rule(part=part, format=name, layers=frozenset(layers), experts=experts)
        for (part, name, experts), layers in found.items()
    ]
    return tuple(sorted(rules, key=lambda r: (r.part, r.format, sorted(r.layers or ()))))


def _sizes(
    arch: Arch, mlp: MoE, candidates: Sequence[str]
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    size, hidden = mlp.experts.gate.rows, arch.hidden_size
    wide = {name: FORMATS[name].nbytes(pair_rows(size), hidden) for name in candidates}
    return wide, {name: FORMATS[name].nbytes(hidden, size) for name in candidates}


def _costs(
    matrices: Matrices, inputs: Inputs | None, candidates: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    gate, up, down = (_sample(weight) for weight in matrices)
    first, last, weight = (None, None, 1.0) if inputs is None else inputs
    whole = weight * len(matrices[2]) / len(down) * _energy(down, last) if inputs else 1.0
    before = _energy(gate, first) + _energy(up, first)
    wide, narrow = {}, {}
    for name in candidates:
        fmt = FORMATS[name]
        left = _energy(_error(fmt, gate, first), first) + _energy(_error(fmt, up, first), first)
        wide[name] = whole * left / max(before, 1e-30)
        share = _energy(_error(fmt, down, last), last) / max(_energy(down, last), 1e-30)
        narrow[name] = whole * share
    return wide, narrow


def _error(fmt: QuantFormat, weight: F32, curve: Curvature | None) -> F32:
    return weight - fmt.unpack(fmt.pack(weight, curve), *weight.shape)


def _energy(weight: F32, curve: Curvature | None) -> float:
    """tr(W H W^T); H = I without a curve."""
    seen = weight if curve is None else weight @ curve.root
    return float(np.square(seen, dtype=np.float64).sum())


def _sample(weight: F32) -> F32:
    tiles = len(weight) // TILE_ROWS
    if tiles <= SAMPLE // TILE_ROWS:
        return weight
    at = np.linspace(0, tiles - 1, SAMPLE // TILE_ROWS).astype(int)
    rows = (at[:, None] * TILE_ROWS + np.arange(TILE_ROWS)).reshape(-1)
    return np.ascontiguousarray(weight[rows])


def _matrices(source: Source, mlp: MoE, expert: int) -> Matrices:
    gate, up, down = (read(source, part.weight.at(expert)) for part in mlp.experts.matrices)
    return gate, up, down


def _nothing_finished(layer: int, expert: int) -> Matrices:
    raise AssertionError("a measuring run begins with the first layer")
