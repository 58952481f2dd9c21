"""quant_method "bitsandbytes": 4-bit codes of a flattened matrix (nf4, fp4), or int8 rows.

4 bits:
    X.weight             U8 [n / 2, 1]: weight 2i is the high nibble of byte i, 2i + 1 the low one
                         (or other dtypes over the same bytes)
    X.weight.quant_map   F32 [16]: what the codes mean
    X.weight.absmax      F32 [blocks]: w = map[code] * absmax; blocks run over the flattened matrix.
                         Double-quantized: U8 codes of it,
                         absmax = nested_quant_map[code] * nested_absmax + nested_offset
    X.weight.quant_state.bitsandbytes__nf4 (or fp4)
                         U8: JSON of shape, blocksize and the nested sizes
8 bits:
    X.weight             I8 [rows, cols], X.SCB F32 [rows]: w = code * SCB * (1 / 127)

Checked against bitsandbytes 0.50.2.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moelite.config import MAX_SIZE, HFConfig
from moelite.errors import CheckpointError
from moelite.quant.base import F32
from moelite.sources.codes import Codes
from moelite.sources.tensor import Parts, Stored, Tensor

_STATE = ".quant_state.bitsandbytes__"
_STATE_LIMIT = 4096  # bytes of JSON
_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_HOLDERS = ("U8", "I8", "F16", "BF16", "F32")  # dtypes that the bytes of codes may be saved as


@dataclass(frozen=True, slots=True)
class Nested:
    """Scales that are codes themselves."""

    absmax: Stored
    map: F32
    block: int
    offset: np.float32


class FourBit:
    """One matrix in nf4 or fp4."""

    def __init__(self, stem: str, parts: Parts, state: dict[str, Any], kind: str) -> None:
        shape, block = _shape(stem, state), _size(stem, state, "blocksize")
        count = math.prod(shape)
        held = parts.look(stem)
        holder = parts.take(stem, _HOLDERS, held.shape)
        if holder.nbytes != -(-count // 2):
            raise _wrong(stem, f"has {holder.nbytes} bytes for {count} weights of 4 bits")
        self.shape = shape
        self._codes = replace(holder, info=replace(held.info, dtype="U8", shape=(held.nbytes,)))
        self._map = parts.take(f"{stem}.quant_map", ("F32",), (16,)).numbers()
        blocks = -(-count // block)
        nested = f"{stem}.nested_absmax" in parts
        self._absmax = parts.take(f"{stem}.absmax", ("U8",) if nested else ("F32",), (blocks,))
        self._nested = _nested(stem, parts, state, blocks) if nested else None
        self._block = block
        self._kind = kind
        self.dtype = f"bitsandbytes {kind}, blocks of {block}" + (", nested" if nested else "")
        self.nbytes = holder.nbytes + self._absmax.nbytes
        if self._nested is not None:
            self.nbytes += self._nested.absmax.nbytes

    def rows(self, start: int, stop: int) -> F32:
        cols = self.shape[1]
        first, last = start * cols, stop * cols
        bytes_ = self._codes.rows(first // 2, -(-last // 2))
        codes = np.stack((bytes_ >> 4, bytes_ & 15), axis=-1).reshape(-1)
        codes = codes[first % 2 : first % 2 + last - first]
        values = self._map[codes]
        values *= self._scales(first, last)
        return values.reshape(stop - start, cols)

    def coded(self, start: int, stop: int) -> Codes | None:
        """nf4 whose blocks do not cross from one row into the next."""
        cols = self.shape[1]
        if self._kind != "nf4" or cols % self._block:
            return None
        bytes_ = self._codes.rows(start * cols // 2, stop * cols // 2)
        codes = np.stack((bytes_ >> 4, bytes_ & 15), axis=-1).reshape(stop - start, cols)
        each = cols // self._block
        scales = self._absmaxes(start * each, stop * each).reshape(stop - start, each)
        extra: dict[str, Any] = {}
        if (nested := self._nested) is not None:
            extra = {
                "codes": self._absmax.rows(start * each, stop * each).reshape(scales.shape),
                "absmax": nested.absmax.numbers(),
                "first": start * each,
                "map": nested.map,
                "offset": float(nested.offset),
                "block": nested.block,
            }
        return Codes("nf4", np.empty(0, np.int8), codes, scales, self._block, extra)

    def _scales(self, first: int, last: int) -> F32:
        """The scale of each of the weights first..last of the flattened matrix."""
        start = first // self._block
        found = self._absmaxes(start, -(-last // self._block))
        return found[np.arange(first, last) // self._block - start]

    def _absmaxes(self, start: int, stop: int) -> F32:
        """The scales of blocks start..stop."""
        stored = self._absmax.rows(start, stop)
        if self._nested is None:
            return stored.astype(np.float32)
        outer = np.arange(start, stop) // self._nested.block
        first = start // self._nested.block
        absmax = self._nested.absmax.rows(first, -(-stop // self._nested.block))
        found: F32 = self._nested.map[stored] * absmax[outer - first] + self._nested.offset
        return found


class EightBit:
    """One matrix in int8, a scale a row."""

    dtype = "bitsandbytes int8"

    def __init__(self, codes: Stored, absmax: Stored) -> None:
        self.shape = codes.shape
        self.nbytes = codes.nbytes + absmax.nbytes
        self._codes, self._absmax = codes, absmax

    def rows(self, start: int, stop: int) -> F32:
        values = self._codes.numbers(start, stop)
        values *= self._absmax.rows(start, stop)[:, None]
        values *= np.float32(1 / 127)  # in this order, as the library does
        return values

    def coded(self, start: int, stop: int) -> Codes | None:
        """The codes; their scales are absmax / 127, which may round otherwise than `rows`."""
        scales = self._absmax.rows(start, stop)[:, None] * np.float32(1 / 127)
        codes = self._codes.rows(start, stop)
        return Codes("int8", np.empty(0, np.int8), codes, scales, self.shape[1])


def find(parts: Parts, config: HFConfig) -> dict[str, Tensor]:
    """The logical tensors of a bitsandbytes checkpoint."""
    found: dict[str, Tensor] = {}
    for name in parts.names:
        if _STATE in name:
            stem, _, kind = name.partition(_STATE)
            if kind not in {"nf4", "fp4"}:
                raise _wrong(name, "is no state of nf4 or fp4")
            found[stem] = FourBit(stem, parts, _state(parts, name), kind)
        elif name.endswith(".SCB"):
            stem = name.removesuffix(".SCB")
            codes = parts.take(f"{stem}.weight", ("I8",), (None, None))
            absmax = parts.take(name, ("F32",), (codes.shape[0],))
            _row_major(parts, f"{stem}.weight_format")
            found[f"{stem}.weight"] = EightBit(codes, absmax)
    return found


def _row_major(parts: Parts, name: str) -> None:
    if name in parts and int(parts.take(name, ("U8",), ()).rows()) != 0:
        raise _wrong(name, "says that the matrix is not stored row by row")


def _state(parts: Parts, name: str) -> dict[str, Any]:
    stored = parts.take(name, ("U8",), (None,))
    if stored.nbytes > _STATE_LIMIT:
        raise _wrong(name, f"has {stored.nbytes} bytes; a state has up to {_STATE_LIMIT}")
    try:
        state = json.loads(stored.rows().tobytes())
    except (ValueError, RecursionError) as problem:
        raise _wrong(name, f"is not valid JSON: {problem}") from problem
    if not isinstance(state, dict):
        raise _wrong(name, "holds no JSON object")
    return state


def _shape(stem: str, state: dict[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    good = isinstance(shape, list) and len(shape) == 2
    if not good or not all(type(n) is int and 1 <= n <= MAX_SIZE for n in shape or ()):
        raise _wrong(stem, f"has the shape {shape!r}; it must be that of a matrix")
    assert shape is not None
    return shape[0], shape[1]


def _size(stem: str, state: dict[str, Any], key: str) -> int:
    size = state.get(key)
    if type(size) is not int or size not in _SIZES:
        raise _wrong(stem, f"has {key} {size!r}; it must be one of {', '.join(map(str, _SIZES))}")
    return size


def _nested(stem: str, parts: Parts, state: dict[str, Any], blocks: int) -> Nested:
    block, offset = _size(stem, state, "nested_blocksize"), state.get("nested_offset")
    if not isinstance(offset, float | int) or not math.isfinite(offset):
        raise _wrong(stem, f"has nested_offset {offset!r}; it must be a number")
    table = parts.take(f"{stem}.nested_quant_map", ("F32",), (256,)).numbers()
    absmax = parts.take(f"{stem}.nested_absmax", ("F32",), (-(-blocks // block),))
    return Nested(absmax, table, block, np.float32(offset))


def _wrong(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name!r} {what}", fix="fetch the checkpoint again, or use the unquantized one"
    )
