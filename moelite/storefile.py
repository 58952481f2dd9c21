"""The files of a store: its manifest, the headers of its tensor files, their checksums.

docs/DESIGN.md has them byte by byte. Nothing here depends on time or on the run, so the same
checkpoint and recipe give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moelite.errors import StoreError
from moelite.quant.base import PAGE
from moelite.quant.record import RecordLayout, record_layout
from moelite.tensorfile import Header, build_header

VERSION = 3
MANIFEST = "moelite.json"
PARTIAL = "moelite.partial.json"
DENSE = "dense.safetensors"
EXPERTS = "experts"  # the tensor of a tier: "experts.1" of the second, and so on
LOW = "experts.low"  # the plane that stands in for experts that are not in memory
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
class LayerEntry:
    """How the experts of one MoE layer are stored.

    tiers: the layouts in use, one tensor of the layer's file each; tier_of [E]: which of them an
    expert is in; it is the row that counts the experts of its tier before it. low: the layout of
    the plane that holds every expert once more, in few bits; None if there is none.
    """

    tiers: tuple[RecordLayout, ...]
    tier_of: tuple[int, ...]
    low: RecordLayout | None = None

    @property
    def experts(self) -> int:
        return len(self.tier_of)

    @property
    def slot_bytes(self) -> int:
        """What any expert of the layer fits in."""
        return max(tier.record_bytes for tier in self.tiers)

    @property
    def record_bytes(self) -> int:
        """Bytes of all records, without the low plane."""
        return sum(self.tiers[t].record_bytes for t in self.tier_of)

    @property
    def payload_bytes(self) -> int:
        """As `record_bytes`, without what fills a record's last page."""
        return sum(self.tiers[t].payload_bytes for t in self.tier_of)

    @property
    def low_bytes(self) -> int:
        """Bytes of the low plane."""
        return 0 if self.low is None else self.experts * self.low.record_bytes

    @property
    def formats(self) -> set[str]:
        """Every format in use."""
        layouts = self.tiers if self.low is None else (*self.tiers, self.low)
        return {name for layout in layouts for name in layout.formats}

    def layout_of(self, expert: int) -> RecordLayout:
        return self.tiers[self.tier_of[expert]]

    def place(self, expert: int) -> tuple[str, int]:
        """(tensor of the layer's file, row) of an expert's record."""
        tier = self.tier_of[expert]
        return tier_tensor(tier), self.tier_of[:expert].count(tier)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of the layer's file, in order: safetensors (dtype, shape)."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            tier_tensor(i): ("U8", (self.tier_of.count(i), tier.record_bytes))
            for i, tier in enumerate(self.tiers)
        }
        if self.low is not None:
            found[LOW] = "U8", (self.experts, self.low.record_bytes)
        return found


def tier_tensor(tier: int) -> str:
    """Name of a tier's tensor in a layer's file."""
    return f"{EXPERTS}.{tier}" if tier else EXPERTS


def format_label(layers: Iterable[LayerEntry]) -> str:
    """Formats of routed experts in words: "int4", "int4 + vq-1", the one of most bytes first."""
    sizes: Counter[str] = Counter()
    for layer in layers:
        for tier in layer.tier_of:
            for name in layer.tiers[tier].formats:
                sizes[name] += layer.tiers[tier].record_bytes
    return " + ".join(name for name, _ in sorted(sizes.items(), key=lambda x: (-x[1], x[0])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """moelite.json. recipe: what was asked for, as JSON; layers: {MoE layer: how it is stored};
    fingerprint: of the checkpoint. calibration: of the text that experts were calibrated with (ids,
    tokens, sha256), or None.
    """

    source: str
    fingerprint: str
    recipe: dict[str, Any]
    layers: dict[int, LayerEntry]
    classes: tuple[TensorClass, ...]
    tensors: dict[str, DenseSpec]
    files: dict[str, FileEntry]
    calibration: dict[str, Any] | None = None

    @property
    def params(self) -> int:
        """Weights in all."""
        return sum(c.params for c in self.classes)

    @property
    def experts(self) -> str:
        """Formats of routed experts, in words."""
        return format_label(self.layers.values())

    @property
    def dense(self) -> str:
        """Formats of the dense matrices, in words, the one of most tensors first."""
        counts = Counter(spec.format for spec in self.tensors.values() if len(spec.shape) == 2)
        del counts["f32"]  # routers, whatever the recipe
        found = sorted(counts.items(), key=lambda x: (-x[1], x[0]))
        return " + ".join(name for name, _ in found) or "f32"


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


def layer_header(entry: LayerEntry) -> tuple[bytes, dict[str, int]]:
    """Header of a layer file and the offset of each tensor's first record, multiples of PAGE."""
    return build_header(entry.tensors(), {"format": "moelite"}, PAGE)


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
    if manifest.calibration is None:
        del raw["calibration"]
    raw["layers"] = {str(layer): asdict(entry) for layer, entry in manifest.layers.items()}
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


def layer_entry(raw: dict[str, Any]) -> LayerEntry:
    """A LayerEntry from JSON."""
    low = raw.get("low")
    return LayerEntry(
        tiers=tuple(RecordLayout(**tier) for tier in raw["tiers"]),
        tier_of=tuple(int(tier) for tier in raw["tier_of"]),
        low=None if low is None else RecordLayout(**low),
    )


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
            recipe=dict(raw["recipe"]),
            calibration=None if "calibration" not in raw else dict(raw["calibration"]),
            layers=dict(sorted((int(k), layer_entry(v)) for k, v in raw["layers"].items())),
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
    """Kernels trust the layouts, so they must be those that the formats compute."""
    from moelite.quant import FORMATS

    if not manifest.layers or min(manifest.layers) < 0:
        raise ValueError("there is no layer of experts")
    for number, entry in manifest.layers.items():
        if not entry.tier_of or {*range(len(entry.tiers))} != set(entry.tier_of):
            raise ValueError(f"layer {number}: the experts' tiers are {entry.tier_of}")
        for layout in entry.tiers if entry.low is None else (*entry.tiers, entry.low):
            shape, sizes = (layout.hidden_size, layout.expert_size), None
            if not all(FORMATS[name].exact for name in layout.formats):
                sizes = layout.down, layout.payload_bytes - layout.down
                if min(sizes) < 0 or sum(sizes) > 4 * 3 * math.prod(shape):
                    raise ValueError(f"layer {number}: a record of {sum(sizes)} bytes")
            want = record_layout(layout.formats, *shape, sizes)
            if layout != want:
                raise ValueError(f"layer {number}: the record layout is {layout}, not {want}")
    for key, spec in manifest.tensors.items():
        if spec.format not in FORMATS or not 1 <= len(spec.shape) <= 2 or min(spec.shape) < 1:
            raise ValueError(f"tensor {key!r} is {spec.format} {spec.shape}")


def spans(header: Header) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the parts that have a checksum: each tensor, or each row of a tier."""
    for name, info in header.tensors.items():
        count = info.shape[0] if name.startswith(EXPERTS) and len(info.shape) == 2 else 1
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
