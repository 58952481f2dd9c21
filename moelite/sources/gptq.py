"""quant_method "gptq": codes packed down the columns, as auto-gptq and GPTQModel write them.

    X.qweight  I32 [in / k, out], k codes a word, the lowest bits first (3 bits: across words)
    X.qzeros   I32 [groups, out / k]: zero points; checkpoint_format "gptq" stores them one too low
    X.scales   [groups, out]
    X.g_idx    I32 [in]: the group of each column; absent: groups lie in order

    w[o, i] = (code[i, o] - zero[g_idx[i], o]) * scale[g_idx[i], o]

"One too low" is of whole words: GPTQModel adds 0x11111111 to each (for 4 bits), carries included.
Checked against gptqmodel 7.7.0 (nn_modules/qlinear, utils/model.py) and auto_gptq 0.7.1.
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

BITS = (2, 3, 4, 8)


class GPTQ:
    """One matrix. first_version: its zero points are stored one too low."""

    def __init__(
        self, parts: tuple[Stored, Stored, Stored, Stored | None], bits: int, first_version: bool
    ) -> None:
        self._codes, self._zeros, self._scales, self._index = parts
        cols = self._codes.shape[0] * 32 // bits
        self.shape = (self._scales.shape[1], cols)
        self.nbytes = sum(part.nbytes for part in parts if part is not None)
        self._bits, self._one_low = bits, first_version
        groups = self._scales.shape[0]
        self.dtype = f"gptq int{bits}, groups of {-(-cols // groups)}"

    def rows(self, start: int, stop: int) -> F32:
        codes, zeros, scales = self._read(start, stop)
        groups, count = self._groups(), scales.shape[1]
        values = codes.astype(np.float32)
        if self._in_order(groups):
            blocks = values.reshape(len(values), count, self.shape[1] // count)
            blocks -= zeros.astype(np.float32)[:, :, None]
            blocks *= scales[:, :, None]
        else:
            values -= zeros.astype(np.float32)[:, groups]
            values *= scales[:, groups]
        return values

    def coded(self, start: int, stop: int) -> Codes | None:
        """Where columns are in order and the whole matrix has one zero point."""
        size = group_size(self.shape[1], self._scales.shape[0])
        zeros = self._read_zeros(0, self.shape[0])
        if size is None or not self._in_order(self._groups()) or (zeros != zeros[0, 0]).any():
            return None
        codes, _, scales = self._read(start, stop)
        return coded(codes, int(zeros[0, 0]), scales, size, self._bits)

    def _in_order(self, groups: npt.NDArray[np.int64]) -> bool:
        """Are the groups of one size, one after another?"""
        cols, count = self.shape[1], self._scales.shape[0]
        return cols % count == 0 and bool((groups == np.arange(cols) // (cols // count)).all())

    def _groups(self) -> npt.NDArray[np.int64]:
        """The group of each column."""
        groups, cols = self._scales.shape[0], self.shape[1]
        if self._index is None:
            return np.arange(cols) // -(-cols // groups)
        index = self._index.rows().astype(np.int64)
        if index.min() < 0 or index.max() >= groups:
            raise CheckpointError(
                f"tensor {self._index.name!r} names groups {index.min()} to {index.max()};"
                f" there are {groups}",
                fix="fetch the checkpoint again",
            )
        return index

    def _read(self, start: int, stop: int) -> tuple[U8, U8, F32]:
        """codes [n, in], zeros [n, groups], scales [n, groups] of rows start..stop."""
        words = self._codes.columns(start, stop)
        scales = to_float32(self._scales.columns(start, stop), self._scales.dtype)
        codes = unpack_bits(words.T, self._bits, self.shape[1])
        return codes, self._read_zeros(start, stop).T, scales.T

    def _read_zeros(self, start: int, stop: int) -> U8:
        """zero points uint8 [groups, n]; 8 bits wrap."""
        if self._bits == 3:  # 32 codes in three words
            first, last, step = start // 32 * 3, -(-stop // 32) * 3, 32
        else:
            step = 32 // self._bits
            first, last = start // step, -(-stop // step)
        words = self._zeros.columns(first, min(last, self._zeros.shape[1]))
        if self._one_low and self._bits != 3:
            ones = sum(1 << at for at in range(0, 32, self._bits))
            words = (words.view(np.uint32) + np.uint32(ones)).view(np.int32)
        skip = start % step
        zeros = unpack_bits(words, self._bits, skip + stop - start)[:, skip:]
        return zeros + np.uint8(1) & np.uint8(7) if self._one_low and self._bits == 3 else zeros


def find(parts: Parts, config: HFConfig) -> dict[str, Tensor]:
    """The logical tensors of a GPTQ checkpoint. config: its quantization_config."""
    bits = config.integer("bits", low=2, high=8)
    config.must_be("checkpoint_format", "gptq", "gptq_v2")
    config.must_be("pack_dtype", "int32")
    first_version = config.text("checkpoint_format", default="gptq") == "gptq"
    stems = [n.removesuffix(".qweight") for n in parts.names if n.endswith(".qweight")]
    return {f"{stem}.weight": _matrix(parts, stem, bits, first_version) for stem in stems}


def _matrix(parts: Parts, stem: str, bits: int, first_version: bool) -> GPTQ:
    words = parts.take(f"{stem}.qweight", ("I32",), (None, None))
    depth, rows = words.shape
    index = None
    if f"{stem}.g_idx" in parts:
        index = parts.take(f"{stem}.g_idx", ("I32",), (None,))
        bits = 32 * depth // index.shape[0]  # single matrices may have other bits than most
    if bits not in BITS or 32 * depth % bits or (index and 32 * depth != bits * index.shape[0]):
        columns = "" if index is None else f" for {index.shape[0]} columns"
        raise CheckpointError(
            f"tensor {stem + '.qweight'!r} is {list(words.shape)}{columns};"
            f" that is not {', '.join(map(str, BITS))} bits a weight",
            fix="fetch the checkpoint again, or use the unquantized one",
        )
    scales = parts.take(f"{stem}.scales", FLOATS, (None, rows))
    groups = scales.shape[0]
    zeros = parts.take(f"{stem}.qzeros", ("I32",), (groups, -(-rows * bits // 32)))
    return GPTQ((words, zeros, scales, index), bits, first_version)
