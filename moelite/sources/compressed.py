"""quant_method "compressed-tensors", as llm-compressor writes it; the format of each tensor is read
off its parts and must be one that config.json's config_groups name.

    pack-quantized        X.weight_packed I32 [rows, ceil(cols * bits / 32)]: codes + 2^(bits - 1),
                          lowest bits first; X.weight_shape [2]; X.weight_scale [rows, groups],
                          [rows, 1] or [1]; X.weight_zero_point, packed the same down the rows;
                          X.weight_g_idx [cols]: the group of each column
    int-, float-, naive-quantized, mxfp8-quantized
                          X.weight I8 or F8_E4M3 [rows, cols], X.weight_scale (see grid.py; U8 is
                          an exponent), X.weight_zero_point I8
    mxfp4-, nvfp4-pack-quantized
                          X.weight_packed U8 [rows, cols / 2], the low nibble first; X.weight_scale
                          U8 [rows, cols / 32], or F8_E4M3 [rows, cols / 16] divided by
                          X.weight_global_scale

Checked against compressed-tensors 0.20.0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moelite.config import MAX_SIZE, HFConfig
from moelite.errors import CheckpointError, UnsupportedError
from moelite.quant.base import F32
from moelite.sources.affine import coded, group_size
from moelite.sources.codes import Codes
from moelite.sources.grid import Grid, Scaled, grid
from moelite.sources.tensor import (
    E2M1,
    E2M1_TWICE,
    FLOATS,
    Parts,
    Stored,
    Tensor,
    unpack_bits,
)

_ACTIVATIONS = (
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale"),
    *("output_zero_point", "k_scale", "v_scale", "q_scale"),
)
FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("mxfp4-pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized", "mixed-precision"),
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What one of the config_groups says about weights."""

    bits: int
    kind: str  # "int" or "float"
    block: tuple[int, int] | None


