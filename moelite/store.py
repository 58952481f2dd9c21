"""The store: what `quantize` writes and a run reads.

One folder: moelite.json (the manifest), dense.safetensors (everything but routed experts), one
experts-NNNNN.safetensors per MoE layer with one record per expert, and the checkpoint's own small
files unchanged. Every file is valid safetensors or JSON.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moelite.crc import crc32
from moelite.drive import let_go, open_for_reading
from moelite.errors import QuantizationError, StoreError
from moelite.quant.base import ALIGN, U8
from moelite.quant.record import RecordLayout, check_record
from moelite.storefile import (
    DENSE,
    LOW,
    MANIFEST,
    PARTIAL,
    LayerEntry,
    Manifest,
    describe,
    layer_file,
    packed_bytes,
    read_json,
    read_manifest,
    spans,
)
from moelite.tensorfile import Header, TensorInfo, pread_into, read_header


class ExpertKey(NamedTuple):
    """Names one routed expert."""

    layer: int
    expert: int


class Place(NamedTuple):
    """Where an expert's record is: an open file, the offset in it, and its bytes."""

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseEntry:
    """A tensor as `read_dense` returns it: nbytes of `format`, logical `shape`."""

    format: str
    shape: tuple[int, ...]
    nbytes: int


class Store:
    """An open store. Reads are positional, thread-safe, and checked for length.

    direct: records are read past the page cache, into memory that begins on a page, and dense
    tensors do not stay in it. Set it before the first read.
    """

    def __init__(self, path: Path, manifest: Manifest, config: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.config = config
        self.layers = manifest.layers
        self.expert_format = manifest.experts  # in words
        self.dense_format = manifest.dense
        self.formats = {spec.format for spec in manifest.tensors.values()}
        self.formats |= {name for entry in self.layers.values() for name in entry.formats}
        self.direct = False
        self._files: dict[str, tuple[int, Header]] = {}
        self._known: dict[ExpertKey, Place] = {}  # experts that were verified
        self._places = {layer: _places(entry) for layer, entry in manifest.layers.items()}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a finished store; reads headers, no weights.

        Raises StoreError if it is none, is unfinished, of another version, or a file is missing or
        cut short.
        """
        if not (path / MANIFEST).is_file():
            raise _no_store(path)
        manifest = read_manifest(path / MANIFEST)
        for name in [DENSE, *map(layer_file, manifest.layers), *manifest.files]:
            entry = manifest.files.get(name)
            if entry is None or Path(name).name != name:
                raise StoreError(f"{path / MANIFEST} is damaged: no proper entry for {name!r}")
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != entry.bytes:
                state = "is missing" if found is None else f"has {found} bytes, not {entry.bytes}"
                raise StoreError(f"{path / name} {state}", fix="quantize the checkpoint again")
        return cls(path, manifest, read_json(path / "config.json"))

    def hold_open(self) -> None:
        """Open every layer's file now: who deletes or replaces one later changes nothing here."""
        for layer in self.manifest.layers:
            self._open(layer_file(layer))

    def dense_keys(self) -> list[str]:
        """Keys of the dense tensors: TensorRef.key."""
        return list(self.manifest.tensors)

    def dense_entry(self, key: str) -> DenseEntry:
        """Format, logical shape and bytes of a dense tensor. Raises StoreError if there is none."""
        spec = self.manifest.tensors.get(key)
        if spec is None:
            raise StoreError(f"{self.path / DENSE} has no tensor {key!r}")
        size = packed_bytes(spec.format, spec.shape)
        return DenseEntry(format=spec.format, shape=spec.shape, nbytes=size)

    def read_dense(self, key: str, out: U8 | None = None, *, verify: bool = False) -> U8:
        """A dense tensor's packed bytes, uint8 [nbytes], starting on a cache line.

        out: where to, [nbytes], instead of memory of its own. verify: also compare with the
        checksum taken when it was written.
        """
        entry = self.dense_entry(key)
        fd, header = self._open(DENSE)
        info = header.tensors.get(key)
        if info is None or info.nbytes != entry.nbytes:
            raise StoreError(f"{self.path / DENSE}: tensor {key!r} is not {entry.nbytes} bytes")
        out = _aligned(entry.nbytes) if out is None else out
        index = list(header.tensors).index(key) if verify else None
        self._fill(fd, out, info.offset, (DENSE, f"tensor {key!r}", index))
        if self.direct:
            let_go(fd, info.offset, info.nbytes)
        return out

    def read_record(self, key: ExpertKey, out: U8, *, verify: bool = False) -> None:
        """One expert's record into the first bytes of `out`, as many as its layout says.

        verify: also compare with the checksum taken when it was written. Raises StoreError naming
        file, layer and expert for a short read, a damaged record, or an expert that is not there.
        """
        place, index = self._place(key)
        if out.dtype != np.uint8 or out.ndim != 1 or out.size < place.nbytes:
            raise ValueError(f"a record takes {place.nbytes} bytes, not {out.dtype} {out.shape}")
        self._read(key, place, out, index if verify else None)

    def load_record(self, key: ExpertKey, out: U8) -> int:
        """As `read_record`; verified the first time that this Store reads the expert. Its bytes.

        Damage on the disk thus never reaches a token, and costs nothing from then on.
        """
        place = self._known.get(key)
        if place is not None:
            self._read(key, place, out, None)
        else:
            self.read_record(key, out, verify=True)
            self._check(key, self.layers[key.layer].layout_of(key.expert), out)
            place = self._known[key] = self._place(key)[0]
        return place.nbytes

    def cached_place(self, key: ExpertKey) -> Place | None:
        """Where an expert was read before that the page cache may still hold; None where it was not
        read and verified yet, or is read past the page cache."""
        return None if self.direct else self._known.get(key)

    def _place(self, key: ExpertKey) -> tuple[Place, int]:
        # and the number of its checksum
        what = f"layer {key.layer} expert {key.expert}"
        name, places = layer_file(key.layer), self._places.get(key.layer, [])
        if not 0 <= key.expert < len(places):
            raise StoreError(f"{self.path / name}: {what} is not in this store")
        tensor, row, size, index = places[key.expert]
        fd, header = self._open(name)
        info = header.tensors.get(tensor, _NOTHING)
        if not row * size < info.nbytes or info.nbytes % size:
            raise StoreError(f"{self.path / name}: {what}: the file holds other records")
        return Place(fd, info.offset + row * size, size), index

    def _read(self, key: ExpertKey, place: Place, out: U8, index: int | None) -> None:
        what = layer_file(key.layer), f"layer {key.layer} expert {key.expert}", index
        self._fill(place.file, out[: place.nbytes], place.offset, what)

    def read_low(self, layer: int, out: U8) -> None:
        """The low plane of a layer, verified, into the first low_bytes of `out`, a record apart."""
        entry, name = self.layers[layer], layer_file(layer)
        assert entry.low is not None, "see LayerEntry.low"
        size = entry.low.record_bytes
        fd, header = self._open(name)
        info = header.tensors.get(LOW, _NOTHING)
        if info.nbytes != entry.low_bytes:
            raise StoreError(f"{self.path / name}: the file holds another low plane")
        for expert in range(entry.experts):
            at = expert * size
            place = name, f"layer {layer} expert {expert}, low plane", entry.experts + expert
            self._fill(fd, out[at : at + size], info.offset + at, place)
            self._check(ExpertKey(layer, expert), entry.low, out[at : at + size])

    def _check(self, key: ExpertKey, layout: RecordLayout, record: U8) -> None:
        try:
            check_record(layout, record)
        except QuantizationError as problem:
            raise StoreError(
                f"{self.path / layer_file(key.layer)}: expert {key.expert}: {problem.message}",
                fix="quantize the checkpoint again",
            ) from problem

    def sidecars(self) -> dict[str, bytes]:
        """The checkpoint's small files (config, tokenizer, template) by name."""
        names = [n for n in self.manifest.files if not n.endswith(".safetensors")]
        return {name: (self.path / name).read_bytes() for name in names}

    def verify_file(self, name: str) -> None:
        """Compare every byte of a file with its checksums.

        Raises StoreError naming the file and, where it can be told, the first damaged part.
        """
        entry = self.manifest.files[name]
        header = read_header(self.path / name, StoreError) if entry.crc32 else None
        found = describe(self.path / name, list(spans(header)) if header else [])
        for i, (want, got) in enumerate(zip(entry.crc32, found.crc32, strict=False)):
            if want != got:
                names = list(header.tensors) if header else []
                part = f"tensor {names[i]!r}" if name == DENSE else self._part(name, i)
                raise _damaged(self.path / name, part)
        if found != entry:
            raise _damaged(self.path / name, "the file")

    def _part(self, name: str, index: int) -> str:
        # what checksum `index` of a layer's file is of
        layer = next(layer for layer in self.layers if layer_file(layer) == name)
        for expert, (_, _, _, number) in enumerate(self._places[layer]):
            if number == index:
                return f"expert {expert}"
        return f"expert {index - self.layers[layer].experts}, low plane"

    def close(self) -> None:
        """Close the files; reads afterwards open them again."""
        with self._lock:
            for fd, _ in self._files.values():
                os.close(fd)
            self._files.clear()
            self._known.clear()

    def _open(self, name: str) -> tuple[int, Header]:
        with self._lock:
            if name not in self._files:
                header = read_header(self.path / name, StoreError)
                try:
                    direct = self.direct and name != DENSE  # whose tensors begin anywhere
                    fd = open_for_reading(self.path / name, direct=direct)
                except OSError as problem:
                    raise StoreError(
                        f"{self.path / name} cannot be opened: {problem.strerror}",
                        fix="check the disk, and that nobody removed the store",
                    ) from problem
                self._files[name] = fd, header
            return self._files[name]

    def _fill(self, fd: int, out: U8, offset: int, place: tuple[str, str, int | None]) -> None:
        name, what, index = place
        try:
            done = pread_into(fd, out.data, offset)
        except OSError as problem:
            raise StoreError(
                f"{self.path / name}: {what}: {problem.strerror}", fix="check the disk"
            ) from problem
        if done != out.size:
            raise StoreError(
                f"{self.path / name} ends inside {what}", fix="quantize the checkpoint again"
            )
        if index is not None and crc32(out) != self.manifest.files[name].crc32[index]:
            raise _damaged(self.path / name, what)


def _places(entry: LayerEntry) -> list[tuple[str, int, int, int]]:
    """(tensor, row, record bytes, number of its checksum) of each expert of a layer."""
    first, before = [], 0
    for tier in range(len(entry.tiers)):
        first.append(before)
        before += entry.tier_of.count(tier)
    found = []
    for expert, tier in enumerate(entry.tier_of):
        tensor, row = entry.place(expert)
        found.append((tensor, row, entry.tiers[tier].record_bytes, first[tier] + row))
    return found


_NOTHING = TensorInfo(dtype="", shape=(), offset=0, nbytes=0)


def _aligned(size: int) -> U8:
    raw = np.empty(size + ALIGN, np.uint8)
    skip = -raw.ctypes.data % ALIGN
    return raw[skip : skip + size]


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        f"{path}: {what} is damaged: its checksum differs",
        fix=f"delete {path.name}, then run the same `moelite quantize` again",
    )


def _no_store(path: Path) -> StoreError:
    if (path / PARTIAL).exists():
        return StoreError(
            f"{path} is an unfinished store", fix="run the same `moelite quantize` again"
        )
    if (path / "config.json").exists():
        return StoreError(
            f"{path} is a checkpoint, not a store", fix=f"moelite quantize {path} STORE"
        )
    return StoreError(f"{path} is not a store: it has no {MANIFEST}", fix="name a store's folder")
