"""Matrices of small numbers times scales that cover rectangles: FP8, and int8 of every block shape.

    w[r, c] = (code[r, c] - zero[r // height, c // width]) * scale[r // height, c // width]

in float32, one multiplication. Libraries multiply in the dtype of the scale, so theirs are these
values rounded to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moelite.errors import CheckpointError
from moelite.quant.base import F32
from moelite.sources.codes import Codes
from moelite.sources.tensor import Stored


@dataclass(frozen=True, slots=True)
class Grid:
    """Numbers for rectangles of `height` x `width`, or a single one [] or [1].

    stored: [ceil(rows / height), ceil(cols / width)]; zero points are read the same way.
    """

    stored: Stored
    height: int
    width: int

    def rows(self, start: int, stop: int) -> F32:
        """float32 [stop - start, columns of the grid]."""
        if len(self.stored.shape) < 2:
            return np.full((stop - start, 1), self.stored.numbers().item(), np.float32)
        first = start // self.height
        found = self.stored.numbers(first, -(-stop // self.height))
        return found[np.arange(start, stop) // self.height - first]

    def spread(self, start: int, stop: int, cols: int) -> F32:
        """float32 [stop - start, cols]: one for each weight."""
        return np.repeat(self.rows(start, stop), self.width, axis=1)[:, :cols]


def grid(scale: Stored, shape: tuple[int, ...], block: tuple[int, int] | None) -> Grid:
    """What `scale` covers in a matrix of `shape`, by its own shape.

    A single number, one a row [rows, 1], one a group of columns [rows, groups], or, where the
    config gives the size of blocks, [ceil(rows / height), ceil(cols / width)].
    """
    rows, cols = shape
    found = scale.shape
    if found in {(), (1,), (1, 1)}:
        return Grid(scale, rows, cols)
    if block is not None and found == (-(-rows // block[0]), -(-cols // block[1])):
        return Grid(scale, *block)
    if found == (rows,):
        found = (rows, 1)
    if len(found) == 2 and found[0] == rows and found[1] and cols % found[1] == 0:
        return Grid(scale, 1, cols // found[1])
    raise CheckpointError(
        f"tensor {scale.name!r} is {list(scale.shape)}, which covers no matrix {list(shape)}"
        + (f" in blocks of {list(block)}" if block else ""),
        fix="fetch the checkpoint again, or use the unquantized one",
    )


class Scaled:
    """A tensor of small numbers, its scales, and zero points if it has them."""

    def __init__(self, values: Stored, scales: Grid, zeros: Grid | None, dtype: str) -> None:
        self.shape = values.shape
        self.dtype = dtype
        parts = [values, scales.stored] + ([] if zeros is None else [zeros.stored])
        self.nbytes = sum(part.nbytes for part in parts)
        self._values, self._scales, self._zeros = values, scales, zeros

    def rows(self, start: int, stop: int) -> F32:
        values = self._values.numbers(start, stop)
        if self._zeros is not None:
            values -= self._zeros.spread(start, stop, self.shape[1])
        values *= self._scales.spread(start, stop, self.shape[1])
        return values

    def coded(self, start: int, stop: int) -> Codes | None:
        """int8 without zero points is codes and scales; FP8 is not."""
        if self._values.dtype != "I8" or self._zeros is not None:
            return None
        codes: npt.NDArray[np.int8] = self._values.rows(start, stop)
        scales = self._scales.rows(start, stop)
        width = min(self._scales.width, self.shape[1])
        return Codes("int8", np.empty(0, np.int8), codes, np.ascontiguousarray(scales), width)
