"""Choosing the ternary symbols and levels of the qmoe formats, and writing them as codes.

A weight becomes 0, its row's lower level or its upper one: the nearest, except that 0 has an
advantage, the price: w > level / 2 + price / (2 level) to become `level`. With calibration, columns
are chosen one after another and those to come make up for each error (GPTQ, see
moelite.quant.curvature); a price is then paid in output error, not in weight error.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moelite.errors import QuantizationError
from moelite.jit import kernel
from moelite.quant.base import F32, U8
from moelite.quant.curvature import Curvature
from moelite.quant.qmoe_dictionary import encode, usual_codes

# (weight [n, I], curve) -> (symbols uint8 [n, I], levels float32 [n, 2] that bf16 holds)
Choice = Callable[[F32, Curvature | None], tuple[U8, F32]]

BLOCK = 128  # columns whose errors are handed on to the columns behind them together
CHUNK = 1024  # rows whose symbols are chosen together
LARGEST = 3.3895e38  # that bf16 holds
SAMPLE = 256  # rows that the price is set by
HALVINGS = 8  # of its range, 2^-4 to 2^6: to 3 %
ROUNDS = 8  # of fitting levels before symbols are chosen
# Error feedback makes weights wider than they were: levels 1.2 times those that fit the weights as
# they are leave up to 4 % less output error than 1.0 in as many bits; 1.4 is worse again.
WIDER = np.float32(1.2)


@kernel
def _sweep(work, factor, levels, price, symbols, errors):
    # symbols of work [n, block], column by column; errors [n, block]: (w - q) / factor[i, i]
    for r in range(work.shape[0]):
        low, high = levels[r, 0], levels[r, 1]
        half_low, half_high = low * np.float32(0.5), high * np.float32(0.5)
        more_low = price / (np.float32(2) * low) if low < 0 else np.float32(0)
        more_high = price / (np.float32(2) * high) if high > 0 else np.float32(0)
        for i in range(work.shape[1]):
            w, d = work[r, i], factor[i, i]
            symbol, q = 0, np.float32(0)
            if high > 0 and w > half_high + more_high * d * d:
                symbol, q = 2, high
            elif low < 0 and w < half_low + more_low * d * d:
                symbol, q = 1, low
            symbols[r, i] = symbol
            e = (w - q) / d
            errors[r, i] = e
            for j in range(i + 1, work.shape[1]):
                work[r, j] -= e * factor[i, j]


def choose_symbols(weight: F32, levels: F32, price: float, curve: Curvature | None) -> U8:
    """Symbols [n, I] of weight [n, I] under given levels [n, 2]."""
    work, cols = weight.copy(), weight.shape[1]
    symbols = np.empty(weight.shape, np.uint8)
    for first in range(0, cols, BLOCK):
        last = min(first + BLOCK, cols)
        part, rest = np.ascontiguousarray(work[:, first:last]), np.empty((0, 0), np.float32)
        factor = np.eye(last - first, dtype=np.float32)
        if curve is not None:
            factor = np.ascontiguousarray(curve.factor[first:last, first:last])
            rest = curve.factor[first:last, last:]
        found, errors = np.empty(part.shape, np.uint8), np.empty_like(part)
        _sweep(part, factor, levels, np.float32(price), found, errors)
        symbols[:, first:last] = found
        if rest.size:
            work[:, last:] -= errors @ rest
    return symbols


def round_bf16(values: F32) -> F32:
    """float32 rounded to bf16, ties to even. Raises QuantizationError beyond its largest value."""
    if np.abs(values).max(initial=0) > LARGEST:
        raise QuantizationError("a weight is beyond bf16's largest value, 3.39e38")
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    return ((bits + (np.uint32(0x7FFF) + odd)) & np.uint32(0xFFFF0000)).view(np.float32)


def choose_published(weight: F32, curve: Curvature | None) -> tuple[U8, F32]:
    """As in QMoE: levels are the row's least and largest weight, the nearest level is taken."""

    def choose(part: F32, curve: Curvature | None) -> tuple[U8, F32]:
        levels = round_bf16(np.stack([part.min(1).clip(max=0), part.max(1).clip(min=0)], 1))
        return choose_symbols(part, levels, 0.0, curve), levels

    return _in_chunks(choose, weight, curve)


# --- levels that fit ----------------------------------------------------------------------------


