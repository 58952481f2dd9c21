"""Random matrices in each encoding, written out from its layout, with their values.

Independent of moelite's decoders (and of the libraries, whose own files lie in encoded/): plain
loops over words and nibbles. An encoder takes (rng, rows, cols) and gives (parts, the float32
matrix); parts are {end of the name: (dtype, array)}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Parts = dict[str, tuple[str, np.ndarray]]
Encoder = Callable[[np.random.Generator, int, int], tuple[Parts, np.ndarray]]
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, k]: rows of codes, the lowest bits of a word first."""
    each = 32 // bits
    packed = np.zeros((len(codes), -(-codes.shape[1] // each)), np.uint32)
    for i in range(codes.shape[1]):
        packed[:, i // each] |= codes[:, i].astype(np.uint32) << np.uint32(bits * (i % each))
    return packed.view(np.int32)


def scale(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Scales that fp16 holds."""
    return (rng.random(shape) * 0.02 + 0.01).astype(np.float16)


def gptq(rng: np.random.Generator, rows: int, cols: int) -> tuple[Parts, np.ndarray]:
    """4 bits, groups of 32 in another order, zero points of checkpoint_format gptq (1 too low)."""
    groups = cols // 32
    index = rng.permutation(np.arange(cols) // 32).astype(np.int32)
    codes, scales = rng.integers(0, 16, (cols, rows)), scale(rng, groups, rows)
    zeros = rng.integers(1, 16, (groups, rows))
    want = (codes - zeros[index]).astype(np.float32) * scales.astype(np.float32)[index]
    parts = {
        "qweight": ("I32", words(codes.T, 4).T),
        "qzeros": ("I32", words(zeros - 1, 4)),
        "scales": ("F16", scales),
        "g_idx": ("I32", index),
    }
    return parts, want.T


def awq(rng: np.random.Generator, rows: int, cols: int) -> tuple[Parts, np.ndarray]:
    """4 bits, groups of 32."""
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    codes, scales = rng.integers(0, 16, (cols, rows)), scale(rng, cols // 32, rows)
    zeros = rng.integers(0, 16, scales.shape)
    want = (codes - zeros.repeat(32, 0)) * scales.astype(np.float32).repeat(32, 0)

    def shuffled(table: np.ndarray) -> np.ndarray:
        return table.reshape(len(table), -1, 8)[:, :, order].reshape(table.shape)

    parts = {
        "qweight": ("I32", words(shuffled(codes), 4)),
        "qzeros": ("I32", words(shuffled(zeros), 4)),
        "scales": ("F16", scales),
    }
    return parts, want.astype(np.float32).T


def packed_int4(rng: np.random.Generator, rows: int, cols: int) -> tuple[Parts, np.ndarray]:
    """compressed-tensors pack-quantized, symmetric, groups of 32, bf16 scales."""
    codes = rng.integers(0, 16, (rows, cols))
    high = scale(rng, rows, cols // 32).astype(np.float32).view(np.uint32) >> 16
    scales = (high << 16).astype(np.uint32).view(np.float32)
    parts = {
        "weight_packed": ("I32", words(codes, 4)),
        "weight_scale": ("BF16", high.astype(np.uint16)),
        "weight_shape": ("I64", np.array([rows, cols], np.int64)),
    }
    return parts, (codes - 8).astype(np.float32) * scales.repeat(32, 1)


def bytes_int8(rng: np.random.Generator, rows: int, cols: int) -> tuple[Parts, np.ndarray]:
    """compressed-tensors int-quantized, a scale a row."""
    codes = rng.integers(-127, 128, (rows, cols)).astype(np.int8)
    scales = (scale(rng, rows, 1) / np.float16(16)).astype(np.float32)
    return {"weight": ("I8", codes), "weight_scale": ("F32", scales)}, codes * scales


def packed_mxfp4(rng: np.random.Generator, rows: int, cols: int) -> tuple[Parts, np.ndarray]:
    """compressed-tensors mxfp4-pack-quantized."""
    codes = rng.integers(0, 16, (rows, cols))
    powers = rng.integers(120, 124, (rows, cols // 32))
    parts = {
        "weight_packed": ("U8", (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        "weight_scale": ("U8", powers.astype(np.uint8)),
    }
    want = np.array(FP4)[codes] * 2.0 ** (powers - 127).repeat(32, 1)
    return parts, want.astype(np.float32)


def fp8(rng: np.random.Generator, rows: int, cols: int) -> tuple[Parts, np.ndarray]:
    """Blocks of 16 x 24."""
    codes = rng.integers(0, 127, (rows, cols)) | rng.integers(0, 2, (rows, cols)) << 7
    exponent, mantissa = codes >> 3 & 15, codes & 7
    value = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    scales = (rng.random((-(-rows // 16), -(-cols // 24))) * 1e-3).astype(np.float32)
    spread = scales.repeat(16, 0)[:rows].repeat(24, 1)[:, :cols]
    want = np.where(codes >> 7, -value, value).astype(np.float32) * spread
    return {
        "weight": ("F8_E4M3", codes.astype(np.uint8)),
        "weight_scale_inv": ("F32", scales),
    }, want


def nf4(rng: np.random.Generator, rows: int, cols: int) -> tuple[Parts, np.ndarray]:
    """bitsandbytes nf4, blocks of 64 over the flattened matrix, the last one short."""
    codes = rng.integers(0, 16, rows * cols)
    absmax = (rng.random(-(-codes.size // 64)) * 0.3 + 0.1).astype(np.float32)
    table = np.array(NF4, np.float32)
    state = {"shape": [rows, cols], "blocksize": 64, "quant_type": "nf4", "dtype": "float32"}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    parts = {
        "weight": ("U8", (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]),
        "weight.absmax": ("F32", absmax),
        "weight.quant_map": ("F32", table),
        "weight.quant_state.bitsandbytes__nf4": ("U8", text),
    }
    want = table[codes] * absmax.repeat(64)[: codes.size]
    return parts, want.reshape(rows, cols)


def blocks_mxfp4(rng: np.random.Generator, rows: int, cols: int) -> tuple[Parts, np.ndarray]:
    """gpt-oss: blocks and scales of a Linear."""
    parts, want = packed_mxfp4(rng, rows, cols)
    packed, powers = parts["weight_packed"][1], parts["weight_scale"][1]
    return {
        "weight_blocks": ("U8", packed.reshape(rows, cols // 32, 16)),
        "weight_scales": ("U8", powers),
    }, want


def _groups(layout: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


ENCODERS: dict[str, tuple[Encoder, dict[str, Any], str]] = {  # how, quantization_config, dtype
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
        "gptq int4, groups of 32",
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        "awq int4, groups of 32",
    ),
    "pack-quantized": (
        packed_int4,
        _groups("pack-quantized", num_bits=4, type="int", group_size=32),
        "compressed-tensors int4, groups of 32",
    ),
    "int-quantized": (
        bytes_int8,
        _groups("int-quantized", num_bits=8, type="int"),
        "compressed-tensors int8",
    ),
    "mxfp4-pack-quantized": (
        packed_mxfp4,
        _groups("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
        "compressed-tensors mxfp4",
    ),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 24]}, "fp8, blocks of 16x24"),
    "bitsandbytes": (
        nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bitsandbytes nf4, blocks of 64",
    ),
    "mxfp4": (blocks_mxfp4, {"quant_method": "mxfp4"}, "mxfp4"),
}
