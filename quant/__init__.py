"""Quantization formats: one file each, found by name in FORMATS."""

from __future__ import annotations

from moelite.quant import bf16, f32, int4, int4_f16, int8, mxfp4, nf4, nf4_dq, qmoe, vq
from moelite.quant.base import QuantFormat

if __name__ != "moelite.quant":
    raise ImportError("import moelite.quant, not quant (run `pip install -e .` first)")

_ALL: tuple[QuantFormat, ...] = (
    *(f32.FORMAT, bf16.FORMAT, int8.FORMAT, int4.FORMAT),
    *(int4_f16.FORMAT, mxfp4.FORMAT, nf4.FORMAT, nf4_dq.FORMAT),
    *vq.FORMATS,
    *qmoe.FORMATS,
)
FORMATS: dict[str, QuantFormat] = {fmt.name: fmt for fmt in _ALL}
