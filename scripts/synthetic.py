"""Stores of random weights at the shape of a real model: what speed depends on, without a download.

Packed records are drawn directly, code by code, so a store takes seconds per GB. What is drawn:

- Every matrix has zero mean: uniform codes have not (the middle of a table of 16 is no zero), so
  the block scales have random signs. Weights with a mean send every token to the same experts, and
  then expert caches look better than they are.
- Standard deviation 1 / sqrt(columns), embeddings 1: activations keep their size. What goes back
  to the residual (o and down) is smaller by sqrt(2 * layers), or else attention, which averages
  over tokens, makes them more alike with every layer, and deep layers choose the same experts for
  all. Routers 2 / sqrt(columns): their choice is clear, but not one-sided. Norms are 1.
- Every expert has its own generator, seeded by (seed, layer, expert): no two are alike, and the
  same seed gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moelite.arch import Arch, GatedMLP, Linear, Norm
from moelite.errors import StoreError, UsageError
from moelite.inventory import DenseItem, Inventory, take_inventory
from moelite.models import build
from moelite.packing import new_file, replace_file
from moelite.quant import int8
from moelite.quant.base import BLOCK, F32, TILE_ROWS, U8
from moelite.quant.int4_pack import LAYOUT, TABLE, write_heads
from moelite.quant.record import packed_parts
from moelite.recipe import Recipe
from moelite.store import Store
from moelite.storefile import (
    DENSE,
    MANIFEST,
    FileEntry,
    Manifest,
    dense_header,
    describe,
    dump,
    layer_file,
    layer_header,
    manifest_bytes,
    packed_bytes,
    spans,
)
from moelite.tensorfile import pwrite_all, read_header

Progress = Callable[[str], None]

# config.json as published, but for what changes neither shapes nor mathematics
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": {  # allenai/OLMoE-1B-7B-0924
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {  # mistralai/Mixtral-8x7B-v0.1
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {  # Qwen/Qwen3-30B-A3B
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    },
}
_ROUTER = 2.0  # standard deviation of router logits
_PIECE = 1 << 20  # random bytes drawn at once: they stay in the processor's cache


def config_of(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a named shape, with fewer or more layers if asked. UsageError."""
    if shape not in SHAPES:
        raise UsageError(f"{shape!r} is no shape", fix=f"choose one of {', '.join(SHAPES)}")
    config = dict(SHAPES[shape])
    if layers is not None:
        if layers < 1:
            raise UsageError(f"--layers {layers} leaves no model", fix="--layers 1 or more")
        config["num_hidden_layers"] = layers
    return config


# --- random matrices ---


