"""A GGUF file: a bounded check of its header, its metadata, and where each tensor lies.

    "GGUF", u32 version (2 or 3), u64 tensors, u64 entries; then the entries: name, u32 type, value;
    then of each tensor: name, u32 dimensions, u64 each (the fastest first), u32 type, u64 offset;
    then, at a multiple of general.alignment (32), the data.

A string is u64 bytes and UTF-8; an array u32 type, u64 count, values. All little endian. Files come
from strangers: every count is checked against the bytes that are left before it is believed.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from moelite.errors import CheckpointError, UnsupportedError

MAGIC = b"GGUF"
_HEADER_LIMIT = 1 << 28  # bytes of metadata; the largest vocabularies take 20 MB
_TENSORS = 1 << 20
_ENTRIES = 1 << 16
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its type, shape (slowest axis first), bytes of a row, and place in `path`."""

    name: str
    path: Path
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    row_bytes: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.row_bytes * math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class GGUF:
    """metadata: scalars and strings as Python has them, arrays as lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Entry]


def read_gguf(path: Path) -> GGUF:
    """Read the header of `path`. Raises CheckpointError naming the file and what is wrong."""
    try:
        with path.open("rb") as file:
            return _Reader(path, file).read()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from problem
    except (ValueError, struct.error, OverflowError) as problem:
        raise CheckpointError(
            f"{path}: damaged GGUF header: {problem}", fix="fetch it again"
        ) from problem


class _Reader:
    """Reads front to back; `left` is what the header may still take."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = path.stat().st_size
        self._left = min(self._size, _HEADER_LIMIT)

    def read(self) -> GGUF:
        if self._take(4) != MAGIC:
            raise CheckpointError(
                f"{self._path} is no GGUF file", fix="name a checkpoint's folder, or a GGUF file"
            )
        version = self._count("<I")
        if version not in {2, 3}:
            raise UnsupportedError(
                f"{self._path} is GGUF version {version}; moelite reads 2 and 3, little endian",
                fix="convert the model again with a current llama.cpp",
            )
        tensors, entries = self._count("<Q", _TENSORS), self._count("<Q", _ENTRIES)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            name = self._string()
            if name in metadata:
                raise ValueError(f"{name!r} occurs twice")
            metadata[name] = self._value(self._count("<I"))
        infos = [self._tensor() for _ in range(tensors)]
        start = self._aligned(metadata.get("general.alignment", 32))
        found = {
            name: self._placed(name, shape, kind, start + at) for name, shape, kind, at in infos
        }
        if len(found) != len(infos):
            raise ValueError("a tensor's name occurs twice")
        return GGUF(self._path, metadata, found)

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"{count} bytes where {self._left} are left of the header")
        self._left -= count
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("the file ends inside the header")
        return data

    def _count(self, form: str, most: int = 1 << 63) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        if value > most:
            raise ValueError(f"a count of {value} where at most {most} are allowed")
        return int(value)

    def _string(self) -> str:
        return self._take(self._count("<Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._count("<I"), self._count("<Q", self._left)
            if inner == _STRING:
                return [self._string() for _ in range(count)]
            if inner == _ARRAY:
                raise ValueError("an array of arrays")
            return np.frombuffer(
                self._take(count * self._dtype(inner).itemsize), self._dtype(inner)
            ).tolist()
        return np.frombuffer(self._take(self._dtype(kind).itemsize), self._dtype(kind))[0].item()

    def _dtype(self, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"type {kind} of a value is unknown")
        return np.dtype(_SCALARS[kind])

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        sides = [self._count("<Q", 1 << 40) for _ in range(self._count("<I", 4))]
        return name, tuple(reversed(sides)), self._count("<I"), self._count("<Q")

    def _aligned(self, alignment: Any) -> int:
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"general.alignment is {alignment!r}")
        at = self._file.tell()
        return at + -at % alignment

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Entry:
        try:
            known = gguf.GGMLQuantizationType(kind)
            block, size = gguf.GGML_QUANT_SIZES[known]
        except (ValueError, KeyError):
            raise UnsupportedError(
                f"{self._path}: tensor {name!r} is of GGML type {kind}, which the gguf package"
                f" does not know",
                fix="pip install --upgrade gguf, or use a model quantized to another type",
            ) from None
        if not shape or math.prod(shape) == 0 or shape[-1] % block:
            raise ValueError(f"tensor {name!r} {list(shape)} is not whole blocks of {block}")
        entry = Entry(name, self._path, known, shape, shape[-1] // block * size, offset)
        if offset + entry.nbytes > self._size:
            raise ValueError(
                f"tensor {name!r} ends at byte {offset + entry.nbytes}, the file at {self._size}"
            )
        return entry
