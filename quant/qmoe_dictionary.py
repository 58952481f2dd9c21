"""The dictionary of the qmoe format: 2^16 runs of ternary symbols, each the meaning of one code.

The rule is that of QMoE (Frantar and Alistarh 2023, arXiv 2310.16795): symbols are independent, 0
with P = .885, 1 and 2 with P = .0575 each; runs are made of 1 to 14 pairs of symbols, and the 2^16
most probable ones are entries. A run is never more probable than its beginnings, so these are
entries, too, and a greedy parse of any row ends exactly. A run's probability depends only on its
pairs and on how many symbols are not 0, so the entries are whole classes of runs, most probable
first. Of the last class there is room for a part, and the rule leaves open which. Here runs are in
the order of their pairs t0 + 3 t1, largest first: .733 bits per weight at P = .885; smallest first,
or in any order, it would be .736.

Compiled code finds the masks through a symbol that is resolved when the code is linked: they are
too large for a constant in each kernel, and the address differs from process to process.
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

from moelite.jit import kernel
from moelite.quant.base import U8, pad

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]

ENTRIES = 1 << 16
MOST_PAIRS = 14
P0 = 0.885
BITS = 2 * MOST_PAIRS  # of a mask that stand for symbols
_PAIRS = 9  # values of a pair

_masks = np.zeros((ENTRIES, 2), np.uint32)
_SYMBOL = "moelite_qmoe_masks"
binding.add_symbol(_SYMBOL, _masks.ctypes.data)


class Dictionary(NamedTuple):
    """masks uint32 [2^16, 2]: of each code where its symbols are 1 and where they are 2, the first
    one in bit 0, and in the first mask's bits 28..31 how many pairs they are. 512 KiB: in a second
    cache of that size; a byte a symbol, 2 MiB, was slower and suffered from other users of the
    cache.
    next int32 [2^16 + 1, 9]: row 0, or a code + 1, and a pair give the code + 1 of the run that is
    longer by the pair, 0 where there is none.
    """

    masks: U32
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
    # every run of a class, [runs, 2 * pairs], in the order of their pairs, largest first
    places = np.array(list(itertools.combinations(range(2 * pairs), nonzero)), np.int64)
    values = np.array(list(itertools.product((1, 2), repeat=nonzero)), np.uint8)
    runs = np.zeros((len(places), len(values), 2 * pairs), np.uint8)
    np.put_along_axis(runs, places[:, None, :], values[None], axis=2)
    flat = runs.reshape(-1, 2 * pairs)
    return flat[np.argsort(-_keys(flat))]


def _keys(runs: U8) -> npt.NDArray[np.int64]:
    # a number that names a run: its pairs as digits, base 9, after a 1
    keys = np.ones(len(runs), np.int64)
    for at in range(0, runs.shape[1], 2):
        keys = keys * _PAIRS + runs[:, at] + 3 * runs[:, at + 1].astype(np.int64)
    return keys


@functools.cache
def dictionary() -> Dictionary:
    """The Dictionary, made once a process, in about 0.03 s."""
    keys, code = [np.ones(1, np.int64)], 0
    for pairs, nonzero, take in _classes():
        runs, bits = _runs(pairs, nonzero)[:take], 1 << np.arange(2 * pairs)
        for symbol in (1, 2):
            _masks[code : code + take, symbol - 1] = (runs == symbol) @ bits
        _masks[code : code + take, 0] |= np.uint32(pairs << BITS)
        keys.append(_keys(runs))
        code += take
    key = np.concatenate(keys)
    order = np.argsort(key)
    parent = order[np.searchsorted(key[order], key[1:] // _PAIRS)]
    following = np.zeros((ENTRIES + 1, _PAIRS), np.int32)
    following[parent, key[1:] % _PAIRS] = np.arange(1, ENTRIES + 1)
    return Dictionary(_masks, following)


@kernel
def _encode(symbols, following, codes, offsets):
    # symbols [n, even] -> codes. The longest match gives the fewest codes there are: a run without
    # its first pair is an entry, too.
    count = 0
    for r in range(symbols.shape[0]):
        offsets[r] = count
        node = 0
        for c in range(0, symbols.shape[1], 2):
            pair = symbols[r, c] + 3 * symbols[r, c + 1]
            longer = following[node, pair]
            if longer == 0:
                codes[count] = node - 1
                count += 1
                longer = following[0, pair]
            node = longer
        codes[count] = node - 1
        count += 1
    offsets[symbols.shape[0]] = count


def encode(symbols: U8) -> tuple[U32, U16]:
    """(offsets [n + 1], where rows begin and the last one ends, codes) of symbols [n, I]."""
    rows, cols = symbols.shape
    even = np.zeros((rows, pad(cols, 2)), np.uint8)
    even[:, :cols] = symbols
    codes = np.empty(even.size // 2, np.uint16)
    offsets = np.empty(rows + 1, np.uint32)
    _encode(even, dictionary().next, codes, offsets)
    return offsets, codes[: offsets[-1]].copy()


def usual_codes(cols: int) -> float:
    """Codes of a row of `cols` random symbols with the dictionary's own probabilities, measured:
    21.8 symbols each, and at the row's end less.
    """
    return cols / 21.8 + 0.45


def _masks_address(typingctx):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.get_c_value(builder, ir.IntType(8), _SYMBOL)
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(), codegen


# the address of Dictionary.masks, for compiled code; they are zero until dictionary() is called
masks_address: Any = intrinsic(_masks_address)
