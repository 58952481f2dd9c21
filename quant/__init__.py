"""Quantization formats: one file each, found by name in FORMATS."""

from __future__ import annotations

from moelite.quant import bf16, f32, int4, int4_f16, int8, mxfp4, nf4, nf4_dq
from moelite.quant.base import QuantFormat

if __name__ != "moelite.quant":
    raise ImportError("import moelite.quant, not quant (run `pip install -e .` first)")

FORMATS: dict[str, QuantFormat] = {
    module.FORMAT.name: module.FORMAT
    for module in (f32, bf16, int8, int4, int4_f16, mxfp4, nf4, nf4_dq)
}
