"""The tables of the vq formats: 256 entries of 4, 8 or 16 whole numbers for each plane of codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# Entry lengths of the planes of each format, the longest first: 8 bits every so many columns.
PLANES: dict[str, tuple[int, ...]] = {
    "vq-0.5": (16,),
    "vq-1": (8,),
    "vq-1.5": (16, 8),
    "vq-2": (8, 8),
    "vq-2.5": (16, 4),
    "vq-3": (8, 4),
}
ENTRIES = 256  # of a table: a code is one byte
STEPS = 16  # table steps in a standard deviation of the weights
LIMIT = 63  # the largest sum of entries: 64 more is an unsigned byte up to 127
FILE = Path(__file__).with_name("vq_tables.npy")


def read_tables() -> dict[str, list[Any]]:
    """The int8 tables [256, d] of every format, from FILE: one after another, in PLANES's order."""
    flat, at = np.load(FILE), 0
    found: dict[str, list[Any]] = {}
    for name, dims in PLANES.items():
        found[name] = []
        for d in dims:
            found[name].append(flat[at : at + ENTRIES * d].reshape(ENTRIES, d))
            at += ENTRIES * d
    return found
