"""Rows of float32 of every token of a text, in memory or in a file that goes with the process."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moelite.errors import StoreError
from moelite.quant.base import F32
from moelite.tensorfile import pread_into, pwrite_all

Rows = npt.NDArray[np.int64]  # ascending


class Stream:
    """[T, H] float32, zeros at first. folder: where its file is, which has no name; None: memory.

    Nothing is mapped: pages of a mapped file would count as this process's memory.
    """

    def __init__(self, shape: tuple[int, int], folder: Path | None) -> None:
        self._shape = shape
        self._array: F32 | None = None
        self._file: Any = None
        if folder is None:
            self._array = np.zeros(shape, np.float32)
        else:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open while we live
            os.truncate(self._file.fileno(), 4 * shape[0] * shape[1])

    def read(self, rows: Rows) -> F32:
        """A copy of these rows."""
        if self._array is not None:
            return self._array[rows]
        out = np.empty((rows.size, self._shape[1]), np.float32)
        for first, last in _runs(rows):
            part = out[first:last].reshape(-1).view(np.uint8).data
            if pread_into(self._fd, part, self._at(rows[first])) != len(part):
                raise StoreError("the temporary file of the calibration was cut short")
        return out

    def write(self, rows: Rows, values: F32) -> None:
        """Puts `values` [n, H] into these rows."""
        if self._array is not None:
            self._array[rows] = values
            return
        values = np.ascontiguousarray(values)
        for first, last in _runs(rows):
            part = values[first:last].reshape(-1).view(np.uint8).data
            pwrite_all(self._fd, part, self._at(rows[first]))

    def close(self) -> None:
        """Gives the memory or the file back."""
        self._array = None
        if self._file is not None:
            self._file.close()

    @property
    def _fd(self) -> int:
        fd: int = self._file.fileno()
        return fd

    def _at(self, row: np.int64) -> int:
        return 4 * self._shape[1] * int(row)


def _runs(rows: Rows) -> Iterator[tuple[int, int]]:
    # spans of `rows` that follow one another
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *cuts.tolist(), rows.size]
    yield from itertools.pairwise(edges)
