"""What a format is: how one [O, I] matrix lies in a run of bytes, and how a record holds three.

Every format offers `nbytes`, `pack` and `unpack` (numpy: the definition) and, in the same file, the
numba kernel that multiplies straight from the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moelite.errors import QuantizationError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

TILE_ROWS = 8  # rows of a tile: one 32-bit lane of a 256-bit vector each
BLOCK = 32  # columns that share a scale
ALIGN = 64  # a matrix inside a record starts on a cache line
PAGE = 4096  # a record is a whole number of pages, for O_DIRECT


def pad(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple


class Act(NamedTuple):
    """Activations of T tokens, as kernels read them.

    x    float32 [T * width]: the values, `width` apart, zero beyond `cols` up to a multiple of 8.
    q    int8 [T * blocks * 32], scale float32 [T * blocks]: the same per block of 32 columns,
         x ~= q * scale with |q| <= 127.
    bias int32 [T * blocks]: -64 * sum of the block's q. Where codes are stored 64 too high, to be
         unsigned, a dot product that starts from it comes out right.
    rest int8 [T * blocks * 32]: what q leaves, x ~= (q + rest / 254) * scale with |rest| <= 127: 16
         bits in two planes. rest_bias: its bias.
    A format reads x, or q, or q and rest (see QuantFormat.planes); the others may be empty.
    """

    x: F32
    width: int
    q: npt.NDArray[np.int8]
    scale: F32
    bias: npt.NDArray[np.int32]
    rest: npt.NDArray[np.int8]
    rest_bias: npt.NDArray[np.int32]
    blocks: int


class Matrix(NamedTuple):
    """A packed [rows, cols] matrix whose bytes begin at packed[base].

    product, row: addresses of its format's compiled code, see moelite.dispatch. tile_bytes: what 8
    rows take, from one tile's codes to the next's.
    """

    product: int
    row: int
    packed: U8
    base: int
    rows: int
    cols: int
    tile_bytes: int


class Job(NamedTuple):
    """Which activations meet a matrix and where the results go, for positions first..last.

    Position p multiplies activation row source[p] and writes row target[p] of `out`, float32
    [rows * width] with `width` a multiple of 8 that is not below the matrix's row count.
    """

    source: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    first: int
    last: int
    out: F32
    width: int


class QuantFormat(Protocol):
    """One layout of a matrix. Matrices are [O, I]: O output rows of I inputs."""

    name: str
    planes: int  # how many int8 planes of the activations its kernel reads; 0: Act.x instead

    # njit (matrix, act, job, start, stop, follow): multiplies rows start..stop (start a multiple of
    # TILE_ROWS) of a Matrix by the job's activations. A token's result does not depend on which
    # other tokens or rows are computed with it. follow: the address of what the thread reads next,
    # to be prefetched while the last rows are multiplied.
    multiply: Any
    # njit (matrix, row, out): one row as float32 to out[:cols]
    row: Any

    def tile_bytes(self, cols: int) -> int:
        """Bytes from the codes of one tile of TILE_ROWS rows to those of the next."""
        ...

    def nbytes(self, rows: int, cols: int) -> int:
        """Exact size of a packed [rows, cols] matrix, scales and padding included."""
        ...

    def pack(self, weight: F32) -> U8:
        """weight [O, I] float32 -> [nbytes(O, I)] uint8. Raises QuantizationError on NaN or inf."""
        ...

    def pack_rows(self, packed: U8, rows: int, cols: int, start: int, weight: F32) -> None:
        """Packs weight [n, I] as rows start..start+n of the [rows, cols] matrix in `packed`.

        start is a multiple of TILE_ROWS; n is too, unless it reaches the last row. Packing a matrix
        piece by piece gives the same bytes as packing it whole.
        """
        ...

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        """[nbytes(O, I)] uint8 -> the [O, I] float32 matrix that the kernel multiplies by."""
        ...


def empty_packed(fmt: QuantFormat, rows: int, cols: int) -> U8:
    """Zeroed uint8 [nbytes] to pack into, starting on a cache line."""
    size = fmt.nbytes(rows, cols)
    raw = np.zeros(size + ALIGN, np.uint8)
    skip = -raw.ctypes.data % ALIGN
    return raw[skip : skip + size]


def pack_whole(fmt: QuantFormat, weight: F32) -> U8:
    """`pack` by way of `pack_rows`."""
    rows, cols = weight.shape
    packed = empty_packed(fmt, rows, cols)
    fmt.pack_rows(packed, rows, cols, 0, weight)
    return packed


def check_weight(name: str, weight: F32) -> F32:
    """The weight as contiguous float32 [O, I], if every value is finite; else QuantizationError."""
    weight = np.ascontiguousarray(weight, np.float32)
    if weight.ndim != 2:
        raise QuantizationError(
            f"{name} packs matrices [O, I], not an array of shape {weight.shape}"
        )
    if not np.isfinite(weight.sum(dtype=np.float64)):
        bad = int(np.count_nonzero(~np.isfinite(weight)))
        if bad:
            raise QuantizationError(
                f"{bad} of {weight.size} weights are NaN or infinite",
                fix="the checkpoint is damaged: download it again",
            )
    return weight


def check_packed(fmt: QuantFormat, packed: U8, rows: int, cols: int) -> U8:
    """`packed`, if it has the size of a [rows, cols] matrix of fmt; else QuantizationError."""
    want = fmt.nbytes(rows, cols)
    if packed.dtype != np.uint8 or packed.shape != (want,):
        raise QuantizationError(
            f"a {fmt.name} matrix [{rows}, {cols}] takes {want} bytes (uint8), "
            f"not {packed.dtype} {packed.shape}"
        )
    return packed


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """Where gate, up and down of one expert lie in its record.

    gate and up are [expert_size, hidden_size], down is [hidden_size, expert_size], all in `format`.
    Offsets are bytes from the record's start; record_bytes is a multiple of PAGE.
    """

    format: str
    hidden_size: int
    expert_size: int
    gate: int
    up: int
    down: int
    payload_bytes: int
    record_bytes: int


def record_layout(fmt: QuantFormat, hidden_size: int, expert_size: int) -> RecordLayout:
    """The layout of one expert of `fmt`: gate, up, down, each on a cache line."""
    wide = pad(fmt.nbytes(expert_size, hidden_size), ALIGN)
    payload = 2 * wide + fmt.nbytes(hidden_size, expert_size)
    return RecordLayout(
        format=fmt.name,
        hidden_size=hidden_size,
        expert_size=expert_size,
        gate=0,
        up=wide,
        down=2 * wide,
        payload_bytes=payload,
        record_bytes=pad(payload, PAGE),
    )
