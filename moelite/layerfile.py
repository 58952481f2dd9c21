"""Writes the file of one MoE layer: tiers of records, then the low plane."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from moelite.packing import TEMPORARY, new_file
from moelite.quant import FORMATS
from moelite.quant.base import U8
from moelite.quant.record import RecordLayout, fill_record, record_layout
from moelite.storefile import LOW, LayerEntry, layer_header, tier_tensor
from moelite.tensorfile import pread_into, pwrite_all

# gate_up and down, packed, of an expert in each of some pairs of formats
Pack = Callable[[int, tuple[tuple[str, str], ...]], list[tuple[U8, U8]]]
# runs the function on every expert, in any order
Each = Callable[[Iterable[int], Callable[[int], None]], None]


def write_layer(path: Path, entry: LayerEntry, pack: Pack, each: Each) -> LayerEntry:
    """Packs every expert of a layer into the file at `path`; the entry as it became.

    Where the size of a format depends on the weights, records first go to a file of their own, and
    the layer's records become as large as the largest.
    """
    if all(FORMATS[name].exact for name in entry.formats):
        return _write(path, entry, pack, each)
    with _Spool(path.with_name(path.name + ".records" + TEMPORARY)) as spool:

        def one(expert: int) -> None:
            packed = pack(expert, _formats(entry, expert))
            for name, parts in zip(_tensors(entry, expert), packed, strict=True):
                spool.put(name, expert, parts)

        each(range(entry.experts), one)
        layouts = {name: spool.layout(name, layout) for name, layout in _layouts(entry).items()}
        fitted = replace(
            entry,
            tiers=tuple(layouts[tier_tensor(i)] for i in range(len(entry.tiers))),
            low=layouts.get(LOW),
        )

        def stored(expert: int, formats: tuple[tuple[str, str], ...]) -> list[tuple[U8, U8]]:
            return [spool.get(name, expert) for name in _tensors(entry, expert)]

        def in_turn(experts: Iterable[int], one: Callable[[int], None]) -> None:
            for expert in experts:
                one(expert)

        return _write(path, fitted, stored, in_turn)


def _write(path: Path, entry: LayerEntry, pack: Pack, each: Each) -> LayerEntry:
    header, offsets = layer_header(entry)
    with new_file(path, len(header) + entry.record_bytes + entry.low_bytes) as fd:
        pwrite_all(fd, header, 0)

        def one(expert: int) -> None:
            places = [(*entry.place(expert), entry.layout_of(expert))]
            if entry.low is not None:
                places.append((LOW, expert, entry.low))
            packed = pack(expert, _formats(entry, expert))
            for (name, row, layout), parts in zip(places, packed, strict=True):
                record = fill_record(layout, *parts)
                pwrite_all(fd, record.data, offsets[name] + row * layout.record_bytes)

        each(range(entry.experts), one)
    return entry


def _layouts(entry: LayerEntry) -> dict[str, RecordLayout]:
    found = {tier_tensor(i): tier for i, tier in enumerate(entry.tiers)}
    return found if entry.low is None else {**found, LOW: entry.low}


def _tensors(entry: LayerEntry, expert: int) -> list[str]:
    own = [tier_tensor(entry.tier_of[expert])]
    return own if entry.low is None else [*own, LOW]


def _formats(entry: LayerEntry, expert: int) -> tuple[tuple[str, str], ...]:
    own = (entry.layout_of(expert).formats,)
    return own if entry.low is None else (*own, entry.low.formats)


class _Spool:
    """Packed matrices in a file, until all their sizes are known."""

    def __init__(self, path: Path) -> None:
        self._path, self._end, self._lock = path, 0, threading.Lock()
        self._places: dict[tuple[str, int], tuple[int, int, int]] = {}  # offset and two sizes

    def __enter__(self) -> _Spool:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._path.unlink(missing_ok=True)

    def put(self, name: str, expert: int, parts: tuple[U8, U8]) -> None:
        with self._lock:
            at = self._end
            self._end += sum(part.size for part in parts)
            self._places[name, expert] = at, parts[0].size, parts[1].size
        for part in parts:
            pwrite_all(self._fd, part.data, at)
            at += part.size

    def get(self, name: str, expert: int) -> tuple[U8, U8]:
        at, *sizes = self._places[name, expert]
        out = np.empty(sum(sizes), np.uint8)
        if pread_into(self._fd, out.data, at) != out.size:
            raise OSError(f"{self._path} is cut short")
        return out[: sizes[0]], out[sizes[0] :]

    def layout(self, name: str, planned: RecordLayout) -> RecordLayout:
        """The layout that holds the largest of a tensor's matrices."""
        sizes = [found[1:] for (tensor, _), found in self._places.items() if tensor == name]
        largest = max(size[0] for size in sizes), max(size[1] for size in sizes)
        shape = planned.hidden_size, planned.expert_size
        return record_layout(planned.formats, *shape, largest)
