"""Tensors that came encoded: stored bytes, how they are read, and the Source they make together.

An encoding takes the stored tensors it knows out of a checkpoint and gives logical ones back: under
their ordinary names, with their ordinary shapes, decoded to float32 some rows at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moelite.arch import TensorRef
from moelite.checkpoint import READABLE, Checkpoint
from moelite.errors import CheckpointError, UnsupportedError
from moelite.quant.base import F32
from moelite.sources.codes import Codes
from moelite.tensorfile import TensorInfo, pread_into

MAX_SIDE = 1 << 22  # rows or columns of a matrix; moelite.config allows no more either
FLOATS = ("F32", "F16", "BF16")
_KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1"}
_KINDS |= dict.fromkeys(("U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), "u1")


def _e4m3() -> F32:
    """The 256 values of float8 e4m3fn: sign, 4 bits of exponent, 3 of mantissa; no infinities."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values[code & 127 == 127] = np.nan
    return np.where(code > 127, -values, values).astype(np.float32)


def _e8m0() -> F32:
    """The 256 values of float8 e8m0: 2^(code - 127), NaN for 255."""
    values = np.exp2(np.arange(255) - 127.0)
    return np.append(values, np.nan).astype(np.float32)


E4M3 = _e4m3()
E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
E8M0 = _e8m0()
_TABLES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0}
# E2M1 doubled, so that its entries are whole: 4-bit codes of MXFP4 and NVFP4
E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def to_float32(array: npt.NDArray[Any], dtype: str) -> F32:
    """The numbers that `array` holds as the bits of a safetensors `dtype`."""
    if dtype == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype in _TABLES:
        values: F32 = _TABLES[dtype][array]
        return values
    return array.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file. Arrays have its own dtype, or unsigned bits where numpy has
    none. Reads are positional: several threads may read at once.
    """

    name: str
    path: Path
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        return self.info.nbytes

    def rows(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows start:stop of axis 0 (all of a scalar)."""
        if not self.shape:
            return self._read([(0, 1)], 1).reshape(())
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        width = math.prod(self.shape[1:])
        count = max(0, stop - start) * width
        return self._read([(start * width, count)], count).reshape(-1, *self.shape[1:])

    def columns(self, start: int, stop: int) -> npt.NDArray[Any]:
        """[rows, stop - start]: a matrix's columns, one read a row."""
        rows, width = self.shape
        count = stop - start
        spans = [(row * width + start, count) for row in range(rows)]
        return self._read(spans, rows * count).reshape(rows, count)

    def numbers(self, start: int = 0, stop: int | None = None) -> F32:
        """`rows` as float32."""
        return to_float32(self.rows(start, stop), self.dtype)

    def _read(self, spans: list[tuple[int, int]], total: int) -> npt.NDArray[Any]:
        """Elements (from, count) of each span, one after another."""
        out = np.empty(total, _KINDS[self.dtype])
        view, width, at = out.view(np.uint8).data, out.itemsize, 0
        try:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                for start, count in spans:
                    part = view[at : at + count * width]
                    at += len(part)
                    if pread_into(fd, part, self.info.offset + start * width) != len(part):
                        raise CheckpointError(
                            f"{self.path} ends inside tensor {self.name!r}", fix="fetch it again"
                        )
            finally:
                os.close(fd)
        except OSError as problem:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r}: {problem.strerror}"
            ) from problem
        return out