def generator(*key: int) -> np.random.Generator:
    """A generator of its own for each key."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


def fill(out: U8, rng: np.random.Generator) -> None:
    """Random bytes over a contiguous uint8 array, without a second array of its size."""
    flat = out.reshape(-1)
    for at in range(0, flat.size, _PIECE):
        part = flat[at : at + _PIECE]
        words = rng.bit_generator.random_raw(-(-part.size // 8))
        part[:] = np.asarray(words).view(np.uint8)[: part.size]


def fill_int8(out: np.ndarray, rng: np.random.Generator) -> None:
    """Random int8 -127..127 of zero mean; -128, which no packer gives, becomes 0."""
    fill(out.view(np.uint8), rng)
    out[out == -128] = 0


def spread_scales(count: int, rng: np.random.Generator) -> np.ndarray:
    """Block scales [count] int8: size 64..127, either sign."""
    raw = np.empty(count, np.uint8)
    fill(raw, rng)
    size = (raw & 63).astype(np.int8) + np.int8(64)
    return np.where(raw & 128, -size, size).astype(np.int8)


SCALE_RMS = math.sqrt(float(np.mean(np.arange(64, 128.0) ** 2)))
INT8_RMS = math.sqrt(sum(n * n for n in range(-127, 128)) / 256)


def _int4(packed: U8, shape: tuple[int, int], std: float, rng: np.random.Generator) -> None:
    rows, cols = shape
    rms = math.sqrt(float(np.mean(TABLE.astype(np.float64) ** 2)))
    fill(packed, rng)
    LAYOUT.heads(packed, cols)[:] = 0
    write_heads(packed, cols, np.full(rows, std / (rms * SCALE_RMS), np.float32), TABLE)
    for _, scales, _ in LAYOUT.groups(packed, cols):
        scales.view(np.int8)[...] = spread_scales(scales.size, rng).reshape(scales.shape)


def _int8(packed: U8, shape: tuple[int, int], std: float, rng: np.random.Generator) -> None:
    fill_int8(packed.view(np.int8), rng)
    for _, scales, _ in int8.LAYOUT.groups(packed, shape[1]):
        halves = scales.view(np.float16)
        size = np.abs(spread_scales(halves.size, rng))  # the codes have either sign already
        halves[...] = (size * np.float32(std / (INT8_RMS * SCALE_RMS))).reshape(halves.shape)


_RANDOM = {"int4": _int4, "int8": _int8}
FORMATS_DRAWN = tuple(_RANDOM)


def random_packed(
    fmt: str, shape: tuple[int, int], std: float, rng: np.random.Generator, packed: U8
) -> None:
    """A random [rows, cols] matrix of zero mean in `fmt`, to packed [nbytes] uint8."""
    rows, cols = shape
    if rows % TILE_ROWS or cols % BLOCK:
        raise UsageError(f"[{rows}, {cols}] is not made of whole blocks [{TILE_ROWS}, {BLOCK}]")
    _RANDOM[fmt](packed, shape, std, rng)


def random_plain(shape: tuple[int, ...], rng: np.random.Generator) -> F32:
    """What is kept as float32: a norm [n], all ones, or a router [E, H]."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(_ROUTER / math.sqrt(shape[1]))


def std_of(cols: int, layers: int | None = None) -> float:
    """Standard deviation of a matrix's weights; layers: of the model, if it adds to the residual.

    Embeddings are 1 instead.
    """
    return 1 / math.sqrt(cols if layers is None else cols * 2 * layers)


# --- the store ---


class RandomSource:
    """A checkpoint that has every tensor the architecture calls for, as far as anyone may ask."""

    def __init__(self, config: dict[str, Any], name: str, seed: int) -> None:
        self.config = config
        self.files = {"config.json": dump(config)}
        self.source = f"synthetic:{name}@{seed}"
        self._seed = seed
        self._shapes = dict(_tensors(build(config)))

    def names(self) -> list[str]:
        """Every tensor, sorted."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """BF16, as published checkpoints have it."""
        return "BF16"

    def nbytes(self, name: str) -> int:
        """Two bytes a weight."""
        return 2 * math.prod(self._shapes[name])

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Only tells two seeds apart: weights are drawn packed, never as numbers."""
        rows = len(range(self._shapes[name][0])[start:stop])
        return np.full((rows, *self._shapes[name][1:]), self._seed, np.float32)


def _tensors(arch: Arch) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield arch.embed.name, (arch.vocab_size, arch.hidden_size)
    yield from _parts(arch.norm, arch.head)
    for layer in arch.layers:
        a = layer.attention
        yield from _parts(layer.input_norm, layer.post_norm, a.q, a.k, a.v, a.o, a.q_norm, a.k_norm)
        mlp = layer.mlp
        if isinstance(mlp, GatedMLP):
            yield from _parts(*mlp.matrices)
            continue
        yield from _parts(mlp.router.linear)
        for part in mlp.experts.matrices:
            for expert in range(mlp.num_experts):
                yield part.weight.at(expert).name, (part.rows, part.cols)