class Packed:
    """One matrix of integers packed into words."""

    def __init__(self, parts: Parts, stem: str, schemes: list[Scheme]) -> None:
        words = parts.look(f"{stem}.weight_packed")
        self.shape = _logical(parts, stem)
        rows, cols = self.shape
        fitting = [s.bits for s in schemes if -(-cols * s.bits // 32) == words.shape[-1]]
        if not fitting:
            raise CheckpointError(
                f"tensor {words.name!r} is {list(words.shape)} for a matrix {list(self.shape)};"
                f" that fits none of the bits of config_groups"
                f" ({', '.join(sorted({str(s.bits) for s in schemes}))})",
                fix="fetch the checkpoint again, or use the unquantized one",
            )
        self._bits = bits = fitting[0]
        self._words = parts.take(words.name, ("I32",), (rows, -(-cols * bits // 32)))
        self._index = _optional(parts, f"{stem}.weight_g_idx", ("I32",), (cols,))
        scale = parts.take(f"{stem}.weight_scale", FLOATS, parts.look(f"{stem}.weight_scale").shape)
        self._scales = grid(scale, self.shape, None)
        self._groups = 1 if len(scale.shape) < 2 else scale.shape[1]
        packed_rows = -(-rows * bits // 32)
        self._zeros = _optional(
            parts, f"{stem}.weight_zero_point", ("I32",), (packed_rows, self._groups)
        )
        known = (self._words, scale, self._zeros, self._index)
        self.nbytes = sum(part.nbytes for part in known if part is not None)
        self.dtype = f"compressed-tensors int{bits}, groups of {cols // self._groups}"

    def rows(self, start: int, stop: int) -> F32:
        values = self._codes(start, stop).astype(np.float32)
        values -= self._spread(self._zero_points(start, stop).astype(np.float32))
        values *= self._spread(self._scales.rows(start, stop))
        return values

    def coded(self, start: int, stop: int) -> Codes | None:
        """Where the whole matrix has one zero point and columns are in order."""
        size = group_size(self.shape[1], self._groups)
        zeros = self._zero_points(0, self.shape[0])
        if size is None or self._index is not None or (zeros != zeros[0, 0]).any():
            return None
        scales = self._scales.rows(start, stop)
        return coded(self._codes(start, stop), int(zeros[0, 0]), scales, size, self._bits)

    def _codes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        return unpack_bits(self._words.rows(start, stop), self._bits, self.shape[1])

    def _zero_points(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """uint8 [n, groups] or [n, 1]: the code that means 0."""
        if self._zeros is None:
            return np.full((stop - start, 1), 1 << (self._bits - 1), np.uint8)
        first = start // 32 * 32
        words = self._zeros.rows(first * self._bits // 32, -(-stop // 32) * self._bits)
        return unpack_bits(words.T, self._bits, stop - first)[:, start - first :].T

    def _spread(self, numbers: F32) -> F32:
        """[n, groups] -> [n, cols]: the number of each column's group; [n, 1] as it is."""
        if numbers.shape[1] == 1:
            return numbers
        if self._index is None:
            return np.repeat(numbers, self.shape[1] // self._groups, axis=1)
        index = self._index.rows()
        if index.min() < 0 or index.max() >= self._groups:
            raise CheckpointError(
                f"tensor {self._index.name!r} names groups {index.min()} to {index.max()};"
                f" there are {self._groups}",
                fix="fetch the checkpoint again",
            )
        return numbers[:, index]


class Float4:
    """One matrix of E2M1 numbers: MXFP4, or NVFP4 with its scale for the whole matrix."""

    def __init__(self, parts: Parts, stem: str) -> None:
        self._packed = parts.take(f"{stem}.weight_packed", ("U8",), (None, None))
        rows, width = self._packed.shape
        self.shape = (rows, 2 * width)
        mx = f"{stem}.weight_global_scale" not in parts
        self._block = 32 if mx else 16
        if self.shape[1] % self._block:
            raise CheckpointError(
                f"tensor {self._packed.name!r} is {list(self._packed.shape)}: its {2 * width}"
                f" columns are not whole blocks of {self._block}"
            )
        kinds = ("U8", "F8_E8M0") if mx else ("F8_E4M3",)
        scale = parts.take(f"{stem}.weight_scale", kinds, (rows, 2 * width // self._block))
        self._scales = _exponents(scale) if mx else scale
        self._whole = None if mx else parts.take(f"{stem}.weight_global_scale", ("F32",), (1,))
        self.nbytes = self._packed.nbytes + scale.nbytes
        self.dtype = f"compressed-tensors {'mxfp4' if mx else 'nvfp4'}"

    def rows(self, start: int, stop: int) -> F32:
        scales = self._scales.numbers(start, stop)
        if self._whole is not None:
            scales = scales / self._whole.numbers()
        codes = unpack_bits(self._packed.rows(start, stop), 4, self.shape[1])
        values = E2M1[codes].reshape(*scales.shape, self._block)
        values *= scales[..., None]
        return values.reshape(codes.shape)

    def coded(self, start: int, stop: int) -> Codes | None:
        if self._whole is not None:
            return None
        codes = unpack_bits(self._packed.rows(start, stop), 4, self.shape[1])
        scales = self._scales.numbers(start, stop) / np.float32(2)
        return Codes("mxfp4", E2M1_TWICE, codes, scales, self._block)


def find(parts: Parts, config: HFConfig) -> dict[str, Tensor]:
    """The logical tensors of a compressed-tensors checkpoint. config: its quantization_config."""
    schemes = _schemes(config)
    found: dict[str, Tensor] = {}
    for name in parts.names:
        stem, _, part = name.rpartition(".")
        if part in _ACTIVATIONS:
            parts.drop(name)
        elif part == "weight_packed":
            words = parts.look(name).dtype == "I32"
            found[f"{stem}.weight"] = Packed(parts, stem, schemes) if words else Float4(parts, stem)
        elif part == "weight_scale" and f"{stem}.weight_packed" not in parts:
            found[f"{stem}.weight"] = _plain(parts, stem, schemes)
    return found


def _plain(parts: Parts, stem: str, schemes: list[Scheme]) -> Tensor:
    """A matrix whose weights lie in bytes of their own."""
    values = parts.take(f"{stem}.weight", ("I8", "F8_E4M3"), (None, None))
    scale = parts.look(f"{stem}.weight_scale")
    scale = parts.take(scale.name, (*FLOATS, "U8"), scale.shape)
    kind = "int" if values.dtype == "I8" else "float"
    blocks = [s.block for s in schemes if s.kind == kind and s.bits == 8]
    if not blocks:
        raise CheckpointError(
            f"tensor {values.name!r} is {values.dtype}, which none of config_groups names",
            fix="download config.json again, or use the unquantized checkpoint",
        )
    numbers = _exponents(scale) if scale.dtype == "U8" else scale
    scales = grid(numbers, values.shape, next(filter(None, blocks), None))
    zero = _optional(parts, f"{stem}.weight_zero_point", ("I8",), scale.shape)
    zeros = None if zero is None else Grid(zero, scales.height, scales.width)
    return Scaled(values, scales, zeros, f"compressed-tensors {kind}8")


def _exponents(stored: Stored) -> Stored:
    """The same bytes, read as powers of two."""
    return replace(stored, info=replace(stored.info, dtype="F8_E8M0"))


def _optional(
    parts: Parts, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
) -> Stored | None:
    return parts.take(name, dtypes, shape) if name in parts else None


def _logical(parts: Parts, stem: str) -> tuple[int, int]:
    stored = parts.take(f"{stem}.weight_shape", ("I64", "I32"), (2,))
    rows, cols = (int(n) for n in stored.rows())
    if not (1 <= rows <= MAX_SIZE and 1 <= cols <= MAX_SIZE):
        raise CheckpointError(
            f"tensor {stored.name!r} says [{rows}, {cols}]", fix="fetch the checkpoint again"
        )
    return rows, cols


def _schemes(config: HFConfig) -> list[Scheme]:
    """What the config_groups say about weights."""
    config.must_be("format", *FORMATS)
    config.must_be("quantization_status", "compressed")
    config.must_be("transform_config", {})
    sparsity = config.nested("sparsity_config") or HFConfig({})
    sparsity.must_be("format", "dense")
    groups = config.nested("config_groups") or HFConfig({})
    found = [_scheme(groups, name) for name in groups.keys()]  # noqa: SIM118 - not a dict
    if not any(found):
        raise UnsupportedError(
            "quantization_config has no config_groups with weights",
            fix="use the unquantized checkpoint of this model",
        )
    return [scheme for scheme in found if scheme is not None]


def _scheme(groups: HFConfig, name: str) -> Scheme | None:
    group: Any = groups.nested(name)
    weights = group.nested("weights") if group is not None else None
    if weights is None:
        return None
    weights.must_be("type", "int", "float")
    block = weights.items("block_structure", int)
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise CheckpointError(
            f"block_structure = {list(block)} in quantization_config; it must be two sizes",
            fix="download config.json again, or correct it",
        )
    return Scheme(
        bits=weights.integer("num_bits", low=1, high=8),
        kind=weights.text("type", default="int"),
        block=None if block is None else (block[0], block[1]),
    )
