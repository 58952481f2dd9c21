"""Quantization formats: one file each, found by name in FORMATS."""

from __future__ import annotations

from moelite.quant import bf16, f32, int4, int8, qmoe
from moelite.quant.base import QuantFormat

if __name__ != "moelite.quant":
    raise ImportError("import moelite.quant, not quant (run `pip install -e .` first)")

FORMATS: dict[str, QuantFormat] = {
    fmt.name: fmt for fmt in (f32.FORMAT, bf16.FORMAT, int8.FORMAT, int4.FORMAT, *qmoe.FORMATS)
}
