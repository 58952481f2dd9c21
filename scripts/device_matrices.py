"""Packed matrices of every format, made in no time: random codes under scales of a usual size.

Packers search, and some are compiled first; what a kernel's speed depends on is only how bytes lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moelite.quant import FORMATS
from moelite.quant.base import ALIGN, TILE_ROWS, U8, pad
from moelite.quant.codes import IQ4_NL
from moelite.quant.qmoe_dictionary import dictionary

SOME = 64  # rows that are made; larger matrices repeat them


def matrix(name: str, rows: int, cols: int) -> U8:
    """A packed [rows, cols] matrix of some format."""
    rng = np.random.default_rng(cols)
    if name in ("f32", "bf16", "nf4-dq"):
        some = min(rows, SOME)
        weight = rng.normal(size=(some, cols)).astype(np.float32) * 0.02
        whole = FORMATS[name].pack(weight)
        return np.resize(whole, FORMATS[name].nbytes(rows, cols))
    if name.startswith("qmoe"):
        return _qmoe(rows, cols, rng)
    size = FORMATS[name].tile_bytes(cols)
    tiles = rng.integers(0, 256, SOME // TILE_ROWS * size, dtype=np.uint8)
    _set_scales(name, tiles, cols, rng)
    return np.resize(tiles, pad(rows, TILE_ROWS) // TILE_ROWS * size)


def _set_scales(name: str, tiles: U8, cols: int, rng: Any) -> None:
    fmt: Any = FORMATS[name]
    head = fmt.layout.heads(tiles, cols)
    if name.startswith("vq"):
        scales = rng.uniform(0.001, 0.002, (len(head), TILE_ROWS)).astype(np.float32)
        head[...] = (scales.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return
    if name in ("int4", "int4-f16"):
        scales = rng.uniform(0.001, 0.002, (len(head), TILE_ROWS)).astype(np.float32)
        head[:, :32], head[:, 32:48] = scales.view(np.uint8), IQ4_NL.view(np.uint8)
    for _, where, codes in fmt.layout.groups(tiles, cols):
        if name == "int8":
            codes[codes == 128] = 0
        kind: Any = {"int4": np.int8, "mxfp4": np.uint8, "nf4": np.float32}.get(name, np.float16)
        count = where.shape[0] * where.shape[1] * where.shape[2] // np.dtype(kind).itemsize
        low, high = {np.int8: (-127, 127), np.uint8: (116, 124)}.get(kind, (0.01, 0.02))
        values = rng.uniform(low, high, count).astype(kind).view(np.uint8)
        where[...] = values.reshape(where.shape)


def _qmoe(rows: int, cols: int, rng: Any) -> U8:
    lengths = (dictionary().masks[:, 0] >> 28).astype(np.int64)
    end = {int(n): int(np.argmax(lengths == n)) for n in np.unique(lengths)}
    made = [_run(pad(cols, 2) // 2, lengths, end, rng) for _ in range(min(rows, SOME))]
    lines = [made[r % len(made)] for r in range(rows)]
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(np.uint32)
    levels = np.tile(np.array([-0.02, 0.02], np.float32).view(np.uint32) >> 16, rows)
    parts = offsets, levels.astype(np.uint16), np.concatenate(lines)
    flat = np.concatenate([part.view(np.uint8) for part in parts])
    return np.concatenate([flat, np.zeros(-flat.size % ALIGN, np.uint8)])


def _run(pairs: int, lengths: Any, end: dict[int, int], rng: Any) -> Any:
    # random codes of `pairs` pairs in all: the last ones are what fits
    codes = rng.integers(0, 1 << 16, pairs)
    upto = np.cumsum(lengths[codes])
    n = int(np.searchsorted(upto, pairs, side="right"))
    left = pairs - (int(upto[n - 1]) if n else 0)
    return np.append(codes[:n], [end[left]] if left else []).astype(np.uint16)
