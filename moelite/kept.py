"""Quantized matrices kept as they came: which format carries their codes without changing a number.

Quantizing four bits to four bits again would only add an error (docs/DESIGN.md).
"""

from __future__ import annotations

import numpy as np

from moelite.arch import Arch, TensorRef
from moelite.checkpoint import Source
from moelite.errors import QuantizationError, UnsupportedError
from moelite.inventory import moe_layers
from moelite.quant import int4_f16, mxfp4, nf4, nf4_dq
from moelite.quant.base import BLOCK, TILE_ROWS, U8, QuantFormat
from moelite.quant.codes import Bitsandbytes, Coded, Nested
from moelite.recipe import Recipe, Rule
from moelite.sources import coded
from moelite.sources.codes import Codes, finer_scales

# int8 keeps Q8_0 by itself: the largest code of a block gives its scale back
CARRIERS: tuple[QuantFormat, ...] = (int4_f16.FORMAT, mxfp4.FORMAT, nf4.FORMAT, nf4_dq.FORMAT)


def repack(fmt: QuantFormat, source: Source, ref: TensorRef) -> U8 | None:
    """The matrix that `ref` names, packed in `fmt` from its own codes; None where that is not
    possible exactly."""
    if fmt not in CARRIERS or (codes := coded(source, ref)) is None:
        return None
    try:
        if fmt is int4_f16.FORMAT or fmt is mxfp4.FORMAT:
            if codes.kind == "nf4" or codes.kind == "int8" or codes.block % BLOCK:
                return None
            carrier = int4_f16.FORMAT if fmt is int4_f16.FORMAT else mxfp4.FORMAT
            return carrier.from_codes(Coded(codes.table, codes.codes, finer_scales(codes, BLOCK)))
        if codes.kind != "nf4":
            return None
        normal = nf4_dq.FORMAT if fmt is nf4_dq.FORMAT else nf4.FORMAT
        return normal.from_bitsandbytes(_state(codes))
    except (QuantizationError, UnsupportedError):
        return None  # a scale that the carrier has no bits for


def _state(codes: Codes) -> Bitsandbytes:
    extra, nested = codes.extra, None
    absmax = codes.scales.reshape(-1)
    if extra:
        nested = Nested(extra["absmax"], extra["map"], extra["offset"])
        absmax = extra["codes"].reshape(-1)
    packed = (codes.codes[:, ::2] << 4 | codes.codes[:, 1::2]).astype(np.uint8)
    shape = codes.codes.shape[0], codes.codes.shape[1]
    return Bitsandbytes(packed, absmax, shape, nested, blocksize=codes.block)


def keeping(source: Source, arch: Arch, recipe: Recipe) -> Recipe:
    """`recipe`, with the experts of each layer that came in codes kept as they are.

    Judged by each layer's first expert; `repack` may still find another one's scales too fine.
    """
    rules = []
    for number, mlp in moe_layers(arch).items():
        gate, up, down = (part.weight.at(0) for part in mlp.experts.matrices)
        wide = _carrier(source, gate)
        if wide is not None and wide == _carrier(source, up):
            rules.append(Rule(part="gate_up", format=wide, layers=frozenset({number})))
        narrow = _carrier(source, down)
        if narrow is not None:
            rules.append(Rule(part="down", format=narrow, layers=frozenset({number})))
    if not rules:
        return recipe
    formats = {(rule.part, rule.format) for rule in rules}
    if len(rules) == 2 * len(moe_layers(arch)) and len({name for _, name in formats}) == 1:
        return Recipe(experts=rules[0].format, dense=recipe.dense, low=recipe.low)
    return Recipe(experts=recipe.experts, dense=recipe.dense, low=recipe.low, rules=tuple(rules))


def _carrier(source: Source, ref: TensorRef) -> str | None:
    codes = coded(source, ref, 0, TILE_ROWS)
    if codes is None:
        return None
    if codes.kind == "int8":
        return "int8" if codes.block == BLOCK else None
    if codes.kind == "nf4":
        return nf4_dq.FORMAT.name if codes.extra else nf4.FORMAT.name
    return mxfp4.FORMAT.name if codes.kind == "mxfp4" else int4_f16.FORMAT.name
