"""The files of a store: its manifest, the headers of its tensor files, their checksums.

docs/DESIGN.md has them byte by byte. Nothing here depends on time or on the run, so the same
checkpoint and recipe give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moelite.errors import StoreError
from moelite.quant.base import PAGE, RecordLayout, record_layout
from moelite.tensorfile import Header, build_header

VERSION = 2
MANIFEST = "moelite.json"
PARTIAL = "moelite.partial.json"
DENSE = "dense.safetensors"
EXPERTS = "experts"  # the one tensor of a layer file
_JSON_LIMIT = 100_000_000  # bytes
_PLAIN = {"f32": "F32", "bf16": "BF16"}  # formats that are a safetensors dtype
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorClass:
    """What one kind of tensor takes. bytes_before: in the checkpoint; bytes_after: in the store."""

    name: str
    format: str
    tensors: int
    params: int
    bytes_before: int
    bytes_after: int

    @property
    def bpw(self) -> float:
        """Bits per weight in the store, scales and padding included."""
        return 8 * self.bytes_after / max(1, self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of the store. crc32: per record or dense tensor, in file order."""

    bytes: int
    sha256: str
    crc32: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSpec:
    """One tensor of dense.safetensors: [rows, cols] or [n] in `format`."""

    format: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """moelite.json. layers: {MoE layer: its number of experts}; fingerprint: of the checkpoint.

    calibration: of the text that experts were calibrated with; empty without one.
    """

    source: str
    fingerprint: str
    experts: str
    dense: str
    layout: RecordLayout
    layers: dict[int, int]
    classes: tuple[TensorClass, ...]
    tensors: dict[str, DenseSpec]
    files: dict[str, FileEntry]
    calibration: str = ""

    @property
    def params(self) -> int:
        """Weights in all."""
        return sum(c.params for c in self.classes)


def layer_file(layer: int) -> str:
    """File name of a MoE layer's experts."""
    return f"experts-{layer:05d}.safetensors"