def _parts(*parts: Linear | Norm | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in parts:
        if isinstance(part, Linear):
            yield part.weight.name, (part.rows, part.cols)
        elif part is not None and part.weight is not None:
            yield part.weight.name, (part.size,)


def write_store(
    config: dict[str, Any],
    out: Path,
    *,
    name: str,
    formats: tuple[str, str] = ("int4", "int8"),
    seed: int = 0,
    progress: Progress = lambda note: None,
) -> Inventory:
    """A store of random weights in the new folder `out`; formats: of experts and of the rest.

    Holds one matrix or one record in memory. UsageError, or StoreError where `out` holds something.
    """
    for fmt in formats:
        if fmt not in _RANDOM:
            raise UsageError(f"{fmt!r} cannot be drawn", fix=f"one of {', '.join(_RANDOM)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} is not empty", fix="name a new folder, or delete this one")
    source = RandomSource(config, name, seed)
    inventory = take_inventory(source, Recipe(experts=formats[0], dense=formats[1]))
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, FileEntry] = {}
    for file, data in source.files.items():
        replace_file(out / file, data)
        files[file] = describe(out / file, [])
    _dense(out / DENSE, inventory, seed)
    for layer in inventory.layers:
        progress(f"layer {layer} of {len(inventory.layers)}")
        _layer(out / layer_file(layer), inventory, layer, seed)
    for file in (DENSE, *map(layer_file, inventory.layers)):
        progress(f"checksums of {file}")
        files[file] = describe(out / file, list(spans(read_header(out / file, StoreError))))
    replace_file(out / MANIFEST, manifest_bytes(_manifest(inventory, source, files)))
    Store.open(out).close()
    return inventory


def _manifest(
    inventory: Inventory, source: RandomSource, files: Mapping[str, FileEntry]
) -> Manifest:
    return Manifest(
        source=source.source,
        fingerprint=inventory.fingerprint,
        recipe=inventory.recipe.as_json(),
        layers=inventory.entries,
        classes=inventory.classes,
        tensors={key: item.spec for key, item in inventory.items.items()},
        files=dict(sorted(files.items())),
    )


def _dense(path: Path, inventory: Inventory, seed: int) -> None:
    items = inventory.items
    header, offsets = dense_header({key: item.spec for key, item in items.items()})
    last = max(offsets, key=lambda key: offsets[key])
    end = offsets[last] + packed_bytes(items[last].spec.format, items[last].spec.shape)
    with new_file(path, end) as fd:
        pwrite_all(fd, header, 0)
        for i, (key, item) in enumerate(items.items()):
            data = _dense_bytes(item, inventory.arch, generator(seed, 1, i))
            pwrite_all(fd, data.data, offsets[key])


def _dense_bytes(item: DenseItem, arch: Arch, rng: np.random.Generator) -> U8:
    spec = item.spec
    if spec.format == "f32":
        return random_plain(spec.shape, rng).reshape(-1).view(np.uint8)
    packed = np.empty(packed_bytes(spec.format, spec.shape), np.uint8)
    rows, cols = spec.shape
    to_residual = {layer.attention.o.weight for layer in arch.layers}
    std = std_of(cols, len(arch.layers) if item.ref in to_residual else None)
    if item.ref == arch.embed:
        std = 1.0
    random_packed(spec.format, (rows, cols), std, rng, packed)
    return packed


def _layer(path: Path, inventory: Inventory, layer: int, seed: int) -> None:
    entry = inventory.entries[layer]
    header, offsets = layer_header(entry)
    with new_file(path, len(header) + entry.record_bytes) as fd:
        pwrite_all(fd, header, 0)
        for expert in range(entry.experts):
            layout, (tensor, row) = entry.layout_of(expert), entry.place(expert)
            rng, record = generator(seed, 2, layer, expert), np.zeros(layout.record_bytes, np.uint8)
            wide, down = packed_parts(layout, record)
            std = std_of(layout.hidden_size)
            random_packed(layout.gate_up_format, layout.gate_up_shape, std, rng, wide)
            std = std_of(layout.expert_size, len(inventory.arch.layers))
            random_packed(layout.down_format, layout.down_shape, std, rng, down)
            pwrite_all(fd, record.data, offsets[tensor] + row * layout.record_bytes)
