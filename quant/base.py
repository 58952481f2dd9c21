"""What a format is: how one [O, I] matrix lies in a run of bytes.

Every format offers `nbytes`, `pack` and `unpack` (numpy: the definition) and, in the same file, the
numba kernel that multiplies straight from the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moelite.errors import QuantizationError

if TYPE_CHECKING:
    from moelite.quant.curvature import Curvature

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

TILE_ROWS = 8  # rows of a tile: one 32-bit lane of a 256-bit vector each
BLOCK = 32  # columns that share a scale
GROUP = 8  # blocks whose scales lie together, before their codes
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
    # Whether every [rows, cols] matrix takes nbytes(rows, cols). Where not, the size depends on the
    # weights: nbytes is an estimate to plan with, `pack` returns what it took, a multiple of ALIGN,
    # from which `unpack` and the kernel find their way by themselves; there is no `pack_rows`, so
    # call `pack`; and check(packed, rows, cols) raises QuantizationError unless `packed` begins
    # with a matrix that the kernel can read without leaving it: for bytes that come from a file.
    exact: bool
    planes: int  # how many int8 planes of the activations its kernel reads; 0: Act.x instead
    row_multiple: int  # the length of rows has to be a multiple of it
    whole: bool  # pack_rows takes all rows of a matrix at once only
    curved: bool  # pack has use for a curve

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
        """Size of a packed [rows, cols] matrix, scales and padding included; see `exact`.

        Raises QuantizationError if the format cannot hold rows of that length.
        """
        ...

    def pack(self, weight: F32, curve: Curvature | None = None) -> U8:
        """weight [O, I] float32 -> uint8 [nbytes(O, I)]. Raises QuantizationError on NaN or inf.

        curve: what calibration knows of the inputs; formats that have no use for it ignore it.
        """
        ...

    def pack_rows(
        self,
        packed: U8,
        rows: int,
        cols: int,
        start: int,
        weight: F32,
        curve: Curvature | None = None,
    ) -> None:
        """Packs weight [n, I] as rows start..start+n of the [rows, cols] matrix in `packed`.

        start is a multiple of TILE_ROWS; n is too, unless it reaches the last row. Packing a matrix
        piece by piece gives the same bytes as packing it whole; a `whole` format refuses pieces.
        """
        ...

    def check(self, packed: U8, rows: int, cols: int) -> None:
        """Raises QuantizationError for bytes that a kernel cannot read safely; see `exact`."""
        ...

    def unpack(self, packed: U8, rows: int, cols: int) -> F32:
        """[nbytes(O, I)] uint8 -> the [O, I] float32 matrix that the kernel multiplies by."""
        ...


class TileLayout:
    """A tile as one run of bytes, read front to back: a head, then groups of up to GROUP blocks,
    each the scales of GROUP blocks (unused ones zero) and the codes of those that are there.

    head, scale_bytes, code_bytes: of a tile, of a block. All parts are whole cache lines, or halves
    of one (of vq: of 8 bytes, or padding would be a tenth of a matrix). A stream without gaps or
    side streams is what processors prefetch best (docs/LOG.md).
    """

    def __init__(self, head: int, scale_bytes: int, code_bytes: int) -> None:
        self.head, self.scale_bytes, self.code_bytes = head, scale_bytes, code_bytes

    def tile_bytes(self, cols: int) -> int:
        """Bytes of a tile of `cols` columns."""
        blocks = pad(cols, BLOCK) // BLOCK
        return self.head + pad(blocks, GROUP) * self.scale_bytes + blocks * self.code_bytes

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a [rows, cols] matrix: its tiles one after another."""
        return pad(rows, TILE_ROWS) // TILE_ROWS * self.tile_bytes(cols)

    def heads(self, packed: U8, cols: int) -> U8:
        """uint8 [tiles, head], a view."""
        return packed.reshape(-1, self.tile_bytes(cols))[:, : self.head]

    def groups(self, packed: U8, cols: int) -> Iterator[tuple[slice, U8, U8]]:
        """(its blocks, scales [tiles, n, scale_bytes], codes [tiles, n, code_bytes]) of each group,
        as writable views of a packed matrix, or of some of its tiles.
        """
        tiles = packed.reshape(-1, self.tile_bytes(cols))
        blocks, at = pad(cols, BLOCK) // BLOCK, self.head
        for first in range(0, blocks, GROUP):
            n = min(GROUP, blocks - first)
            scales = tiles[:, at : at + n * self.scale_bytes]
            at += GROUP * self.scale_bytes
            codes = tiles[:, at : at + n * self.code_bytes]
            at += n * self.code_bytes
            yield (
                slice(first, first + n),
                scales.reshape(len(tiles), n, self.scale_bytes),
                codes.reshape(len(tiles), n, self.code_bytes),
            )


class Exact:
    """What formats share whose matrices have one size, whatever the weights."""

    exact = True
    row_multiple = 1
    whole = False
    curved = False

    def check(self: Any, packed: U8, rows: int, cols: int) -> None:
        check_packed(self, packed, rows, cols)

    def pack(self: Any, weight: F32, curve: Curvature | None = None) -> U8:
        return pack_whole(self, check_weight(self.name, weight), curve)


class Tiled(Exact):
    """What formats of tiles share; `layout` says what their tiles are."""

    layout: TileLayout

    def tile_bytes(self, cols: int) -> int:
        return self.layout.tile_bytes(cols)

    def nbytes(self, rows: int, cols: int) -> int:
        return self.layout.nbytes(rows, cols)


def empty_packed(fmt: QuantFormat, rows: int, cols: int) -> U8:
    """Zeroed uint8 [nbytes] to pack into, starting on a cache line."""
    return zeros(fmt.nbytes(rows, cols))


def zeros(size: int) -> U8:
    """Zeroed uint8 [size], starting on a cache line."""
    raw = np.zeros(size + ALIGN, np.uint8)
    skip = -raw.ctypes.data % ALIGN
    return raw[skip : skip + size]


def pack_whole(fmt: QuantFormat, weight: F32, curve: Curvature | None = None) -> U8:
    """`pack` by way of `pack_rows`."""
    rows, cols = weight.shape
    packed = empty_packed(fmt, rows, cols)
    fmt.pack_rows(packed, rows, cols, 0, weight, curve)
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


def rank(values: F32, bounds: F32) -> U8:
    """How many of some bounds lie below each value: its code, a value on a bound taking the lower.

    As numpy.searchsorted, which is slower and takes 8 bytes a value.
    """
    codes = np.zeros(values.shape, np.uint8)
    for bound in bounds:
        codes += values > bound
    return codes


def pair_rows(rows: int) -> int:
    """Rows of two [rows, I] matrices that lie interleaved, tile by tile in turn."""
    return 2 * pad(rows, TILE_ROWS)


def put_half(out: U8, half: int, part: U8, tile_bytes: int) -> None:
    """Writes a packed matrix as every other tile of `out`, from tile `half`, 0 or 1, on.

    out: uint8 [nbytes(pair_rows(rows), cols)], zero where a format ends with its last row.
    """
    tiles, whole = out.reshape(-1, 2, tile_bytes), part.size // tile_bytes
    tiles[:whole, half] = part[: whole * tile_bytes].reshape(whole, tile_bytes)
    if rest := part.size - whole * tile_bytes:
        tiles[whole, half, :rest] = part[whole * tile_bytes :]


def take_half(both: U8, half: int, nbytes: int, tile_bytes: int) -> U8:
    """The packed matrix of `nbytes` that `put_half` wrote."""
    return both.reshape(-1, 2, tile_bytes)[:, half].reshape(-1)[:nbytes].copy()
