"""The kv: keys and values of the tokens a session keeps, allocated once for the whole context."""

from __future__ import annotations

import numpy as np

from moelite.arch import Arch, Attention
from moelite.attention import KVFormat, kv_row_bytes
from moelite.quant.base import U8


def _bytes(attention: Attention, context: int, kv: KVFormat) -> int:
    return attention.num_kv_heads * context * kv_row_bytes(attention.head_dim, kv)


def kv_bytes(arch: Arch, context: int, kv: KVFormat) -> int:
    """Bytes of the keys and values of `context` tokens in every layer."""
    return sum(2 * _bytes(layer.attention, context, kv) for layer in arch.layers)


class KVCache:
    """k[l], v[l]: uint8 [NK * context * row_bytes] of each layer, see moelite.attention.

    A head's positions are contiguous, so decode reads them in a stream. Pages are touched as the
    context grows, so memory used is memory filled.
    """

    def __init__(self, arch: Arch, context: int, kv: KVFormat) -> None:
        self.context, self.format = context, kv
        self.k: list[U8] = []
        self.v: list[U8] = []
        for layer in arch.layers:
            size = _bytes(layer.attention, context, kv)
            self.k.append(np.zeros(size, np.uint8))
            self.v.append(np.zeros(size, np.uint8))
