"""Read a Hugging Face checkpoint: safetensors, one file or sharded, rows on demand as float32.

A checkpoint comes from strangers: headers are checked before they are believed, a shard must lie in
the folder, nothing is unpickled. Only the rows asked for are read, into memory of that size.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moelite.arch import TensorRef
from moelite.errors import CheckpointError, UnsupportedError
from moelite.quant.base import F32
from moelite.tensorfile import Header, TensorInfo, pread_into, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SIDECARS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
SIDECAR_LIMIT = 100_000_000  # bytes
_PIECE = 1 << 20  # 16-bit elements converted at once
READABLE = {"F32": 4, "F16": 2, "BF16": 2}  # safetensors dtypes and their bytes


class Source(Protocol):
    """What quantize can read from."""

    config: dict[str, Any]
    files: dict[str, bytes]  # copied unchanged into the store; config.json says what config does
    source: str  # for the manifest: "org/name@revision", a folder's name, "builtin:..."

    def names(self) -> list[str]:
        """Every tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str:
        """As in safetensors, "BF16", "F16", "F32"; of a quantized tensor, how, in words."""
        ...

    def nbytes(self, name: str) -> int | None:
        """What the tensor takes in the checkpoint; None if it is of a dtype that cannot be read."""
        ...

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start:stop of axis 0 as float32. Safe to call from several threads."""
        ...


class Checkpoint:
    """A local folder; see `open_checkpoint`. Implements Source."""

    def __init__(self, folder: Path, config: dict[str, Any], files: dict[str, bytes]) -> None:
        self.folder = folder
        self.config = config
        self.files = files
        self.source = _source_name(folder)
        self._where: dict[str, tuple[Path, TensorInfo]] = {}

    def names(self) -> list[str]:
        """Every tensor, sorted."""
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored. Raises CheckpointError when there is no such tensor."""
        return self._find(name)[1].shape

    def dtype(self, name: str) -> str:
        """safetensors dtype. Raises CheckpointError when there is no such tensor."""
        return self._find(name)[1].dtype

    def nbytes(self, name: str) -> int | None:
        """Bytes in the file; None for a dtype that `raw` refuses."""
        info = self._find(name)[1]
        return info.nbytes if info.dtype in READABLE else None

    def has(self, name: str) -> bool:
        """Is there such a tensor?"""
        return name in self._where

    def place(self, name: str) -> tuple[Path, TensorInfo]:
        """The file that a tensor lies in, and where. Raises CheckpointError if there is none."""
        return self._find(name)

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start:stop of axis 0 (all of a scalar) as float32; only their bytes are read.

        Raises UnsupportedError for a dtype other than F32, F16, BF16.
        """
        path, info = self._find(name)
        width = READABLE.get(info.dtype)
        if width is None:
            raise UnsupportedError(
                f"{path}: tensor {name!r} is {info.dtype}; moelite reads {', '.join(READABLE)}",
                fix="use the unquantized checkpoint of this model",
            )
        rows = info.shape[0] if info.shape else 1
        start, stop, _ = slice(start, stop).indices(rows)
        shape = (max(0, stop - start), *info.shape[1:]) if info.shape else ()
        out = np.empty(shape, np.float32)
        at = info.offset + start * math.prod(info.shape[1:]) * width
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                short = not _fill(fd, out.reshape(-1), at, info.dtype)
            finally:
                os.close(fd)
        except OSError as problem:
            raise CheckpointError(f"{path}: tensor {name!r}: {problem.strerror}") from problem
        if short:
            raise CheckpointError(f"{path} ends inside tensor {name!r}", fix="fetch it again")
        return out

    def _find(self, name: str) -> tuple[Path, TensorInfo]:
        if name not in self._where:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}")
        return self._where[name]

    def _add(self, path: Path, header: Header, names: list[str]) -> None:
        for name in names:
            if name not in header.tensors:
                raise CheckpointError(
                    f"{path} has no tensor {name!r}, though {INDEX} places it there",
                    fix="fetch the checkpoint again",
                )
            self._where[name] = (path, header.tensors[name])


def _fill(fd: int, out: F32, at: int, dtype: str) -> bool:
    """Read and convert out.size elements from byte `at`; False if the file ends before."""
    if dtype == "F32":
        return pread_into(fd, out.view(np.uint8).data, at) == out.nbytes
    piece = np.empty(min(_PIECE, out.size), np.uint16)
    for begin in range(0, out.size, _PIECE):
        part = piece[: min(_PIECE, out.size - begin)]
        if pread_into(fd, part.view(np.uint8).data, at + 2 * begin) != part.nbytes:
            return False
        target = out[begin : begin + part.size]
        if dtype == "BF16":  # the upper half of a float32
            np.left_shift(part, 16, out=target.view(np.uint32), dtype=np.uint32)
        else:
            target[:] = part.view(np.float16)
    return True


def read_sidecars(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(small files by name, config) of a checkpoint's folder, whether or not weights are there."""
    folder = path.resolve()
    if not folder.is_dir():
        raise CheckpointError(f"{path} is not a folder", fix="name the folder of a checkpoint")
    files = {name: _sidecar(folder, name) for name in SIDECARS if (folder / name).exists()}
    if "config.json" not in files:
        raise CheckpointError(
            f"{path} has no config.json", fix="name the folder that holds config.json"
        )
    config = _json_object(folder / "config.json", files["config.json"])
    return files, config


