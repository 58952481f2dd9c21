"""One safetensors file: a bounded check of its header, positional reads, a page-aligned header.

A safetensors file is an 8-byte little-endian length N, N bytes of JSON (spaces may follow it), then
the tensors' bytes without holes. Files come from strangers, so nothing in the header is believed
before it was checked against the file's own size. Nothing is mapped: memory stays bounded.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelite.errors import MoeliteError

_seeking = threading.Lock()
HEADER_LIMIT = 100_000_000  # bytes; what the safetensors library allows too
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies. offset: bytes from the file's start; dtype as in safetensors."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The tensors of a file by name, in the order of their bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def read_header(path: Path, error: type[MoeliteError]) -> Header:
    """Check and parse the header of `path`. Raises `error` naming the file and the tensor."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise error(
                    f"{path}: a header of {length} bytes does not fit this file of {size} bytes",
                    fix="it is cut short or no safetensors file; fetch it again",
                )
            text = file.read(length)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from problem
    try:
        raw = _object(json.loads(text, object_pairs_hook=_no_duplicates))
        metadata = _object(raw.pop("__metadata__", {}))
        entries = {name: _entry(name, value) for name, value in raw.items()}
        tensors = _placed(entries, 8 + length, size)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: damaged safetensors header: {problem}") from problem
    return Header(
        tensors=tensors,
        metadata={k: str(v) for k, v in metadata.items()},
        data_start=8 + length,
        file_bytes=size,
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _counts(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in value):
        raise ValueError(f"tensor {name!r}: shape and data_offsets are lists of counts")
    return tuple(value)


def _entry(name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one tensor, offsets relative to the data."""
    entry = _object(value)
    dtype = entry.get("dtype")
    shape, span = (_counts(name, entry.get(key)) for key in ("shape", "data_offsets"))
    if not isinstance(dtype, str) or len(span) != 2:
        raise ValueError(f"tensor {name!r} needs dtype, shape and two data_offsets")
    begin, end = span
    bits = _BITS.get(dtype)  # a type newer than this table: offsets alone are checked
    if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
        raise ValueError(f"tensor {name!r} of {dtype} {shape} does not take {end - begin} bytes")
    return dtype, shape, begin, end


def _placed(
    entries: dict[str, tuple[str, tuple[int, ...], int, int]], start: int, size: int
) -> dict[str, TensorInfo]:
    """Entries in byte order, proven to fill the file exactly: no hole, overlap or overrun."""
    tensors, at = {}, 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if begin != at or end < begin:
            raise ValueError(
                f"tensor {name!r} at bytes {begin} to {end} where {at} is next and the data"
                f" has {size - start} bytes"
            )
        tensors[name] = TensorInfo(dtype=dtype, shape=shape, offset=start + begin, nbytes=end - at)
        at = end
    if start + at != size:
        raise ValueError(f"the tensors take {at} bytes, the file has {size - start}")
    return tensors


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], align: int
) -> tuple[bytes, dict[str, int]]:
    """Header bytes, padded so that the data starts at a multiple of `align`, and file offsets.

    tensors: {name: (dtype, shape)} in the order their bytes follow.
    """
    raw: dict[str, Any] = {"__metadata__": dict(metadata)}
    begins, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        begins[name] = at
        end = at + math.prod(shape) * _BITS[dtype] // 8
        raw[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(raw, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}


def _read_at(fd: int, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], offset)
    with _seeking:  # Windows has no positional reads
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(out))
    out[: len(data)] = data
    return len(data)


def pread_into(fd: int, out: memoryview, offset: int) -> int:
    """Fill `out` (bytes) from `offset`; the count read, less than asked only at the file's end."""
    done = 0
    while done < len(out):
        count = _read_at(fd, out[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def pwrite_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
