"""Makes ggml/: a small matrix in each GGML type, quantized and decoded by ggml itself.

    python tests/encoded/make_ggml.py LIBGGML_BASE

LIBGGML_BASE is libggml-base.so of any llama.cpp build, such as llama-cpp-python's. A file holds
"data" (uint8, rows of blocks) and "want" (float32, what ggml makes of it).
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "ggml"
ROWS, COLS = 3, 256
NAMES = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "F16", "BF16"),
)


def main(library: str) -> None:
    ggml = ctypes.CDLL(library)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    rng = np.random.default_rng(11)
    HERE.mkdir(exist_ok=True)
    for name in NAMES:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        weight = rng.normal(0, 0.1, (ROWS, COLS)).astype(np.float32)
        data = np.zeros((ROWS, COLS // block * size), np.uint8)
        if name in {"F16", "BF16"}:
            data = gguf.quantize(weight, kind).view(np.uint8)
        else:
            written = ggml.ggml_quantize_chunk(
                int(kind), weight.ctypes.data, data.ctypes.data, 0, ROWS, COLS, None
            )
            assert written == data.nbytes, (name, written)
        want = np.empty_like(weight)
        decode = {
            "F16": "ggml_fp16_to_fp32_row",
            "BF16": "ggml_bf16_to_fp32_row",
        }.get(name, f"dequantize_row_{name.lower().replace('_k', '_K')}")
        function = getattr(ggml, decode)
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function(data.ctypes.data, want.ctypes.data, weight.size)
        assert np.abs(want - weight).max() < 0.2, name
        save_file({"data": data, "want": want}, HERE / f"{name}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