def read_json_file(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a small file of a checkpoint's folder."""
    return _json_object(folder / name, _sidecar(folder, name))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors; reads headers, no weights.

    Tensors are given as they are stored: `moelite.sources` decodes those of quantized checkpoints.
    Raises CheckpointError for what is missing or damaged.
    """
    files, config = read_sidecars(path)
    folder = path.resolve()
    checkpoint = Checkpoint(folder, config, files)
    for shard, names in _shards(folder).items():
        place = _inside(folder, shard)
        if not place.exists():
            raise CheckpointError(
                f"{folder / shard} is missing, though {INDEX} names it",
                fix="fetch the checkpoint again: it is incomplete",
            )
        header = read_header(place, CheckpointError)
        checkpoint._add(place, header, list(header.tensors) if names is None else names)
    return checkpoint


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """{file: its tensors}; None means all that it holds."""
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    if not (folder / INDEX).exists():
        raise CheckpointError(*_no_safetensors(folder))
    raw = _json_object(folder / INDEX, _sidecar(folder, INDEX)).get("weight_map")
    if not isinstance(raw, dict) or not raw:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    shards: dict[str, list[str] | None] = {}
    for name, shard in raw.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{folder / INDEX}: tensor {name!r} has no file name")
        names = shards.setdefault(shard, [])
        assert names is not None
        names.append(name)
    return shards


def _no_safetensors(folder: Path) -> tuple[str]:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pth", ".pt"})
    if pickles:
        return (
            f"{folder} holds pickled weights ({pickles[0]}), which can run any code when opened;"
            f" moelite reads safetensors only",
        )
    return (f"{folder} has neither {SINGLE} nor {INDEX}",)


def _inside(folder: Path, name: str) -> Path:
    """The real path of a file that must lie in `folder`, or in the blobs of the same hub cache."""
    lexical = Path(name)
    if lexical.is_absolute() or ".." in lexical.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: the file name {name!r} leads out of the checkpoint")
    real = (folder / name).resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in allowed):
        raise CheckpointError(
            f"{folder / name} is a link to {real}, outside the checkpoint",
            fix="replace the link by the file itself (or a hard link)",
        )
    return real


def _sidecar(folder: Path, name: str) -> bytes:
    path = _inside(folder, name)
    try:
        if path.stat().st_size > SIDECAR_LIMIT:
            raise CheckpointError(f"{folder / name} is larger than {SIDECAR_LIMIT} bytes")
        return path.read_bytes()
    except OSError as problem:
        raise CheckpointError(f"{folder / name} cannot be read: {problem.strerror}") from problem


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path} is not valid JSON: {problem}") from problem
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _source_name(folder: Path) -> str:
    """org/name@revision for a snapshot in a hub cache, else the folder's name."""
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return f"{repo.removeprefix('models--').replace('--', '/', 1)}@{folder.name}"
    return folder.name


def ref_shape(source: Source, ref: TensorRef) -> tuple[int, ...]:
    """Shape of the matrix or vector that `ref` names. Raises CheckpointError if it cannot be."""
    shape = source.shape(ref.name)
    if ref.stacked:
        if ref.expert is None or len(shape) < 2 or not 0 <= ref.expert < shape[0]:
            raise CheckpointError(f"tensor {ref.name!r} {shape} has no expert {ref.expert}")
        shape = shape[1:]
    if ref.transpose:
        shape = (*shape[:-2], *shape[:-3:-1])
    if ref.rows is not None:
        shape = (len(range(*slice(*ref.rows).indices(shape[0]))), *shape[1:])
    return shape


def read(source: Source, ref: TensorRef, start: int = 0, stop: int | None = None) -> F32:
    """Rows start:stop of the [O, I] matrix (or [O] vector) that `ref` names, contiguous float32.

    Of a plain tensor only these rows are read; of a stacked one its whole expert, of a transposed
    one all of it.
    """
    rows = range(*slice(*(ref.rows or (None,))).indices(_rows(source, ref)))[start:stop]
    if not (ref.stacked or ref.transpose):
        if not rows:
            return np.empty((0, *source.shape(ref.name)[1:]), np.float32)
        return np.ascontiguousarray(source.raw(ref.name, rows[0], rows[-1] + 1)[:: rows.step])
    if ref.stacked:
        assert ref.expert is not None, "choose the expert with TensorRef.at"
        whole = source.raw(ref.name, ref.expert, ref.expert + 1)[0]
    else:
        whole = source.raw(ref.name)
    if ref.transpose:
        whole = whole.swapaxes(-1, -2)
    return np.ascontiguousarray(whole[rows.start : rows.stop : rows.step])


def _rows(source: Source, ref: TensorRef) -> int:
    """Output rows before `ref.rows` picks some."""
    shape = source.shape(ref.name)[1 if ref.stacked else 0 :]
    return shape[-1] if ref.transpose else shape[0]
