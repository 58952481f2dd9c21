"""GGUF tensors as logical ones: an expert out of a stack, rows in Hugging Face's order, codes.

Numbers are decoded by the gguf package, whose arithmetic is ggml's.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from moelite.errors import CheckpointError, UnsupportedError
from moelite.quant.base import F32, U8
from moelite.sources.codes import Codes
from moelite.sources.gguf_file import Entry
from moelite.sources.tensor import E2M1_TWICE
from moelite.tensorfile import pread_into

_Type = gguf.GGMLQuantizationType
PLAIN = {_Type.F32: "F32", _Type.F16: "F16", _Type.BF16: "BF16"}
_IQ4_NL = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
_BLOCK = 32


class Rows:
    """Rows first..first + shape[0] of a tensor whose axes but the last are taken as one.

    heads: 0, or the rows of a head whose two halves lie row by row in turn, as llama.cpp keeps
    q and k of the models whose rope turns neighbouring dimensions: row 2 i + h of a head is row
    h * heads / 2 + i here.
    """

    def __init__(
        self, entry: Entry, shape: tuple[int, ...], first: int = 0, heads: int = 0
    ) -> None:
        if not _can_decode(entry.kind):
            raise UnsupportedError(
                f"{entry.path}: tensor {entry.name!r} is {entry.kind.name}, which the gguf package"
                f" does not decode",
                fix="use a model quantized to another type",
            )
        self.shape = shape
        self.dtype = PLAIN.get(entry.kind, entry.kind.name)
        self.nbytes = entry.row_bytes * (shape[0] if len(shape) > 1 else 1)
        self._entry, self._first, self._heads = entry, first, heads

    def rows(self, start: int, stop: int) -> F32:
        if len(self.shape) == 1:
            whole = self._decode(self._read(0, 1))[0]
            return np.ascontiguousarray(whole[start:stop])
        return self._decode(self._ordered(start, stop))

    def coded(self, start: int, stop: int) -> Codes | None:
        unpack = _CODED.get(self._entry.kind)
        if unpack is None or len(self.shape) == 1:
            return None
        data = self._ordered(start, stop)
        codes, scales = unpack(data.reshape(len(data), self.shape[1] // _BLOCK, -1))
        kind, table = _TABLES[self._entry.kind]
        return Codes(kind, table, codes.reshape(len(data), -1), scales, _BLOCK)

    def _decode(self, data: U8) -> F32:
        if self._entry.kind in PLAIN and self._entry.kind != _Type.BF16:
            data = data.view(np.float32 if self._entry.kind == _Type.F32 else np.float16)
        with np.errstate(all="ignore"):  # a damaged scale is found where weights are packed
            found: F32 = gguf.dequantize(data, self._entry.kind)
        return np.ascontiguousarray(found, np.float32)

    def _ordered(self, start: int, stop: int) -> U8:
        """The bytes of rows start..stop, uint8 [n, bytes of a row], in this tensor's order."""
        size = self._heads
        if not size:
            return self._read(start, stop)
        first = start // size * size
        row = np.arange(start, stop)
        half, i = np.divmod(row % size, size // 2)
        whole = self._read(first, -(-stop // size) * size)
        ordered: U8 = whole[row // size * size + 2 * i + half - first]
        return ordered

    def _read(self, start: int, stop: int) -> U8:
        entry = self._entry
        out = np.empty((stop - start, entry.row_bytes), np.uint8)
        at = entry.offset + (self._first + start) * entry.row_bytes
        try:
            fd = os.open(entry.path, os.O_RDONLY)
            try:
                short = pread_into(fd, out.reshape(-1).data, at) != out.nbytes
            finally:
                os.close(fd)
        except OSError as problem:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r}: {problem.strerror}"
            ) from problem
        if short:
            raise CheckpointError(f"{entry.path} ends inside tensor {entry.name!r}")
        return out


@lru_cache(maxsize=256)
def _can_decode(kind: gguf.GGMLQuantizationType) -> bool:
    """Does the gguf package decode a block of zeros of this type?"""
    if kind in PLAIN:
        return True
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _halves(blocks: U8, head: int) -> npt.NDArray[np.uint8]:
    """[n, blocks, head + 16] -> codes [n, blocks, 32]: low nibbles are the first 16."""
    packed = blocks[..., head:]
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _half_scales(blocks: U8) -> F32:
    return np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)


def _four(blocks: U8) -> tuple[npt.NDArray[Any], F32]:
    """Q4_0 and IQ4_NL: an fp16 scale and 16 bytes."""
    return _halves(blocks, 2), _half_scales(blocks)


def _mxfp4(blocks: U8) -> tuple[npt.NDArray[Any], F32]:
    """An exponent and 16 bytes; ggml's tables too are of twice the numbers and half the scale."""
    scales = np.ldexp(np.float32(1), blocks[..., 0].astype(np.int32) - 128)
    return _halves(blocks, 1), scales.astype(np.float32)


def _q8_0(blocks: U8) -> tuple[npt.NDArray[Any], F32]:
    """An fp16 scale and 32 signed bytes."""
    return np.ascontiguousarray(blocks[..., 2:]).view(np.int8), _half_scales(blocks)


_CODED = {_Type.Q4_0: _four, _Type.IQ4_NL: _four, _Type.MXFP4: _mxfp4, _Type.Q8_0: _q8_0}
_TABLES = {
    _Type.Q4_0: ("int4", np.arange(-8, 8, dtype=np.int8)),
    _Type.IQ4_NL: ("int4", _IQ4_NL),
    _Type.MXFP4: ("mxfp4", E2M1_TWICE),
    _Type.Q8_0: ("int8", np.empty(0, np.int8)),
}
