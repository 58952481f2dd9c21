"""Rotary frequencies from a config: the rules of transformers 5, in float64.

Both spellings are read: `rope_parameters` {rope_theta, rope_type, ...} and the older
`rope_theta` + `rope_scaling` {type or rope_type, ...}.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from moelite.arch import Rope
from moelite.config import MAX_POSITIONS, HFConfig, short
from moelite.errors import CheckpointError, UnsupportedError

_FACTOR = (1e-3, 1e6)  # sane range of every scaling factor


def read_rope(hf: HFConfig, *, head_dim: int, max_positions: int) -> Rope:
    """The Rope over a whole head of `head_dim`; UnsupportedError for a rule not implemented."""
    if head_dim % 2:
        raise CheckpointError(f"rotary positions need an even head size, not {head_dim}")
    if hf.has("rope_parameters") and hf.has("rope_scaling"):
        raise CheckpointError(
            "config.json sets both rope_parameters and rope_scaling",
            fix="keep the one that the model was trained with",
        )
    hf.must_be("partial_rotary_factor", 1.0)
    scaling = hf.nested("rope_parameters") or hf.nested("rope_scaling") or HFConfig({})
    theta = _theta(hf, scaling)
    kind = scaling.text("rope_type", "type", default="default")
    if kind not in _RULES:
        raise UnsupportedError(
            f"rope_type {short(kind)} is not implemented; supported: {', '.join(_RULES)}",
            fix="use a checkpoint with one of these, or remove the scaling to run it unscaled",
        )
    scaling.must_be("partial_rotary_factor", 1.0)
    plain = tuple(theta ** (-i / head_dim) for i in range(0, head_dim, 2))
    rope = _RULES[kind](scaling, plain, theta, max_positions)
    scaling.finish()
    return rope


def _theta(hf: HFConfig, scaling: HFConfig) -> float:
    """The base, from inside the scaling object or from the top level; the two must agree."""
    inner = scaling.number("rope_theta", low=1.0001, high=1e15, default=None)
    if inner is None:
        return hf.number("rope_theta", low=1.0001, high=1e15)
    outer = hf.number("rope_theta", low=1.0001, high=1e15, default=inner)
    if inner != outer:
        raise CheckpointError(
            f"config.json contradicts itself: rope_theta = {outer:g}, but {inner:g} inside "
            "rope_parameters",
            fix="remove the wrong one",
        )
    return inner


def _default(scaling: HFConfig, plain: tuple[float, ...], theta: float, max_positions: int) -> Rope:
    return Rope(inv_freq=plain)


def _linear(scaling: HFConfig, plain: tuple[float, ...], theta: float, max_positions: int) -> Rope:
    factor = scaling.number("factor", low=_FACTOR[0], high=_FACTOR[1])
    return Rope(inv_freq=tuple(f / factor for f in plain))


def _llama3(scaling: HFConfig, plain: tuple[float, ...], theta: float, max_positions: int) -> Rope:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    factor = scaling.number("factor", low=_FACTOR[0], high=_FACTOR[1])
    low = scaling.number("low_freq_factor", low=_FACTOR[0], high=_FACTOR[1])
    high = scaling.number("high_freq_factor", low=_FACTOR[0], high=_FACTOR[1])
    original = scaling.integer("original_max_position_embeddings", high=MAX_POSITIONS)
    if high <= low:
        raise CheckpointError(
            f"high_freq_factor {high:g} must be above low_freq_factor {low:g}",
            fix="correct the rope settings in config.json",
        )

    def one(freq: float) -> float:
        turns = original * freq / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1 - keep) * freq / factor + keep * freq

    return Rope(inv_freq=tuple(one(f) for f in plain))


def _yarn(scaling: HFConfig, plain: tuple[float, ...], theta: float, max_positions: int) -> Rope:
    """Interpolate dimensions that turn less than beta_slow times within the original context,
    keep those that turn more than beta_fast times, ramp between; scale cos and sin."""
    original = scaling.integer(
        "original_max_position_embeddings", high=MAX_POSITIONS, default=max_positions
    )
    factor = scaling.number(
        "factor", low=_FACTOR[0], high=_FACTOR[1], default=max_positions / original
    )
    fast = scaling.number("beta_fast", low=_FACTOR[0], high=_FACTOR[1], default=32.0)
    slow = scaling.number("beta_slow", low=_FACTOR[0], high=_FACTOR[1], default=1.0)
    dim = 2 * len(plain)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(fast), dimension(slow)
    if scaling.flag("truncate", default=True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # as transformers: no division by zero

    def one(i: int, freq: float) -> float:
        interpolate = min(max((i - first) / (last - first), 0.0), 1.0)
        return freq / factor * interpolate + freq * (1 - interpolate)

    return Rope(
        inv_freq=tuple(one(i, f) for i, f in enumerate(plain)),
        scale=_attention_factor(scaling, factor),
    )


def _attention_factor(scaling: HFConfig, factor: float) -> float:
    """What yarn multiplies cos and sin by: given, or 0.1 ln(factor) + 1, or the mscale ratio."""
    mscale = scaling.number("mscale", low=0.0, high=100.0, default=0.0)
    mscale_all = scaling.number("mscale_all_dim", low=0.0, high=100.0, default=0.0)
    given = scaling.number("attention_factor", low=_FACTOR[0], high=100.0, default=None)
    if given is not None:
        return given

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all:
        return temperature(mscale) / temperature(mscale_all)
    return temperature(1.0)


_RULES: dict[str, Callable[[HFConfig, tuple[float, ...], float, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
