"""The 16 entries that suit a tile of 8 rows, by Lloyd's algorithm.

Every tile carries its table, so a fitted one costs nothing when it is read. On normal deviates it
gains nothing over the one of int4_pack, which was fitted to them; on matrices of a real model it
took 4 to 24 % off the weighted error (docs/LOG.md).
"""

from __future__ import annotations

import numpy as np

from moelite.jit import inner
from moelite.quant.base import BLOCK
from moelite.quant.int4_pack import code_of, search_weighed

_ROUNDS = 2  # the first brings most of what there is to gain


@inner
def _fill_nearest(table, nearest):
    # as int4_pack.NEAREST: for (i - 256) / 4, the index of the nearest entry; the lower of two
    for i in range(nearest.size):
        at, best = np.float32(i - 256) / np.float32(4), 0
        for k in range(1, table.size):
            if abs(np.float32(table[k]) - at) < abs(np.float32(table[best]) - at):
                best = k
        nearest[i] = best


@inner
def fit_table(w, share, steps, table, nearest):
    """Moves table int8 [16] to what rounds w [8, I] best, column j counting share[j]; fills nearest
    uint8 [512] for it. Each entry becomes the weighted mean of the values that were rounded to it.
    """
    _fill_nearest(table, nearest)
    for _ in range(_ROUNDS):
        total, count = np.zeros(table.size), np.zeros(table.size)
        for r in range(w.shape[0]):
            for at in range(0, w.shape[1], BLOCK):
                block, part = w[r, at : at + BLOCK], share[at : at + BLOCK]
                scale = search_weighed(block, part, table, nearest, steps)
                if scale != 0:
                    inverse = np.float32(1) / scale
                    for j in range(BLOCK):
                        code = code_of(block[j], inverse, nearest)
                        total[code] += part[j] * scale * block[j]
                        count[code] += part[j] * scale * scale
        for k in range(table.size):
            if count[k] > 0:
                table[k] = np.int8(min(max(np.rint(total[k] / count[k]), -63.0), 63.0))
        _fill_nearest(table, nearest)
