"""quant_method "awq", version "gemm": 4-bit codes packed across output rows in their own order.

    X.qweight  I32 [in, out / 8]: the nibbles of a word, lowest first, are rows 0 2 4 6 1 3 5 7
    X.qzeros   I32 [groups, out / 8]: zero points in the same order
    X.scales   [groups, out]

    w[o, i] = (code[i, o] - zero[i // group, o]) * scale[i // group, o]

Checked against autoawq 0.2.9 (modules/linear/gemm.py, utils/packing_utils.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moelite.config import HFConfig
from moelite.errors import CheckpointError
from moelite.quant.base import F32, U8
from moelite.sources.affine import coded, group_size
from moelite.sources.codes import Codes
from moelite.sources.tensor import FLOATS, Parts, Stored, Tensor, to_float32, unpack_bits

_WORD = 8  # codes
_PLACE = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # in a word, of rows 0..7


class AWQ:
    """One matrix."""

    def __init__(self, codes: Stored, zeros: Stored, scales: Stored) -> None:
        self._codes, self._zeros, self._scales = codes, zeros, scales
        self.shape = (scales.shape[1], codes.shape[0])
        self.nbytes = codes.nbytes + zeros.nbytes + scales.nbytes
        self._group = codes.shape[0] // scales.shape[0]
        self.dtype = f"awq int4, groups of {self._group}"

    def rows(self, start: int, stop: int) -> F32:
        codes, zeros = _unpack(self._codes, start, stop), _unpack(self._zeros, start, stop)
        scales = to_float32(self._scales.columns(start, stop), self._scales.dtype)
        groups = len(scales)
        values = codes.astype(np.float32).reshape(groups, self._group, stop - start)
        values -= zeros.astype(np.float32)[:, None]
        values *= scales[:, None]
        return np.ascontiguousarray(values.reshape(codes.shape).T)

    def coded(self, start: int, stop: int) -> Codes | None:
        """Where the whole matrix has one zero point."""
        zeros = _unpack(self._zeros, 0, self.shape[0])
        size = group_size(self.shape[1], self._scales.shape[0])
        if size is None or (zeros != zeros[0, 0]).any():
            return None
        scales = to_float32(self._scales.columns(start, stop), self._scales.dtype)
        return coded(_unpack(self._codes, start, stop).T, int(zeros[0, 0]), scales.T, size, 4)


def _unpack(packed: Stored, start: int, stop: int) -> U8:
    """uint8 [n, stop - start]: the codes of rows start..stop."""
    first = start // _WORD
    words = packed.columns(first, -(-stop // _WORD))
    depth, width = words.shape
    nibbles = unpack_bits(words, 4, width * _WORD).reshape(depth, width, _WORD)
    codes: npt.NDArray[np.uint8] = nibbles[:, :, _PLACE].reshape(depth, width * _WORD)
    return codes[:, start - first * _WORD : stop - first * _WORD]


def find(parts: Parts, config: HFConfig) -> dict[str, Tensor]:
    """The logical tensors of an AWQ checkpoint. config: its quantization_config."""
    config.must_be("version", "gemm", "GEMM")
    config.must_be("bits", 4)
    config.must_be("w_bit", 4)
    stems = [n.removesuffix(".qweight") for n in parts.names if n.endswith(".qweight")]
    return {f"{stem}.weight": _matrix(parts, stem) for stem in stems}


def _matrix(parts: Parts, stem: str) -> AWQ:
    codes = parts.take(f"{stem}.qweight", ("I32",), (None, None))
    cols, words = codes.shape
    scales = parts.take(f"{stem}.scales", FLOATS, (None, words * _WORD))
    groups = scales.shape[0]
    zeros = parts.take(f"{stem}.qzeros", ("I32",), (groups, words))
    if cols % groups:
        raise CheckpointError(
            f"tensor {scales.name!r} is {list(scales.shape)}: {groups} groups of {cols} columns",
            fix="fetch the checkpoint again",
        )
    return AWQ(codes, zeros, scales)
