"""Packing a tensor some rows at a time, and files that appear only when they are complete."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moelite.arch import MoE, TensorRef
from moelite.checkpoint import Source, read
from moelite.errors import BudgetError, MoeliteError, StoreError
from moelite.inventory import DenseItem, Inventory
from moelite.kept import CARRIERS, repack
from moelite.process import rss_bytes
from moelite.quant import FORMATS
from moelite.quant.base import F32, TILE_ROWS, U8, QuantFormat
from moelite.quant.record import join, pack_gate_up
from moelite.storefile import packed_bytes
from moelite.tensorfile import pwrite_all
from moelite.units import MIB, show_bytes

TEMPORARY = ".part"  # ends the name of a file that is not complete
_CHUNK_BYTES = 4 * MIB  # float32 rows packed at once
_PACK_FACTOR = 8  # a packer's peak is 7 times its rows (int8), measured with tracemalloc
_KEPT_BYTES = 8  # a weight packed from its own codes: 4.1 measured, and the codes
_SLACK_BYTES = 24 * MIB  # what threads, the allocator and headers add


def _chunk_rows(cols: int) -> int:
    """Rows packed at once: whole tiles, about _CHUNK_BYTES of float32."""
    return max(TILE_ROWS, _CHUNK_BYTES // (4 * cols) // TILE_ROWS * TILE_ROWS)


def pack(
    fmt: QuantFormat,
    source: Source,
    matrix: tuple[TensorRef, int, int],
    packed: U8,
    after: Callable[[], None] | None = None,
) -> None:
    """Pack `matrix` (ref, rows, cols) into `packed`, some rows at a time; `after` each of them.

    A stacked or transposed tensor cannot be read by rows and is held whole meanwhile.
    """
    ref, rows, cols = matrix
    rows_of, step = _rows_of(source, ref), rows if fmt.whole else _chunk_rows(cols)
    for start in range(0, rows, step):
        part = rows_of(start, min(rows, start + step))
        with _naming(ref):
            fmt.pack_rows(packed, rows, cols, start, part)
        if after is not None:
            after()


def pack_expert(source: Source, mlp: MoE, expert: int, formats: tuple[str, str]) -> tuple[U8, U8]:
    """gate_up and down of one expert in these formats, packed some rows at a time.

    Whole matrices are held where the size of a format depends on the weights.
    """
    gate, up, down = mlp.experts.matrices
    wide = FORMATS[formats[0]]
    refs = [part.weight.at(expert) for part in (gate, up)]
    if wide.exact:
        halves = [_packed(wide, source, (ref, gate.rows, gate.cols)) for ref in refs]
        both = join(wide, (gate.rows, gate.cols), halves[0], halves[1])
    else:
        with _naming(refs[0]):
            both = pack_gate_up(wide, read(source, refs[0]), read(source, refs[1]))
    matrix = down.weight.at(expert), down.rows, down.cols
    return both, _packed(FORMATS[formats[1]], source, matrix)


def _packed(fmt: QuantFormat, source: Source, matrix: tuple[TensorRef, int, int]) -> U8:
    if (kept := repack(fmt, source, matrix[0])) is not None:
        return kept
    if not fmt.exact:
        with _naming(matrix[0]):
            return fmt.pack(read(source, matrix[0]))
    out = np.zeros(fmt.nbytes(*matrix[1:]), np.uint8)
    pack(fmt, source, matrix, out)
    return out


def _rows_of(source: Source, ref: TensorRef) -> Callable[[int, int], F32]:
    """Reads rows start..stop of a matrix; one that cannot be read by rows is held whole."""
    if not (ref.stacked or ref.transpose):
        return lambda start, stop: read(source, ref, start, stop)
    whole = read(source, ref)
    return lambda start, stop: whole[start:stop]


@contextmanager
def _naming(ref: TensorRef) -> Iterator[None]:
    """Errors inside name the tensor."""
    try:
        yield
    except MoeliteError as problem:
        raise type(problem)(f"tensor {ref.key!r}: {problem.message}", fix=problem.fix) from None


def pack_dense(fd: int, offset: int, source: Source, item: DenseItem) -> None:
    """Write one dense tensor into the file at `offset`, holding only some of its rows."""
    shape = item.spec.shape
    if len(shape) == 1:
        pwrite_all(fd, read(source, item.ref).data.cast("B"), offset)
        return
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    size = packed_bytes(item.spec.format, shape)
    mapped = mmap.mmap(fd, offset - begin + size, offset=begin)
    packed = np.frombuffer(mapped, np.uint8)[offset - begin :]
    try:
        # the pages are the file's: letting go of them after each chunk keeps them out of our memory
        rows, cols = shape
        matrix = (item.ref, rows, cols)
        pack(FORMATS[item.spec.format], source, matrix, packed, lambda: _let_go(mapped))
        if sys.platform != "linux":  # there fsync covers mapped pages
            mapped.flush()
    finally:
        del packed


def _let_go(mapped: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _held_bytes(source: Source, ref: TensorRef) -> int:
    """float32 held while `ref` is packed: a chunk, or the whole of what cannot be read by rows."""
    if not (ref.stacked or ref.transpose):
        return 0
    shape = source.shape(ref.name)
    return 2 * 4 * math.prod(shape[1:] if ref.stacked else shape)


def workers(inventory: Inventory, source: Source, budget: int) -> int:
    """Packing threads that the budget permits. Raises BudgetError when it permits none."""
    wanted = min(2, os.cpu_count() or 1)
    for name in inventory.formats:
        FORMATS[name].pack(np.ones((TILE_ROWS, 64), np.float32))  # compiles: it counts below
    refs = [item.ref for item in inventory.items.values()]
    for mlp in inventory.layers.values():
        refs += [part.weight.at(0) for part in mlp.experts.matrices]
    columns = [item.spec.shape[-1] for item in inventory.items.values()]
    layouts = [tier for entry in inventory.entries.values() for tier in entry.tiers]
    layouts += [entry.low for entry in inventory.entries.values() if entry.low is not None]
    columns += [layouts[0].hidden_size, layouts[0].expert_size]
    chunk = max(4 * cols * _chunk_rows(cols) for cols in columns)
    if any(FORMATS[n].whole or not FORMATS[n].exact for n in inventory.formats):
        chunk = max(chunk, 4 * layouts[0].hidden_size * layouts[0].expert_size)
    # three parts, gate and up joined, the record
    each = 3 * max(tier.record_bytes for tier in layouts) + chunk * _PACK_FACTOR
    each += max(_held_bytes(source, ref) for ref in refs)
    if any(carrier.name in inventory.formats for carrier in CARRIERS):
        each += _KEPT_BYTES * layouts[0].hidden_size * layouts[0].expert_size
    base = rss_bytes() + _SLACK_BYTES
    if base + each > budget:
        need = math.ceil((base + each) / MIB)
        raise BudgetError(
            f"quantizing takes at least {need}MiB of memory; --ram is {show_bytes(budget)}",
            fix=f"--ram {need}MiB",
        )
    return max(1, min(wanted, (budget - base) // each))


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def new_file(path: Path, size: int) -> Iterator[int]:
    """A file of `size` zeros under a temporary name; synced and renamed if all goes well."""
    temporary = path.with_name(path.name + TEMPORARY)
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.ftruncate(fd, size)
        if hasattr(os, "posix_fallocate") and size:  # a full disk shows now, not in a mapped page
            os.posix_fallocate(fd, 0, size)
        yield fd
        os.fsync(fd)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    temporary.rename(path)
    sync_folder(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    with new_file(path, len(data)) as fd:
        pwrite_all(fd, data, 0)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer a folder; the lock goes with the process, however it ends."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise StoreError(
                f"another quantize is writing {folder}", fix="wait for it, or name another folder"
            ) from problem
        yield
    finally:
        os.close(fd)
