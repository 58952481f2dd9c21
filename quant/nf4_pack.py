"""bitsandbytes' 4-bit normal floats, number by number as its `quantize_4bit` on a CPU.

Read from bitsandbytes 0.50: functional.py, backends/default/ops.py (4-bit codes) and
csrc/cpu_ops.cpp (8-bit codes of absmax). All of it runs over the flattened matrix, in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moelite.quant.base import F32, TILE_ROWS, U8, rank

SPAN = 64  # values that share an absmax
NESTED = 256  # absmax that share a nested absmax, with double quantization

# quantiles of the normal distribution (QLoRA, arXiv 2305.14314), as bitsandbytes spells them
TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
ZERO = 7  # the code of 0
_BOUNDS = (TABLE[:-1] + TABLE[1:]) / np.float32(2)
_STEPS = 65535  # of the grid on [-1, 1] through which 8-bit codes are looked up


def quantize(weight: F32) -> tuple[U8, F32]:
    """weight [O, I], I a multiple of 64 -> codes uint8 [O, I] 0..15, absmax [O, I / 64]."""
    blocks = weight.reshape(len(weight), -1, SPAN)
    absmax = np.abs(blocks).max(axis=2)
    inverse = np.float32(1) / np.maximum(absmax, np.float32(1e-38))
    scaled = np.clip(blocks * inverse[..., None], np.float32(-1), np.float32(1))
    return rank(scaled, _BOUNDS).reshape(weight.shape), absmax


def pad_rows(codes: U8, scales: F32 | U8) -> tuple[U8, Any]:
    """Codes [n, I] and scales [n, m] with rows added up to a multiple of 8, all 0 as weights."""
    more = (0, -len(codes) % TILE_ROWS), (0, 0)
    return np.pad(codes, more, constant_values=ZERO), np.pad(scales, more)


def _dynamic_map() -> F32:
    # create_dynamic_map(): a sign, an exponent of ten in unary, and what is left as fraction
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i
        # torch.linspace(.1, 1, n + 1): from either end to the middle, each value rounded once
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(n))
        at = np.arange(n + 1)
        ends = np.where(at < (n + 1) // 2, np.float32(0.1) + step * at, 1 - step * (n - at))
        edges = ends.astype(np.float32)
        means = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(values, np.float32))


MAP = _dynamic_map()


def _nearest() -> U8:
    # the code of each step of the grid: the first entry whose middle to the next is not below it
    grid = np.arange(0, 2 * _STEPS + 2, 2).astype(np.float32) / np.float32(_STEPS) - np.float32(1)
    return np.searchsorted(np.float32(0.5) * (MAP[:-1] + MAP[1:]), grid).astype(np.uint8)


_NEAREST = _nearest()


def mean(values: F32) -> np.float32:
    """torch's mean of float32 [n] on one thread: 32 sums side by side, in four levels.

    From 32,768 values on torch divides the sum among its threads, and the last bit depends on them.
    """
    width = 8 if len(values) >= 8 else 1
    vectors = len(values) // width
    whole = vectors // 4
    power = max(4, (whole - 1).bit_length() // 4) if whole > 1 else 4
    rows, step = values[: whole * 4 * width].reshape(-1, 4, width), 1 << power
    levels = np.zeros((4, 4, width), np.float32)
    done = 0
    while done + step <= whole:
        for row in rows[done : done + step]:
            levels[0] += row
        done += step
        for level in range(1, 4):
            levels[level] += levels[level - 1]
            levels[level - 1] = 0
            if done & (step - 1) << level * power:
                break
    for row in rows[done:]:
        levels[0] += row
    for upper in levels[1:]:
        levels[0] += upper
    lanes = levels[0]
    for vector in values[whole * 4 * width : vectors * width].reshape(-1, width):
        lanes[0] += vector
    for k in range(1, 4):
        lanes[0] += lanes[k]
    total = np.float32(0)
    for value in [*values[vectors * width :], *lanes[0]]:
        total += value
    return np.float32(total / np.float32(len(values)))


def quantize_absmax(absmax: F32) -> tuple[U8, F32, np.float32]:
    """absmax float32 [n] -> codes uint8 [n], nested absmax [ceil(n / 256)], offset: the mean.

    absmax ~= MAP[code] * nested + offset.
    """
    with np.errstate(all="ignore"):  # sums over float32's end are refused by who packs
        return _quantize_absmax(absmax)


def _quantize_absmax(absmax: F32) -> tuple[U8, F32, np.float32]:
    offset = mean(absmax)
    full = np.zeros(-(-len(absmax) // NESTED) * NESTED, np.float32)
    full[: len(absmax)] = absmax - offset
    blocks = full.reshape(-1, NESTED)
    nested = np.abs(blocks).max(axis=1)
    scaled = blocks * (np.float32(1) / nested)[:, None]
    # (value + 1) / 2 * 65535 + 1/2, the last two steps rounded once; where nested is 0: code 0
    half = (np.clip(scaled, -1, 1) + np.float32(1)) * np.float32(0.5)
    at = (half.astype(np.float64) * _STEPS + 0.5).astype(np.float32)
    codes = _NEAREST[np.nan_to_num(at).astype(np.int64)]
    codes[nested == 0] = 0
    return codes.reshape(-1)[: len(absmax)], nested, offset


def dequantize_absmax(
    codes: U8, nested: F32, offset: float, table: npt.NDArray[np.float32] = MAP
) -> F32:
    """The float32 [n] that codes uint8 [n] stand for; product and sum are each rounded."""
    each = np.repeat(nested, NESTED)[: len(codes)]
    return table[codes] * each + np.float32(offset)
