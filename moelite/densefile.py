"""dense.safetensors: everything but routed experts, in one file.

Without calibration it is written at once. With it, matrices whose format has use for what they read
are packed layer by layer, each before the experts of its layer. Meanwhile the file has another name
and all its final size; what is not packed yet is zero. A layer is done when its bytes are synced
and the journal says so; a layer that was cut off is packed again, into the same places.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from moelite.arch import Linear, TensorRef
from moelite.checkpoint import Source
from moelite.forward import unrouted
from moelite.inventory import DenseItem, Inventory
from moelite.packing import new_file, pack_dense, size_of, sync_folder
from moelite.quant import FORMATS
from moelite.quant.base import U8
from moelite.storefile import DENSE, dense_header, packed_bytes
from moelite.tensorfile import pwrite_all

BEGUN = "dense.begun.safetensors"
# runs the function on every item, in any order
Each = Callable[[Iterable[DenseItem], Callable[[DenseItem], None]], None]
Part = tuple[TensorRef, tuple[int, ...]]


class DenseFile:
    """The dense file of a store in `out`, on its way.

    layers: {layer: its matrices that are packed by what calibration knows}; empty without it.
    done: those of them that are packed; None: nothing is written yet. finished: it has its name.
    """

    def __init__(self, source: Source, inventory: Inventory, out: Path, calibrated: bool) -> None:
        self._source, self._out, self._items = source, out, inventory.items
        self.layers = _curved(inventory) if calibrated else {}
        self.done: list[int] | None = None
        self.finished = False
        specs = {key: item.spec for key, item in self._items.items()}
        self._header, self._offsets = dense_header(specs)
        last = max(self._offsets, key=lambda key: self._offsets[key])
        self.size = self._offsets[last] + packed_bytes(specs[last].format, specs[last].shape)

    @property
    def path(self) -> Path:
        """Where its bytes are."""
        return self._out / (BEGUN if self.layers and not self.finished else DENSE)

    @property
    def left_bytes(self) -> int:
        """Of an unfinished file that an earlier run left."""
        return size_of(self._out / BEGUN) or 0

    def resume(self, done: list[int] | None, finished: bool) -> None:
        """Takes up what an earlier run left, by its journal."""
        begun, whole = self._out / BEGUN, self._out / DENSE
        self.finished = finished
        if finished or done is None:
            return
        if not begun.exists() and size_of(whole) == self.size:  # named, but not taken down
            whole.rename(begun)
        self.done = list(done) if size_of(begun) == self.size else None

    def plain(self) -> list[DenseItem]:
        """What is packed without calibration."""
        curved = {part.weight.key for parts in self.layers.values() for part in parts}
        return [item for key, item in self._items.items() if key not in curved]

    def parts(self, layer: int) -> list[Part]:
        """What is packed by calibration in a layer."""
        return [(part.weight, (part.rows, part.cols)) for part in self.layers.get(layer, ())]

    def wanted(self, part: Linear) -> bool:
        """Whether calibration has to pack it."""
        layers = (n for n in self.layers if not self.finished and n not in (self.done or ()))
        return any(part in self.layers[number] for number in layers)

    def write(self, each: Each) -> None:
        """Writes the file, but for what is packed by calibration."""
        with new_file(self.path, self.size) as fd:
            pwrite_all(fd, self._header, 0)

            def one(item: DenseItem) -> None:
                pack_dense(fd, self._offsets[item.ref.key], self._source, item)

            each(self.plain(), one)
        self.done = []

    def put(self, part: Linear, packed: U8) -> None:
        """Writes one matrix that was packed by calibration."""
        fd = os.open(self.path, os.O_RDWR)
        try:
            pwrite_all(fd, packed.data, self._offsets[part.weight.key])
        finally:
            os.close(fd)

    def close_layer(self, layer: int) -> None:
        """Takes a layer as done, its bytes on the disk."""
        assert self.done is not None, "the file is there"
        fd = os.open(self.path, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self.done.append(layer)

    def finish(self) -> None:
        """Gives the file its name."""
        (self._out / BEGUN).rename(self._out / DENSE)
        sync_folder(self._out)
        self.finished = True


def _curved(inventory: Inventory) -> dict[int, tuple[Linear, ...]]:
    found = {}
    for number, layer in enumerate(inventory.arch.layers):
        mlp = unrouted(layer.mlp)
        parts = (*layer.attention.linears, *(() if mlp is None else mlp.matrices))
        formats = {part: inventory.items[part.weight.key].spec.format for part in parts}
        if curved := tuple(part for part in parts if FORMATS[formats[part]].curved):
            found[number] = curved
    return found