def packed_bytes(fmt: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor: vectors are plain, matrices as their format says."""
    from moelite.quant import FORMATS

    return 4 * shape[0] if len(shape) == 1 else FORMATS[fmt].nbytes(*shape)


def dense_tensor(spec: DenseSpec) -> tuple[str, tuple[int, ...]]:
    """safetensors (dtype, shape) under which a dense tensor is kept."""
    if spec.format in _PLAIN:
        return _PLAIN[spec.format], spec.shape
    return "U8", (packed_bytes(spec.format, spec.shape),)


def layer_header(experts: int, record_bytes: int) -> tuple[bytes, int]:
    """Header of a layer file and the offset of its first record, both multiples of PAGE."""
    header, offsets = build_header(
        {EXPERTS: ("U8", (experts, record_bytes))}, {"format": "moelite"}, PAGE
    )
    return header, offsets[EXPERTS]


def dense_header(tensors: dict[str, DenseSpec]) -> tuple[bytes, dict[str, int]]:
    """Header of dense.safetensors and the offset of each tensor, in the given order."""
    shapes = {key: dense_tensor(spec) for key, spec in tensors.items()}
    return build_header(shapes, {"format": "moelite"}, PAGE)


# --- the manifest as JSON ---


def dump(value: dict[str, Any]) -> bytes:
    """The same bytes for the same facts: nothing in a store depends on time or on the run."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def manifest_bytes(manifest: Manifest) -> bytes:
    """moelite.json."""
    raw: dict[str, Any] = {"store_version": VERSION, "params": manifest.params}
    raw |= {f.name: getattr(manifest, f.name) for f in fields(manifest)}
    if not manifest.calibration:
        del raw["calibration"]
    raw["layout"] = asdict(manifest.layout)
    raw["classes"] = [asdict(c) for c in manifest.classes]
    raw["tensors"] = {k: asdict(spec) for k, spec in manifest.tensors.items()}
    raw["files"] = {name: file_json(entry) for name, entry in manifest.files.items()}
    return dump(raw)


def file_json(entry: FileEntry) -> dict[str, Any]:
    """A FileEntry as JSON; checksums as one string of 8 hex digits each."""
    crc = "".join(f"{c:08x}" for c in entry.crc32)
    return {"bytes": entry.bytes, "sha256": entry.sha256, "crc32": crc}


def file_entry(raw: dict[str, Any]) -> FileEntry:
    """The reverse of `file_json`."""
    crc = raw["crc32"]
    parts = tuple(int(crc[i : i + 8], 16) for i in range(0, len(crc), 8))
    return FileEntry(bytes=int(raw["bytes"]), sha256=str(raw["sha256"]), crc32=parts)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a store. Raises StoreError naming the file."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise StoreError(f"{path} is larger than {_JSON_LIMIT} bytes")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise StoreError(f"{path} cannot be read: {problem}") from problem
    if not isinstance(value, dict):
        raise StoreError(f"{path} holds no JSON object")
    return value


def check_version(path: Path, raw: dict[str, Any]) -> None:
    """Raises StoreError naming both versions when they differ."""
    if (found := raw.get("store_version")) != VERSION:
        raise StoreError(
            f"{path} is a store of version {found!r}; this moelite reads version {VERSION}",
            fix="upgrade moelite, or quantize the checkpoint again",
        )


def read_manifest(path: Path) -> Manifest:
    """Parse and check moelite.json. Raises StoreError."""
    raw = read_json(path)
    check_version(path, raw)
    try:
        manifest = Manifest(
            source=str(raw["source"]),
            fingerprint=str(raw["fingerprint"]),
            calibration=str(raw.get("calibration", "")),
            experts=str(raw["experts"]),
            dense=str(raw["dense"]),
            layout=RecordLayout(**raw["layout"]),
            layers=dict(sorted((int(k), int(v)) for k, v in raw["layers"].items())),
            classes=tuple(TensorClass(**c) for c in raw["classes"]),
            tensors={
                k: DenseSpec(format=v["format"], shape=tuple(int(n) for n in v["shape"]))
                for k, v in raw["tensors"].items()
            },
            files={k: file_entry(v) for k, v in raw["files"].items()},
        )
        _check_formats(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise StoreError(
            f"{path} is damaged: {type(problem).__name__} {problem}",
            fix="quantize the checkpoint again",
        ) from problem
    return manifest


def _check_formats(manifest: Manifest) -> None:
    """Kernels trust the layout, so it must be the one that the format computes."""
    from moelite.quant import FORMATS

    layout = manifest.layout
    want = record_layout(FORMATS[manifest.experts], layout.hidden_size, layout.expert_size)
    if layout != want:
        raise ValueError(f"the record layout is {layout}, not {want}")
    if not manifest.layers or min(manifest.layers) < 0 or min(manifest.layers.values()) < 1:
        raise ValueError("there is a layer without experts")
    for key, spec in manifest.tensors.items():
        if spec.format not in FORMATS or not 1 <= len(spec.shape) <= 2 or min(spec.shape) < 1:
            raise ValueError(f"tensor {key!r} is {spec.format} {spec.shape}")


def spans(header: Header) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the parts that have a checksum: each tensor, or each row of EXPERTS."""
    for name, info in header.tensors.items():
        count = info.shape[0] if name == EXPERTS and len(info.shape) == 2 else 1
        for i in range(count):
            yield info.offset + i * (info.nbytes // count), info.nbytes // count


def describe(path: Path, parts: list[tuple[int, int]]) -> FileEntry:
    """Size and checksums of a file as it is on disk; parts are (offset, bytes), ascending."""
    digest, crcs, buffer = hashlib.sha256(), [], bytearray(_CHUNK)
    with path.open("rb") as file:

        def take(size: int) -> int:
            crc = 0
            while size > 0 and (count := file.readinto(memoryview(buffer)[:size])):
                piece = memoryview(buffer)[:count]
                digest.update(piece)
                crc = zlib.crc32(piece, crc)
                size -= count
            return crc

        for offset, size in parts:
            take(offset - file.tell())
            crcs.append(take(size))
        take(1 << 62)
        return FileEntry(bytes=file.tell(), sha256=digest.hexdigest(), crc32=tuple(crcs))