class Tensor(Protocol):
    """One logical tensor. dtype: how reports name its encoding; nbytes: what all its parts take."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def rows(self, start: int, stop: int) -> F32:
        """Rows start..stop of axis 0, decoded."""
        ...

    def coded(self, start: int, stop: int) -> Codes | None:
        """The same rows as codes, if this encoding is codes and block scales; else None."""
        ...


class Parts:
    """The stored tensors of a checkpoint; those that belong to an encoding are taken out."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.names = checkpoint.names()
        self.taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._checkpoint.has(name)

    def drop(self, *names: str) -> None:
        """These say nothing about weights (scales of activations, a note about the layout)."""
        self.taken.update(names)

    def look(self, name: str) -> Stored:
        """The stored tensor, unchecked."""
        return Stored(name, *self._checkpoint.place(name))

    def take(self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> Stored:
        """The stored tensor `name` of one of `dtypes` and of `shape` (None: any count from 1 on).

        Raises CheckpointError naming it, what was found and what is allowed.
        """
        if name not in self:
            raise CheckpointError(
                f"the checkpoint has no tensor {name!r}, which its encoding needs",
                fix="fetch the checkpoint again, complete",
            )
        found = self.look(name)
        sides = zip(found.shape, shape, strict=False)
        good = len(found.shape) == len(shape) and all(
            (1 <= n <= MAX_SIDE) if want is None else n == want for n, want in sides
        )
        if found.dtype not in dtypes or not good:
            wanted = ", ".join("n" if n is None else str(n) for n in shape)
            raise CheckpointError(
                f"tensor {name!r} is {found.dtype} {list(found.shape)};"
                f" its encoding calls for {' or '.join(dtypes)} [{wanted}]",
                fix="fetch the checkpoint again, or use the unquantized one",
            )
        self.taken.add(name)
        return found


class Assembled:
    """A Source of tensors that decode themselves, beside plain ones that `plain` reads."""

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        files: dict[str, bytes],
        tensors: Mapping[str, Tensor],
        plain: tuple[Checkpoint, frozenset[str]] | None = None,
    ) -> None:
        self.source = source
        self.config = config
        self.files = files
        self._tensors = dict(tensors)
        self._plain = plain[0] if plain else None
        self._plain_names = plain[1] if plain else frozenset()

    def names(self) -> list[str]:
        """Every logical tensor, sorted."""
        return sorted([*self._tensors, *self._plain_names])

    def shape(self, name: str) -> tuple[int, ...]:
        found = self._find(name)
        return found.shape if found is not None else self._other().shape(name)

    def dtype(self, name: str) -> str:
        """How the tensor is encoded, in words, or the safetensors dtype of a plain one."""
        found = self._find(name)
        return found.dtype if found is not None else self._other().dtype(name)

    def nbytes(self, name: str) -> int | None:
        """What the tensor takes as encoded; None if it cannot be read."""
        found = self._find(name)
        return found.nbytes if found is not None else self._other().nbytes(name)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start:stop of axis 0 as float32."""
        found = self._find(name)
        if found is None:
            return self._other().raw(name, start, stop)
        start, stop, _ = slice(start, stop).indices(found.shape[0])
        return found.rows(start, max(start, stop))

    def coded(self, ref: TensorRef, start: int = 0, stop: int | None = None) -> Codes | None:
        """Rows start:stop of the matrix `ref` names, as codes; None where only numbers exist."""
        found = self._find(ref.name)
        if found is None or ref.stacked or ref.transpose or ref.rows is not None:
            return None
        start, stop, _ = slice(start, stop).indices(found.shape[0])
        return found.coded(start, max(start, stop))

    def _find(self, name: str) -> Tensor | None:
        if name not in self._tensors and name not in self._plain_names:
            raise CheckpointError(f"{self.source} has no tensor {name!r}")
        return self._tensors.get(name)

    def _other(self) -> Checkpoint:
        assert self._plain is not None
        return self._plain


def assemble(
    checkpoint: Checkpoint, config: dict[str, Any], parts: Parts, tensors: Mapping[str, Tensor]
) -> Assembled:
    """The Source of a folder whose `parts` make `tensors`; what was not taken stays as it is.

    config: that of the model without what was undone; its config.json becomes this.

    Raises UnsupportedError if something is left that only an encoding could explain.
    """
    rest = frozenset(set(parts.names) - parts.taken)
    for name in sorted(rest):
        dtype = checkpoint.dtype(name)
        if name.endswith(".weight") and dtype not in READABLE:
            raise UnsupportedError(
                f"tensor {name!r} is {dtype}, and nothing in the checkpoint says how to decode it",
                fix="use the unquantized checkpoint of this model",
            )
    if both := sorted(rest & set(tensors)):
        raise CheckpointError(
            f"the checkpoint has tensor {both[0]!r} twice: plain and quantized",
            fix="fetch the checkpoint again",
        )
    files = checkpoint.files | {"config.json": json.dumps(config, indent=2).encode()}
    return Assembled(checkpoint.source, config, files, tensors, (checkpoint, rest))


def unpack_bits(words: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """int32 [n, k] -> uint8 [n, count]: codes of `bits` bits, lowest first, without gaps.

    A code may cross from one word into the next.
    """
    stream = np.ascontiguousarray(words).view(np.uint8)  # little endian, as the files are
    if bits == 8:
        return stream[:, :count]
    if bits == 4:
        both = np.stack((stream & 15, stream >> 4), axis=-1)
        return both.reshape(len(stream), 2 * stream.shape[1])[:, :count]
    at = np.arange(count) * bits
    wide = np.pad(stream, ((0, 0), (0, 1))).astype(np.uint16)  # a code lies within two bytes
    pairs = wide[:, at // 8] | wide[:, at // 8 + 1] << 8
    codes = pairs >> (at % 8).astype(np.uint16) & ((1 << bits) - 1)
    return codes.astype(np.uint8, order="C")
