"""How fast this machine's threads read memory: the ceiling of decoding, which reads every weight of
a token once."""

from __future__ import annotations

import threading
import time

import numpy as np

from moelite.jit import kernel
from moelite.quant.base import U8
from moelite.simd import add_i8, load_i8x32, splat_i8, store_i8x32

_PIECE = 128  # bytes of one step
_MOST = 1 << 30  # bytes read; less than a processor's cache measures the cache


@kernel
def _read(block, out):
    # sums the bytes of a block, so that nothing of it may be left out
    a0 = a1 = a2 = a3 = splat_i8(np.int8(0))
    for i in range(0, block.size // _PIECE * _PIECE, _PIECE):
        a0, a1 = add_i8(a0, load_i8x32(block, i)), add_i8(a1, load_i8x32(block, i + 32))
        a2, a3 = add_i8(a2, load_i8x32(block, i + 64)), add_i8(a3, load_i8x32(block, i + 96))
    store_i8x32(out, 0, add_i8(add_i8(a0, a1), add_i8(a2, a3)))


def read_speed(block: U8, threads: int) -> float:
    """Bytes per second at which `threads` threads read `block`, uint8 [n], a part of it each."""
    block = block[:_MOST]
    sums = np.zeros((threads, 32), np.int8)
    cuts = [block.size * i // threads for i in range(threads + 1)]
    team = [
        threading.Thread(target=_read, args=(block[cuts[i] : cuts[i + 1]], sums[i]))
        for i in range(threads)
    ]
    _read(block[:_PIECE], sums[0])  # loads the kernel
    start = time.perf_counter()
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    return block.size / (time.perf_counter() - start)