@kernel
def _fit_levels(weight, cost, price, levels, rounds):
    # levels [n, 2] of weight [n, I] without feedback: means, weighted by 1 / cost [I], of the
    # weights that the price leaves them
    for r in range(weight.shape[0]):
        size = np.float32(0)
        for w in weight[r]:
            size += w * w
        size = np.float32(2) * np.sqrt(size / np.float32(weight.shape[1]))
        low, high = -size, size
        for _ in range(rounds):
            more = price / (np.float32(2) * high) if high > 0 else np.float32(0)
            less = price / (np.float32(2) * low) if low < 0 else np.float32(0)
            above, below = np.float32(0), np.float32(0)
            n_above, n_below = np.float32(0), np.float32(0)
            for i in range(weight.shape[1]):
                w, share = weight[r, i], np.float32(1) / cost[i]
                if w > high * np.float32(0.5) + more * cost[i]:
                    above += w * share
                    n_above += share
                elif w < low * np.float32(0.5) + less * cost[i]:
                    below += w * share
                    n_below += share
            high = above / n_above if n_above > 0 else high
            low = below / n_below if n_below > 0 else low
        levels[r, 0], levels[r, 1] = low, high


def _first_levels(weight: F32, cost: F32, price: float) -> F32:
    levels = np.empty((len(weight), 2), np.float32)
    _fit_levels(weight, cost, np.float32(price), levels, ROUNDS)
    return round_bf16(WIDER * levels)


def set_price(weight: F32, curve: Curvature | None, exponent: int = 0) -> float:
    """The price for weight * 2^exponent at which there are `usual_codes`, by some of the rows."""
    cost = _costs(weight.shape[1], curve)
    some = np.ldexp(weight[:: -(-len(weight) // SAMPLE)], exponent)
    unit = float((some**2).mean() / cost.mean())
    least, most = -4.0, 6.0
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        price = unit * 2**middle
        symbols = choose_symbols(some, _first_levels(some, cost, price), price, curve)
        if len(encode(symbols)[1]) > len(some) * usual_codes(weight.shape[1]):
            least = middle
        else:
            most = middle
    return unit * 2**most


def _costs(cols: int, curve: Curvature | None) -> F32:
    # error feedback turns an error e of column i into an output error of e^2 / cost
    return np.ones(cols, np.float32) if curve is None else np.diagonal(curve.factor) ** 2


def best_levels(weight: F32, symbols: U8, curve: Curvature | None) -> F32:
    """The levels [n, 2] that leave least output error, or weight error, under given symbols."""
    found = [(symbols == which).astype(np.float32) for which in (1, 2)]
    target = weight
    if curve is not None:
        found = [places @ curve.root for places in found]
        target = weight @ curve.root
    low, high = found
    ll, hh, lh = (low * low).sum(1), (high * high).sum(1), (low * high).sum(1)
    lt, ht = (low * target).sum(1), (high * target).sum(1)
    det = ll * hh - lh * lh
    both = det > 1e-6 * ll * hh  # else one of them has no place
    det = np.where(both, det, 1)
    lower = np.where(both, (lt * hh - ht * lh) / det, lt / np.where(ll > 0, ll, 1))
    upper = np.where(both, (ht * ll - lt * lh) / det, ht / np.where(hh > 0, hh, 1))
    return np.stack([lower.clip(max=0), upper.clip(min=0)], 1).astype(np.float32)


def choose_fitted(weight: F32, curve: Curvature | None) -> tuple[U8, F32]:
    """Levels of least squares, under symbols that take `usual_codes` whatever the weights are."""
    _, exponent = np.frexp(np.abs(weight).max(initial=0))  # then squares of all sizes are floats
    price = set_price(weight, curve, -exponent)
    cost = _costs(weight.shape[1], curve)

    def choose(part: F32, curve: Curvature | None) -> tuple[U8, F32]:
        part = np.ldexp(part, -exponent)
        symbols = choose_symbols(part, _first_levels(part, cost, price), price, curve)
        return symbols, round_bf16(np.ldexp(best_levels(part, symbols, curve), exponent))

    return _in_chunks(choose, weight, curve)


def _in_chunks(choose: Choice, weight: F32, curve: Curvature | None) -> tuple[U8, F32]:
    # CHUNK rows at a time: what is held besides is then small
    parts = [choose(weight[at : at + CHUNK], curve) for at in range(0, len(weight), CHUNK)]
    symbols, levels = zip(*parts, strict=True)
    return np.concatenate(symbols), np.concatenate(levels)
