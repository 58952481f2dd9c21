"""The kv: keys and values of the tokens a session keeps, allocated once for the whole context."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moelite.arch import Arch, Attention
from moelite.quant.base import pad

KVFormat = Literal["f16", "f32"]
_DTYPE: dict[str, Any] = {"f16": np.uint16, "f32": np.float32}  # numba reads fp16 as its bits


def _elements(attention: Attention, context: int) -> int:
    return attention.num_kv_heads * context * pad(attention.head_dim, 8)


def kv_bytes(arch: Arch, context: int, kv: KVFormat) -> int:
    """Bytes of the keys and values of `context` tokens in every layer."""
    size = np.dtype(_DTYPE[kv]).itemsize
    return sum(2 * size * _elements(layer.attention, context) for layer in arch.layers)


class KVCache:
    """k[l], v[l]: one run [NK, context, D8] per layer, D8 = head_dim padded to 8 with zeros.

    fp16 values lie in uint16 arrays. A head's positions are contiguous, so decode reads them in a
    stream. Pages are touched as the context grows, so memory used is memory filled.
    """

    def __init__(self, arch: Arch, context: int, kv: KVFormat) -> None:
        self.context = context
        self.k: list[npt.NDArray[Any]] = []
        self.v: list[npt.NDArray[Any]] = []
        for layer in arch.layers:
            count = _elements(layer.attention, context)
            self.k.append(np.zeros(count, _DTYPE[kv]))
            self.v.append(np.zeros(count, _DTYPE[kv]))
