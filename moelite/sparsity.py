"""How sparse a store's ternary experts are, and how near their codes come to the least there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moelite.quant import FORMATS, qmoe
from moelite.quant.qmoe import Statistics
from moelite.quant.record import packed_parts
from moelite.store import ExpertKey, Store


def ternary_statistics(path: Path) -> Statistics | None:
    """Over the first expert of each layer, by weights; None where no expert is in such a format."""
    store, parts = Store.open(path), []
    for layer, entry in store.layers.items():
        layout = entry.layout_of(0)
        record = np.empty(layout.record_bytes, np.uint8)
        store.read_record(ExpertKey(layer, 0), record)
        shapes = layout.gate_up_shape, layout.down_shape
        for packed, name, shape in zip(
            packed_parts(layout, record), layout.formats, shapes, strict=True
        ):
            if not FORMATS[name].exact:
                parts.append((shape[0] * shape[1], qmoe.statistics(packed, *shape)))
    store.close()
    if not parts:
        return None
    total = sum(size for size, _ in parts)
    sums = (sum(size * value[i] for size, value in parts) / total for i in range(3))
    return Statistics(*sums)
