"""The dictionary of the qmoe format: 2^16 runs of ternary symbols, each the meaning of one code.

The rule is that of QMoE (Frantar and Alistarh 2023, arXiv 2310.16795): symbols are independent, 0
with P = .885, 1 and 2 with P = .0575 each; runs are made of 1 to 14 pairs of symbols, and the 2^16
most probable ones are entries. A run is never more probable than its beginnings, so these are
entries, too, and a greedy parse of any row ends exactly. A run's probability depends only on its
pairs and on how many symbols are not 0, so the entries are whole classes of runs, most probable
first, except for the last class: of its runs, the first in the order of their pairs t0 + 3 t1.

Compiled code reads the table through a symbol that is resolved when the code is linked: 2 MB are
too many for a constant in each kernel, and the address differs from process to process.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from moelite.quant.base import ALIGN, U8

ENTRIES = 1 << 16
MOST_PAIRS = 14
ENTRY_BYTES = 32  # of the table: 28 symbols, zeros, and in the last byte how many there are
P0 = 0.885
_RUN = 2 * MOST_PAIRS
_PAIRS = 9  # values of a pair

_memory = np.zeros(ENTRIES * ENTRY_BYTES + ALIGN, np.uint8)  # takes memory when it is filled
_skip = -_memory.ctypes.data % ALIGN
_table = _memory[_skip : _skip + ENTRIES * ENTRY_BYTES].reshape(ENTRIES, ENTRY_BYTES)
_SYMBOL = "moelite_qmoe_table"
binding.add_symbol(_SYMBOL, _table.ctypes.data)


class Dictionary(NamedTuple):
    """table uint8 [2^16, 32]: of each code the symbols 0, 1, 2 and, last, how many they are.
    next int32 [2^16 + 1, 9]: row 0, or a code + 1, and a pair give the code + 1 of the run that is
    longer by the pair, 0 where there is none.
    """

    table: U8
    next: npt.NDArray[np.int32]


def _classes() -> list[tuple[int, int, int]]:
    # (pairs, symbols that are not 0, how many runs to take), most probable first
    def bits(kind: tuple[int, int]) -> float:
        return (kind[1] - 2 * kind[0]) * math.log2(P0) - kind[1] * math.log2((1 - P0) / 2)

    kinds = [(n, k) for n in range(1, MOST_PAIRS + 1) for k in range(2 * n + 1)]
    left, found = ENTRIES, []
    for n, k in sorted(kinds, key=bits):
        take = min(left, math.comb(2 * n, k) << k)
        if take:
            found.append((n, k, take))
        left -= take
    return found


def _runs(pairs: int, nonzero: int) -> U8:
    # every run of a class, [runs, 2 * pairs], in the order of their pairs
    places = np.array(list(itertools.combinations(range(2 * pairs), nonzero)), np.int64)
    values = np.array(list(itertools.product((1, 2), repeat=nonzero)), np.uint8)
    runs = np.zeros((len(places), len(values), 2 * pairs), np.uint8)
    np.put_along_axis(runs, places[:, None, :], values[None], axis=2)
    runs = runs.reshape(-1, 2 * pairs)
    return runs[np.argsort(_keys(runs))]


def _keys(runs: U8) -> npt.NDArray[np.int64]:
    # a number that names a run: its pairs as digits, base 9, after a 1
    keys = np.ones(len(runs), np.int64)
    for at in range(0, runs.shape[1], 2):
        keys = keys * _PAIRS + runs[:, at] + 3 * runs[:, at + 1].astype(np.int64)
    return keys


@functools.cache
def dictionary() -> Dictionary:
    """The Dictionary, made once a process, in about 0.1 s."""
    keys, code = [np.ones(1, np.int64)], 0
    for pairs, nonzero, take in _classes():
        runs = _runs(pairs, nonzero)[:take]
        _table[code : code + take, : 2 * pairs] = runs
        _table[code : code + take, -1] = 2 * pairs
        keys.append(_keys(runs))
        code += take
    key = np.concatenate(keys)
    order = np.argsort(key)
    parent = order[np.searchsorted(key[order], key[1:] // _PAIRS)]
    following = np.zeros((ENTRIES + 1, _PAIRS), np.int32)
    following[parent, key[1:] % _PAIRS] = np.arange(1, ENTRIES + 1)
    return Dictionary(_table, following)


def _table_address(typingctx):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.get_c_value(builder, ir.IntType(8), _SYMBOL)
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(), codegen


# the address of Dictionary.table, for compiled code; it holds zeros until dictionary() was called
table_address: Any = intrinsic(_table_address)
